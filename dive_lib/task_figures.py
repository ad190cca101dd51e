"""Figures of Vermouth's tasks, in the style of `figures`."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.colors import is_color_like, to_rgb
from matplotlib.figure import Figure

from dive_lib.figures import BLUE, INK, MARKERS, MUTED, ORANGE, PALE, SKY, heat, styled

WIDTH = 8.0  # inches
OTHER = (0, (3, 1.5))  # dashes of the frames that say no
TEN = sns.color_palette("colorblind").as_hex()
"""The colours of up to ten words: as far apart as ten can be for a colour-blind reader, in hue and in lightness."""


@styled
def label_maps(images: torch.Tensor, maps: Mapping[str, torch.Tensor], classes: Sequence[str],
               names: Mapping[str, Sequence[str]] | None = None, firsts: Sequence[str] = ()) -> Figure:
    """Images (n, 3, H, W) in [-1, 1] in the first row, label maps (n, h, w) under them.

    A colour for the last word of each name, with a key where there are at most ten; class 0 and ignored pixels are
    white. names: row -> what is printed under each of its maps. firsts: rows that are drawn once more by the first
    word, if all first words are names of colours: in these colours, on grey.
    """
    words = [name.split() for name in classes[1:]]
    lasts, palette = _by_last_word(words)
    pixels = ((images.clamp(-1, 1) + 1) / 2).permute(0, 2, 3, 1).numpy()
    rows = {"image": pixels}
    for name, values in maps.items():
        rows[name] = palette[values.clamp(min=0).numpy()]
        if name in firsts and all(len(own) > 1 and is_color_like(own[0]) for own in words):
            named = np.array([to_rgb("0.35"), *(to_rgb(own[0]) for own in words)])
            rows[f"{name},\nfirst word"] = named[values.clamp(min=0).numpy()]
    lines = {row: max(text.count("\n") + 1 for text in own) for row, own in (names or {}).items()}
    keyed = 1 < len(lasts) <= len(TEN)
    height = 1.02 * WIDTH / len(images) * len(rows) + 0.16 * sum(lines.values()) + 0.1 + 0.35 * keyed
    figure, axes = plt.subplots(len(rows), len(images), figsize=(WIDTH, height), squeeze=False)
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0, hspace=0)
    for line, (name, pictures) in zip(axes, rows.items()):
        line[0].set_ylabel(name, fontsize=9.5)
        for axis, picture in zip(line, pictures):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            axis.spines[:].set(visible=True, color=PALE)
        for axis, text in zip(line, (names or {}).get(name, ())):
            axis.set_xlabel(text, fontsize=8.5, color=INK, labelpad=2)
    if keyed:
        handles = [plt.Rectangle((0, 0), 1, 1, facecolor=lasts[word], edgecolor=PALE, label=word) for word in lasts]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(lasts), fontsize=9.5, handlelength=1,
                      handletextpad=0.3, columnspacing=0.8)
    return figure


def _by_last_word(words: Sequence[Sequence[str]]) -> tuple[dict, np.ndarray]:
    """{last word: colour} and the palette (1 + K, 3) of class 0, white, and of names split into words."""
    found = list(dict.fromkeys(own[-1] for own in words))
    shades = [to_rgb(colour) for colour in TEN] if len(found) <= len(TEN) else \
        sns.husl_palette(len(found), s=0.9, l=0.6)
    lasts = dict(zip(found, shades))
    return lasts, np.array([(1.0, 1.0, 1.0), *(lasts[own[-1]] for own in words)])


def names_in(maps: torch.Tensor, classes: Sequence[str], most: int = 0, least: float = 0.0) -> list[str]:
    """What stands under each label map (n, h, w) of `label_maps`: the names in it, class 0 apart, one in a line.

    most: only so many with the most pixels (0: all, in the classes' order), then "..."; least: share of the named
    pixels that a name must have.
    """
    texts = []
    for values in maps:
        found, counts = (part.tolist() for part in values[values > 0].unique(return_counts=True))
        large = [(count, c) for c, count in zip(found, counts) if count >= least * sum(counts)]
        if most:
            large = sorted(large, key=lambda pair: -pair[0])
        texts.append("\n".join([classes[c] for _, c in large[:most or None]] + ["..."] * (0 < most < len(large))))
    return texts


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
                      fontsize=9, color="white" if value > 0.6 * end else INK)
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
        axis.set_yticks(range(len(top)), [name for _, name in top], fontsize=9)
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
def value_bars(rows: Sequence[Mapping], keys: Mapping[str, str], label: str, top: float | str | None = None,
               reference: Mapping[str, float] | None = None) -> Figure:
    """Horizontal bars, one panel for each of `keys` (key -> title). rows: {name, key: value, key_ci95 optional, own
    optional (drawn darker)}. top: end of the scale, by default each panel's largest; "shared": that of all panels.
    reference: key -> value of a dotted line."""
    figure, axes = plt.subplots(1, len(keys), figsize=(8, 0.36 * len(rows) + 1.2), sharey=True, squeeze=False)
    ends = {key: max([0, *(end for row in rows for end in (row[key], *(row.get(f"{key}_ci95") or ())))])
            for key in keys}
    top = max(ends.values()) if top == "shared" else top
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
        axis.set(title=title, xlabel=label, xlim=(0, 1.2 * (top or ends[key] or 1)))
        axis.grid(axis="x")
        axis.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[0, 0].invert_yaxis()
    return figure


@styled
def retrieved(queries: torch.Tensor, found: Sequence[torch.Tensor], right: Sequence[Sequence[bool]]) -> Figure:
    """Each query (3, H, W) with its nearest photos; a blue frame where the class is the query's, a dashed orange one
    where it is not. found: (k, 3, H, W) for each query."""
    columns = 1 + len(found[0])
    figure, axes = plt.subplots(len(queries), columns, squeeze=False, figsize=(
        WIDTH, 1.05 * WIDTH / columns * len(queries) + 0.6))
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0, rect=(0, 0, 1, 0.96))
    for line, query, photos, marks in zip(axes, queries, found, right):
        for axis, picture, mark in zip(line, [query, *photos], [None, *marks]):
            axis.imshow(((picture.clamp(-1, 1) + 1) / 2).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(False)
            colour = PALE if mark is None else BLUE if mark else ORANGE
            axis.spines[:].set(visible=True, color=colour, linewidth=1 if mark is None else 2.5, capstyle="butt",
                               linestyle="-" if mark is None or mark else OTHER)
    for axis, text in ((axes[0, 0], "sketch"), (axes[0, 1], "nearest photos, from left to right")):
        axis.text(0, 1.06, text, fontsize=10, transform=axis.transAxes).set_in_layout(False)  # wider than its panel
    handles = [plt.Line2D([], [], color=colour, linewidth=2.5, linestyle=style, label=label)
               for colour, style, label in ((BLUE, "-", "of the sketch's class"), (ORANGE, OTHER, "of another class"))]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure
