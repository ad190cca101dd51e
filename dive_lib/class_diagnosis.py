"""What a class-conditional model has learned of its condition: the loss under the true class and under others."""

import torch

from dive_lib.diagnosis import gap_rows
from dive_lib.dit import DiT
from dive_lib.objective import Pairs

COLUMNS = ("corruption", "t_low", "t_high", "gap", "share", "true_loss")
"""Of a gap table, in the order of `dit_gaps.csv`."""


def wrong_classes(labels: torch.Tensor, classes: int, generator: torch.Generator) -> torch.Tensor:
    """(B,) for every label another class, drawn evenly."""
    return (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes


def gap_table(model: DiT, latents: torch.Tensor, labels: torch.Tensor, ranges: list[tuple[int, int]], *, draws: int,
              seed: int) -> list[dict]:
    """By how much a wrong class and the null class raise the loss on the same (t, noise) pairs, by range of timesteps.

    Rows {corruption, t_low, t_high, gap, share: of images with gap > 0, true_loss}. latents (B, C, h, w), labels (B,).
    draws: pairs for each range, at random t, the same for all images.
    """
    generator, encode = torch.Generator().manual_seed(seed), model.grid.encode
    classes = len(model.grid.classes)
    wrong = {"wrong_class": encode(wrong_classes(labels, classes, generator)),
             "null_class": encode(torch.full_like(labels, classes))}
    pairs = [Pairs.draw(model, torch.randint(low, high, (draws,), generator=generator), generator, prior=False)
             for low, high in ranges]
    rows = gap_rows(model, latents, encode(labels), wrong, ranges, pairs)
    return [{column: row[column] for column in COLUMNS} for row in rows]
