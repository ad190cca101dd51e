"""Figures of Vermouth's tasks, in the style of `figures`."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.figure import Figure

from dive_lib.figures import BLUE, INK, MARKERS, MUTED, ORANGE, PALE, SKY, heat, styled

WIDTH = 8.0  # inches


@styled
def label_maps(images: torch.Tensor, maps: Mapping[str, torch.Tensor], classes: Sequence[str],
               names: Sequence[str] = ()) -> Figure:
    """Images (n, 3, H, W) in [-1, 1] in the first row, label maps (n, h, w) under them.

    A colour for each class: the hue is that of the name's last word, the shade that of the words before it; class 0
    and ignored pixels are white. names: printed under the last row, one for each image.
    """
    palette = np.array([(1.0, 1.0, 1.0), *_colours(classes[1:])])
    pixels = ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    rows = {"image": pixels} | {name: palette[values.clamp(min=0).numpy()] for name, values in maps.items()}
    figure, axes = plt.subplots(len(rows), len(images), figsize=(WIDTH, 1.04 * WIDTH / len(images) * len(rows) + 0.25),
                                squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0, hspace=0)
    for line, (name, pictures) in zip(axes, rows.items()):
        line[0].set_ylabel(name, fontsize=9.5)
        for axis, picture in zip(line, pictures):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set(visible=True, color=PALE)
    for axis, name in zip(axes[-1], names):
        axis.set_xlabel(name, fontsize=7.5, color=MUTED)
    return figure


def names_in(maps: torch.Tensor, classes: Sequence[str]) -> list[str]:
    """What stands under each label map (n, h, w) of `label_maps`: the names in it, class 0 apart, one in a line."""
    return ["\n".join(classes[c] for c in values.unique().tolist() if c > 0) for values in maps]


def _colours(classes: Sequence[str]) -> list[tuple[float, float, float]]:
    words = [(" ".join(name.split()[:-1]), name.split()[-1]) for name in classes]
    firsts, lasts = (list(dict.fromkeys(part)) for part in zip(*words)) if words else ([], [])
    shades = np.linspace(0.35, 0.85, len(firsts)) if len(firsts) > 1 else [0.65]
    hues = {shade: sns.husl_palette(len(lasts), s=0.9, l=shade) for shade in shades}
    return [hues[shades[firsts.index(first)]][lasts.index(last)] for first, last in words]


@styled
def combinations(classes: Sequence[str], unseen: Sequence[str], values: Sequence[Sequence[float]],
                 titles: Sequence[str], label: str = "pixels", top: float | None = None) -> Figure:
    """Names of two words as a grid of first by second word, a panel for each of `values` (K,); unseen ones are framed.

    Names that have another number of words are left out; a value may be NaN (grey). top: upper end of the scale, by
    default each panel's largest. Names that are mostly no such pairs, as those of the public sets, are bars instead.
    """
    pairs = {name: name.split() for name in classes if len(name.split()) == 2}
    if 2 * len(pairs) < len(classes):
        return _largest(classes, unseen, values, titles, label)
    columns = list(dict.fromkeys(first for first, _ in pairs.values()))
    lines = list(dict.fromkeys(second for _, second in pairs.values()))
    figure, axes = plt.subplots(1, len(values), figsize=(WIDTH, 0.27 * len(lines) + 1.7), squeeze=False, sharey=True)
    for axis, panel, title in zip(axes[0], values, titles):
        grid = np.full((len(lines), len(columns)), np.nan)
        for name, (first, second) in pairs.items():
            grid[lines.index(second), columns.index(first)] = float(panel[classes.index(name)])
        end = top or max(1.0, np.nanmax(grid, initial=0))
        axis.set_facecolor(PALE)
        image = heat(axis, grid, columns, lines, "Blues", end)
        for row, column in np.argwhere(~np.isnan(grid)):
            value = grid[row, column]
            axis.text(column, row, f"{value:.0f}" if end >= 10 else f"{value:.1f}", ha="center", va="center",
                      fontsize=7.5, color="white" if value > 0.6 * end else INK)
        axis.set_title(title)
        axis.tick_params(axis="x", rotation=60)
        for name in unseen:
            first, second = pairs[name]
            corner = columns.index(first) - 0.45, lines.index(second) - 0.45
            axis.add_patch(plt.Rectangle(corner, 0.9, 0.9, fill=False, edgecolor=INK, linewidth=1.4))
        figure.colorbar(image, ax=axis, pad=0.02, label=label).outline.set_visible(False)
    return figure


def _largest(classes: Sequence[str], unseen: Sequence[str], values: Sequence[Sequence[float]], titles: Sequence[str],
             label: str, count: int = 30) -> Figure:
    """Bars of the `count` largest of each of `values` (K,), without NaN; those of unseen names are framed."""
    figure, axes = plt.subplots(1, len(values), figsize=(WIDTH, 0.2 * min(count, len(classes)) + 1.2), squeeze=False)
    for axis, panel, title in zip(axes[0], values, titles):
        known = [(float(value), name) for value, name in zip(panel, classes) if not np.isnan(float(value))]
        top = sorted(known, key=lambda row: -row[0])[:count]
        axis.barh(range(len(top)), [value for value, _ in top], height=0.66, color=BLUE,
                  edgecolor=[INK if name in unseen else BLUE for _, name in top])
        axis.set_yticks(range(len(top)), [name for _, name in top], fontsize=7.5)
        axis.invert_yaxis()
        axis.set(title=f"{title}, the {len(top)} largest of {len(known)}", xlabel=label)
        axis.grid(axis="y", visible=False)
    return figure


@styled
def shots_curve(rows: Sequence[Mapping], chance: float) -> Figure:
    """Accuracy against shots: rows {name, shots, accuracy, accuracy_ci95, by_seed}, a line for each name.

    by_seed: accuracies of single draws of the shots, as dots.
    """
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    names = list(dict.fromkeys(row["name"] for row in rows))
    for k, (name, marker) in enumerate(zip(names, MARKERS)):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["shots"])
        shift = 2 ** (0.06 * (k - (len(names) - 1) / 2))  # side by side, so that the bars do not cover each other
        x = [row["shots"] * shift for row in own]
        line, = axis.plot(x, [row["accuracy"] for row in own], marker + "-", linewidth=1.5, label=name)
        for at, row in zip(x, own):
            axis.plot([at, at], row["accuracy_ci95"], color=line.get_color(), linewidth=4, alpha=0.3,
                      solid_capstyle="butt")
            axis.plot([at] * len(row["by_seed"]), row["by_seed"], ".", color=line.get_color(), markersize=3, alpha=0.6)
    axis.axhline(chance, color=MUTED, linewidth=1, linestyle=":")
    axis.annotate("chance", (1, chance), (0, -3), xycoords=("axes fraction", "data"), textcoords="offset points",
                  ha="right", va="top", color=MUTED, fontsize=9)
    axis.set_xscale("log", base=2)
    shots = sorted({row["shots"] for row in rows})
    axis.set_xticks(shots, shots)
    axis.minorticks_off()
    axis.set(xlabel="training images of each class (dots: draws; bar: 95 % interval)", ylabel="accuracy, percent",
             ylim=(0, 103))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


@styled
def value_bars(rows: Sequence[Mapping], keys: Mapping[str, str], label: str, top: float | None = None,
               reference: Mapping[str, float] | None = None) -> Figure:
    """Horizontal bars, one panel for each of `keys` (key -> title). rows: {name, key: value, key_ci95 optional, own
    optional (drawn darker)}. top: end of the scale, by default each panel's largest. reference: key -> value of a
    dotted line."""
    figure, axes = plt.subplots(1, len(keys), figsize=(8, 0.36 * len(rows) + 1.2), sharey=True, squeeze=False)
    for axis, (key, title) in zip(axes[0], keys.items()):
        for k, row in enumerate(rows):
            value, interval = row[key], row.get(f"{key}_ci95")
            axis.barh(k, value, height=0.66, color=BLUE if row.get("own") else SKY)
            if interval:
                axis.plot(interval, [k, k], color=INK, linewidth=1.6, solid_capstyle="butt")
            axis.annotate(f"{value:.1f}", (max(value, interval[1]) if interval else value, k), (4, 0),
                          textcoords="offset points", va="center", fontsize=9.5)
        if reference and key in reference:
            axis.axvline(reference[key], color=ORANGE, linewidth=1.2, linestyle=":")
        ends = [max([row[key], *(row.get(f"{key}_ci95") or ())]) for row in rows]
        axis.set(title=title, xlabel=label, xlim=(0, 1.2 * (top or max(ends) or 1)))
        axis.grid(axis="x")
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[0, 0].invert_yaxis()
    return figure


@styled
def retrieved(queries: torch.Tensor, found: Sequence[torch.Tensor], right: Sequence[Sequence[bool]]) -> Figure:
    """Each query (3, H, W) with its nearest photos; a blue frame where the class is the query's, an orange one where
    it is not. found: (k, 3, H, W) for each query."""
    columns = 1 + len(found[0])
    figure, axes = plt.subplots(len(queries), columns, figsize=(WIDTH, 1.05 * WIDTH / columns * len(queries)),
                                squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for line, query, photos, marks in zip(axes, queries, found, right):
        for axis, picture, mark in zip(line, [query, *photos], [None, *marks]):
            axis.imshow(((picture.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            colour = PALE if mark is None else BLUE if mark else ORANGE
            axis.spines[:].set(visible=True, color=colour, linewidth=1 if mark is None else 2.5)
    return figure
