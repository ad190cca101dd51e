"""Figures of what frozen features hold: heat maps over time step and stage, projections, principal components."""

from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from dive_lib.figures import (BLUE, BROWN, GREEN, GREY, INK, MUTED, ORANGE, PINK, SKY, VERMILION, YELLOW, colour_bar,
                              styled)


@styled
def heat_maps(grids: Mapping[str, Mapping], times: Sequence[int], stages: Sequence[str], network: str = "") -> Figure:
    """One panel for each granularity: value of every time step (down) and stage (across), the best cell framed.

    grids: title -> {values (T, S), best (row, column) or None, label of the values, limits: ends of the colour scale,
    by default those of the values}. Stages of more backbones follow each other. network: the whole figure's title.
    """
    wide = max(2.7, 0.5 * len(stages) + 1.1)
    figure, axes = plt.subplots(1, len(grids), figsize=(wide * len(grids), 0.3 * len(times) + 1.5), squeeze=False,
                                sharey=True)
    for axis, (title, grid) in zip(axes[0], grids.items()):
        values = np.asarray(grid["values"], dtype=float)
        low, high = grid.get("limits") or (np.nanmin(values), np.nanmax(values))
        image = axis.imshow(values, cmap="viridis", aspect="auto", interpolation="nearest", vmin=low, vmax=high)
        digits = 0 if high - low > 10 else 1
        for row, column in np.ndindex(values.shape):
            axis.text(column, row, f"{values[row, column]:.{digits}f}", ha="center", va="center", fontsize=8 - digits,
                      color="white" if values[row, column] < (low + high) / 2 else INK)
        if grid.get("best") is not None:
            row, column = grid["best"]
            axis.add_patch(plt.Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=VERMILION, linewidth=3))
        axis.set_xticks(range(len(stages)), stages, rotation=50, ha="right")
        axis.set(title=title, xlabel="")
        axis.grid(False)
        colour_bar(figure, image, axis, grid["label"])
    axes[0, 0].set_yticks(range(len(times)), times)
    axes[0, 0].set_ylabel("time step t")
    figure.suptitle(network, x=0.02, ha="left", fontweight="bold")
    return figure


@styled
def by_time(curves: Mapping[str, Mapping[str, np.ndarray]], times: Sequence[int], label: str) -> Figure:
    """Best value over the stages against t: one panel for each granularity, one line with its interval for each
    backbone, (3, T) of value, low and high."""
    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 3.2), squeeze=False)
    for axis, (title, lines) in zip(axes[0], curves.items()):
        for (name, values), marker in zip(lines.items(), cycle("os^vDPX*<>")):
            line, = axis.plot(times, values[0], marker + "-", markersize=4, linewidth=1.5, label=name)
            axis.fill_between(times, values[1], values[2], color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="time step t")
    axes[0, 0].set_ylabel(label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
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

    Colour: class; mark: sketch or photo.
    """
    labels, sketches = np.asarray(labels), np.asarray(sketches)
    figure, axes = plt.subplots(1, len(panels), figsize=(max(7.5, 2.5 * len(panels)), 3.4), squeeze=False)
    colours = [BLUE, ORANGE, GREEN, VERMILION, PINK, BROWN, GREY, YELLOW, SKY, INK]
    for axis, (title, points) in zip(axes[0], panels.items()):
        for kind, marker in ((False, "o"), (True, "x")):
            own = sketches == kind
            axis.scatter(*points[own].T, s=16, marker=marker, linewidth=1.0,
                         color=[colours[c % 10] for c in labels[own]])
        axis.set(title=title, xticks=[], yticks=[])
        axis.grid(False)
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=colours[c % 10], label=classes[c])
               for c in sorted(set(labels.tolist()))]
    handles += [plt.Line2D([], [], marker=marker, linestyle="", color=MUTED, label=name)
                for name, marker in (("photo", "o"), ("sketch", "x"))]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(7, len(handles)), handletextpad=0.1)
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
    """Feature maps as pictures: a block for each image (its picture first), time steps down, stages across.

    images (n, 3, H, W) in [-1, 1]; maps: t -> stage -> (n, h, w, 3) of `principal_colours`.
    """
    times, stages = list(maps), list(next(iter(maps.values())))
    columns = len(stages) + 1
    figure, axes = plt.subplots(len(times), columns * len(images), squeeze=False,
                                figsize=(0.92 * columns * len(images), 0.95 * len(times) + 0.4))
    for k, image in enumerate(images):
        for row, t in enumerate(times):
            first = axes[row, k * columns]
            first.imshow(((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
            first.set_visible(row == 0)
            for column, stage in enumerate(stages, start=1):
                axis = axes[row, k * columns + column]
                axis.imshow(maps[t][stage][k], interpolation="nearest")
                if row == 0:
                    axis.set_title(stage, fontsize=8, fontweight="normal", loc="center")
                if column == 1:
                    axis.set_ylabel(f"t = {t}", fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.grid(False)
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure
