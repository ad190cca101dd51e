"""Figures of classification, in the style of `figures`; accuracies are in percent."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from dive_lib.figures import (BLUE, GREEN, INK, MARKERS, MUTED, PALE, SKY, VERMILION, colour_bar, log_cost, step_edges,
                              styled)
from dive_lib.wording import brief

KINDS = {"dive": (BLUE, "a search by gradient: DIVE, its variants, ours"),
         "diffusion_classifier": (SKY, "every class tried: Diffusion Classifier"), "": (GREEN, "a trained network")}
"""Of the rows of Table IV by how their keys begin: colour and what the legend says."""


@styled
def accuracy_bars(rows: Sequence[Mapping], paper_label: str = "paper, ImageNet") -> Figure:
    """Table IV: accuracy of each method, the paper's beside it; in the bar its images where others have more.

    rows: {name, key, accuracy, accuracy_ci95 or None, n_images, paper or None}, top to bottom.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8, 0.4 * len(rows) + 1.9), sharey=True, width_ratios=[1.5, 1])
    most, present = max(row["n_images"] for row in rows), {}
    for k, row in enumerate(rows):
        kind = next(start for start in KINDS if row["key"].startswith(start))
        present[kind] = axes[0].barh(k, row["accuracy"], height=0.66, color=KINDS[kind][0])
        if row["n_images"] < most:
            axes[0].annotate(f"{row['n_images']} images", (0, k), (6, 0), textcoords="offset points", va="center",
                             fontsize=9, color=INK if kind == "diffusion_classifier" else "white")
        end = row["accuracy"]
        if row.get("accuracy_ci95"):
            axes[0].plot(row["accuracy_ci95"], [k, k], color=INK, linewidth=1.6, solid_capstyle="butt")
            end = max(end, row["accuracy_ci95"][1])
        axes[0].annotate(f"{row['accuracy']:.1f}", (end, k), (4, 0), textcoords="offset points", va="center",
                         fontsize=10)
        if row.get("paper") is not None:
            axes[1].barh(k, row["paper"], height=0.66, color=PALE)
            axes[1].annotate(f"{row['paper']:.1f}", (row["paper"], k), (4, 0), textcoords="offset points", va="center",
                             fontsize=10, color=MUTED)
    axes[0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[0].invert_yaxis()
    for axis, title in zip(axes, ("measured here", paper_label)):
        axis.set(xlabel="accuracy, percent", title=title, xlim=(0, 114))
        axis.margins(y=0.01)
        axis.set_xticks(range(0, 101, 25))
        axis.grid(axis="x")
        axis.grid(axis="y", visible=False)
    axes[0].set_xlabel(f"accuracy, percent, of {most} images\nunless said (line: 95 % interval)")
    axes[1].tick_params(axis="y", length=0)
    shown = [kind for kind in KINDS if kind in present]
    figure.legend([present[kind] for kind in shown], [KINDS[kind][1] for kind in shown], loc="outside lower center",
                  ncols=2)
    return figure


@styled
def accuracy_against_cost(curves: Sequence[Mapping], points: Sequence[Mapping]) -> Figure:
    """Lines of fewer images than others are dashed: values of different images are not comparable.

    curves: rows {name, forward_equivalents, accuracy, n_images}, joined by name. points: the same, with accuracy_ci95;
    forward_equivalents_once, where there is such a cost, is written beside the point.
    """
    figure, axis = plt.subplots(figsize=(8, 5))
    most = max(row["n_images"] for row in (*curves, *points))
    colours = iter(mpl.rcParams["axes.prop_cycle"].by_key()["color"] * 3)
    markers = iter(MARKERS)
    for name in dict.fromkeys(row["name"] for row in curves):
        own = [row for row in curves if row["name"] == name]
        axis.plot([row["forward_equivalents"] for row in own], [row["accuracy"] for row in own], next(markers),
                  linestyle="-" if own[0]["n_images"] == most else (0, (4, 2)), markersize=3.5, linewidth=1.5,
                  color=next(colours), label=f"{name} ({own[0]['n_images']})")
    for row, marker in zip(points, markers):
        colour = next(colours)
        if row.get("accuracy_ci95"):
            axis.plot([row["forward_equivalents"]] * 2, row["accuracy_ci95"], linewidth=4, alpha=0.35, color=colour,
                      solid_capstyle="butt")
        axis.plot(row["forward_equivalents"], row["accuracy"], marker, markersize=8, color=colour,
                  label=f"{row['name']} ({row['n_images']})")
        if row.get("forward_equivalents_once"):
            cost = f"{row['forward_equivalents']:,.0f} + {row['forward_equivalents_once']:,} once"
            axis.annotate(cost, (row["forward_equivalents"], row["accuracy"]), (7, 4), textcoords="offset points",
                          va="bottom", fontsize=9.5)
    log_cost(axis.xaxis, axis.set_xscale)
    axis.margins(x=0.1)
    axis.set(xlabel="forward-equivalents per image", ylabel="accuracy, percent (bar: 95 % interval)")
    figure.legend(loc="outside lower center", ncols=2, handletextpad=0.4, fontsize=9.5,
                  title="in brackets: images; dashed: fewer than the others", title_fontsize=9.5)
    return figure


@styled
def cost_against_classes(rows: Sequence[Mapping], known: int) -> Figure:
    """Cost and accuracy against the number of classes.

    rows: {name, classes, forward_equivalents, accuracy or None, accuracy_wilson95 optional, n_images}. known: classes
    that have images; a dotted line marks where others begin. Methods of equal accuracy stand side by side.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8, 4), width_ratios=[1, 1.25])
    names, counts = list(dict.fromkeys(row["name"] for row in rows)), sorted({row["classes"] for row in rows})
    beside = max(counts[-1] / counts[0], 2) ** (1 / 55)  # from one method's bar to the next, as a factor
    for k, (name, marker) in enumerate(zip(names, MARKERS)):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["classes"])
        line, = axes[0].plot([row["classes"] for row in own], [row["forward_equivalents"] for row in own], marker + "-",
                             markersize=5, linewidth=1.5, label=name)
        read = [row for row in own if row["accuracy"] is not None]
        places = [row["classes"] * beside ** (k - (len(names) - 1) / 2) for row in read]
        axes[1].plot(places, [row["accuracy"] for row in read], marker, markersize=5, color=line.get_color())
        axes[1].plot(places, [row["accuracy"] for row in read], linewidth=0.7, color=line.get_color())
        for place, row in zip(places, read):
            axes[1].plot([place] * 2, row.get("accuracy_wilson95") or [row["accuracy"]] * 2, color=line.get_color(),
                         linewidth=3, alpha=0.35, solid_capstyle="butt")
    for axis in axes:
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(counts, counts)
        axis.set_xlabel("possible classes")
        if counts[-1] > known:
            axis.axvline(known * beside ** (len(names) / 2 + 0.5), color="0.5", linewidth=1, linestyle=":")
    log_cost(axes[0].yaxis, axes[0].set_yscale)
    axes[0].set(title="forward-equivalents per image")
    read = [row for row in rows if row["accuracy"] is not None]
    images = sorted({row["n_images"] for row in read})
    lowest = min(min(row.get("accuracy_wilson95") or [row["accuracy"]]) for row in read)
    axes[1].set(title=f"accuracy, percent, of {' to '.join(map(str, images[:1] + images[1:][-1:]))} images",
                ylim=(max(0, 5 * ((lowest - 7) // 5)), 101))
    if counts[-1] > known:
        edge = axes[1].get_lines()[-1].get_xdata()[0]
        for text, side, shift in (("known classes", "right", -4), ("some with random\nembeddings", "left", 4)):
            axes[1].annotate(text, (edge, 0.02), (shift, 0), xycoords=axes[1].get_xaxis_transform(), ha=side,
                             textcoords="offset points", va="bottom", fontsize=9, color=MUTED)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9.5,
                  title="bar: 95 % interval (Wilson); methods are set side by side", title_fontsize=9.5)
    return figure


@styled
def convergence(steps: Sequence[int], cap: int, visited: Sequence[int], every: int = 1) -> Figure:
    """Distributions of the step that gave each image its answer and of the number of classes that it met.

    cap: the steps of the run. every: steps of a loop; bins hold equally many ends of loops.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.1))
    values = [np.asarray(steps), np.asarray(visited)]
    edges = [step_edges(cap, every), np.arange(1, max(visited) + 2) - 0.5]
    for axis, data, bins in zip(axes, values, edges):
        axis.hist(data, bins=bins, color=BLUE, edgecolor="white", linewidth=0.8)
        axis.axvline(data.mean(), color=VERMILION)
        axis.set_title(f"mean {data.mean():.1f}", color=VERMILION, fontweight="normal")
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(xlabel="convergence step (lowest monitor value)", ylabel="images")
    axes[1].set_xlabel("classes met at the ends of the loops")
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@styled
def embedding_paths(table: np.ndarray, paths: Sequence[Mapping], classes: Sequence[str]) -> Figure:
    """The way of v through the vocabulary, in the plane of the table's two principal components, and its monitor.

    table (K, d): the classes' embeddings. paths: per image {embeddings (S, d), classes: nearest class at each step,
    label, prediction, monitor: [[step, value]]}. Each panel shows the whole way and the whole table.
    """
    centre = table.mean(0)
    _, sizes, axes_of_table = np.linalg.svd(table - centre, full_matrices=False)
    plane, shares = axes_of_table[:2].T, 100 * sizes[:2] ** 2 / (sizes ** 2).sum()
    points = (table - centre) @ plane
    columns = min(3, len(paths))
    figure, grid = plt.subplots(2, columns, figsize=(8, 5.4), squeeze=False, height_ratios=[1.6, 1])
    for k, path in enumerate(paths[:columns]):
        axis, way = grid[0, k], (np.asarray(path["embeddings"]) - centre) @ plane
        axis.scatter(*points.T, s=8, color=PALE)
        axis.plot(*way.T, color=BLUE, linewidth=1.2)
        axis.plot(*way[0], "o", color=BLUE, markersize=5)
        met = sorted({*path["classes"], path["prediction"], path["label"]})
        axis.plot(*points[met].T, "o", markersize=4, color=INK)
        axis.plot(*points[path["label"]], "o", markersize=12, markerfacecolor="none", color=VERMILION)
        axis.margins(0.12)
        title = f"{brief(classes[path['label']], 21)} read as {brief(classes[path['prediction']], 13)}"
        axis.set(title=title if len(title) < 24 else title.replace(" read as ", "\nread as "), xticks=[], yticks=[],
                 xlabel=f"PC1 ({shares[0]:.0f} %)", ylabel="" if k else f"PC2 ({shares[1]:.0f} %)")
        axis.grid(False)
        _name_classes(axis, points, {path["classes"][0], path["prediction"], path["label"]}, classes,
                      np.concatenate([way, points[met]]))
        step, value = np.array(path["monitor"]).T
        grid[1, k].step(step, value, where="post", color=BLUE, linewidth=1.4)
        grid[1, k].set(xlabel="step", ylabel="" if k else "monitor")
    return figure


def _name_classes(axis, points, named, classes, drawn):
    """Writes names beside points (K, 2), each on a side where what is drawn (n, 2) leaves room for it."""
    low, high = np.array([axis.get_xlim(), axis.get_ylim()]).T
    unit = (high - low) / (170, 190)  # one point of the page, about
    for c in sorted(named):
        name = brief(classes[c], 16)
        width = 2.9 * len(name)  # half the name's
        ends = np.array([[-width, 0], [0, 0], [width, 0]])
        sides = [(a, b) for b in (0, 14, -14, 26, -26) for a in (width + 9, -width - 9, 0) if a or b]

        def room(side, ends=ends, point=points[c]):
            spots = point + (ends + side) * unit
            border = min(((spots - low) / unit).min(), ((high - spots) / unit).min())
            return min(border, np.linalg.norm((drawn - spots[:, None]) / unit, axis=-1).min())

        side = max(sides, key=lambda side: (min(room(side), 9), -np.hypot(*side)))  # near, where there is room enough
        drawn = np.concatenate([drawn, points[c] + (ends + side) * unit])
        axis.annotate(name, points[c], side, textcoords="offset points", fontsize=9, ha="center", va="center",
                      color=INK, fontweight="bold", path_effects=[withStroke(linewidth=2.5, foreground="white")],
                      arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 3})


@styled
def confusion_matrix(counts: np.ndarray, classes: Sequence[str], method: str = "") -> Figure:
    """Labels against answers of a method, percent of a label's images; `counts` (K, K)."""
    share = 100 * counts / np.maximum(1, counts.sum(1, keepdims=True))
    figure, axis = plt.subplots(figsize=(6.4, 5.4))
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    step = max(1, len(classes) // 10)
    ticks = range(0, len(classes), step)
    names = [brief(classes[k], 16) for k in ticks]
    axis.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 4 else 0)
    axis.set_yticks(ticks, names)
    axis.grid(False)
    axis.set(xlabel="answer", ylabel="class", title=method)
    colour_bar(figure, image, axis, "share of the class's images, percent")
    return figure


@styled
def model_orders(rows: Mapping[str, Mapping], measures: Mapping[str, str], paper: Mapping[str, Mapping] | None = None,
                 paper_label: str = "paper", notes: Sequence[str] = ()) -> Figure:
    """Table VI: one panel for each measure (key -> title), one bar for each model, with its interval `<key>_ci95`.

    paper: the paper's models in the same way, in panels beneath; a measure that they lack has none. notes: what stands
    beneath the first measure here, and in the paper.
    """
    lines = [("here", rows, [BLUE, SKY, PALE])] + ([(paper_label, paper, [MUTED, PALE])] if paper else [])
    figure, axes = plt.subplots(len(lines), len(measures), figsize=(8, 2.3 * len(lines) + 0.5), squeeze=False)
    for panels, (name, models, colours) in zip(axes, lines):
        panels[0].set_ylabel(name)
        for axis, key in zip(panels, measures):
            _model_bars(axis, models, key, colours)
    for axis, title in zip(axes[0], measures.values()):
        axis.set_title(title, fontsize=10)
    for axis, note in zip(axes[:, 0], notes):
        axis.set_xlabel(note, fontsize=9)
    return figure


def _model_bars(axis, models, key, colours):
    axis.set(yticks=[])
    axis.spines["left"].set_visible(False)
    axis.grid(False)
    shown = {name: row for name, row in models.items() if key in row}
    axis.bar(range(len(shown)), [row[key] for row in shown.values()], width=0.6, color=colours[:len(shown)])
    intervals = [row.get(f"{key}_ci95") or () for row in shown.values()]
    for k, interval in enumerate(intervals):
        if interval:
            axis.plot([k, k], interval, color=INK, linewidth=1.6, solid_capstyle="butt")
    axis.set_xticks(range(len(shown)), [f"{name}\n{row[key]:.{1 if row[key] >= 10 else 2}f}"
                                        for name, row in shown.items()], fontsize=9)
    ends = [end for row, interval in zip(shown.values(), intervals) for end in (row[key], *interval)]
    axis.set_ylim(0, 1.18 * max(ends, default=0) or 1)
    if not shown:
        axis.text(0.5, 0.5, "\N{EN DASH}", transform=axis.transAxes, ha="center")
        axis.spines["bottom"].set_visible(False)
