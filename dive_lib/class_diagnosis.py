"""What a class-conditional model has learned of its condition: the loss under the true class and under others."""

import torch

from dive_lib.dit import DiT
from dive_lib.objective import Objective, Pairs


def wrong_classes(labels: torch.Tensor, classes: int, generator: torch.Generator) -> torch.Tensor:
    """(B,) for every label another class, drawn evenly."""
    return (labels + torch.randint(1, classes, labels.shape, generator=generator)) % classes


@torch.no_grad()
def gap_table(model: DiT, latents: torch.Tensor, labels: torch.Tensor, ranges: list[tuple[int, int]], *, draws: int,
              seed: int) -> list[dict]:
    """By how much a wrong class and the null class raise the loss on the same (t, noise) pairs, by range of timesteps.

    Rows {corruption, t_low, t_high, gap, share: of images with gap > 0, true_loss}. draws: pairs for each range, the
    same for all images.
    """
    generator, rows = torch.Generator().manual_seed(seed), []
    device = model.vocabulary.class_table.device
    objective, latents = Objective(model), latents.to(device)
    classes = len(model.grid.classes)
    wrong = {"wrong_class": wrong_classes(labels, classes, generator), "null_class": torch.full_like(labels, classes)}
    for low, high in ranges:
        t = torch.randint(low, high, (draws,), generator=generator)
        pairs = Pairs.draw(model, t, generator, prior=False)

        def loss(which):
            return objective.losses_per_pair(latents, model.grid.encode(which).to(device), pairs).mean(1)

        true = loss(labels)
        for name, others in wrong.items():
            gap = loss(others) - true
            rows.append({"corruption": name, "t_low": low, "t_high": high, "gap": gap.mean().item(),
                         "share": (gap > 0).float().mean().item(), "true_loss": true.mean().item()})
    return rows
