"""The mini data set: colour scenes composed of real handwritten digits, written in COCO's format.

A scene is 64 x 64 pixels with one to four digits that stand on a common ground line before a textured background.
The layouts follow a distribution that a prior can learn: classes of one parity keep together, the class decides
the typical size, four objects are smaller than one, and objects share the ground line. Neighbours may cover each
other in part. Boxes are those of the whole digit (also where it is covered), with even coordinates; masks are the
visible part.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from dive_lib.files import write_json
from dive_lib.glyphs import stretch
from dive_lib.side_by_side import cut, in_pieces

CLASSES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"red": (235, 60, 55), "orange": (245, 150, 40), "yellow": (240, 225, 70), "green": (75, 205, 80),
           "cyan": (70, 215, 220), "blue": (80, 120, 250), "purple": (170, 90, 235), "white": (235, 235, 235)}
SIZE = 64
OBJECTS = (0.4, 0.35, 0.2, 0.05)  # shares of scenes with one, two, three and four digits
PIECE = 500  # scenes that one process writes at a time
COVERED = 0.15  # share of neighbours that cover each other in part


@dataclass
class SceneObject:
    """One digit: class id, colour name, glyph index within its split and its box in pixels."""

    class_id: int
    colour: str
    glyph: int
    box_xyxy: tuple[int, int, int, int]


def draw_layout(labels: np.ndarray, rng: np.random.Generator, *, shares: tuple[float, ...] = OBJECTS,
                covered: float = COVERED) -> list[SceneObject]:
    """Draws the objects of one scene from left to right. `shares`, `covered`: as the constants above."""
    count = rng.choice([1, 2, 3, 4], p=shares)
    parity = rng.integers(2)
    same = rng.random(count) < 0.8
    classes = [int(2 * rng.integers(5) + (parity if keep else 1 - parity)) for keep in same]
    scale = {1: 1.15, 2: 1.0, 3: 0.95, 4: 0.9}[int(count)]
    heights = np.array([scale * (24 + 1.4 * c + rng.choice([-2, 0, 2])) for c in classes])
    slender = np.array([0.5 if c == 1 else 0.68 for c in classes])
    widths = heights * slender * rng.uniform(0.92, 1.08, count)
    overlap = np.where(rng.random(count - 1) < covered, rng.uniform(0.15, 0.3, count - 1), 0.0)
    overlap = overlap * np.minimum(widths[:-1], widths[1:])
    shrink = min(1.0, (SIZE - 2) / (widths.sum() - overlap.sum()))
    heights, widths, overlap = heights * shrink, widths * shrink, overlap * shrink
    free = SIZE - (widths.sum() - overlap.sum())
    weights = rng.dirichlet(np.ones(count + 1))
    weights[1:-1][overlap > 0] = 0
    gaps = free * weights / weights.sum()
    gaps[1:-1] -= overlap
    ground = rng.integers(42, 63)
    objects, left = [], 0.0
    for i, class_id in enumerate(classes):
        left += gaps[i]
        bottom = ground + rng.choice([-2, 0, 2])
        box = np.array([left, bottom - heights[i], left + widths[i], bottom])
        box = np.clip(2 * np.round(box / 2), 0, SIZE).astype(int)
        glyph = int(rng.choice(np.flatnonzero(labels == class_id)))
        objects.append(SceneObject(class_id, str(rng.choice(list(COLOURS))), glyph, tuple(int(v) for v in box)))
        left += widths[i]
    return objects


def render(objects: list[SceneObject], glyphs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list]:
    """Paints objects over a background. Returns the image (64, 64, 3) uint8 and each visible mask (64, 64) bool."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    wave = np.sin(2 * np.pi * rng.uniform(2, 5) * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    base = rng.uniform(0.08, 0.28, 3) + np.multiply.outer(y - 0.5, rng.uniform(-0.12, 0.12, 3))
    canvas = base + 0.02 * wave[..., None]
    masks = [np.zeros((SIZE, SIZE), bool) for _ in objects]
    for i in rng.permutation(len(objects)):
        item = objects[i]
        x1, y1, x2, y2 = item.box_xyxy
        ink = ((stretch(glyphs[item.glyph], x2 - x1, y2 - y1) - 0.15) * 1.6).clip(0, 1)[..., None]
        colour = np.array(COLOURS[item.colour]) / 255 * rng.uniform(0.85, 1.0)
        stripes = 1 - rng.uniform(0, 0.2) * (0.5 + 0.5 * np.sin(rng.uniform(0.4, 1.2) * np.arange(y2 - y1)))
        patch = canvas[y1:y2, x1:x2]
        canvas[y1:y2, x1:x2] = (1 - ink) * patch + ink * colour * stripes[:, None, None]
        visible = ink[..., 0] > 0.5
        for mask in masks:
            mask[y1:y2, x1:x2] &= ~visible
        masks[i][y1:y2, x1:x2] = visible
    canvas = canvas + rng.normal(0, 0.01, canvas.shape)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8), masks


def caption(objects: list[SceneObject]) -> str:
    """For example "a red three and a blue seven"."""
    names = [f"a{'n' if item.colour == 'orange' else ''} {item.colour} {CLASSES[item.class_id]}"
             for item in objects]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def write_split(root: Path, split: str, glyphs: np.ndarray, labels: np.ndarray, count: int, *, seed: int,
                shares: tuple[float, ...] = OBJECTS, covered: float = COVERED) -> dict:
    """Writes `count` scenes as <root>/<split>/*.png and <root>/annotations/{instances,captions}_<split>.json.

    glyphs (n, 8, 8) in [0, 1] and labels (n,) are those of this split alone. shares, covered: as the constants above.
    Scene i depends only on them and on (seed, split, i). An annotation's area is that of its box (COCO's: of its mask).
    Returns the instances dictionary.
    """
    root = Path(root)
    (root / split).mkdir(parents=True, exist_ok=True)

    def write(numbers: range) -> list[tuple[list[SceneObject], list[str]]]:
        """The objects of some scenes, and their masks' run lengths."""
        written = []
        for i in numbers:
            rng = np.random.default_rng([seed, sum(split.encode()), i])
            objects = draw_layout(labels, rng, shares=shares, covered=covered)
            pixels, masks = render(objects, glyphs, rng)
            Image.fromarray(pixels).save(root / split / f"{i:06d}.png", compress_level=1)
            masks = [rle.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode() for mask in masks]
            written.append((objects, masks))
        return written

    written = in_pieces(write, cut(count, PIECE), f"{split} scenes")
    images, annotations, captions = [], [], []
    for i, (objects, masks) in enumerate(scene for piece in written for scene in piece):
        images.append({"id": i + 1, "file_name": f"{i:06d}.png", "width": SIZE, "height": SIZE})
        captions.append({"id": i + 1, "image_id": i + 1, "caption": caption(objects)})
        for item, mask in zip(objects, masks):
            x1, y1, x2, y2 = item.box_xyxy
            annotations.append({
                "id": len(annotations) + 1, "image_id": i + 1, "category_id": item.class_id + 1, "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": float((x2 - x1) * (y2 - y1)),
                "segmentation": {"size": [SIZE, SIZE], "counts": mask},
                "attributes": {"colour": item.colour, "glyph": item.glyph}})
    categories = [{"id": k + 1, "name": name, "supercategory": "digit"} for k, name in enumerate(CLASSES)]
    instances = {"info": {"description": "scenes of real handwritten digits", "seed": seed},
                 "images": images, "annotations": annotations, "categories": categories}
    write_json(root / "annotations" / f"instances_{split}.json", instances)
    write_json(root / "annotations" / f"captions_{split}.json", {"images": images, "annotations": captions})
    return instances
