"""Single digits, each as a photo and as a sketch: the mini data of few-shot classification and of sketch retrieval.

A photo is a 64 x 64 colour scene (`scenes.render`) with one handwritten digit and the name "red three"; a sketch is a
thin line drawing of another glyph, light on dark as chalk on a board, since the small backbones know bright strokes
only. Written in the layouts of the public data sets, so that the same loaders read both:
<root>/<split>/{photo,sketch}/<class>/<k>.png, the few-shot list `split_zhou_Digits.json`, the class lists `seen.txt`
and `unseen.txt`, and `names.json` with the colour and glyph of every photo.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from dive_lib.class_images import write_image
from dive_lib.files import write_json, write_text
from dive_lib.glyphs import stretch
from dive_lib.progress import Progress
from dive_lib.scenes import CLASSES, COLOURS, SIZE, SceneObject, render

KINDS = ("photo", "sketch")
SHIFT = 4  # pixels by which a digit may stand off the middle, in each direction
INKED = 0.38  # ink of a glyph above which a pixel belongs to a stroke
SPLIT_FILE = "split_zhou_Digits.json"


def draw_photo(digit: int, glyphs: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, dict]:
    """One digit in a random colour, place and size: image (64, 64, 3) uint8 and {colour, glyph, name}.

    glyphs (n, 8, 8) in [0, 1] with labels (n,).
    """
    glyph = int(rng.choice(np.flatnonzero(labels == digit)))
    colour = str(rng.choice(list(COLOURS)))
    pixels, _ = render([SceneObject(digit, colour, glyph, _box(digit, rng))], glyphs, rng)
    return pixels, {"colour": colour, "glyph": glyph, "name": f"{colour} {CLASSES[digit]}"}


def draw_sketch(digit: int, glyphs: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The middle line of one glyph's strokes, about two pixels wide, light on dark: (64, 64, 3) uint8."""
    glyph = glyphs[rng.choice(np.flatnonzero(labels == digit))]
    x1, y1, x2, y2 = _box(digit, rng)
    canvas = np.zeros((SIZE, SIZE), bool)
    canvas[y1:y2, x1:x2] = thin(stretch(glyph, x2 - x1, y2 - y1) > INKED)
    lines = Image.fromarray((255 * canvas).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))
    ink = (np.asarray(lines) / 255 * 2.4).clip(0, 1)
    board, chalk = rng.uniform(0.0, 0.1), rng.uniform(0.8, 1.0)
    grey = board + (chalk - board) * ink + rng.normal(0, 0.01, ink.shape)
    return np.repeat((grey.clip(0, 1) * 255).round().astype(np.uint8)[..., None], 3, axis=2)


def thin(filled: np.ndarray) -> np.ndarray:
    """The skeleton, one pixel wide, of a filled shape (H, W) bool (Zhang and Suen 1984)."""
    image = np.pad(filled, 1)
    changed = True
    while changed:
        changed = False
        for odd in (False, True):
            # Neighbours clockwise from the one above.
            ring = [np.roll(image, shift, (0, 1)) for shift in
                    ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))]
            count = np.sum(ring, axis=0)
            turns = np.sum([~ring[k] & ring[(k + 1) % 8] for k in range(8)], axis=0)
            up, right, down, left = ring[0], ring[2], ring[4], ring[6]
            edge = ~(up & right & left) & ~(up & down & left) if odd else ~(up & right & down) & ~(right & down & left)
            remove = image & (count >= 2) & (count <= 6) & (turns == 1) & edge
            changed |= bool(remove.any())
            image = image & ~remove
    return image[1:-1, 1:-1]


def write_split(root: Path | str, split: str, glyphs: np.ndarray, labels: np.ndarray, per_class: Mapping[str, int], *,
                seed: int) -> dict[str, dict]:
    """Writes the photos and sketches of one split and returns {photo's path under root: {colour, glyph, name}}.

    per_class: {"photo": images of each digit, "sketch": ...}. Image k of a class depends only on the glyphs of this
    split and on (seed, split, kind, class, k): images that are there already stay.
    """
    root, names = Path(root), {}
    with Progress(sum(per_class[kind] for kind in KINDS) * len(CLASSES), f"{split} digits", unit="images") as progress:
        for digit, word in enumerate(CLASSES):
            for kind in KINDS:
                for k in range(per_class[kind]):
                    rng = np.random.default_rng([seed, sum(split.encode()), KINDS.index(kind), digit, k])
                    path = f"{split}/{kind}/{word}/{k:05d}.png"
                    if kind == "photo":
                        pixels, names[path] = draw_photo(digit, glyphs, labels, rng)
                    else:
                        pixels = draw_sketch(digit, glyphs, labels, rng)
                    if not (root / path).exists():
                        write_image(root / path, pixels)
                    progress.update()
    return names


def write_lists(root: Path | str, names: Mapping[str, Mapping], unseen: Sequence[str]) -> None:
    """The lists beside the images. names: of all splits, from `write_split`. unseen: digits kept from retrieval's
    training. Raises ValueError for a word that is no digit."""
    unknown = set(unseen) - set(CLASSES)
    if unknown or not 0 < len(unseen) < len(CLASSES):
        raise ValueError(f"unseen digits {sorted(unseen)}: name some, not all, of {', '.join(CLASSES)}")
    root = Path(root)
    listed: dict[str, list] = {"train": [], "val": [], "test": []}
    for path in names:
        split, _, word, _ = path.split("/")
        listed[split].append([path, CLASSES.index(word), word])
    write_json(root / SPLIT_FILE, listed)
    write_json(root / "names.json", names)
    write_text(root / "unseen.txt", "".join(f"{word}\n" for word in CLASSES if word in unseen))
    write_text(root / "seen.txt", "".join(f"{word}\n" for word in CLASSES if word not in unseen))


def _box(digit: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Corners of a digit that fills more than half of the image's height and stands near its middle, as the objects
    of classification's data sets do."""
    height = int(2 * rng.integers(18, 26))
    width = int(2 * max(5, round(height * (0.5 if digit == 1 else 0.68) * rng.uniform(0.92, 1.08) / 2)))
    x, y = (int(np.clip((SIZE - side) // 2 + rng.integers(-SHIFT, SHIFT + 1), 0, SIZE - side))
            for side in (width, height))
    return x, y, x + width, y + height
