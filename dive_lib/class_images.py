"""Images sorted into folders by class, as ImageNet is: <root>/<split>/<class>/<image>.

Classes are the folders' names in sorted order, so ImageNet's synsets get the numbers that published models use. An
image is cropped to its centre square as in guided-diffusion (ADM), on which DiT was trained.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dive_lib.checkpoint import fingerprint
from dive_lib.decoding import stacked
from dive_lib.paths import shorten
from dive_lib.progress import Progress

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}
IMAGENET = ("For ImageNet (ILSVRC 2012), download the images from image-net.org and sort them into a folder for each "
            "synset: <root>/val/n01440764/ILSVRC2012_val_00000293.JPEG")


class ClassFolderError(ValueError):
    """A folder of images is not what it should be; the message names the place and the remedy."""


@dataclass
class ClassImages:
    """Some images of a split. folder: of the split. names: "class/file" of each image. labels (n,): their classes."""

    folder: Path
    classes: tuple[str, ...]
    names: list[str]
    labels: torch.Tensor
    image_size: int
    channels: int

    def __len__(self) -> int:
        return len(self.names)

    def image_id(self, index: int) -> str:
        """A name that can be a file name, too: "07-00001" for 07/00001.png."""
        return self.names[index].rpartition(".")[0].replace("/", "-")

    def index_of(self, image_id: str) -> int:
        """Inverse of image_id."""
        return self._index[image_id]

    def __post_init__(self):
        self._index = {self.image_id(i): i for i in range(len(self))}

    def load_image(self, index: int) -> torch.Tensor:
        """(C, S, S) in [-1, 1]. Raises ClassFolderError for a file that cannot be decoded."""
        path = self.folder / self.names[index]
        try:
            with Image.open(path) as image:
                pixels = self.fit(image.convert("L" if self.channels == 1 else "RGB"))
        except Exception as error:  # Pillow's decoders raise errors of many types for damaged files
            raise ClassFolderError(f"{shorten(path)}: cannot be decoded ({error}); replace or remove it") from None
        values = torch.from_numpy(pixels).float().view(self.image_size, self.image_size, self.channels)
        return values.permute(2, 0, 1) / 127.5 - 1

    def fit(self, image: Image.Image) -> np.ndarray:
        """(S, S[, 3]) uint8 of a whole image."""
        return centre_crop(image, self.image_size)

    def load_images(self, indices) -> torch.Tensor:
        """(B, C, S, S)."""
        return stacked(self.load_image, indices)

    def check(self, label: str) -> str:
        """Decodes every image, and returns a fingerprint of their names and bytes."""
        parts = []
        with Progress(len(self), f"{label} images checked", unit="images") as progress:
            for i, name in enumerate(self.names):
                self.load_image(i)
                parts.append(fingerprint(name, self.folder / name))
                progress.update()
        return fingerprint(parts)


def read_split(root: Path | str, split: str, *, image_size: int, channels: int = 3, per_class: int = 0, skip: int = 0,
               classes: tuple[str, ...] | None = None) -> ClassImages:
    """The images of a split, class by class, in sorted order.

    per_class: the first so many of each class, 0 for all; DIVE's subset of ImageNet is the first two of each in val.
    skip: so many of each class are left out first. classes: the names that the folder must have, those of another
    split. Raises ClassFolderError for a missing folder, other classes, and a class with too few images.
    """
    folder = Path(root) / split
    if not folder.is_dir():
        raise ClassFolderError(f"{shorten(folder)}: no such folder; it must hold a folder of images for each class. "
                               f"{IMAGENET}")
    found = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if not found:
        loose = sum(entry.suffix.lower() in SUFFIXES for entry in folder.iterdir())
        raise ClassFolderError(f"{shorten(folder)}: no folder of a class ({loose} images lie in it directly). "
                               f"{IMAGENET}")
    if classes is not None and found != tuple(classes):
        different = sorted(set(found) ^ set(classes))
        raise ClassFolderError(f"{shorten(folder)}: {len(found)} classes, the training split has {len(classes)}; "
                               f"they differ in {', '.join(different[:3])}; add or remove these folders")
    names, labels = [], []
    for label, name in enumerate(found):
        files = sorted(entry.name for entry in (folder / name).iterdir()
                       if entry.suffix.lower() in SUFFIXES and entry.name[0] != ".")
        chosen = files[skip:skip + per_class] if per_class else files[skip:]
        if len(chosen) < max(1, per_class):
            raise ClassFolderError(f"{shorten(folder / name)}: {len(files)} images, but {skip + max(1, per_class)} are "
                                   "needed of each class; add images or lower per_class")
        names += [f"{name}/{file}" for file in chosen]
        labels += [label] * len(chosen)
    return ClassImages(folder, found, names, torch.tensor(labels), image_size, channels)


def readable(classes: tuple[str, ...], file: Path) -> tuple[str, ...]:
    """Names of classes for people: "n01440764 tench" where the file has a line with these words, else the folder's.

    Still in sorted order, each once, and fit to name a folder. Raises ClassFolderError where the file lacks a class.
    """
    if not file.exists():
        return classes
    try:
        lines = [line.split(maxsplit=1) for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise ClassFolderError(f"{shorten(file)}: not UTF-8 ({error}); save it as UTF-8, or remove it") from None
    words = dict(line for line in lines if len(line) == 2)
    missing = [name for name in classes if name not in words]
    if missing:
        raise ClassFolderError(f"{shorten(file)}: {len(missing)} of {len(classes)} classes have no line, such as "
                               f"{missing[0]}; add the line \"{missing[0]} NAME\", or remove the file")
    return tuple(f"{name} {words[name].strip().replace('/', ' or ')}" for name in classes)


def write_image(path: Path, pixels: np.ndarray) -> None:
    """Writes pixels (S, S) or (S, S, 3) uint8 as PNG in one atomic step; the tens of thousands of images of a split are
    not forced to the disk one by one, as `files.atomic_path` would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp.png")
    Image.fromarray(pixels).save(temporary, compress_level=1)
    temporary.replace(path)


def centre_crop(image: Image.Image, size: int) -> np.ndarray:
    """The centre square (size, size[, 3]) uint8 as in guided-diffusion: halved while it is twice too large, then
    resized so that its shorter side fits, then cropped."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC)
    pixels = np.array(image)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top:top + size, left:left + size]
