"""Data sets of semantic segmentation: images, label maps of the same names, and a list of class names.

<root>/<folder>/images/<split>/<name>.jpg, <root>/<folder>/annotations/<split>/<name>.png (8 or 16 bit) and
`classes.json`: {"names": [...], "first": value of the first name in the label maps, "background": names that are
scored apart, "unseen": names that training never shows}; the last two may be absent. Other values
are ignored.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dive_lib.checkpoint import fingerprint
from dive_lib.class_images import SUFFIXES, ClassFolderError
from dive_lib.decoding import stacked
from dive_lib.files import read_json
from dive_lib.paths import shorten
from dive_lib.progress import Progress

IGNORED = -1
SETS = {  # name: folder under the root, number of classes (0: any), where to get it
    "COCO-Stuff": ("coco_stuff", 171, "COCO-Stuff 164k (github.com/nightrome/cocostuff), labels 0 to 170 as "
                                      "mmsegmentation converts them"),
    "ADE-150": ("ade150", 150, "ADE20K's scene parsing benchmark (ADEChallengeData2016.zip of "
                               "data.csail.mit.edu/places/ADEchallenge), labels 1 to 150"),
    "ADE-847": ("ade847", 847, "ADE20K full (groups.csail.mit.edu/vision/datasets/ADE20K), labels 0 to 846 in 16 bit "
                               "as MaskFormer's datasets/prepare_ade20k_full_sem_seg.py writes them"),
    "PC-59": ("pc59", 59, "PASCAL Context (cs.stanford.edu/~roozbeh/pascal-context) with 59 classes, labels 1 to 59"),
    "PC-459": ("pc459", 459, "PASCAL Context (cs.stanford.edu/~roozbeh/pascal-context) with 459 classes, in 16 bit"),
    "VOC-20": ("voc20", 20, "PASCAL VOC 2012 (host.robots.ox.ac.uk/pascal/VOC/voc2012), labels 1 to 20"),
    "scenes": ("scenes", 81, "notebooks/14_vermouth_data.ipynb, which makes it"),
}
LAYOUT = "It must hold images/<split>/, annotations/<split>/ with a PNG for each image, and classes.json"


@dataclass
class SegmentationImages:
    """A split. names: stems of its files. image_size: images are resized to this square, label maps too (nearest)."""

    folder: Path
    split: str
    files: list[str]
    classes: tuple[str, ...]
    first: int
    image_size: int
    background: tuple[str, ...] = ()
    unseen: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.files)

    @property
    def names(self) -> list[str]:
        return [f"{self.split}/{file}" for file in self.files]

    def load_image(self, index: int) -> torch.Tensor:
        """(3, S, S) in [-1, 1]. Raises ClassFolderError for a file that cannot be decoded."""
        image = self._open(self.folder / "images" / self.split / self.files[index], "RGB", Image.BICUBIC)
        return torch.from_numpy(np.array(image)).float().permute(2, 0, 1) / 127.5 - 1

    def load_images(self, indices) -> torch.Tensor:
        """(B, 3, S, S)."""
        return stacked(self.load_image, indices)

    def load_label(self, index: int, size: int = 0) -> torch.Tensor:
        """(S, S) int64: index in `classes`, IGNORED elsewhere. size: another side than that of the images.

        Raises ClassFolderError for a file that cannot be decoded or is no label map.
        """
        path = self.label_path(index)
        image = self._open(path, "", Image.NEAREST, size)
        if image.mode not in ("L", "P", "I;16", "I"):
            raise ClassFolderError(f"{shorten(path)}: mode {image.mode}, not one number for each pixel; convert it to "
                                   "a grey PNG whose values are classes")
        values = torch.from_numpy(np.array(image).astype(np.int64)) - self.first
        return torch.where((values >= 0) & (values < len(self.classes)), values, IGNORED)

    def load_labels(self, indices, size: int = 0) -> torch.Tensor:
        """(B, S, S)."""
        return torch.stack([self.load_label(int(i), size) for i in indices])

    def label_path(self, index: int) -> Path:
        stem = self.files[index].rpartition(".")[0]
        return self.folder / "annotations" / self.split / f"{stem}.png"

    def class_pixels(self) -> torch.Tensor:
        """(K,) int64 number of pixels of each class in all label maps."""
        counts = torch.zeros(len(self.classes), dtype=torch.long)
        for index in range(len(self)):
            values = self.load_label(index)
            counts += torch.bincount(values[values != IGNORED], minlength=len(counts))
        return counts

    def check(self, label: str) -> str:
        """Decodes every image and label map, and returns a fingerprint of their names and bytes."""
        parts = []
        with Progress(len(self), f"{label} images checked", unit="images") as progress:
            for i, name in enumerate(self.files):
                self.load_image(i)
                if (self.load_label(i) == IGNORED).all():
                    raise ClassFolderError(
                        f"{shorten(self.label_path(i))}: no pixel has one of the {len(self.classes)} classes; check "
                        "`first` in classes.json, or remove the image")
                parts.append(fingerprint(name, self.folder / "images" / self.split / name, self.label_path(i)))
                progress.update()
        return fingerprint(parts)

    def _open(self, path: Path, mode: str, resample: int, size: int = 0) -> Image.Image:
        try:
            with Image.open(path) as image:
                image = image.convert(mode) if mode else image.copy()
                side = size or self.image_size
                return image if image.size == (side, side) else image.resize((side, side), resample)
        except Exception as error:  # Pillow's decoders raise errors of many types for damaged files
            raise ClassFolderError(f"{shorten(path)}: cannot be decoded ({error}); replace or remove it") from None


def read(root: Path | str, name: str, split: str, image_size: int) -> SegmentationImages:
    """Reads the lists of a split of one of SETS and checks that every image has its label map.

    Raises ClassFolderError, naming the place, and where to get the set and how to lay it out.
    """
    if name not in SETS:
        raise ClassFolderError(f"unknown segmentation data set {name!r}; choose one of {', '.join(SETS)}")
    folder, count, source = SETS[name]
    folder = Path(root) / folder
    guide = f"{LAYOUT}. Source: {source}"
    listed, images = folder / "classes.json", folder / "images" / split
    for place in (listed, images):
        if not place.exists():
            raise ClassFolderError(f"{shorten(place)}: missing, a part of the segmentation data set {name}. {guide}")
    content = read_json(listed)
    names = content.get("names", []) if isinstance(content, dict) else []
    if len(set(names)) != len(names) or not names or count and len(names) != count:
        raise ClassFolderError(f"{shorten(listed)}: {len(names)} names, {len(set(names))} of them different; {name} "
                               f"has {count}. {guide}")
    if type(content.get("first")) is not int:
        raise ClassFolderError(f"{shorten(listed)}: `first` must be the value of {names[0]!r} in the label maps")
    for key in ("background", "unseen"):
        unknown = set(content.get(key, ())) - set(names)
        if unknown:
            raise ClassFolderError(f"{shorten(listed)}: {key} has {sorted(unknown)[0]!r}, which is no name of the list")
    files = sorted(entry.name for entry in images.iterdir()
                   if entry.suffix.lower() in SUFFIXES and entry.name[0] != ".")
    part = SegmentationImages(folder, split, files, tuple(names), content["first"], image_size,
                              tuple(content.get("background", ())), tuple(content.get("unseen", ())))
    missing = [part.label_path(i) for i in range(len(files)) if not part.label_path(i).is_file()]
    if not files or missing:
        problem = f"{shorten(missing[0])}: no such label map ({len(missing)} are missing)" if missing else \
            f"{shorten(images)}: no images"
        raise ClassFolderError(f"{problem}. {guide}")
    return part
