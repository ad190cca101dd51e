"""Pictures of the report: images with boxes on them, and the paper's Figures 2 and 3 drawn anew.

An image is a tensor (3, H, W) in [-1, 1]; boxes are x1, y1, x2, y2 in its pixels. With `original_size`
(width, height), an image that was squashed to a square is shown in its original aspect ratio. A cell is a
dictionary: image, and where wanted original_size, boxes_xyxy (n, 4), labels (n strings), scores (n), title,
dropped (strings).
"""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from matplotlib.patheffects import Normal, Stroke

from dive_lib.coco import CocoLayouts
from dive_lib.figures import BLUE, GREY, INK, MUTED, ORANGE, VERMILION, styled
from dive_lib.layout import FIELDS, LayoutGrid

COLOURS = ("#56b4e9", "#ffa726", "#2ee6a8", "#f5e663", "#ff8ad8", "#8da2ff", "#ff7043", "#d9b38c", "#c5f06a",
           "#e0e0e0")
"""Of boxes by class, bright enough for dark images; the label's text also tells classes apart."""
WIDTH = 8.0  # inches


def annotated(layouts: CocoLayouts, index: int) -> dict:
    """A cell: one image of a split with its annotations."""
    names = [layouts.categories.names[c] for c in layouts.class_ids(index)]
    return {"image": layouts.load_image(index), "boxes_xyxy": layouts.boxes_xyxy(index), "labels": names}


def detected(layouts: CocoLayouts, grid: LayoutGrid, result: Mapping, title: str = "") -> dict:
    """A cell: the image of a detection result (`detections.run`) with the boxes that were found."""
    index = layouts.index_of(result["image_id"])
    decoded = grid.decode(torch.tensor(result["tokens"]))
    cell = {"image": layouts.load_image(index), "boxes_xyxy": decoded.boxes_xyxy,
            "labels": [grid.classes[c] for c in decoded.class_ids]}
    return cell | {"title": title} if title else cell


@styled
def detections_grid(items: Sequence[Mapping], columns: int = 5,
                    classes: Sequence[str] | None = None) -> Figure:
    """Images with labelled boxes, row by row. classes: order of the colours (default: the labels found)."""
    axes = _grid(items, columns)
    colours = _colours(items, classes)
    for axis, cell in zip(axes.flat, items):
        _show(axis, cell, colours, WIDTH / columns)
    return axes[0, 0].figure


@styled
def comparison_grid(rows: Sequence[Sequence[Mapping]], columns: Sequence[str],
                    classes: Sequence[str] | None = None) -> Figure:
    """Figure 5 of the paper: a row per image, a column per method, the regenerated image last.

    rows: per image one cell for each name in `columns`. Below a cell with `dropped` stand the objects that
    decoding dropped (`dropped_objects`), each after a dot, or a dash if there are none.
    """
    if any(len(row) != len(columns) for row in rows):
        raise ValueError(f"each row needs {len(columns)} cells, one a column, got {list(map(len, rows))}")
    letters = round(140 / len(columns))  # of the small print that fit into a column
    rows = [[cell | {"dropped": _small_print(cell["dropped"], letters)} if "dropped" in cell else cell for cell in row]
            for row in rows]
    cells, titles = [cell for row in rows for cell in row], [textwrap.wrap(name, 11) for name in columns]
    axes = _grid(cells, len(columns), top=0.09 + 0.18 * max(map(len, titles)))
    colours = _colours(cells, classes)
    for axis, cell in zip(axes.flat, cells):
        _show(axis, cell, colours, WIDTH / len(columns))
        if "dropped" in cell:
            axis.set_xlabel("\n".join(cell["dropped"]) or "\N{EN DASH}", fontsize=7.5, labelpad=2,
                            color=VERMILION if cell["dropped"] else MUTED)
    for axis, row in zip(axes[:, 0], rows):
        if "dropped" not in row[0] and any("dropped" in cell for cell in row):  # room for what the column is about
            axis.set_xlabel("dropped:", fontsize=7.5, labelpad=2, loc="right", color=MUTED)
    for axis, lines in zip(axes[0], titles):
        axis.set_title("\n".join(lines), loc="center", fontsize=min(9.5, 76 / len(columns)))
    return axes[0, 0].figure


@styled
def image_grid(images: Sequence[torch.Tensor], titles: Sequence[str] | None = None, columns: int = 8,
               row_labels: Sequence[str] | None = None) -> Figure:
    """Images (3, H, W) row by row, such as originals above reconstructions. row_labels: one per row."""
    cells = [{"image": image} for image in images]
    for cell, title in zip(cells, titles or ()):
        cell["title"] = title
    axes = _grid(cells, columns)
    for axis, cell in zip(axes.flat, cells):
        _show(axis, cell, {}, WIDTH / columns)
    for axis, label in zip(axes[:, 0], row_labels or ()):
        axis.set_ylabel(label, fontsize=9.5)
    return axes[0, 0].figure


def dropped_objects(dropped: Sequence[Mapping], grid: LayoutGrid) -> list[str]:
    """A short text per object that `LayoutGrid.decode` dropped: "seven: x2 missing", "no class", "three: illegal box".

    What is missing has [none] for its token.
    """
    texts = []
    for record in dropped:
        none = [token == empty for token, empty in zip(record["tokens"], grid.none_tokens.tolist())]
        missing = [field for field, empty in zip(FIELDS, none) if empty and field != "class"]
        name = "no class" if none[0] else grid.classes[record["tokens"][0]]
        reason = ["no box" if len(missing) == 4 else ", ".join(missing) + " missing"] if missing else []
        if record["reason"] == "illegal":
            reason = ["illegal box"]
        texts.append("; ".join([name, *reason]) if none[0] else ": ".join([name, *reason]))
    return texts


def _small_print(texts, letters, most=5):
    """At most so many lines of so many letters; the texts that do not fit are counted."""
    texts = [f"\N{BULLET} {text}" for text in texts]
    for shown in range(len(texts), -1, -1):
        rest = [f"and {len(texts) - shown} more"] if shown < len(texts) else []
        lines = [line for text in texts[:shown] for line in textwrap.wrap(text, letters)] + rest
        if len(lines) <= most:
            return lines


def _grid(cells, columns, top=0.0):
    """Axes (rows, columns) without ticks in a figure whose rows are as high as their cells need."""
    if not cells:
        raise ValueError("there is no image to show; give at least one")
    width, heights = WIDTH / columns, []
    for start in range(0, len(cells), columns):
        row = cells[start:start + columns]
        lines = max(len(cell.get("dropped", ())) or "dropped" in cell for cell in row)
        heights.append(max(width / _aspect(cell) for cell in row) + 0.06 + 0.15 * lines
                       + 0.2 * any("title" in cell for cell in row))
    heights[0] += top
    figure, axes = plt.subplots(len(heights), columns, figsize=(WIDTH, sum(heights)), squeeze=False,
                                height_ratios=heights)
    figure.get_layout_engine().set(w_pad=0.025, h_pad=0.035, wspace=0, hspace=0)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
    for axis in axes.flat[len(cells):]:
        axis.set_visible(False)
    return axes


def _size(cell):
    height, width = cell["image"].shape[-2:]
    return tuple(cell.get("original_size") or (width, height))


def _aspect(cell):
    width, height = _size(cell)
    return width / height


def _colours(cells, classes):
    names = classes or sorted({label for cell in cells for label in cell.get("labels", ())})
    return {name: COLOURS[k % len(COLOURS)] for k, name in enumerate(names)}


def _show(axis, cell, colours, inches, fontsize=7.5):
    """One cell of `inches` width."""
    image = torch.as_tensor(cell["image"]).detach().float().cpu()
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    width, height = _size(cell)
    axis.imshow(pixels, extent=(0, width, height, 0), interpolation="nearest", aspect="equal")
    if "title" in cell:
        axis.set_title(cell["title"], loc="center", fontsize=9, fontweight="normal", pad=3)
    boxes = np.asarray(cell.get("boxes_xyxy", ()), dtype=float).reshape(-1, 4)
    boxes = boxes * np.array([width / image.shape[-1], height / image.shape[-2]] * 2)
    labels = cell.get("labels", [""] * len(boxes))
    scores = cell.get("scores")
    halo = [Stroke(linewidth=2.8, foreground="black", alpha=0.55), Normal()]
    unit = width / inches / 72  # image pixels per point
    placed = []
    for k, ((x1, y1, x2, y2), label) in enumerate(zip(boxes, labels)):
        colour = colours.get(label, COLOURS[-1])
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.5,
                                 path_effects=halo))
        text = label if scores is None else f"{label} {float(scores[k]):.2f}"
        if not text:
            continue
        size = (0.62 * fontsize * len(text) + 3) * unit, (fontsize + 3.5) * unit
        left, top = _free_place((x1, y1, x2, y2), size, (width, height), placed)
        placed.append((left, top, left + size[0], top + size[1]))
        axis.text(left + 1.7 * unit, top + size[1] / 2, text, fontsize=fontsize, color="black", va="center",
                  bbox={"facecolor": colour, "alpha": 0.9, "pad": 1})
    axis.set(xlim=(0, width), ylim=(height, 0))


def _free_place(box, size, image, placed):
    """Upper left corner of a label: above, below or inside its box, the first place that is least covered."""
    (x1, y1, x2, y2), (w, h), (width, height) = box, size, image
    rows = [y1 - h, y2, y1, y2 - h, y1 - 2 * h, y2 + h]
    best = None
    for row in rows:
        for left in (x1, x2 - w):
            left, top = min(max(left, 0), max(0, width - w)), min(max(row, 0), height - h)
            covered = abs(top - row) * w + sum(
                max(0, min(left + w, r) - max(left, a)) * max(0, min(top + h, d) - max(top, b))
                for a, b, r, d in placed)
            if best is None or covered < best[0] - 1e-9:
                best = covered, left, top
    return best[1:]


FILLS = {"data": ("#f4f4f4", GREY), "frozen": ("#dbeaf5", BLUE), "trained": ("#fdebd0", ORANGE),
         "plain": ("white", MUTED), "loss": ("#fbe3d6", VERMILION)}


@styled
def training_scheme() -> Figure:
    """Figure 2 of the paper: training of the layout LDM (equation 1) and of the layout prior (equation 3)."""
    figure, axis = _canvas(10.4, 6.2)
    axis.text(0.1, 5.95, "a   layout LDM", fontweight="bold", va="center")
    image = _Box(axis, 0.1, 4.75, 1.5, 0.8, "image $x$", "data")
    encoder = _Box(axis, 2.2, 4.75, 1.7, 0.8, "first stage\nencoder", "frozen")
    noisy = _Box(axis, 4.5, 4.75, 2.0, 0.8, "noisy latent\n$z_t$", "plain")
    _Box(axis, 7.0, 3.35, 1.2, 2.2, "U-Net\n$\\epsilon_\\theta$", "trained")
    loss = _Box(axis, 8.7, 4.75, 1.6, 0.8, "$\\|\\epsilon-\\epsilon_\\theta\\|^2$", "loss")
    layout = _Box(axis, 0.1, 3.35, 1.5, 0.8, "layout $y$", "data")
    table = _Box(axis, 2.2, 3.35, 1.7, 0.8, "vocabulary\n$v_\\theta(y)$", "trained")
    layers = _Box(axis, 4.5, 3.35, 2.0, 0.8, "layout encoder", "trained")
    _chain(axis, image, encoder, noisy)
    _chain(axis, layout, table, layers)
    _arrow(axis, noisy.right, (7.0, 5.15))
    _arrow(axis, layers.right, (7.0, 3.75))
    _arrow(axis, (8.2, 5.15), loss.left)
    note = {"fontsize": 9, "color": MUTED, "va": "top"}
    axis.text(0.1, 3.1, "slots of class, $x_1, y_1, x_2, y_2$,\nempty ones all [none]", **note)
    axis.text(7.6, 3.1, "cross-attention", ha="center", **note)

    axis.text(0.1, 2.05, "b   layout prior", fontweight="bold", va="center")
    layout = _Box(axis, 0.1, 0.85, 1.5, 0.8, "layout $y$", "data")
    table = _Box(axis, 2.2, 0.85, 1.7, 0.8, "vocabulary\n$v_\\theta(y)$", "frozen")
    noisy = _Box(axis, 4.5, 0.85, 2.0, 0.8, "noisy embeddings\n$v_t$", "plain")
    prior = _Box(axis, 7.0, 0.85, 1.2, 0.8, "transformer\n$\\epsilon_\\phi$", "trained")
    loss = _Box(axis, 8.7, 0.85, 1.6, 0.8, "$\\|\\epsilon'-\\epsilon_\\phi\\|^2$", "loss")
    _chain(axis, layout, table, noisy, prior, loss)
    _legend(axis, "data", "trained", "frozen", "loss")
    return figure


@styled
def inversion_scheme() -> Figure:
    """Figure 3 of the paper: both models are frozen, the gradient of their losses moves the embeddings."""
    figure, axis = _canvas(10.4, 6.2)
    image = _Box(axis, 0.1, 5.0, 1.6, 0.8, "image $x$", "data")
    encoder = _Box(axis, 2.3, 5.0, 1.8, 0.8, "first stage\nencoder", "frozen")
    noisy = _Box(axis, 4.7, 5.0, 1.9, 0.8, "noisy latent\n$z_t$", "plain")
    ldm = _Box(axis, 7.1, 5.0, 1.35, 0.8, "layout LDM\n$\\epsilon_\\theta$", "frozen")
    image_loss = _Box(axis, 8.9, 5.0, 1.4, 0.8, "$\\|\\epsilon-\\epsilon_\\theta\\|^2$", "loss")
    _chain(axis, image, encoder, noisy, ldm, image_loss)

    embeddings = _Box(axis, 0.1, 2.85, 1.6, 1.0, "embeddings $v$\nstart: [none]", "trained")
    nearest = _Box(axis, 2.3, 2.85, 1.8, 1.0, "nearest entry\n$\\mathrm{NN}(v)$", "plain")
    state = _Box(axis, 4.55, 2.85, 2.2, 1.0, "$v'=\\mathrm{sg}[\\mathrm{NN}(v)-v]+v$", "plain", 9)
    total = _Box(axis, 8.9, 2.85, 1.4, 1.0, "sum", "loss")
    _chain(axis, embeddings, nearest, state)
    _arrow(axis, (6.75, 3.55), (7.775, 3.55), head=False)
    _arrow(axis, (7.775, 3.55), ldm.bottom)
    axis.text(7.65, 4.3, "condition", ha="right", va="center", fontsize=9, color=MUTED)
    _arrow(axis, image_loss.bottom, total.top)

    vocabulary = _Box(axis, 2.3, 0.95, 1.8, 0.8, "vocabulary\nwith [none]", "frozen")
    _arrow(axis, vocabulary.top, nearest.bottom)
    noisy = _Box(axis, 4.7, 0.95, 1.9, 0.8, "noisy embeddings\n$v'_t$", "plain")
    prior = _Box(axis, 7.1, 0.95, 1.35, 0.8, "prior\n$\\epsilon_\\phi$", "frozen")
    layout_loss = _Box(axis, 8.9, 0.95, 1.4, 0.8, "$\\|\\epsilon'-\\epsilon_\\phi\\|^2$", "loss")
    _arrow(axis, state.bottom, noisy.top)
    _chain(axis, noisy, prior, layout_loss)
    _arrow(axis, layout_loss.top, total.bottom)
    answer = _Box(axis, 0.1, 0.95, 1.6, 0.8, "layout $y^*$", "data")
    _arrow(axis, embeddings.bottom, answer.top)
    axis.text(1.0, 2.3, "at the lowest\nmonitor loss", va="center", fontsize=9, color=MUTED)

    gradient = {"colour": VERMILION, "dashed": True}
    _arrow(axis, (8.9, 3.15), (6.75, 3.15), **gradient)
    _arrow(axis, (5.65, 3.85), (0.9, 3.85), curve=0.16, **gradient)
    axis.text(7.8, 3.02, "gradient", ha="center", va="top", fontsize=9.5, color=VERMILION)
    axis.text(3.2, 4.5, "straight-through", ha="center", va="center", fontsize=9.5, color=VERMILION,
              bbox={"facecolor": "white", "pad": 1})
    _legend(axis, "data", "trained", "frozen", "loss")
    return figure


class _Box:
    """A rounded box with text in it, and the middles of its edges."""

    def __init__(self, axis, x, y, width, height, text, kind, fontsize=10):
        self.axis = axis
        self.left, self.right = (x, y + height / 2), (x + width, y + height / 2)
        self.bottom, self.top = (x + width / 2, y), (x + width / 2, y + height)
        fill, edge = FILLS[kind]
        axis.add_patch(FancyBboxPatch((x + 0.06, y + 0.06), width - 0.12, height - 0.12, linewidth=1.3,
                                      boxstyle="round,pad=0.06", facecolor=fill, edgecolor=edge))
        axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=fontsize)


def _canvas(width, height):
    figure, axis = plt.subplots(figsize=(WIDTH, WIDTH * height / width))
    axis.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axis.set_axis_off()
    return figure, axis


def _arrow(axis, start, end, colour=INK, dashed=False, head=True, curve=0.0):
    axis.add_patch(FancyArrowPatch(
        start, end, arrowstyle="-|>" if head else "-", mutation_scale=11, color=colour, linewidth=1.4,
        shrinkA=0, shrinkB=0, linestyle=(0, (4, 2)) if dashed else "-", connectionstyle=f"arc3,rad={curve}"))


def _chain(axis, *boxes):
    for first, second in zip(boxes, boxes[1:]):
        _arrow(axis, first.right, second.left)


def _legend(axis, *kinds):
    handles = [Patch(facecolor=FILLS[kind][0], edgecolor=FILLS[kind][1], linewidth=1.3) for kind in kinds]
    names = {"data": "data", "trained": "learned", "frozen": "frozen", "loss": "loss"}
    axis.legend(handles, [names[kind] for kind in kinds], loc="lower center", ncols=len(kinds), fontsize=9.5,
                bbox_to_anchor=(0.5, -0.03))
