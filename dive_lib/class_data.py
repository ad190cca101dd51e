"""The data of classification in a profile: three splits of an image folder, and what is diffused of its images.

The notebook 09_class_data makes or checks the folder once and describes it in runs/<profile>/classes.json; everything
downstream loads that description.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from dive_lib import glyphs, image_encoder, number_images, paths
from dive_lib.class_images import ClassImages, read_split, readable
from dive_lib.files import read_json, write_json
from dive_lib.first_stage import device
from dive_lib.progress import Progress

SPLITS = ("train", "val", "test")


@dataclass
class ClassData:
    """root: the folder. names: {"train": folder of that split, ...}. encoder: folder, or empty for the pixels.

    val is for tuning, test for what is reported. digests: of the images of both. classes: the folders, with their
    names for people where the root had a file `classnames.txt` when it was described.
    """

    root: Path
    names: dict[str, str]
    encoder: str
    train: ClassImages
    val: ClassImages
    test: ClassImages
    digests: dict[str, str]
    classes: tuple[str, ...]

    def load_encoder(self) -> nn.Module:
        """On the device where models run."""
        return image_encoder.load(self.encoder).to(device())

    def ids(self, split: str) -> list[str]:
        images = getattr(self, split)
        return [images.image_id(i) for i in range(len(images))]


def make_numbers(root: Path, per_class: dict[str, int], seed: int) -> Path:
    """Composes the numbers of the three splits, each from its own glyphs; per_class {"train": 200, ...}."""
    for split in SPLITS:
        digits, labels = glyphs.load(paths.data(), split)
        number_images.write_split(root, split, digits, labels, per_class[split], seed=seed)
    return root


def describe(profile: str, root: Path, names: dict[str, str], *, image_size: int, channels: int,
             per_class: dict[str, int], encoder: str) -> ClassData:
    """Reads the three splits, decodes every image of validation and test split, and writes the description.

    root: absolute, or relative to the repository root. per_class: the first so many images of each class, 0 for all.
    Where one folder serves as validation and test split (ImageNet's val), the validation images are those that follow
    the test images. Raises class_images.ClassFolderError.
    """
    root = paths.ROOT / root
    described = {"root": paths.shorten(root), "names": names, "image_size": image_size, "channels": channels,
                 "per_class": per_class, "encoder": encoder}
    splits = _read(described)
    classes = readable(splits["train"].classes, root / "classnames.txt")
    if classes != splits["train"].classes:  # models are trained under these names, so they must not change later
        described["classes"] = list(classes)
    digests = {split: splits[split].check(split) for split in ("val", "test")}
    (paths.runs(profile) / "class_images").mkdir(parents=True, exist_ok=True)  # DVC expects it, also for another root
    write_json(paths.runs(profile) / "classes.json", described | {"digests": digests})
    return ClassData(root, names, encoder, **splits, digests=digests, classes=classes)


def description(profile: str) -> dict:
    """What `describe` wrote: root, names, encoder and the rest, without a look at the folder."""
    path = paths.runs(profile) / "classes.json"
    if not path.exists():
        raise FileNotFoundError(f"{paths.shorten(path)}: run notebooks/09_class_data.ipynb for the profile {profile!r} "
                                "first")
    return read_json(path)


def load(profile: str) -> ClassData:
    """The described data, without decoding every image again."""
    described = description(profile)
    splits = _read(described)
    return ClassData(paths.ROOT / described["root"], described["names"], described["encoder"], **splits,
                     digests=described["digests"], classes=tuple(described.get("classes", splits["train"].classes)))


def _read(described: dict) -> dict[str, ClassImages]:
    names, per_class = described["names"], described["per_class"]
    splits: dict[str, ClassImages] = {}
    for split in SPLITS:
        skip = per_class["test"] if split == "val" and names["val"] == names["test"] else 0
        splits[split] = read_split(paths.ROOT / described["root"], names[split], image_size=described["image_size"],
                                   channels=described["channels"], per_class=per_class[split], skip=skip,
                                   classes=splits["train"].classes if splits else None)
    return splits


@torch.no_grad()
def encode(encoder: nn.Module, images: ClassImages, indices: Sequence[int] | None = None, *, batch: int = 64,
           label: str = "latents") -> torch.Tensor:
    """(n, C, h, w) what is diffused of some images, all by default, in main memory."""
    indices = list(range(len(images)) if indices is None else indices)
    parts = []
    with Progress(len(indices), label, unit="images") as progress:
        for start in range(0, len(indices), batch):
            part = indices[start:start + batch]
            parts.append(encoder.encode(images.load_images(part).to(device())).cpu())
            progress.update(len(part))
    return torch.cat(parts)
