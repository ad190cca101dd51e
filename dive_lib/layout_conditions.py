"""Layouts as conditions of the layout LDM's features: none, a constant one, the one that DIVE inverted, the true one.

The scenes are those on which DIVE was run (notebooks/05_detection), so its layouts cost nothing more. The true layout
holds the answer of a probe for classes; its row is marked "leaks the label".
"""

from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO

from dive_lib.dataset import Dataset
from dive_lib.image_runs import collect

KINDS = ("empty", "constant", "dive", "true")
LEAKS = ("true",)


def inverted(folder: Path | str, count: int) -> tuple[list[int], torch.Tensor]:
    """Ids of the first `count` images of a detection run, and the layouts (n, slots, 5) that DIVE found.

    Raises FileNotFoundError for a run that is not there or not complete.
    """
    results = collect(folder)[:count]
    return [r["image_id"] for r in results], torch.tensor([r["tokens"] for r in results])


def layouts(kind: str, data: Dataset, image_ids: list[int], found: torch.Tensor) -> torch.Tensor | None:
    """The condition (n, slots, 5) of test images, or None for the empty layout.

    kind: one of KINDS. found: DIVE's layouts of these images. The constant layout is the first training image's.
    """
    if kind == "empty":
        return None
    if kind == "dive":
        return found
    if kind == "constant":
        return encoded(data, "train", [data.train.image_id(0)]).expand(len(image_ids), -1, -1).contiguous()
    if kind == "true":
        return encoded(data, "test", image_ids)
    raise ValueError(f"layout condition {kind!r} is unknown; choose one of {', '.join(KINDS)}")


def encoded(data: Dataset, split: str, image_ids: list[int]) -> torch.Tensor:
    """True layouts (n, slots, 5) of images; of more objects than slots, the first ones."""
    images, slots = getattr(data, split), data.grid.slots
    places = [images.index_of(image_id) for image_id in image_ids]
    return torch.stack([data.grid.encode(images.boxes_xyxy(k)[:slots], images.class_ids(k)[:slots]) for k in places])


def label_maps(data: Dataset, image_ids: list[int]) -> torch.Tensor:
    """(n, S, S) class of every pixel of test images: 0 is background, 1 + k is class k. Crowds have no class (-1).

    S: side of the model's input, to which masks are resized by nearest neighbour. Smaller objects lie on larger ones.
    """
    side, classes = data.grid.image_size, {i: k for k, i in enumerate(data.test.categories.ids)}
    annotations: dict[int, list[dict]] = {image_id: [] for image_id in image_ids}
    for entry in data.annotations("test")["annotations"]:
        if entry["image_id"] in annotations:
            annotations[entry["image_id"]].append(entry)
    maps, reader = [], COCO()
    for image_id in image_ids:
        width, height = data.test.original_size(data.test.index_of(image_id))
        reader.imgs[image_id] = {"width": width, "height": height}
        values = np.zeros((height, width), dtype=np.int64)
        for entry in sorted(annotations[image_id], key=lambda e: -e["area"]):
            values[reader.annToMask(entry) == 1] = -1 if entry["iscrowd"] else \
                1 + classes[entry["category_id"]]
        rows, columns = (((np.arange(side) + 0.5) * length / side).astype(int) for length in (height, width))
        maps.append(torch.from_numpy(values[rows][:, columns]))
    return torch.stack(maps)
