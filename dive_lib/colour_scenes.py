"""Scenes for open-vocabulary segmentation: every digit has a colour, and some combinations are kept from training.

A pixel of a digit belongs to the class of its name, such as "red three"; all others are "background". Training and
validation scenes contain only seen combinations, so that "red three" must be read from "red" and "three" learned apart;
test scenes have both. Written as the public data sets are laid out: <root>/images/<split>/<k>.png, label maps in
<root>/annotations/<split>/<k>.png and `classes.json` with the names in the order of the label maps' values.
"""

from pathlib import Path

import numpy as np

from dive_lib.class_images import write_image
from dive_lib.files import write_json
from dive_lib.progress import Progress
from dive_lib.scenes import CLASSES, COLOURS, draw_layout, render

BACKGROUND = "background"
NAMES = (BACKGROUND, *(f"{colour} {digit}" for digit in CLASSES for colour in COLOURS))
"""Classes in the order of the label maps' values."""


def unseen_names(seed: int) -> tuple[str, ...]:
    """Twenty of the eighty combinations: two colours of every digit, each colour with two or three digits."""
    rng = np.random.RandomState(seed)  # NumPy guarantees RandomState's stream for ever
    digits, colours = rng.permutation(len(CLASSES)), rng.permutation(list(COLOURS))
    chosen = {f"{colours[(k + shift) % len(colours)]} {CLASSES[digit]}"
              for k, digit in enumerate(digits) for shift in (0, len(colours) // 2)}
    return tuple(name for name in NAMES if name in chosen)


def draw_scene(glyphs: np.ndarray, labels: np.ndarray, rng: np.random.Generator,
               allowed: set[str]) -> tuple[np.ndarray, np.ndarray]:
    """A scene (64, 64, 3) uint8 and its label map (64, 64) uint8; its digits have names of `allowed`."""
    objects = draw_layout(labels, rng)
    for item in objects:
        colours = [colour for colour in COLOURS if f"{colour} {CLASSES[item.class_id]}" in allowed]
        item.colour = str(rng.choice(colours))
    pixels, masks = render(objects, glyphs, rng)
    values = np.zeros(pixels.shape[:2], np.uint8)
    for item, mask in zip(objects, masks):
        values[mask] = NAMES.index(f"{item.colour} {CLASSES[item.class_id]}")
    return pixels, values


def write_split(root: Path | str, split: str, glyphs: np.ndarray, labels: np.ndarray, count: int, *,
                seed: int) -> None:
    """Writes `count` scenes of one split and their label maps; "test" has unseen combinations too.

    Scene k depends only on the glyphs of this split and on (seed, split, k): scenes that are there already stay.
    """
    root, unseen = Path(root), unseen_names(seed)
    allowed = {name for name in NAMES if split == "test" or name not in unseen}
    with Progress(count, f"{split} scenes", unit="images") as progress:
        for k in range(count):
            files = [root / folder / split / f"{k:05d}.png" for folder in ("images", "annotations")]
            if not all(path.exists() for path in files):
                rng = np.random.default_rng([seed, sum(split.encode()), 2, k])
                for path, pixels in zip(files, draw_scene(glyphs, labels, rng, allowed)):
                    write_image(path, pixels)
            progress.update()


def write_classes(root: Path | str, seed: int) -> None:
    """`classes.json`: names, those without meaning of their own, and the unseen ones."""
    write_json(Path(root) / "classes.json", {"names": NAMES, "first": 0, "background": [BACKGROUND],
                                             "unseen": unseen_names(seed)})
