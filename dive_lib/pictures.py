"""Pictures of the report: images with boxes on them, and the paper's Figures 2 and 3 drawn anew.

An image is a tensor (3, H, W) in [-1, 1]; boxes are x1, y1, x2, y2 in its pixels. With `original_size`
(width, height), an image that was squashed to a square is shown in its original aspect ratio. A cell is a
dictionary: image, and where wanted original_size, boxes_xyxy (n, 4), labels (n strings), scores (n), title,
dropped (strings).
"""

import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Patch

from dive_lib.coco import CocoLayouts
from dive_lib.figures import BLUE, GREY, INK, MUTED, ORANGE, VERMILION, styled
from dive_lib.layout import FIELDS, LayoutGrid
from dive_lib.picture_grid import WIDTH, axes_of, colours_of, cut, filled, fitting, show, stack


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
    """Images with labelled boxes, row by row. classes: order of the colours (default: the labels found).

    Rows stay beneath each other where they are cut, unless every cell has a title of its own.
    """
    fit = fitting(items, columns)
    lines = cut(items, fit) if all(cell.get("title") for cell in items) else stack(cut(items, columns), fit)
    axes, colours = axes_of(lines), colours_of(items, classes)
    for axis, cell in filled(axes, lines):
        show(axis, cell, colours, WIDTH / axes.shape[1])
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
    fit = fitting([cell for row in rows for cell in row], len(columns))
    letters = round(140 / fit)  # of the small print that fit into a column
    rows = [[cell | {"dropped": _small_print(cell["dropped"], letters)} if "dropped" in cell else cell for cell in row]
            for row in rows]
    lines = [line for row in rows for line in cut(row, fit)]
    headings = [[textwrap.wrap(name, 11 if fit == len(columns) else letters // 2) for name in line]
                for line in cut(columns, fit)]
    if len(headings) > 1:  # each line has columns of its own
        headings *= len(rows)
    axes = axes_of(lines, [0.09 + 0.18 * max(map(len, line)) for line in headings])
    colours = colours_of([cell for row in rows for cell in row], classes)
    for axis, cell in filled(axes, lines):
        show(axis, cell, colours, WIDTH / fit)
        if "dropped" in cell:
            axis.set_xlabel("\n".join(cell["dropped"]) or "\N{EN DASH}", fontsize=7.5, labelpad=2,
                            color=VERMILION if cell["dropped"] else MUTED)
    for axis, row in zip(axes[::len(lines) // len(rows), 0], rows):
        if "dropped" not in row[0] and any("dropped" in cell for cell in row):  # room for what the column is about
            axis.set_xlabel("dropped:", fontsize=7.5, labelpad=2, loc="right", color=MUTED)
    for axis, text in filled(axes, headings):
        axis.set_title("\n".join(text), loc="center", fontsize=min(9.5, 76 / fit))
    return axes[0, 0].figure


@styled
def image_grid(images: Sequence[torch.Tensor], titles: Sequence[str] | None = None, columns: int = 8,
               row_labels: Sequence[str] | None = None) -> Figure:
    """Images (3, H, W) row by row, such as originals above reconstructions. row_labels: one per row.

    titles: of the first row, whose columns then stay together where they are cut, or of every image.
    """
    cells = [{"image": image} for image in images]
    for cell, title in zip(cells, titles or ()):
        cell["title"] = title
    fit = fitting(cells, columns)
    rows = cut(cells, columns)
    lines = cut(cells, fit) if all("title" in cell for cell in cells) and not row_labels else stack(rows, fit)
    axes = axes_of(lines)
    for axis, cell in filled(axes, lines):
        show(axis, cell, {}, WIDTH / axes.shape[1])
    labels = stack([[label] * len(row) for label, row in zip(row_labels or (), rows)], fit)
    for axis, label in zip(axes[:, 0], labels):
        axis.set_ylabel(label[0], fontsize=9.5)
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
