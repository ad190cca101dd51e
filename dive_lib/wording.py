"""How tables, figures and headlines word what was measured: intervals, verdicts, names, alternative texts."""

import re
from collections.abc import Sequence

from matplotlib.figure import Figure

WORDS = {"layout_ldm": "layout LDM", "dit": "DiT", "stable_diffusion": "Stable Diffusion", "pixels": "raw pixels",
         "numbers_resnet": "ResNet of numbers", "resnet18": "ResNet-18", "dino": "DINO", "dinov2": "DINOv2"}
"""Names of `backbones` -> what tables and figures call them."""


def interval(ends: Sequence[float], digits: int = 1) -> str:
    """An interval as text: [63.7, 68.3]."""
    return "[" + ", ".join(f"{end:.{digits}f}" for end in ends) + "]"


def in_words(text: str) -> str:
    """A text with backbones named as in sentences: "backbone untrained_dit" -> "backbone untrained DiT"."""
    names = "|".join(WORDS)
    return re.sub(rf"\b({names})\b", lambda found: WORDS[found[0]], text.replace("untrained_", "untrained "))


def standing(ends: Sequence[float], words: Sequence[str] = ("below", "level with", "above")) -> str:
    """Where a difference with this interval puts what was measured; one whose interval holds zero is none."""
    return words[0] if ends[1] < 0 else words[2] if ends[0] > 0 else words[1]


def spelt(name: str) -> str:
    """A key as a figure or table spells it: "moved_16px" -> "moved 16 px"."""
    return re.sub(r"(\d)px\b", r"\1 px", name.replace("_", " "))


def alternative_text(figure: Figure, most: int = 400) -> str:
    """What a reader who cannot see the figure is told: its titles, axes and legends, in at most so many letters.

    Where there are none, as in a scheme, the texts in it.
    """
    found = [axis.get_title(loc) for axis in figure.axes for loc in ("left", "center")]
    found += [label for axis in figure.axes for label in (axis.get_xlabel(), axis.get_ylabel())]
    if not any(found):
        found = [text.get_text() for axis in figure.axes for text in axis.texts]
    legends = [*figure.legends, *filter(None, (axis.get_legend() for axis in figure.axes))]
    found += [figure.get_supylabel(), *(text.get_text() for legend in legends for text in legend.get_texts())]
    formula = re.compile(r"\\mathrm|[$\\{}]")  # read out, its letters are enough
    parts = dict.fromkeys(" ".join(formula.sub("", text).split()) for text in found)
    told = "; ".join(filter(None, parts))
    return told if len(told) <= most else told[:most].rpartition("; ")[0] + " ..."


def brief(name: str, letters: int) -> str:
    """A class's name that fits: without a WordNet id before its words, and of so many letters at most."""
    words = re.sub(r"^n\d{8} (?=.)", "", name)
    return words if len(words) <= letters else words[:letters - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
