"""Figures of layouts as a distribution: what real and sampled ones look like, and how a prior ranks them."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dive_lib.figures import BLUE, FOUND, GREY, INK, colour_bar, heat, styled
from dive_lib.layout import LayoutGrid

REAL_AND_SAMPLED = ("real", "sampled from the prior")
SHOWN = 16  # classes that a figure names; of more the most frequent in the real layouts


def layout_summary(layouts: Iterable, grid: LayoutGrid) -> dict[str, np.ndarray]:
    """What `layout_statistics` compares, of tokens (L, N, 5); only legal, complete objects count.

    objects (L,) per layout; classes (K,) share of all objects; class_height (K,) mean, NaN without objects;
    width, height, bottom (n,) in pixels of the model input; co_occurrence (K, K) share of all pairs.
    """
    decoded = [grid.decode(tokens) for tokens in layouts]
    k = len(grid.classes)
    boxes = np.concatenate([layout.boxes_xyxy.numpy().reshape(-1, 4) for layout in decoded])
    classes = np.concatenate([layout.class_ids.numpy().reshape(-1) for layout in decoded]).astype(int)
    pairs = np.zeros((k, k))
    for layout in decoded:
        counts = np.bincount(layout.class_ids.numpy(), minlength=k)
        pairs += np.outer(counts, counts) - np.diag(counts)
    number = np.bincount(classes, minlength=k)
    height = boxes[:, 3] - boxes[:, 1]
    with np.errstate(invalid="ignore"):
        class_height = np.bincount(classes, height, minlength=k) / number
    return {"objects": np.array([len(layout) for layout in decoded]), "class_height": class_height,
            "classes": number / max(1, number.sum()), "co_occurrence": pairs / max(1.0, pairs.sum()),
            "width": boxes[:, 2] - boxes[:, 0], "height": height, "bottom": boxes[:, 3]}


@styled
def layout_statistics(real: Mapping, sampled: Mapping, classes: Sequence[str], names=REAL_AND_SAMPLED) -> Figure:
    """Real layouts beside sampled ones in small multiples; both as `layout_summary` gives them."""
    figure, axes = plt.subplots(2, 3, figsize=(8, 5.2))
    pair = ((names[0], real, GREY, -0.2), (names[1], sampled, BLUE, 0.2))
    most = max(int(max(d["objects"], default=0)) for d in (real, sampled))
    shown = _most_frequent(real)
    for name, data, colour, shift in pair:
        share = np.bincount(np.asarray(data["objects"], dtype=int), minlength=most + 1)
        share = 100 * share / max(1, share.sum())
        axes[0, 0].bar(np.arange(most + 1) + shift, share, 0.4, color=colour, label=name)
        axes[0, 1].bar(np.arange(len(shown)) + shift, 100 * np.asarray(data["classes"])[shown], 0.4, color=colour)
        axes[0, 2].plot(np.asarray(data["class_height"])[shown], "o-" if shift > 0 else "s--", color=colour)
    axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set(xlabel="objects per layout", ylabel="layouts, percent")
    axes[0, 1].set(xlabel=_named(shown, classes), ylabel="objects, percent")
    axes[0, 2].set(xlabel=_named(shown, classes), ylabel="mean height, px")
    for axis in axes[0, 1:]:
        axis.set_xticks(range(len(shown)), [classes[c] for c in shown], rotation=90, fontsize=9)
    names = {"width": "box width", "height": "box height", "bottom": "lower edge of the box"}
    for axis, (key, label) in zip(axes[1], names.items()):
        edges = _edges(np.concatenate([real[key], sampled[key]]))
        for _, data, colour, shift in pair:
            share, _ = np.histogram(data[key], edges)
            axis.stairs(100 * share / max(1, share.sum()), edges, color=colour, fill=shift < 0, linewidth=1.8,
                        alpha=0.6 if shift < 0 else 1)
        axis.set(xlabel=f"{label}, px", ylabel="objects, percent" if key == "width" else "")
    figure.legend(loc="outside upper center", ncols=2)
    return figure


@styled
def co_occurrence(real: Mapping, sampled: Mapping, classes: Sequence[str], names=REAL_AND_SAMPLED) -> Figure:
    """Which classes share a layout: the pairs of `layout_summary`, real beside sampled, one colour scale."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 4.2), sharey=True)
    shown = _most_frequent(real)
    pairs, labels = np.ix_(shown, shown), [classes[c] for c in shown]
    top = 100 * max(np.max(np.asarray(d["co_occurrence"])[pairs]) for d in (real, sampled))
    for axis, data, name in zip(axes, (real, sampled), names):
        image = heat(axis, 100 * np.asarray(data["co_occurrence"])[pairs], labels, labels, "Blues", top)
        axis.tick_params(axis="x", rotation=90)
        axis.set(title=name, xlabel=_named(shown, classes) if len(shown) < len(classes) else "")
    colour_bar(figure, image, axes, "pairs of objects, percent")
    return figure


@styled
def ranking_heatmap(rows: Sequence[Mapping]) -> Figure:
    """How often a prior ranks a real layout before its corrupted copy: {prior, corruption, gap, share 0..1}."""
    priors = list(dict.fromkeys(row["prior"] for row in rows))
    names = list(dict.fromkeys(row["corruption"] for row in rows))
    share = np.full((len(priors), len(names)), np.nan)
    figure, axis = plt.subplots(figsize=(8, 0.62 * len(priors) + 1.5))
    for row in rows:
        i, j = priors.index(row["prior"]), names.index(row["corruption"])
        share[i, j] = 100 * row["share"]
        axis.text(j, i, f"{1000 * row['gap']:+.1f}\n{100 * row['share']:.0f} %", ha="center", va="center", fontsize=10,
                  color="white" if abs(row["share"] - 0.5) > 0.37 else INK)
    image = heat(axis, share, [name.replace("_", " ") for name in names], priors, FOUND, 100)
    axis.set(title="loss above the real layout's, times 1000, and share of layouts", ylabel="prior of")
    colour_bar(figure, image, axis, "real layout\npreferred, percent")
    return figure


def _most_frequent(real: Mapping) -> np.ndarray:
    """The classes that are shown, in their order."""
    return np.sort(np.argsort(-np.asarray(real["classes"]), kind="stable")[:SHOWN])


def _named(shown: np.ndarray, classes: Sequence[str]) -> str:
    return "class" if len(shown) == len(classes) else f"{len(shown)} most frequent\nof {len(classes)} classes"


def _edges(values: np.ndarray) -> np.ndarray:
    """At most 18 bins that each hold equally many of the values that a coordinate grid allows."""
    distinct = np.unique(values.round(3)) if len(values) else np.zeros(1)
    unit = np.diff(distinct).min(initial=np.inf) if len(distinct) > 1 else 1.0
    width = unit * np.ceil((np.ptp(distinct) / unit + 1) / 18)
    return np.arange(distinct[0] - unit / 2, distinct[-1] + unit / 2 + width, width)
