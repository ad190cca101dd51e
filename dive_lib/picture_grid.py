"""Images side by side, with boxes and their labels on them: the grid that `pictures` fills.

A cell is a dictionary, as `pictures` describes; a line is a list of cells. No image is shown with far fewer pixels than
it has, so rows of large ones are cut into several lines.
"""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.patheffects import Normal, Stroke

from dive_lib.figures import DPI
from dive_lib.wording import brief

COLOURS = ("#56b4e9", "#ffa726", "#2ee6a8", "#f5e663", "#ff8ad8", "#8da2ff", "#ff7043", "#d9b38c", "#c5f06a",
           "#e0e0e0")
"""Of boxes by class, bright enough for dark images; the label's text also tells classes apart."""
WIDTH = 8.0  # inches
LABELS = 8  # as many are always written; of more only those for which there is room, large boxes first


def fitting(cells: Sequence[Mapping], columns: int) -> int:
    """At most so many columns, so few that a cell has about the pixels of its image. Raises ValueError for no cell."""
    if not cells:
        raise ValueError("there is no image to show; give at least one")
    room = max(1, int(WIDTH * DPI // max(cell["image"].shape[-1] for cell in cells)))
    return -(-columns // -(-columns // room))  # lines about equally long


def cut(cells: Sequence, columns: int) -> list[Sequence]:
    """Lines of so many cells; the last may be shorter."""
    return [cells[start:start + columns] for start in range(0, len(cells), columns)]


def stack(rows: Sequence[Sequence], columns: int) -> list[Sequence]:
    """The first `columns` cells of all rows, then the next of all: what stood beneath each other still does."""
    longest = max(map(len, rows), default=0)
    return [row[start:start + columns] for start in range(0, longest, columns) for row in rows
            if row[start:start + columns]]


def filled(axes: np.ndarray, lines: Sequence[Sequence[Mapping]]) -> list[tuple[Axes, Mapping]]:
    """Each cell with its axes."""
    return [(axis, cell) for own, line in zip(axes, lines) for axis, cell in zip(own, line)]


def axes_of(lines: Sequence[Sequence[Mapping]], above: Iterable[float] = ()) -> np.ndarray:
    """Axes (lines, columns) without ticks in a figure whose lines are as high as their cells need.

    above: inches for headings above the first lines.
    """
    columns = max(map(len, lines))
    width, heights = WIDTH / columns, []
    for row, heading in zip(lines, [*above, *[0.0] * len(lines)]):
        small = max(len(cell.get("dropped", ())) or "dropped" in cell for cell in row)
        heights.append(max(width / _aspect(cell) for cell in row) + 0.06 + 0.15 * small
                       + 0.2 * any("title" in cell for cell in row) + heading)
    figure, axes = plt.subplots(len(heights), columns, figsize=(WIDTH, sum(heights)), squeeze=False,
                                height_ratios=heights)
    figure.get_layout_engine().set(w_pad=0.025, h_pad=0.035, wspace=0, hspace=0)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for own, line in zip(axes, lines):
        for axis in own[len(line):]:
            axis.set_visible(False)
    return axes


def colours_of(cells: Sequence[Mapping], classes: Sequence[str] | None) -> dict[str, str]:
    """A colour for each class, in their order, or for each label in the cells."""
    names = classes or sorted({label for cell in cells for label in cell.get("labels", ())})
    return {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}


def show(axis: Axes, cell: Mapping, colours: Mapping[str, str], inches: float, fontsize: float = 7.5) -> None:
    """Draws a cell of `inches` width."""
    image = torch.as_tensor(cell["image"]).detach().float().cpu()
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    width, height = _size(cell)
    enlarged = image.shape[-1] < 0.9 * inches * DPI
    axis.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest" if enlarged else "hanning",
                aspect="equal")
    if "title" in cell:
        title = brief(cell["title"], int(inches * 72 / 4.9))
        axis.set_title(title, loc="center", fontsize=9, fontweight="normal", pad=3)
    boxes = np.asarray(cell.get("boxes_xyxy", ()), dtype=float).reshape(-1, 4)
    boxes = boxes * np.array([width / image.shape[-1], height / image.shape[-2]] * 2)
    labels = cell.get("labels") or [""] * len(boxes)
    scores = cell.get("scores")
    halo = [Stroke(linewidth=2.8, foreground="black", alpha=0.55), Normal()]
    unit = width / inches / 72  # image pixels per point
    placed, order = [], list(range(len(boxes)))
    if len(boxes) > LABELS:
        order.sort(key=lambda k: -np.prod(boxes[k, 2:] - boxes[k, :2]))
    for k in order:
        (x1, y1, x2, y2), label = boxes[k], labels[k]
        colour = colours.get(label, COLOURS[-1])
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5,
                                 path_effects=halo))
        text = label if scores is None else f"{label} {float(scores[k]):.2f}"
        if not text:
            continue
        size = (0.62 * fontsize * len(text) + 3) * unit, (fontsize + 3.5) * unit
        left, top, covered = _free_place((x1, y1, x2, y2), size, (width, height), placed)
        if len(boxes) > LABELS and covered > 0.1 * size[0] * size[1]:
            continue
        placed.append((left, top, left + size[0], top + size[1]))
        axis.text(left + 1.7 * unit, top + size[1] / 2, text, fontsize=fontsize, color="black", va="center",
                  bbox={"facecolor": colour, "alpha": 0.9, "pad": 1})
    axis.set(xlim=(0, width), ylim=(height, 0))


def _size(cell):
    height, width = cell["image"].shape[-2:]
    return tuple(cell.get("original_size") or (width, height))


def _aspect(cell):
    width, height = _size(cell)
    return width / height


def _free_place(box, size, image, placed):
    """A label's upper left corner: above, below or inside its box, where it covers least, and the area it covers."""
    (x1, y1, x2, y2), (w, h), (width, height) = box, size, image
    rows = [y1 - h, y2, y1, y2 - h, y1 - 2 * h, y2 + h]
    best = None
    for row in rows:
        for left in (x1, x2 - w):
            left, top = min(max(left, 0), max(0, width - w)), min(max(row, 0), height - h)
            covered = abs(top - row) * w + sum(
                max(0, min(left + w, r) - max(left, a)) * max(0, min(top + h, d) - max(top, b))
                for a, b, r, d in placed)
            if best is None or covered < best[2] - 1e-9:
                best = left, top, covered
    return best
