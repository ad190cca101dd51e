"""The mini data set of classification: the numbers 00 to 99, composed of real handwritten digits.

An image is 16 x 16 grey pixels with two digits side by side. Place, size, ink, paper and noise vary; the class is the
number, so there are a hundred classes that differ by shape alone. Written as ImageNet is, a folder for each class:
<root>/<split>/<class>/<name>.png.
"""

from pathlib import Path

import numpy as np

from dive_lib.class_images import write_image
from dive_lib.glyphs import stretch
from dive_lib.progress import Progress

CLASSES = tuple(f"{number:02d}" for number in range(100))
SIZE = 16
NOISE = 0.02  # standard deviation of the pixels' noise, of a range of 1


def draw(number: int, glyphs: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One image (16, 16) uint8 of a number from 0 to 99; glyphs (n, 8, 8) in [0, 1] with labels (n,)."""
    paper, ink = rng.uniform(0.0, 0.1), rng.uniform(0.8, 1.0)
    canvas = np.zeros((SIZE, SIZE))
    top, height = int(rng.integers(1, 4)), int(rng.integers(11, 13))
    for digit, left, right in ((number // 10, 0, 8), (number % 10, 8, 16)):
        width = int(rng.integers(3, 5) if digit == 1 else rng.integers(6, 8))
        x = int(rng.integers(left, right - width + 1))
        glyph = glyphs[rng.choice(np.flatnonzero(labels == digit))]
        canvas[top:top + height, x:x + width] = ((stretch(glyph, width, height) - 0.1) * 1.4).clip(0, 1)
    canvas = paper + (ink - paper) * canvas + rng.normal(0, NOISE, canvas.shape)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8)


def write_split(root: Path | str, split: str, glyphs: np.ndarray, labels: np.ndarray, per_class: int, *,
                seed: int) -> Path:
    """Writes `per_class` images of every class and returns the split's folder.

    glyphs and labels are those of this split alone. Image k of a class depends only on them and on (seed, split,
    class, k): images that are there already stay.
    """
    folder = Path(root) / split
    with Progress(per_class * len(CLASSES), f"{split} images", unit="images") as progress:
        for number, name in enumerate(CLASSES):
            for k in range(per_class):
                path = folder / name / f"{k:05d}.png"
                if not path.exists():
                    rng = np.random.default_rng([seed, sum(split.encode()), number, k])
                    write_image(path, draw(number, glyphs, labels, rng))
                progress.update()
    return folder
