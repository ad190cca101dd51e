"""The Diffusion Classifier (Li et al., ICCV 2023): the class under which a diffusion model predicts the noise best.

It enumerates: every class on every (t, noise) pair, one forward pass each. Its adaptive variant eliminates classes in
stages, each on more pairs than the last, as `eval_prob_adaptive` of the published code. All images are evaluated
together, and all classes of an image see the same pairs.
"""

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from dive_lib.inversion import fixed_pairs
from dive_lib.inversion_config import InversionConfig
from dive_lib.objective import Cost, Objective, Pairs
from dive_lib.progress import Progress


def shared_pairs(objective: Objective, config: InversionConfig) -> Pairs:
    """Fixed pairs with one noise for all timesteps."""
    pairs = fixed_pairs(objective, config)
    pairs.noise[:] = pairs.noise[:1].clone()
    return pairs


def evenly_spread(count: int, total: int, opposite: bool = False) -> list[int]:
    """`count` of the indices below `total`, as the published code spreads its timesteps. ValueError for more.

    opposite: of pairs whose noises are opposite by two, both or none are taken; of an odd `count`, one is alone.
    """
    if not 1 <= count <= total:
        raise ValueError(f"{count} of {total} pairs were asked for; choose from 1 to {total}")
    if opposite and count < total // 2 * 2:
        both = evenly_spread((count + 1) // 2, total // 2)
        return [index for k in both for index in (2 * k, 2 * k + 1)][:count]
    step = total // count
    return list(range(step // 2, total, step)[:count])


@dataclass
class Classified:
    """The result for one image.

    prediction: class. errors (K,): mean error of every class over the pairs on which it was evaluated, infinite for
    one that was never evaluated. evaluated (K,): number of these pairs. cost: of this image.
    """

    prediction: int
    errors: torch.Tensor
    evaluated: torch.Tensor
    cost: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class Elimination:
    """Stages of the adaptive classifier: stage s takes pairs[s] evenly spread pairs and keeps keep[s] classes.

    Pairs of earlier stages count and are not evaluated again. The published settings (`to_keep`, `n_samples`) are
    keep (500, 50, 10, 1), pairs (50, 100, 500, 1000) for ImageNet and (5, 1), (50, 500) for CIFAR-10. Of several
    classes kept by the last stage, the best is the answer.
    """

    keep: tuple[int, ...]
    pairs: tuple[int, ...]

    def __post_init__(self):
        object.__setattr__(self, "keep", tuple(self.keep))
        object.__setattr__(self, "pairs", tuple(self.pairs))
        if len(self.keep) != len(self.pairs) or not self.keep:
            raise ValueError(f"elimination needs as many numbers of pairs as of classes to keep, got {self}")
        if min(self.keep + self.pairs) < 1 or any(a < b for a, b in pairwise(self.keep)):
            raise ValueError(f"numbers of pairs and of classes to keep must be >= 1, and the latter fall, got {self}")
        if any(a >= b for a, b in pairwise(self.pairs)):
            raise ValueError(f"every stage needs more pairs than the one before, got {self.pairs}")

    def stages(self, total: int, opposite: bool = False) -> list[torch.Tensor]:
        """Indices of the new pairs of each stage among `total`: spread evenly, those evaluated before left out.

        opposite: as of `evenly_spread`.
        """
        if self.pairs[-1] > total:
            raise ValueError(f"the last stage asks for {self.pairs[-1]} pairs, but there are {total}")
        seen, stages = set(), []
        for count in self.pairs:
            new = [k for k in evenly_spread(count, total, opposite) if k not in seen]
            seen.update(new)
            stages.append(torch.tensor(new, dtype=torch.long))
        return stages


def class_errors(objective: Objective, latents: torch.Tensor, pairs: Pairs, candidates: torch.Tensor | None = None,
                 label: str = "diffusion classifier") -> torch.Tensor:
    """(I, M, P) error of every candidate class on every pair for latents (I, 4, h, w).

    candidates: classes (I, M); all classes but the null class by default, M = K. Raises ValueError for candidates that
    are not classes or not of these images.
    """
    classes = len(objective.ldm.grid.classes)
    if candidates is None:
        candidates = torch.arange(classes).expand(len(latents), -1)
    _check(latents, candidates, classes, pairs)
    tokens = objective.ldm.grid.encode(torch.arange(classes)).to(latents.device)
    each = candidates.shape[1] * len(pairs)
    with Progress(len(latents), label, unit="images") as progress:
        index = torch.arange(len(latents) * each)
        parts = []
        for part in index.split(objective.chunk):
            image, pair = part // each, part % len(pairs)
            layout = candidates.flatten()[part // len(pairs)]
            where = (indices.to(latents.device) for indices in (image, layout, pair))
            parts.append(objective.losses_at(latents, tokens, pairs, *where))
            progress.update(int(image[-1]) + 1 - progress.done)
    return torch.cat(parts).view(*candidates.shape, len(pairs))


def enumerate_classes(objective: Objective, latents: torch.Tensor, pairs: Pairs) -> list[Classified]:
    """The Diffusion Classifier: every class on all pairs."""
    return eliminate(objective, latents, pairs, Elimination((1,), (len(pairs),)))


def eliminate(objective: Objective, latents: torch.Tensor, pairs: Pairs, elimination: Elimination,
              candidates: torch.Tensor | None = None, predicted: torch.Tensor | None = None,
              trust: float = 0.0) -> list[Classified]:
    """The adaptive Diffusion Classifier, for latents (I, 4, h, w), on fixed pairs.

    candidates: classes (I, M) among which the first stage chooses, all by default. predicted (I, K): an estimate of
    every class's mean error, up to a number for each image, that counts as `trust` pairs beside the evaluated ones.
    """
    classes = len(objective.ldm.grid.classes)
    if candidates is None:
        candidates = torch.arange(classes).expand(len(latents), -1)
    if predicted is None:
        predicted, trust = torch.zeros(()), 0.0
    candidates = candidates.sort(1).values  # of equal errors the class with the lower number is kept
    sums, evaluated = torch.zeros(len(latents), classes, dtype=torch.float64), torch.zeros(len(latents), classes)
    for keep, new in zip(elimination.keep, elimination.stages(len(pairs), pairs.opposite)):
        if len(new) and (candidates.shape[1] > 1 or not evaluated.any()):
            errors = class_errors(objective, latents, pairs[new.to(latents.device)], candidates)
            sums.scatter_add_(1, candidates, errors.double().sum(2).cpu())
            evaluated.scatter_add_(1, candidates, torch.full(candidates.shape, float(len(new))))
        means = ((sums + trust * predicted.cpu()) / (evaluated + trust)).gather(1, candidates)
        best = means.argsort(dim=1, stable=True)[:, :keep]
        candidates = candidates.gather(1, best)
        predictions = candidates[:, 0]
        candidates = candidates.sort(1).values
    errors = torch.where(evaluated > 0, sums / evaluated, torch.inf)
    return [Classified(int(prediction), errors[i], evaluated[i].long(), Cost(forward=int(evaluated[i].sum())))
            for i, prediction in enumerate(predictions)]


def _check(latents: torch.Tensor, candidates: torch.Tensor, classes: int, pairs: Pairs) -> None:
    if len(candidates) != len(latents) or candidates.ndim != 2 or candidates.shape[1] < 1:
        raise ValueError(f"candidates must be ({len(latents)} images, M >= 1), got {tuple(candidates.shape)}")
    if len(pairs) < 1:
        raise ValueError("classes are compared on at least one pair")
    if candidates.min() < 0 or candidates.max() >= classes:
        raise ValueError(f"candidates must be classes from 0 to {classes - 1}, got {int(candidates.min())} to "
                         f"{int(candidates.max())}")
