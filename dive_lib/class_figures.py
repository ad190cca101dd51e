"""Figures of classification, in the style of `figures`; accuracies are in percent."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator

from dive_lib.figures import BLUE, INK, MARKERS, MUTED, PALE, SKY, VERMILION, colour_bar, log_cost, step_edges, styled

@styled
def accuracy_bars(rows: Sequence[Mapping], paper_label: str = "paper, ImageNet") -> Figure:
    """Table IV: accuracy of each method, the paper's beside it.

    rows: {name, accuracy, accuracy_ci95 or None, paper or None}, top to bottom.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8, 0.42 * len(rows) + 1.2), sharey=True, width_ratios=[1.5, 1])
    for k, row in enumerate(rows):
        axes[0].barh(k, row["accuracy"], height=0.66, color=BLUE if "dive" in row.get("key", "") else SKY)
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
        axis.set_xticks(range(0, 101, 25))
        axis.grid(axis="x")
        axis.grid(axis="y", visible=False)
    axes[1].tick_params(axis="y", length=0)
    return figure


@styled
def accuracy_against_cost(curves: Sequence[Mapping], points: Sequence[Mapping]) -> Figure:
    """curves: rows {name, forward_equivalents, accuracy}, joined by name. points: the same, with accuracy_ci95."""
    figure, axis = plt.subplots(figsize=(7.5, 4.6))
    colours = iter(mpl.rcParams["axes.prop_cycle"].by_key()["color"] * 3)
    markers = iter(MARKERS)
    for name in dict.fromkeys(row["name"] for row in curves):
        own = [row for row in curves if row["name"] == name]
        axis.plot([row["forward_equivalents"] for row in own], [row["accuracy"] for row in own], next(markers) + "-",
                  markersize=3.5, linewidth=1.5, color=next(colours), label=name)
    for row, marker in zip(points, markers):
        colour = next(colours)
        if row.get("accuracy_ci95"):
            axis.plot([row["forward_equivalents"]] * 2, row["accuracy_ci95"], linewidth=4, alpha=0.35, color=colour,
                      solid_capstyle="butt")
        axis.plot(row["forward_equivalents"], row["accuracy"], marker, markersize=8, color=colour, label=row["name"])
    log_cost(axis.xaxis, axis.set_xscale)
    axis.set(xlabel="forward-equivalents per image", ylabel="accuracy, percent (bar: 95 % interval)")
    figure.legend(loc="outside lower center", ncols=2, handletextpad=0.4)
    return figure


@styled
def cost_against_classes(rows: Sequence[Mapping], known: int) -> Figure:
    """Cost and accuracy against the number of classes.

    rows: {name, classes, forward_equivalents, accuracy or None, accuracy_ci95 optional}. known: classes that have
    images; a dotted line marks where others begin.
    """
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.8))
    for name, marker in zip(dict.fromkeys(row["name"] for row in rows), MARKERS):
        own = sorted((row for row in rows if row["name"] == name), key=lambda row: row["classes"])
        for axis, key in zip(axes, ("forward_equivalents", "accuracy")):
            shown = [row for row in own if row[key] is not None]
            line, = axis.plot([row["classes"] for row in shown], [row[key] for row in shown], marker + "-",
                              markersize=5, linewidth=1.5, label=name)
            for row in shown:
                axis.plot([row["classes"]] * 2, row.get(f"{key}_ci95") or [row[key]] * 2, color=line.get_color(),
                          linewidth=4, alpha=0.25, solid_capstyle="butt")
    counts = sorted({row["classes"] for row in rows})
    for axis in axes:
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(counts, counts)
        axis.set_xlabel("possible classes")
        if counts[-1] > known:
            axis.axvline(known, color="0.6", linewidth=1, linestyle=":")
    log_cost(axes[0].yaxis, axes[0].set_yscale)
    axes[0].set(title="forward-equivalents per image")
    lowest = min(min(row.get("accuracy_ci95") or [row["accuracy"]]) for row in rows if row["accuracy"] is not None)
    axes[1].set(title="accuracy, percent (bar: 95 % interval)", ylim=(10 * (lowest // 10), 101))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
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
    label, prediction, monitor: [[step, value]]}.
    """
    centre = table.mean(0)
    _, _, axes_of_table = np.linalg.svd(table - centre, full_matrices=False)
    plane = axes_of_table[:2].T
    points = (table - centre) @ plane
    margin = 0.2 * np.ptp(points, axis=0)
    frame = list(zip(points.min(0) - margin, points.max(0) + margin))
    columns = min(3, len(paths))
    figure, grid = plt.subplots(2, columns, figsize=(8, 5.2), squeeze=False, height_ratios=[1.6, 1])
    for k, path in enumerate(paths[:columns]):
        axis, way = grid[0, k], (np.asarray(path["embeddings"]) - centre) @ plane
        axis.scatter(*points.T, s=8, color=PALE)
        axis.plot(*way.T, color=BLUE, linewidth=1.2)
        axis.plot(*way[0], "o", color=BLUE, markersize=5)
        met = sorted({*path["classes"], path["prediction"], path["label"]})
        axis.plot(*points[met].T, "o", markersize=4, color=INK)
        # Names, the leftmost class's to its left, lest those of neighbours meet.
        named = sorted({path["classes"][0], path["prediction"], path["label"]}, key=lambda c: points[c, 0])
        for c in named:
            left = len(named) > 1 and c == named[0]
            axis.annotate(classes[c], points[c], (-8 if left else 8, 0), textcoords="offset points", fontsize=9,
                          ha="right" if left else "left", va="center", color=INK, fontweight="bold",
                          path_effects=[withStroke(linewidth=2.5, foreground="white")])
        axis.plot(*points[path["label"]], "o", markersize=12, markerfacecolor="none", color=VERMILION)
        axis.set(title=f"{classes[path['label']]} read as {classes[path['prediction']]}", xticks=[], yticks=[],
                 xlim=frame[0], ylim=frame[1])
        axis.grid(False)
        step, value = np.array(path["monitor"]).T
        grid[1, k].step(step, value, where="post", color=BLUE, linewidth=1.4)
        grid[1, k].set(xlabel="step", ylabel="" if k else "monitor")
    return figure


@styled
def confusion_matrix(counts: np.ndarray, classes: Sequence[str], method: str = "") -> Figure:
    """Labels against answers of a method, percent of a label's images; `counts` (K, K)."""
    share = 100 * counts / np.maximum(1, counts.sum(1, keepdims=True))
    figure, axis = plt.subplots(figsize=(6.4, 5.4))
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    step = max(1, len(classes) // 10)
    ticks = range(0, len(classes), step)
    axis.set_xticks(ticks, [classes[k] for k in ticks])
    axis.set_yticks(ticks, [classes[k] for k in ticks])
    axis.grid(False)
    axis.set(xlabel="answer", ylabel="class", title=method)
    colour_bar(figure, image, axis, "share of the class's images, percent")
    return figure


@styled
def model_orders(rows: Mapping[str, Mapping], measures: Mapping[str, str]) -> Figure:
    """Table VI: one panel for each measure (key -> title), one bar for each model, with its interval `<key>_ci95`."""
    figure, axes = plt.subplots(1, len(measures), figsize=(8, 2.8), squeeze=False)
    for axis, (key, title) in zip(axes[0], measures.items()):
        values = [row[key] for row in rows.values()]
        axis.bar(range(len(rows)), values, width=0.6, color=[BLUE, SKY, PALE][:len(rows)])
        ends = []
        for k, row in enumerate(rows.values()):
            interval = row.get(f"{key}_ci95")
            if interval:
                axis.plot([k, k], interval, color=INK, linewidth=1.6, solid_capstyle="butt")
            ends.append(max([row[key], *(interval or ())]))
        shown = [f"{name}\n{row[key]:.{1 if row[key] >= 10 else 2}f}" for name, row in rows.items()]
        axis.set_xticks(range(len(rows)), shown, fontsize=9.5)
        axis.set_title(title, fontsize=10)
        axis.set(yticks=[], ylim=(0, 1.18 * max(ends) or 1))
        axis.spines["left"].set_visible(False)
        axis.grid(False)
    return figure
