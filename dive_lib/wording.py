"""How tables, figures and headlines word what was measured: intervals and the names of backbones."""

import re
from collections.abc import Sequence

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
