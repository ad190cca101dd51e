"""The data set of a profile: three splits of one COCO-format folder, and what its layouts' tokens mean.

The notebook 01_data makes or checks the folder once and describes it in runs/<profile>/dataset.json; everything
downstream loads that description and no longer looks at every image.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dive_lib import glyphs, paths, scenes
from dive_lib.checkpoint import fingerprint
from dive_lib.coco import CocoLayouts, DatasetError, read_split
from dive_lib.files import read_json, write_json
from dive_lib.layout import LayoutGrid

SPLITS = ("train", "val", "test")


@dataclass
class Dataset:
    """root: the folder. names: {"train": folder name of that split, ...}. grid: tokens. train, val, test: layouts.

    subsets: {"evaluation": image ids of the test split that the headline row is measured on, "ablation": the
    smaller subset of Table III, "tuning": ids of the validation split}.
    """

    root: Path
    names: dict[str, str]
    grid: LayoutGrid
    train: CocoLayouts
    val: CocoLayouts
    test: CocoLayouts
    subsets: dict[str, list[int]]

    def annotations(self, split: str) -> dict:
        """The ground truth of "train", "val" or "test" as pycocotools takes it."""
        return read_json(self.root / "annotations" / f"instances_{self.names[split]}.json")


def make_scenes(root: Path, counts: dict[str, int], *, seed: int, shares: tuple[float, ...] = scenes.OBJECTS,
                covered: float = scenes.COVERED) -> Path:
    """Composes the scenes of the three splits, each from its own glyphs: counts {"train": 12000, ...}.

    shares: of scenes with one, two, three and four digits. covered: share of neighbours that cover each other in part.
    """
    for split in SPLITS:
        digits, labels = glyphs.load(paths.data(), split)
        scenes.write_split(root, split, digits, labels, counts[split], seed=seed, shares=shares,
                           covered=covered)
    return root


def describe(profile: str, root: Path, names: dict[str, str], *, image_size: int, bins: int, slots: int,
             strict: bool, evaluation: int, ablation: int, tuning: int, seed: int) -> Dataset:
    """Reads and checks every record and image of the three splits, and writes the description.

    root: absolute, or relative to the repository root.

    The subsets are drawn by image id from the seed; the ablation's lies within the evaluation's. Where one folder
    serves as validation and test split (COCO 2017), tuning images are never evaluation images. Raises
    coco.DatasetError for the first bad record, and for a split without objects.
    """
    root = paths.ROOT / root  # a relative path means the same in a notebook, under DVC and in a test
    train = read_split(root, names["train"], strict=strict)
    splits = {"train": train}
    for split in ("val", "test"):
        splits[split] = read_split(root, names[split], strict=strict, categories=train.categories)
    for part in splits.values():
        if not any(len(image.class_ids) for image in part.images):
            raise DatasetError(f"{paths.shorten(part.annotation_file)}: \"annotations\" has no object to train on or "
                               "to find; add the objects' boxes or choose another split")
    ids = {split: [image.id for image in splits[split].images] for split in ("val", "test")}
    subsets = {"evaluation": subset_ids(ids["test"], min(evaluation, len(ids["test"])), seed),
               "ablation": subset_ids(ids["test"], min(ablation, len(ids["test"])), seed),
               "tuning": []}
    tunable = set(ids["val"]) - (set(subsets["evaluation"]) if names["val"] == names["test"] else set())
    subsets["tuning"] = subset_ids(sorted(tunable), min(tuning, len(tunable)), seed)
    grid = LayoutGrid(train.categories.names, image_size, bins, slots)
    described = {"root": paths.shorten(root), "names": names, "grid": grid.to_dict(), "subsets": subsets}
    own = paths.runs(profile) / "data"
    if root != own:  # DVC expects that folder, and does not look into another one: its digest tells when it changed
        own.mkdir(parents=True, exist_ok=True)
        described["digests"] = {split: fingerprint(part.annotation_file, [(image.path.name, image.path.stat().st_size)
                                                                          for image in part.images])
                                for split, part in splits.items()}
    write_json(paths.runs(profile) / "dataset.json", described)
    layouts = {split: CocoLayouts(splits[split], image_size, slots) for split in SPLITS}
    return Dataset(root, names, grid, **layouts, subsets=subsets)


def load(profile: str) -> Dataset:
    """The described data set, without decoding every image again."""
    path = paths.runs(profile) / "dataset.json"
    if not path.exists():
        raise FileNotFoundError(f"{paths.shorten(path)}: run notebooks/01_data.ipynb for the profile {profile!r} first")
    described = read_json(path)
    root, names, grid = paths.ROOT / described["root"], described["names"], LayoutGrid(**described["grid"])
    train = read_split(root, names["train"], check_images=False)
    layouts = {"train": CocoLayouts(train, grid.image_size, grid.slots)}
    for split in ("val", "test"):
        part = read_split(root, names[split], categories=train.categories, check_images=False)
        layouts[split] = CocoLayouts(part, grid.image_size, grid.slots)
    return Dataset(root, names, grid, **layouts, subsets=described["subsets"])


def subset_ids(image_ids: Iterable[int], count: int, seed: int) -> list[int]:
    """A seeded evaluation subset in rising order, whatever the order of `image_ids`.

    With one seed, a smaller subset is part of each larger one. NumPy guarantees RandomState's stream for
    ever.
    """
    ids = sorted({int(i) for i in image_ids})
    if not 1 <= count <= len(ids):
        raise ValueError(f"cannot choose {count} of {len(ids)} images; lower the subset's count")
    return sorted(ids[k] for k in np.random.RandomState(seed).permutation(len(ids))[:count])
