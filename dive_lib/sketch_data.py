"""Data sets of sketch-based image retrieval: a folder of sketches and one of photos, each sorted by class.

<root>/<folder>/{sketch,photo}/<class>/<image>, and beside them `seen.txt` and `unseen.txt`, a class on each line.
The mini data have one more level, <root>/digits/<split>/{sketch,photo}/..., since the glyphs of their splits differ.
Zero-shot: unseen classes occur only as queries and gallery. Some of the seen ones are left out while settings are
chosen, so that they, not the unseen ones, decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dive_lib.class_images import SUFFIXES, ClassFolderError, ClassImages
from dive_lib.paths import shorten

SETS = {  # name: folder under the root, where to get it
    "Sketchy": ("sketchy", "the Sketchy database of sketchy.eye.gatech.edu with its extension's photos; unseen.txt: "
                           "the 21 classes of split 2 (Yelamarthi et al. 2018), seen.txt: the other 104"),
    "TU-Berlin": ("tu_berlin", "TU-Berlin's sketches (cybertron.cg.tu-berlin.de/eitz) with its extension's photos; "
                               "220 seen and 30 unseen classes"),
    "QuickDraw": ("quickdraw", "QuickDraw Extended (Dey et al. 2019, github.com/sounakdey/doodle2search); 80 seen "
                               "and 30 unseen classes"),
    "digits": ("digits", "notebooks/14_vermouth_data.ipynb, which makes it"),
}
LAYOUT = "It must hold sketch/<class>/ and photo/<class>/ with images, seen.txt and unseen.txt"


class WholeImages(ClassImages):
    """Images resized to a square as a whole, not cropped, as Vermouth's retrieval does."""

    def fit(self, image: Image.Image) -> np.ndarray:
        return np.array(image.resize((self.image_size, self.image_size), Image.BICUBIC))


@dataclass
class SketchPart:
    """Sketches and photos of the same classes, whose labels mean the same class."""

    classes: tuple[str, ...]
    sketches: WholeImages
    photos: WholeImages


@dataclass
class SketchSet:
    """train: all seen classes. val: `held_out`, those of the seen ones that decide settings. test: unseen classes."""

    name: str
    held_out: tuple[str, ...]
    train: SketchPart
    val: SketchPart
    test: SketchPart


def read(root: Path | str, name: str, image_size: int, *, held_out: int, splits: Sequence[str] = ("", "", ""),
         seed: int = 0) -> SketchSet:
    """Reads one of SETS. held_out: number of seen classes, drawn from the seed, that decide settings.

    splits: folders of training, validation and test images in it, empty where all lie in one.
    Raises ClassFolderError, naming the place, and where to get the set and how to lay it out.
    """
    if name not in SETS:
        raise ClassFolderError(f"unknown sketch data set {name!r}; choose one of {', '.join(SETS)}")
    folder = Path(root) / SETS[name][0]
    seen, unseen = (_class_list(folder / f"{kind}.txt", name) for kind in ("seen", "unseen"))
    both = sorted(set(seen) & set(unseen))
    if both:
        raise ClassFolderError(f"{shorten(folder / 'unseen.txt')}: {both[0]!r} is in seen.txt too; a class is either")
    if not 0 < held_out < len(seen):
        raise ClassFolderError(f"{shorten(folder / 'seen.txt')}: {len(seen)} classes, of which {held_out} cannot be "
                               "held out; choose between 1 and one less than all")
    # NumPy guarantees RandomState's stream for ever.
    kept = tuple(sorted(np.random.RandomState(seed).permutation(seen)[:held_out].tolist()))
    parts = [read_part(folder / split, classes, image_size, name)
             for split, classes in zip(splits, (seen, kept, unseen), strict=True)]
    return SketchSet(name, kept, *parts)


def read_part(folder: Path, classes: Sequence[str], image_size: int, name: str) -> SketchPart:
    """The sketches and photos of some classes in one folder; every class must have both."""
    found = {}
    for kind in ("sketch", "photo"):
        names, labels = [], []
        for label, word in enumerate(classes):
            place = folder / kind / word
            files = sorted(entry.name for entry in place.iterdir() if entry.suffix.lower() in SUFFIXES
                           and entry.name[0] != ".") if place.is_dir() else []
            if not files:
                raise ClassFolderError(f"{shorten(place)}: no images. {LAYOUT}. Source: {SETS[name][1]}")
            names += [f"{word}/{file}" for file in files]
            labels += [label] * len(files)
        found[kind] = WholeImages(folder / kind, tuple(classes), names, torch.tensor(labels), image_size, 3)
    return SketchPart(tuple(classes), found["sketch"], found["photo"])


def _class_list(path: Path, name: str) -> tuple[str, ...]:
    if not path.is_file():
        raise ClassFolderError(f"{shorten(path)}: no such file, a part of the sketch data set {name}. {LAYOUT}. "
                               f"Source: {SETS[name][1]}")
    words = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not words or len(set(words)) != len(words):
        raise ClassFolderError(f"{shorten(path)}: must name each class once, one a line, and at least one")
    return tuple(words)
