"""Figures of what frozen features hold: heat maps over time step and stage, projections, principal components."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from dive_lib.figures import (BLUE, BROWN, GREEN, GREY, INK, MUTED, ORANGE, PALE, PINK, SKY, VERMILION, YELLOW,
                              styled)


WIDTH = 8.0  # inches of a figure at most: 1040 pixels, which are shown on 800
CELL = 0.42  # inches of a heat map's cell at least, for a number of 9 points in it


@styled
def heat_maps(grids: Mapping[str, Mapping], times: Sequence[int], stages: Sequence[str], network: str = "") -> Figure:
    """One panel for each granularity: value of every time step (down) and stage (across), the best cell framed.

    grids: title -> {values (T, S), best (row, column) or None, label of the values, limits: ends of the colour scale,
    by default those of the values, chance: optional, a value marked on the scale}. Panels stand below each other where
    cells would be too narrow for their numbers. network: the whole figure's title.
    """
    across = max(1, min(len(grids), int((WIDTH - 0.8) / (CELL * len(stages) + 0.25))))
    down = -(-len(grids) // across)
    wide = min(WIDTH, 0.8 + across * (max(0.5 * len(stages), 1.9) + 0.25))
    figure, axes = plt.subplots(down, across, squeeze=False, sharey=True, figsize=(
        wide, down * (0.29 * len(times) + 1.55) + 0.25 * bool(network)))
    for axis, (title, grid) in zip(axes.flat, grids.items()):
        values = np.asarray(grid["values"], dtype=float)
        low, high = grid.get("limits") or (np.nanmin(values), np.nanmax(values))
        image = axis.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest", vmin=low, vmax=high)
        digits = 0 if high - low > 10 else 1
        for row, column in np.ndindex(values.shape):
            axis.text(column, row, f"{values[row, column]:.{digits}f}", ha="center", va="center", fontsize=9.5,
                      color="white" if values[row, column] < (low + high) / 2 else INK)
        if grid.get("best") is not None:
            row, column = grid["best"]
            axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=VERMILION, linewidth=3))
        axis.set_xticks(range(len(stages)), stages, rotation=50, ha="right", rotation_mode="anchor")
        axis.set(title=title)
        axis.grid(False)
        bar = figure.colorbar(image, ax=axis, location="bottom", pad=0.03, aspect=25, label=grid["label"])
        bar.outline.set_visible(False)
        if grid.get("chance") is not None:
            _mark_chance(bar, grid["chance"], low, high)
    for axis in axes.flat[len(grids):]:
        axis.set_axis_off()
    for axis in axes[:, 0]:
        axis.set_yticks(range(len(times)), times)
        axis.set_ylabel("time step t")
    figure.suptitle(network, x=0.02, ha="left", fontweight="bold")
    return figure


def _mark_chance(bar, chance: float, low: float, high: float) -> None:
    """A tick of its own at the lower part of a colour bar, in the place of those that its text would cover."""
    ticks = [tick for tick in bar.get_ticks() if chance + 0.5 * (high - low) < tick <= high]
    text = f"{chance:.0f}" if chance == round(chance) else f"{chance:.1f}"
    bar.set_ticks([chance, *ticks], labels=[f"chance {text}", *(f"{tick:g}" for tick in ticks)])
    bar.ax.get_xticklabels()[0].set_horizontalalignment("left")


@styled
def by_time(curves: Mapping[str, Mapping[str, np.ndarray]], times: Sequence[int], label: str, *,
            timeless: Sequence[str] = (), chance: Mapping[str, float] | None = None) -> Figure:
    """Best value over the stages against t: one panel for each granularity, one line with its interval for each
    backbone, (3, T) of value, low and high.

    timeless: backbones without time steps, measured once: dashed lines; one far above the others is written instead at
    the panel's upper end, so that it does not press them together. chance: granularity -> value, dotted.
    """
    figure, axes = plt.subplots(1, len(curves), figsize=(WIDTH, 3.7), squeeze=False)
    for axis, (title, lines) in zip(axes[0], curves.items()):
        timed = [values for name, values in lines.items() if name not in timeless]
        low, high = (min(v[1].min() for v in timed), max(v[2].max() for v in timed)) if timed else (0, 0)
        beyond = []
        colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
        for (name, values), marker, colour in zip(lines.items(), cycle("os^vDPX*<>"), cycle(colours)):
            if name not in timeless:
                axis.plot(times, values[0], marker + "-", markersize=4, linewidth=1.5, color=colour, label=name)
                axis.fill_between(times, values[1], values[2], color=colour, alpha=0.15, linewidth=0)
                continue
            far = timed and values[0][0] > high + 0.6 * (high - low)
            axis.axhline(np.nan if far else values[0][0], color=colour, linestyle="--", linewidth=1.5, label=name)
            beyond += [(name, values[0][0], colour)] if far else []
        if chance and title in chance:
            axis.axhline(chance[title], color=MUTED, linestyle=":", linewidth=1.2,
                         label="chance" if axis is axes[0, 0] else None)
        for k, (name, value, colour) in enumerate(beyond):
            axis.annotate(f"{name} {value:.1f} \N{UPWARDS ARROW}", (0.98, 0.98 - 0.1 * k), xycoords="axes fraction",
                          ha="right", va="top", color=colour, fontsize=9.5)
        axis.margins(y=0.08 + 0.16 * bool(beyond))
        axis.set(title=title, xlabel="time step t")
    axes[0, 0].set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


def projected(features: torch.Tensor, seed: int = 0) -> np.ndarray:
    """(n, 2) t-SNE of standardised features (n, d), exact and seeded, so the same each time."""
    x = features.double()
    x = ((x - x.mean(0)) / x.std(0).clamp(min=1e-6)).numpy()
    perplexity = min(30, (len(x) - 1) // 3)
    return TSNE(2, perplexity=perplexity, init="pca", method="exact", max_iter=500, random_state=seed).fit_transform(x)


@styled
def projections(panels: Mapping[str, np.ndarray], labels: Sequence[int], sketches: Sequence[bool],
                classes: Sequence[str]) -> Figure:
    """Figure 3: points (n, 2) of the same images, one panel for each time step.

    Colour: class, of more than ten only the first ten; mark: sketch or photo.
    """
    labels, sketches = np.asarray(labels), np.asarray(sketches)
    present = sorted(set(labels.tolist()))
    figure, axes = plt.subplots(1, len(panels), figsize=(WIDTH, max(2.6, WIDTH / len(panels) + 0.9)), squeeze=False)
    colours = dict(zip(present, [BLUE, ORANGE, GREEN, VERMILION, PINK, BROWN, GREY, YELLOW, SKY, INK]))
    named = np.isin(labels, list(colours))
    for axis, (title, points) in zip(axes[0], panels.items()):
        for kind, marker in ((False, "o"), (True, "x")):
            for own in (~named & (sketches == kind), named & (sketches == kind)):
                axis.scatter(*points[own].T, s=15 if kind else 12, marker=marker, linewidth=1.0,
                             color=[colours.get(c, PALE) for c in labels[own]], zorder=2 if named[own].any() else 1)
        axis.set(title=title, xticks=[], yticks=[])
        axis.grid(False)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=colour, label=classes[c])
               for c, colour in colours.items()]
    if len(present) > len(colours):
        handles.append(plt.Line2D([], [], marker="o", linestyle="", color=PALE,
                                  label=f"{len(present) - len(colours)} other classes"))
    handles += [plt.Line2D([], [], marker=marker, linestyle="", color=MUTED, label=name)
                for name, marker in (("photo", "o"), ("sketch", "x"))]
    figure.legend(handles=handles, loc="outside lower center", handletextpad=0.1,
                  ncols=min(7 if max(map(len, classes)) < 12 else 4, len(handles)))
    return figure


def principal_colours(features: torch.Tensor) -> np.ndarray:
    """(n, h, w, 3) in [0, 1]: the first three principal components of all places of maps (n, C, h, w) as red, green and
    blue. The components' signs are fixed, so that the colours are the same each time."""
    n, _, h, w = features.shape
    x = features.double().permute(0, 2, 3, 1).flatten(0, 2)
    x = x - x.mean(0)
    _, vectors = torch.linalg.eigh(x.T @ x)
    axes = vectors[:, -3:].flip(1)
    axes = axes * torch.sign(axes.gather(0, axes.abs().argmax(0, keepdim=True)))
    values = x @ axes
    low, high = values.quantile(0.02, dim=0), values.quantile(0.98, dim=0)
    return ((values - low) / (high - low).clamp(min=1e-9)).clamp(0, 1).view(n, h, w, -1).numpy()


@styled
def component_maps(images: torch.Tensor, maps: Mapping[int, Mapping[str, np.ndarray]]) -> Figure:
    """Feature maps as pictures: a block for each image (its picture first), time steps down, stages across; blocks
    stand below each other where they would be too narrow for the stages' names.

    images (n, 3, H, W) in [-1, 1]; maps: t -> stage -> (n, h, w, 3) of `principal_colours`.
    """
    times, stages = list(maps), list(next(iter(maps.values())))
    columns = len(stages) + 1
    beside = max(1, min(len(images), int(WIDTH / (0.62 * columns))))
    rows, shares = -(-len(images) // beside), ([1.0] * columns + [0.3]) * beside
    side = min(0.95, WIDTH / sum(shares[:-1]))
    figure, axes = plt.subplots(rows * len(times), len(shares) - 1, squeeze=False, width_ratios=shares[:-1], figsize=(
        side * sum(shares[:-1]), rows * (side * len(times) + 0.4)))
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        axis.spines[:].set_visible(False)
        axis.set_visible(False)
    for k, image in enumerate(images):
        top, left = k // beside * len(times), k % beside * (columns + 1)
        axes[top, left].imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
        axes[top, left].set_visible(True)
        for row, t in enumerate(times, start=top):
            for column, stage in enumerate(stages, start=left + 1):
                axis = axes[row, column]
                axis.set_visible(True)
                axis.imshow(maps[t][stage][k], interpolation="nearest")
                if row == top:
                    axis.set_title(stage, fontsize=9.5, fontweight="normal", loc="center")
                if column == left + 1:
                    axis.set_ylabel(f"t = {t}", fontsize=9)
    return figure
