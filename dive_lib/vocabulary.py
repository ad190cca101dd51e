"""The vocabularies v_theta of DIVE: a table of class embeddings and tables of coordinate embeddings.

Each table's last row is [none]. The tables are trained with the layout-to-image model and frozen afterwards; the
layout prior diffuses their rows, and inversion searches among them.
"""

import math

import torch
from torch import nn

from dive_lib.layout import LayoutGrid


class LayoutVocabulary(nn.Module):
    """Embedding tables for (class, x1, y1, x2, y2).

    grid: what the indices mean. width: embedding width d. shared_coordinates: one coordinate table for the four
    corners (the only reading of the paper's 363M parameters that needs no 65,536-entry table) or one for each.
    init: "normal" (std `std`, as CompVis's token tables) or "sinusoid" (coordinates start as Fourier features of
    their value, so that neighbouring coordinates have neighbouring embeddings from the first step). highest: cycles
    over the image of the finest feature. Gradient steps on an embedding reach the next coordinates, not far ones, as
    long as similarity falls with distance; with 8 cycles, coordinates 6 steps apart are already unrelated.
    """

    def __init__(self, grid: LayoutGrid, width: int, *, shared_coordinates: bool = True, init: str = "normal",
                 std: float = 0.02, highest: float = 8.0):
        super().__init__()
        if init not in ("normal", "sinusoid"):
            raise ValueError(f"vocabulary init must be 'normal' or 'sinusoid', got {init!r}")
        self.grid, self.width, self.shared_coordinates = grid, width, shared_coordinates
        self.class_table = nn.Parameter(torch.randn(len(grid.classes) + 1, width) * std)
        tables = 1 if shared_coordinates else 4
        coordinates = torch.randn(tables, grid.bins + 1, width) * std
        if init == "sinusoid":
            coordinates[:, :-1] = std * math.sqrt(2) * fourier_features(grid.bins, width, highest=highest)
        self.coordinate_tables = nn.Parameter(coordinates)

    def table(self, field: int) -> torch.Tensor:
        """(V + 1, d) the vocabulary of one of the five fields, [none] last."""
        if field == 0:
            return self.class_table
        return self.coordinate_tables[0 if self.shared_coordinates else field - 1]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Vocabulary lookup v_theta(y): tokens (..., N, 5) -> embeddings (..., N, 5, d)."""
        return torch.stack([self.table(field)[tokens[..., field]] for field in range(5)], dim=-2)

    @property
    def std(self) -> float:
        """Standard deviation over all entries: the scale that learning rates and the prior's noise refer to."""
        rows = torch.cat([self.class_table, self.coordinate_tables.flatten(0, 1)]).detach()
        return rows.std().item()


def fourier_features(bins: int, width: int, lowest: float = 0.25, highest: float = 8.0) -> torch.Tensor:
    """(bins, width) sines and cosines of the coordinate, with `lowest` to `highest` cycles over the image."""
    position = torch.linspace(0, 1, bins)[:, None]
    cycles = torch.logspace(math.log10(lowest), math.log10(highest), width // 2)[None]
    angles = 2 * math.pi * position * cycles
    features = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([features, features.new_zeros(bins, width - features.shape[1])], dim=1)
