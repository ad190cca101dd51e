"""Any folder in COCO's layout: read, checked completely before use, and served as layouts for training.

    <root>/annotations/instances_<split>.json
    <root>/<split>/<file_name>

`read_split` refuses a damaged folder with one `DatasetError` that names file, record and remedy, so that
nothing fails in the middle of a training run. Objects marked `iscrowd` are regions rather than objects: they
are no training target, and stay in the annotation file, where pycocotools handles them
(`dive_lib.evaluation`).
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dive_lib.paths import shorten

ROUNDING = 0.02
"""COCO rounds x, y, w, h to 0.01 px, so a box at the edge may leave the image by this much; not counted as
outside."""


class DatasetError(ValueError):
    """A data set that must not be used. The message names the file, the record in it and what to do."""


_CHANGES = {"outside": "partly out-of-image", "degenerate": "degenerate (no area within the image)"}


@dataclass(frozen=True)
class Categories:
    """COCO's category ids, which have gaps, in rising order; the place in `ids` is the class id 0..K-1."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ImageRecord:
    """One image: boxes_xyxy (n, 4) float64 in pixels of the original image, class_ids (n,) int64, no
    crowds."""

    id: int
    path: Path
    width: int
    height: int
    boxes_xyxy: np.ndarray
    class_ids: np.ndarray


@dataclass(frozen=True)
class CocoSplit:
    """A checked split: images in rising order of their ids, counts of what was left out or changed."""

    root: Path
    split: str
    annotation_file: Path
    categories: Categories
    images: tuple[ImageRecord, ...]
    counts: dict[str, int]


def read_split(root: str | Path, split: str, *, strict: bool = False, categories: Categories | None = None,
               max_images: int | None = None, check_images: bool = True) -> CocoSplit:
    """Reads and checks one split of a COCO-format folder.

    strict: refuse degenerate and out-of-image boxes, which otherwise are dropped and clipped, with a count. A
    box that lies wholly outside has nothing left after clipping and counts as degenerate.
    categories: those of the training split; another list of ids and names is refused.
    max_images: keep the images with the lowest ids (the annotation file is checked as a whole, image files
    of those only).
    check_images: decode every image file and compare its size; without it only its presence is checked.

    `counts` of the result, over the kept images: `crowd_excluded`, `clipped`, `degenerate_dropped`.
    Raises `DatasetError`, always for NaN and infinite coordinates.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"max_images must be positive or None, got {max_images}")
    root = Path(root)
    file = root / "annotations" / f"instances_{split}.json"
    content = _read_annotations(root, split, file)
    found = _read_categories(content["categories"], file)
    if categories is not None and found != categories:
        raise _bad(file, "categories", _difference(found, categories),
                   "use the categories of the training split")
    class_of = {category_id: k for k, category_id in enumerate(found.ids)}
    sizes = _read_images(content["images"], file)
    order = sorted(sizes)[:max_images]
    kept = set(order)

    counts = {"crowd_excluded": 0, "clipped": 0, "degenerate_dropped": 0}
    boxes, classes, seen = {i: [] for i in order}, {i: [] for i in order}, set()
    for position, annotation in enumerate(content["annotations"]):
        record = _unique_id(annotation, position, "annotation", seen, file)
        image_id, category_id = (_field(annotation, key, record, file) for key in ("image_id", "category_id"))
        if not _whole(image_id) or image_id not in sizes:
            raise _bad(file, record, f"belongs to image id {image_id!r}, which is not in the list",
                       "add the image or remove the annotation")
        if not _whole(category_id) or category_id not in class_of:
            raise _bad(file, record, f"has the unknown category id {category_id!r} ({len(found)} are known)",
                       "add the category or remove the annotation")
        box, change = _inside(_read_box(annotation, record, file), *sizes[image_id][1:])
        if strict and change:
            raise _bad(file, record, f"has a {_CHANGES[change]} box {annotation['bbox']} in an image of "
                       f"{sizes[image_id][1]} x {sizes[image_id][2]}", "correct it or read without strict")
        if image_id not in kept:
            continue
        if annotation.get("iscrowd", 0):
            counts["crowd_excluded"] += 1
            continue
        if change:
            counts["clipped" if change == "outside" else "degenerate_dropped"] += 1
        if box is not None:
            boxes[image_id].append(box)
            classes[image_id].append(class_of[category_id])

    images = tuple(ImageRecord(i, root / split / sizes[i][0], *sizes[i][1:],
                               np.array(boxes[i], dtype=np.float64).reshape(-1, 4),
                               np.array(classes[i], dtype=np.int64)) for i in order)
    # Decoding releases the interpreter lock; `map` keeps the order, so the first damaged file is reported.
    with ThreadPoolExecutor() as pool:
        for problem in pool.map(partial(_check_file, file=file, decode=check_images), images):
            if problem is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                raise problem
    return CocoSplit(root, split, file, found, images, counts)


class CocoLayouts:
    """A split as seen by a model with a square input of `image_size` pixels and `slots` objects.

    Images are squashed to the square, boxes with them (DIVE, Figure 4: fed at 256 x 256, shown as they were).
    """

    def __init__(self, split: CocoSplit, image_size: int, slots: int):
        if image_size < 1 or slots < 1:
            raise ValueError(f"image_size and slots must be positive, got {image_size} and {slots}")
        self.split, self.image_size, self.slots = split, image_size, slots
        self.categories = split.categories
        self._index = {image.id: i for i, image in enumerate(split.images)}

    def __len__(self) -> int:
        return len(self.split.images)

    def index_of(self, image_id: int) -> int:
        """The place i of the image with this id; KeyError if the split has none."""
        return self._index[image_id]

    def image_id(self, i: int) -> int:
        """COCO's id of image i."""
        return self.split.images[i].id

    def original_size(self, i: int) -> tuple[int, int]:
        """(width, height) of image i on disk."""
        return self.split.images[i].width, self.split.images[i].height

    def load_image(self, i: int) -> torch.Tensor:
        """(3, image_size, image_size) float32 RGB in [-1, 1], squashed by antialiased bicubic resampling."""
        record = self.split.images[i]
        image = _decode(record, self.split.annotation_file)
        if image.size != (self.image_size, self.image_size):
            image = image.resize((self.image_size, self.image_size), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1).contiguous()

    def boxes_xyxy(self, i: int) -> torch.Tensor:
        """(n, 4) float32 in pixels of the model's square input, within [0, image_size], in the order of the
        file."""
        record = self.split.images[i]
        scale = np.array([self.image_size / record.width, self.image_size / record.height] * 2)
        return torch.from_numpy((record.boxes_xyxy * scale).clip(0, self.image_size)).float()

    def class_ids(self, i: int) -> torch.Tensor:
        """(n,) int64 in 0..K-1, in the order of `boxes_xyxy`."""
        return torch.from_numpy(self.split.images[i].class_ids.copy())

    def draw(self, i: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes (n, 4) and classes (n,) of image i in a random order, n <= slots.

        Each draw shuffles the objects (DIVE IV-A). Of more objects than slots, each draw takes another random
        subset.
        """
        classes = self.class_ids(i)
        order = torch.randperm(len(classes), generator=generator)[:self.slots]
        return self.boxes_xyxy(i)[order], classes[order]

    def summary(self) -> dict[str, int]:
        """Counts: images, objects, images without objects or with more than `slots`, and those of
        `read_split`."""
        objects = [len(record.class_ids) for record in self.split.images]
        return {"images": len(objects), "objects": sum(objects), **self.split.counts,
                "overfull_images": sum(n > self.slots for n in objects),
                "images_without_objects": sum(n == 0 for n in objects)}


def to_original(boxes_xyxy: torch.Tensor, original_size: tuple[int, int], image_size: int) -> torch.Tensor:
    """Boxes (n, 4) x1, y1, x2, y2 of the model's square to (n, 4) float64 x, y, w, h of the (width, height)
    image."""
    width, height = original_size
    boxes = torch.as_tensor(boxes_xyxy, dtype=torch.float64).reshape(-1, 4)
    boxes = boxes * torch.tensor([width, height, width, height], dtype=torch.float64) / image_size
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)


def _bad(file: str | Path, record: str, problem: str, remedy: str) -> DatasetError:
    return DatasetError(f"{shorten(file)}: {record}: {problem}; {remedy}")


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _read_annotations(root: Path, split: str, file: Path) -> dict:
    """The JSON object with its three lists; images are not empty."""
    for folder in (root, root / split):
        if not folder.is_dir():
            raise _bad(folder, "folder", "does not exist", f"expected images in {split}/ and annotations/"
                       f"instances_{split}.json below the data set's root; correct the path or get the data")
    if not file.is_file():
        raise _bad(file, "file", "does not exist", f"put the annotations of {split}/ there")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise _bad(file, "file", f"is not valid JSON ({error})", "fetch or write it again") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise _bad(file, f'"{key}"', "is missing or not a list", "use a COCO instances file")
    for key in ("images", "categories"):
        if not content[key]:
            raise _bad(file, f'"{key}"', "is an empty list", "choose another split or file")
    return content


def _field(entry: dict, key: str, record: str, file: Path) -> object:
    if key not in entry:
        raise _bad(file, record, f'has no "{key}"', "complete the record")
    return entry[key]


def _unique_id(entry: object, position: int, kind: str, seen: set, file: Path) -> str:
    """Checks and notes the id of a record; returns its name for messages, such as "image id 7"."""
    place = f"{kind} number {position + 1} of the list"
    if not isinstance(entry, dict):
        raise _bad(file, place, "is not a JSON object", "correct the record")
    value = _field(entry, "id", place, file)
    if not _whole(value):
        raise _bad(file, place, f"has the id {value!r}, not a whole number", "correct the record")
    if value in seen:
        raise _bad(file, f"{kind} id {value}", "occurs twice (duplicate id)", "give it its own id")
    seen.add(value)
    return f"{kind} id {value}"


def _read_categories(entries: list, file: Path) -> Categories:
    names, seen = {}, set()
    for position, entry in enumerate(entries):
        record = _unique_id(entry, position, "category", seen, file)
        names[entry["id"]] = str(_field(entry, "name", record, file))
    return Categories(tuple(sorted(names)), tuple(names[i] for i in sorted(names)))


def _difference(found: Categories, expected: Categories) -> str:
    ours, theirs = (dict(zip(c.ids, c.names, strict=True)) for c in (found, expected))
    first = min(i for i in ours.keys() | theirs.keys() if ours.get(i) != theirs.get(i))
    return (f"differ from the training split's at category id {first}: "
            f"{ours.get(first, 'absent')!r} here, {theirs.get(first, 'absent')!r} there")


def _read_images(entries: list, file: Path) -> dict[int, tuple[str, int, int]]:
    """Image id to (file name, width, height)."""
    sizes, seen = {}, set()
    for position, entry in enumerate(entries):
        record = _unique_id(entry, position, "image", seen, file)
        name, width, height = (_field(entry, key, record, file) for key in ("file_name", "width", "height"))
        if not isinstance(name, str) or not name:
            raise _bad(file, record, f"has the file name {name!r}", "give the name of an image file")
        if not (_whole(width) and _whole(height) and width > 0 and height > 0):
            raise _bad(file, record, f"has the size {width!r} x {height!r}", "give its size in pixels")
        sizes[entry["id"]] = (name, width, height)
    return sizes


def _read_box(annotation: dict, record: str, file: Path) -> tuple[float, float, float, float]:
    """x, y, w, h as finite numbers."""
    box = _field(annotation, "bbox", record, file)
    if not (isinstance(box, list) and len(box) == 4 and all(_whole(v) or isinstance(v, float) for v in box)):
        raise _bad(file, record, f'has "bbox" {box!r}, not a list of 4 numbers', "write [x, y, w, h]")
    if not all(abs(v) <= sys.float_info.max for v in box):  # JSON knows NaN, and integers of any size
        raise _bad(file, record, f"has a coordinate that is not finite: {box!r}",
                   "correct or remove the annotation")
    return tuple(map(float, box))


def _inside(box: tuple[float, ...], width: int, height: int) -> tuple[tuple[float, ...] | None, str | None]:
    """The box as x1, y1, x2, y2 within the image (None if nothing is left of it) and what was wrong."""
    x, y, w, h = box
    clipped = (max(x, 0.0), max(y, 0.0), min(x + w, float(width)), min(y + h, float(height)))
    if w <= 0 or h <= 0 or clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        return None, "degenerate"
    outside = max(-x, -y, x + w - width, y + h - height)
    return clipped, "outside" if outside > ROUNDING else None


def _check_file(image: ImageRecord, *, file: Path, decode: bool) -> DatasetError | None:
    """The reason to refuse an image file, or None."""
    if not image.path.is_file():
        return _bad(file, f"image id {image.id}: {shorten(image.path)}", "is missing", "fetch or remove it")
    try:
        if decode:
            _decode(image, file)
    except DatasetError as error:
        return error
    return None


def _decode(image: ImageRecord, file: Path) -> Image.Image:
    """The image in RGB and in its stored orientation, which is the one that COCO's boxes refer to."""
    record = f"image id {image.id}: {shorten(image.path)}"
    try:
        with Image.open(image.path) as opened:
            pixels = opened.convert("RGB")
    except Exception as error:  # Pillow's decoders raise errors of many types for damaged files
        raise _bad(file, record, f"cannot be decoded ({error})", "fetch it again or remove it") from None
    if pixels.size != (image.width, image.height):
        raise _bad(file, record, f"has {pixels.width} x {pixels.height} pixels, the annotation says "
                   f"{image.width} x {image.height}", "correct the record or restore the original file")
    return pixels
