"""The data of Vermouth's three tasks in a profile: few-shot sets, sketch sets, segmentation sets.

The notebook 14_vermouth_data makes the mini data, or checks the folders of the public ones, and describes them in
runs/<profile>/vermouth.json; everything downstream loads that description.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dive_lib import colour_scenes, digit_renderings, few_shot_data, glyphs, paths, segmentation_data, sketch_data
from dive_lib.checkpoint import fingerprint
from dive_lib.files import read_json, write_json
from dive_lib.segmentation_data import SegmentationImages

SPLITS = ("train", "val", "test")


@dataclass
class VermouthData:
    """root: the folder of all sets. few_shot, sketches: sets by name. segmentation_train, segmentation_val: splits of
    the training set. segmentation_tests: test splits by name. digests: of every image, by set and split."""

    root: Path
    few_shot: dict[str, few_shot_data.FewShotSet]
    sketches: dict[str, sketch_data.SketchSet]
    segmentation_train: SegmentationImages
    segmentation_val: SegmentationImages
    segmentation_tests: dict[str, SegmentationImages]
    digests: dict[str, str]

    @property
    def digits(self) -> few_shot_data.FewShotSet:
        """The first few-shot set, on which the probes look: the digits' photos in the mini data."""
        return next(iter(self.few_shot.values()))

    def summary(self) -> list[dict]:
        """A row for each set: task, name, classes, numbers of training, validation and test images."""
        rows = [{"task": "few-shot", "set": name, "classes": len(part.classes), "train": len(part.train),
                 "val": len(part.val), "test": len(part.test)} for name, part in self.few_shot.items()]
        for name, part in self.sketches.items():
            for kind in ("sketches", "photos"):
                rows.append({"task": f"retrieval, {kind}", "set": name,
                             "classes": len(part.train.classes) + len(part.test.classes),
                             **{split: len(getattr(getattr(part, split), kind)) for split in SPLITS}})
        train = self.segmentation_train
        rows.append({"task": "segmentation", "set": train.folder.name, "classes": len(train.classes),
                     "train": len(train), "val": len(self.segmentation_val), "test": 0})
        return rows + [{"task": "segmentation", "set": name, "classes": len(part.classes), "train": 0, "val": 0,
                        "test": len(part)} for name, part in self.segmentation_tests.items()]


def make_mini(root: Path | str, counts: Mapping[str, Mapping[str, int]], unseen: Sequence[str], seed: int) -> Path:
    """Draws digits and scenes of the three splits, each from its own glyphs.

    counts: {"photo": {"train": of each digit, ...}, "sketch": {...}, "scene": {"train": in all, ...}}.
    unseen: digits kept from retrieval's training. A folder of other settings is replaced.
    """
    root = Path(root)
    settings = {"counts": counts, "unseen": list(unseen), "seed": seed}
    if root.exists() and not ((root / "settings.json").exists() and read_json(root / "settings.json") == settings):
        shutil.rmtree(root)  # also what a kill in an earlier removal left
    write_json(root / "settings.json", settings)
    names = {}
    for split in SPLITS:
        digits, labels = glyphs.load(paths.data(), split)
        per_class = {kind: counts[kind][split] for kind in digit_renderings.KINDS}
        names |= digit_renderings.write_split(root / "digits", split, digits, labels, per_class, seed=seed)
        colour_scenes.write_split(root / "scenes", split, digits, labels, counts["scene"][split], seed=seed)
    digit_renderings.write_lists(root / "digits", names, unseen)
    colour_scenes.write_classes(root / "scenes", seed)
    return root


def describe(profile: str, root: Path | str, *, few_shot: Sequence[str], sketches: Mapping,
             segmentation: Mapping[str, Sequence[str]], image_sizes: Mapping[str, int], seed: int) -> VermouthData:
    """Reads every list, decodes every image, and writes the description.

    root: absolute, or relative to the repository root. few_shot: names of sets. sketches: {"sets": names, "splits":
    folders of training, validation and test images, "held_out": number of seen classes that decide settings}.
    segmentation: {"train": [set, training split, validation split], "tests": ["set/split", ...]}. image_sizes:
    {"few_shot": side, "sketches": side, "segmentation": side}. Raises ClassFolderError.
    """
    root = paths.ROOT / root
    described = {"root": paths.shorten(root), "few_shot": list(few_shot), "sketches": sketches,
                 "segmentation": segmentation, "image_sizes": image_sizes, "seed": seed}
    data = _read(described)
    parts = {f"{name}/{split}": getattr(part, split) for name, part in data["few_shot"].items() for split in SPLITS}
    for name, part in data["sketches"].items():
        for split in SPLITS:
            own = getattr(part, split)
            parts |= {f"{name}/{split}/sketches": own.sketches, f"{name}/{split}/photos": own.photos}
    parts |= {"segmentation/train": data["segmentation_train"], "segmentation/val": data["segmentation_val"]}
    parts |= {f"segmentation/{name}": part for name, part in data["segmentation_tests"].items()}
    digests = {name: images.check(name) for name, images in parts.items()}
    (paths.runs(profile) / "vermouth_data").mkdir(parents=True, exist_ok=True)  # DVC expects it, also for another root
    write_json(paths.runs(profile) / "vermouth.json", described | {"digests": digests})
    return VermouthData(root, **data, digests=digests)


def load(profile: str) -> VermouthData:
    """The described data, without decoding every image again."""
    path = paths.runs(profile) / "vermouth.json"
    if not path.exists():
        raise FileNotFoundError(f"{paths.shorten(path)}: run notebooks/14_vermouth_data.ipynb for the profile "
                                f"{profile!r} first")
    described = read_json(path)
    return VermouthData(paths.ROOT / described["root"], **_read(described), digests=described["digests"])


def identity(data: VermouthData, images) -> str:
    """What a cache of some images' features is keyed by: their names, size, and the digests of all sets."""
    return fingerprint(data.digests, paths.shorten(images.folder), images.names, images.image_size)


def _read(described: Mapping) -> dict:
    root, sizes, segmentation = paths.ROOT / described["root"], described["image_sizes"], described["segmentation"]
    sketches, (train, *splits) = described["sketches"], segmentation["train"]
    side = sizes["segmentation"]
    return {
        "few_shot": {name: few_shot_data.read(root, name, sizes["few_shot"]) for name in described["few_shot"]},
        "sketches": {name: sketch_data.read(root, name, sizes["sketches"], held_out=sketches["held_out"],
                                            splits=sketches["splits"], seed=described["seed"])
                     for name in sketches["sets"]},
        "segmentation_train": segmentation_data.read(root, train, splits[0], side),
        "segmentation_val": segmentation_data.read(root, train, splits[1], side),
        "segmentation_tests": {name: segmentation_data.read(root, *name.split("/"), side)
                               for name in segmentation["tests"]},
    }
