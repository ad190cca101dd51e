"""Charts of the report, all in one style: tidy data in, a matplotlib Figure out.

The style is meant for 800 pixels of width: seaborn's ticks theme and its colour-blind-safe palette. Each
function draws under that style whatever the caller has set. The figures are unknown to pyplot: a notebook saves and
shows one by `show`. AP is always in percent.
"""

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image, display
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from dive_lib.files import atomic_path, read_csv
from dive_lib.wording import alternative_text, spelt

BLUE, ORANGE, GREEN, VERMILION, PINK, BROWN, _, GREY, YELLOW, SKY = sns.color_palette("colorblind").as_hex()
INK, MUTED, PALE = "#222222", "#666666", "#d9d9d9"
MARKERS, DPI = "osD^vPX*<>", 130
FOUND = LinearSegmentedColormap.from_list("found", [VERMILION, "#f3b58c", "#f7f7f7", "#9fc6e0", BLUE])

STYLE = sns.axes_style("ticks") | sns.plotting_context("notebook") | {
    "figure.constrained_layout.use": True, "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.07, "figure.facecolor": "white", "font.family": ["DejaVu Sans"],
    "font.size": 11, "axes.labelsize": 11, "axes.titlesize": 11.5, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "xtick.labelsize": 10, "ytick.labelsize": 10, "legend.fontsize": 10,
    "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": MUTED,
    "axes.linewidth": 0.9, "xtick.color": INK, "ytick.color": INK, "text.color": INK, "axes.labelcolor": INK,
    "xtick.major.width": 0.9, "ytick.major.width": 0.9, "xtick.major.size": 4, "ytick.major.size": 4,
    "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8, "lines.linewidth": 2, "lines.markersize": 6, "patch.linewidth": 0,
    "axes.prop_cycle": mpl.cycler(color=[BLUE, ORANGE, GREEN, VERMILION, PINK, BROWN, GREY]),
}


def style() -> None:
    """Sets the style for what a notebook draws by itself, and the numbers of its tables (`table_number`)."""
    mpl.rcParams.update(STYLE)
    pd.options.display.float_format = table_number
    pd.options.display.precision = 1  # of the intervals in a table, which are lists


def table_number(value: float) -> str:
    """A number in a table: one decimal, or three digits of what is less than 1."""
    return f"{value:,.1f}" if not 0 < abs(value) < 1 else f"{value:.3g}"


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Decorator: draws under `STYLE`, and forgets the figure in pyplot."""
    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        with plt.style.context(["default", STYLE]):
            figure = draw(*args, **kwargs)
            plt.close(figure)
            return figure
    return wrapper


def save(figure: Figure, path: str | os.PathLike, dpi: int = DPI) -> Path:
    """Writes a PNG atomically and returns its path; equal figures give equal bytes."""
    path = Path(path)
    if path.suffix != ".png":
        raise ValueError(f"{path.name}: figures are saved as .png; change the suffix")
    with plt.style.context(["default", STYLE]), atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=dpi, metadata={"Software": None})
    return path


def show(figure: Figure, path: str | os.PathLike) -> None:
    """Saves a figure and shows, in a notebook, the file that was written, with an alternative text."""
    display(Image(filename=save(figure, path), alt=f"{spelt(Path(path).stem)}: {alternative_text(figure)}"))


@styled
def loss_curve(curves: Mapping[str, str | os.PathLike | Iterable],
               ylabel: str = "loss (MSE of the noise)") -> Figure:
    """Loss against optimisation step, one panel per name; bold: the mean over 2 % of the rows on each side.

    curves: name -> CSV file with columns step and loss, or rows (step, loss).
    """
    rows = -(-len(curves) // 3)
    columns = -(-len(curves) // rows)
    size = (8 if columns > 1 else 7, 2.9 * rows + 0.2)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis, (name, curve) in zip(axes.flat, curves.items()):
        if isinstance(curve, (str, os.PathLike)):
            curve = [(row["step"], row["loss"]) for row in read_csv(curve)]
        step, loss = np.array([tuple(row) for row in curve], dtype=float).reshape(-1, 2).T
        axis.plot(step, loss, color=SKY, linewidth=0.8, alpha=0.7)
        axis.plot(step, _smooth(loss, max(1, len(loss) // 50)), color=BLUE)
        if loss.min() > 0 and loss.max() > 4 * np.median(loss):  # else the first steps hide the rest
            axis.set_yscale("log")
        axis.set(title=name if len(curves) > 1 else "", xlabel="optimisation step")
    for axis in axes.flat[len(curves):]:
        axis.set_axis_off()
    figure.supylabel(ylabel, fontsize=11)
    return figure


@styled
def ablation_bars(rows: Sequence[Mapping], paper_label: str = "paper, COCO 2017") -> Figure:
    """Table III: AP and AP50 of each variant, the paper's beside them in a panel of their own scale.

    rows: {name, AP, AP50, AP_ci95: [low, high] or None, reference_AP: DIVE's on the row's images or None, paper_AP and
    paper_AP50 optional}, top to bottom.
    """
    paper = any(row.get("paper_AP") is not None for row in rows)
    figure, axes = plt.subplots(1, 1 + paper, figsize=(8, 0.62 * len(rows) + 1.3), sharey=True, squeeze=False,
                                width_ratios=[1.6, 1][:1 + paper])
    _bars(axes[0, 0], rows, "AP", "AP50", BLUE, SKY)
    references = [(row["reference_AP"], k) for k, row in enumerate(rows) if row.get("reference_AP") is not None]
    for value, k in references:  # above the bar, where no number stands
        axes[0, 0].plot(value, k - 0.46, "v", color=ORANGE, markersize=6.5)
    axes[0, 0].set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes[0, 0].set(xlabel="AP and AP50, percent (line: 95 % interval)", title="measured here")
    axes[0, 0].invert_yaxis()
    if paper:
        _bars(axes[0, 1], rows, "paper_AP", "paper_AP50", MUTED, PALE)
        axes[0, 1].set(xlabel="AP and AP50, percent", title=paper_label)
    axes[0, -1].tick_params(axis="y", length=0)
    handles = [mpl.patches.Patch(color=colour) for colour in (BLUE, SKY, MUTED, PALE)[:4 if paper else 2]]
    names = ["AP here", "AP50 here", "AP paper", "AP50 paper"][:len(handles)]
    if references:
        handles.append(mpl.lines.Line2D([], [], color=ORANGE, marker="v", linestyle="none"))
        names.append("AP of DIVE on the row's images (above the bar)")
    figure.legend(handles, names, loc="outside lower center", ncols=3)
    return figure


def _bars(axis, rows, key, light_key, colour, light):
    for k, row in enumerate(rows):
        for name, shift, fill in ((light_key, 0.2, light), (key, -0.2, colour)):
            value = row.get(name)
            if value is None:
                continue
            axis.barh(k + shift, value, height=0.38, color=fill)
            interval = row.get("AP_ci95") if name == "AP" else None
            if interval:
                axis.plot(interval, [k + shift] * 2, color=INK, linewidth=1.6, solid_capstyle="butt")
            end = max([value, *(interval or ())])
            axis.annotate(f"{value:.1f}", (end, k + shift), (4, 0), textcoords="offset points", va="center",
                          fontsize=10, color=INK if name == key else MUTED)
    axis.grid(axis="x")
    axis.grid(axis="y", visible=False)
    axis.margins(x=0.16)
    axis.set_xlim(left=0)


@styled
def steps_curve(rows: Sequence[Mapping], paper: Sequence[Mapping] = ()) -> Figure:
    """Table I: AP against optimisation steps.

    rows: {steps, AP, AP50, AP_ci95 or None, forward_equivalents per image}; paper: {steps, AP, minutes}.
    """
    figure, axes = plt.subplots(1, 2 if paper else 1, figsize=(8, 3.6), squeeze=False,
                                width_ratios=[1.6, 1] if paper else [1])
    rows, axis = sorted(rows, key=lambda row: row["steps"]), axes[0, 0]
    steps = [row["steps"] for row in rows]
    axis.plot(steps, [row["AP50"] for row in rows], "s--", color=SKY, label="AP50")
    axis.plot(steps, [row["AP"] for row in rows], "o-", color=BLUE, label="AP")
    known = [row for row in rows if row.get("AP_ci95")]
    if known:
        low, high = zip(*(row["AP_ci95"] for row in known))
        axis.fill_between([row["steps"] for row in known], low, high, color=BLUE, alpha=0.15, linewidth=0,
                          label="95 % interval of AP")
    _log_steps(axis, steps, [f"{row['steps']:,}\n{row['forward_equivalents']:,.0f}" for row in rows])
    axis.set(xlabel="optimisation steps\nforward-equivalents per image", ylabel="AP, percent",
             title="measured here", ylim=(0, None))
    axis.legend(loc="lower right")
    if paper:
        axis, steps = axes[0, 1], [row["steps"] for row in paper]
        axis.plot(steps, [row["AP"] for row in paper], "o-", color=MUTED)
        timed = all("minutes" in row for row in paper)
        minutes = [f"\n{row['minutes']:g}" if timed else "" for row in paper]
        _log_steps(axis, steps, [f"{step:,}{time}" for step, time in zip(steps, minutes)])
        axis.set(xlabel="optimisation steps" + ("\nminutes per image (RTX 3090)" if timed else ""),
                 title="paper, COCO 2017", ylim=(0, 1.15 * max(row["AP"] for row in paper)))
    return figure


def _log_steps(axis, values, labels):
    axis.set_xscale("log")
    axis.minorticks_off()
    axis.set_xticks(values, labels)


def step_edges(cap: int, every: int) -> np.ndarray:
    """Edges of about 20 bins of the steps 0 ... cap that hold equally many multiples of `every`."""
    width = every * max(1, round(cap / every / 20))
    return np.arange(-every / 2, cap + width, width)


@styled
def convergence_histogram(steps: Sequence[int], cap: int, every: int = 1) -> Figure:
    """Distribution of the step that gave each image its result.

    cap: the steps of the run. every: steps from one look of the monitor to the next; bins hold equally many looks.
    """
    mean = float(np.mean(steps))
    edges = step_edges(cap, every)
    figure, axis = plt.subplots(figsize=(7, 3.3))
    axis.hist(steps, bins=edges, color=BLUE, edgecolor="white", linewidth=1)
    axis.axvline(mean, color=VERMILION)
    right = mean < cap / 2
    axis.margins(y=0.2)
    axis.annotate(f"mean {mean:.0f} of {cap:,} steps", (mean, 0.97), (6 if right else -6, 0), va="top",
                  xycoords=axis.get_xaxis_transform(), textcoords="offset points", color=VERMILION,
                  ha="left" if right else "right", bbox={"facecolor": "white", "alpha": 0.8, "pad": 1.5})
    axis.set(xlabel="convergence step (lowest monitor value)", ylabel="images", xlim=(edges[0], edges[-1]))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


@styled
def early_stopping_curve(rows: Sequence[Mapping]) -> Figure:
    """AP against the share of steps that early stopping saves.

    rows: {patience in steps, saving in [0, 1], AP, AP_ci95 optional}.
    """
    rows = sorted(rows, key=lambda row: row["saving"])
    figure, axis = plt.subplots(figsize=(7, 3.5))
    axis.plot([100 * row["saving"] for row in rows], [row["AP"] for row in rows], "o-", color=BLUE)
    for row in rows:
        x = 100 * row["saving"]
        if row.get("AP_ci95"):
            axis.plot([x, x], row["AP_ci95"], color=SKY, linewidth=4, solid_capstyle="butt", zorder=1)
        axis.annotate(row["patience"], (x, row["AP"]), (6, 6), textcoords="offset points")
    axis.set(xlabel="steps saved, percent (number: patience in steps; all of them: no stopping)",
             ylabel="AP, percent", ylim=(0, None), xlim=(-3, 103))
    return figure


@styled
def gap_heatmap(rows: Sequence[Mapping], condition: str = "layout", items: str = "scenes") -> Figure:
    """How much worse the image loss is at a corrupted condition than at the true one, by range of timesteps.

    rows: {corruption, t_low, t_high, gap (loss - true loss), share of items with gap > 0 in [0, 1]}.
    """
    names = list(dict.fromkeys(row["corruption"] for row in rows))
    ranges = sorted({(row["t_low"], row["t_high"]) for row in rows})
    share = np.full((len(names), len(ranges)), np.nan)
    figure, axis = plt.subplots(figsize=(8, 0.62 * len(names) + 1.5))
    for row in rows:
        i, j = names.index(row["corruption"]), ranges.index((row["t_low"], row["t_high"]))
        share[i, j] = 100 * row["share"]
        gap = f"{1000 * row['gap']:+.1f}".replace("-", "\N{MINUS SIGN}").replace("\N{MINUS SIGN}0.0", "+0.0")
        axis.text(j, i, f"{gap}\n{100 * row['share']:.0f} %", ha="center", va="center", fontsize=10,
                  color="white" if abs(row["share"] - 0.5) > 0.37 else INK)
    image = heat(axis, share, [f"{low}\N{EN DASH}{high}" for low, high in ranges], list(map(spelt, names)), FOUND, 100)
    axis.tick_params(axis="x", labelsize=8 if len(ranges) > 8 else None)
    axis.set(xlabel="timesteps", title=f"loss above the true {condition}'s, times 1000, and share of {items}")
    colour_bar(figure, image, axis, f"{items} where the true\n{condition} is preferred, percent")
    return figure


def heat(axis, values, columns, rows, cmap, top):
    """A labelled matrix from 0 to `top`; values (rows, columns)."""
    image = axis.imshow(values, cmap=cmap, vmin=0, vmax=top, aspect="auto")
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.grid(False)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    return image


def colour_bar(figure, image, axes, label):
    """The scale of a `heat` beside the axes."""
    figure.colorbar(image, ax=axes, pad=0.02, label=label).outline.set_visible(False)


@styled
def monitor_scatter(true_losses: Sequence[float], found_losses: Sequence[float],
                    perfect: Sequence[bool]) -> Figure:
    """Monitor at the found layout against that at the true one, a point per image.

    perfect: images whose result is right. Of the others, those above the diagonal are search failures
    (the true layout has the lower loss and was not found), those on or below it model failures.
    """
    true, found, perfect = np.asarray(true_losses), np.asarray(found_losses), np.asarray(perfect, dtype=bool)
    search, model = ~perfect & (found > true), ~perfect & (found <= true)
    figure, axis = plt.subplots(figsize=(6.2, 5.4))
    low, high = min(true.min(), found.min()), max(true.max(), found.max())
    limits = low - 0.06 * (high - low), high + 0.06 * (high - low)
    axis.fill_between(limits, limits, limits[1], color=VERMILION, alpha=0.06, linewidth=0)
    axis.fill_between(limits, limits[0], limits, color=BLUE, alpha=0.06, linewidth=0)
    axis.plot(limits, limits, color=MUTED, linewidth=1)
    points = {"right": (perfect, PALE, MUTED, "o"), "search failure": (search, VERMILION, "white", "^"),
              "model failure": (model, BLUE, "white", "s")}
    for name, (mask, colour, edge, marker) in points.items():
        axis.scatter(true[mask], found[mask], s=30, color=colour, marker=marker, edgecolor=edge,
                     linewidth=0.6, alpha=0.85, label=f"{name}: {mask.sum()} of {len(true)}")
    place = {"transform": axis.transAxes, "style": "italic"}
    axis.text(0.03, 0.70, "search failure:\nthe truth scores better", color=VERMILION, **place)
    axis.text(0.97, 0.05, "model failure:\nthe result scores better", color=BLUE, ha="right", **place)
    axis.set(xlim=limits, ylim=limits, xlabel="monitor loss at the true layout",
             ylabel="monitor loss at the found layout")
    axis.set_aspect("equal")
    axis.legend(loc="upper left", handletextpad=0.2)
    return figure


@styled
def cost_accuracy(rows: Sequence[Mapping]) -> Figure:
    """AP against cost: {name, forward_equivalents per image, AP, AP_ci95 optional, label of the point optional}.

    A line for each name.
    """
    figure, axis = plt.subplots(figsize=(7, 4.4))
    names = dict.fromkeys(row["name"] for row in rows)
    for name, marker, cycle in zip(names, MARKERS, mpl.rcParams["axes.prop_cycle"]()):
        own = [row for row in rows if row["name"] == name]
        axis.plot([row["forward_equivalents"] for row in own], [row["AP"] for row in own], marker + "-", markersize=7,
                  label=name, **cycle)
        for row in own:
            if row.get("AP_ci95"):
                axis.plot([row["forward_equivalents"]] * 2, row["AP_ci95"], linewidth=4, alpha=0.35,
                          solid_capstyle="butt", **cycle)
            axis.annotate(row.get("label", ""), (row["forward_equivalents"], row["AP"]), (-6, 5), ha="right",
                          textcoords="offset points", fontsize=9.5)
    log_cost(axis.xaxis, axis.set_xscale)
    axis.set(xlabel="forward-equivalents per image (logarithmic)", ylabel="AP, percent (bar: 95 % interval)")
    axis.margins(0.1)
    figure.legend(loc="outside lower center", ncols=2, handletextpad=0.2)
    return figure


def log_cost(axis: mpl.axis.Axis, set_scale: Callable[[str], None]) -> None:
    """A logarithmic axis of costs in plain numbers; set_scale: set_xscale or set_yscale of its axes."""
    set_scale("log")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axis.set_minor_formatter(NullFormatter())


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Mean over `width` neighbours on each side, fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - width, 0), np.minimum(index + width + 1, len(values))
    return (total[high] - total[low]) / (high - low)
