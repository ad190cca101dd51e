"""The images that probes look at, in memory: photos with classes, sketches with photos, scenes with label maps.

All come from the data of Vermouth's tasks (`vermouth_data`). Cells are chosen on validation images, or for retrieval
on seen classes; what is reported are test images, or unseen classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dive_lib.class_data import ClassData
from dive_lib.dataset import subset_ids
from dive_lib.vermouth_data import VermouthData


@dataclass
class Labelled:
    """images (n, 3, S, S) in [-1, 1]; labels (n,), or label maps (n, S, S) with negative values outside all classes."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class ProbeData:
    """photos, scenes: by split (train, val, test). sketches, gallery: by "val" (seen classes) and "test" (unseen).

    classes: of the photos. sketch_classes: names by split. scene_classes: what a label map's values mean; background:
    those of them that are no part of a mean. side: photos' features are averaged to side x side before a probe reads
    them.
    """

    classes: tuple[str, ...]
    photos: dict[str, Labelled]
    sketch_classes: dict[str, tuple[str, ...]]
    sketches: dict[str, Labelled]
    gallery: dict[str, Labelled]
    scene_classes: tuple[str, ...]
    scenes: dict[str, Labelled]
    side: int = 1
    background: tuple[str, ...] = ()

    @property
    def named(self) -> list[int]:
        """Indices of the scene classes but the background."""
        return [k for k, name in enumerate(self.scene_classes) if name not in self.background]

    def summary(self) -> dict[str, int]:
        """Numbers of images."""
        kinds = {"photos": self.photos, "sketches": self.sketches, "gallery": self.gallery, "scenes": self.scenes}
        return {f"{kind}_{split}": len(part) for kind, parts in kinds.items() for split, part in parts.items()}


def load(data: VermouthData, counts: Mapping[str, Sequence[int]], *, last_word: bool, seed: int) -> ProbeData:
    """Draws the images. counts: at most so many photos (train, val, test), sketches and gallery (seen, unseen) and
    scenes (train, val, test). last_word: a scene's class is the last word of its name, so that "red three" is a three.

    Test scenes are those of the first test set whose names are the training set's; where there is none, every second
    validation scene.
    """
    few, sketch = data.digits, next(iter(data.sketches.values()))
    photos = {split: _draw(getattr(few, split), count, seed)
              for split, count in zip(("train", "val", "test"), counts["photos"], strict=True)}
    parts = {"val": sketch.train, "test": sketch.test}
    queries, gallery = ({split: _draw(getattr(part, kind), count, seed)
                         for (split, part), count in zip(parts.items(), counts[name], strict=True)}
                        for kind, name in (("sketches", "sketches"), ("photos", "gallery")))
    train, val = data.segmentation_train, data.segmentation_val
    same = [part for part in data.segmentation_tests.values() if tuple(part.classes) == tuple(train.classes)]
    short = {name: name.split()[-1] if last_word else name for name in train.classes}
    names = list(short.values())
    classes = tuple(dict.fromkeys(names))
    meaning = torch.tensor([classes.index(name) for name in names])
    splits = {"train": (train, range(len(train))), "val": (val, range(0, len(val), 1 if same else 2)),
              "test": (same[0], range(len(same[0]))) if same else (val, range(1, len(val), 2))}
    scenes = {}
    for (split, (images, places)), count in zip(splits.items(), counts["scenes"], strict=True):
        chosen = [places[k] for k in subset_ids(range(len(places)), min(count, len(places)), seed)]
        labels = images.load_labels(chosen)
        scenes[split] = Labelled(images.load_images(chosen), torch.where(labels >= 0, meaning[labels.clamp(min=0)], -1))
    return ProbeData(few.classes, photos, {split: part.classes for split, part in parts.items()}, queries, gallery,
                     classes, scenes, background=tuple(short[name] for name in train.background))


def of_classes(data: ClassData, per_class: int, *, side: int, seed: int) -> ProbeData:
    """The images that a class-conditional model was trained to make: `per_class` training images of every class, all
    validation and test images; nothing for the other granularities. Grey images get three equal channels."""
    rng = np.random.RandomState(seed)  # NumPy guarantees RandomState's stream for ever
    labels = data.train.labels.numpy()
    chosen = [int(k) for c in range(len(data.classes))
              for k in rng.permutation(np.flatnonzero(labels == c))[:per_class]]
    photos = {split: Labelled(images.load_images(places).expand(-1, 3, -1, -1).contiguous(), images.labels[places])
              for split, images, places in (("train", data.train, chosen), ("val", data.val, range(len(data.val))),
                                            ("test", data.test, range(len(data.test))))}
    return ProbeData(data.classes, photos, {}, {}, {}, (), {}, side)


def _draw(images, count: int, seed: int) -> Labelled:
    chosen = subset_ids(range(len(images)), min(count, len(images)), seed)
    return Labelled(images.load_images(chosen), images.labels[chosen])
