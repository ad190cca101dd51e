"""A shortlist of classes from one gradient: what few passes of DIVE say about all classes at once.

To first order, the loss of class c is L(v) + g . (v_c - v) with the gradient g of the loss at one state v, the null
class for example. So a forward and a backward pass on a few pairs rank the whole vocabulary, whatever its size, and
the Diffusion Classifier decides among the best. An approximation of ours: a class that the shortlist misses is lost.
"""

from dataclasses import replace

import torch

from dive_lib.diffusion_classifier import Classified, Elimination, eliminate
from dive_lib.objective import Cost, Objective, Pairs


def rank_classes(objective: Objective, latents: torch.Tensor, pairs: Pairs, state: int | None = None) -> torch.Tensor:
    """(I, K) all classes by their first-order loss for latents (I, 4, h, w), the most likely first.

    pairs: over which the gradient is a mean; they cost a forward and a backward pass each. state: the class at which
    it is taken, by default the null class.
    """
    grid, vocabulary = objective.ldm.grid, objective.ldm.vocabulary
    if len(pairs) < 1:
        raise ValueError("ranking classes needs at least one pair")
    token = grid.none_tokens if state is None else torch.tensor([state])
    context = objective.ldm.context(vocabulary(grid.encode(token).to(latents.device))).detach()
    gradient = context.new_zeros(len(latents), vocabulary.width)
    index = torch.arange(len(latents) * len(pairs), device=latents.device)
    for part in index.split(objective.chunk):
        image = part // len(pairs)
        _, gradients = objective.image_gradients(latents[image], context.expand(len(part), -1),
                                                 pairs[part % len(pairs)])
        gradient.index_add_(0, image, gradients)
    objective.cost += Cost(forward=len(index), backward=len(index))
    # L(v) - g . v is the same for all classes.
    return (gradient @ vocabulary.table(0)[:-1].T).argsort(dim=1, stable=True).cpu()


def classify_by_shortlist(objective: Objective, latents: torch.Tensor, rank_pairs: Pairs, pairs: Pairs, size: int,
                          elimination: Elimination, state: int | None = None) -> list[Classified]:
    """Ranks the classes by the gradient on rank_pairs, and eliminates among the `size` first ones on pairs.

    Raises ValueError for a shortlist of no class or of more classes than there are.
    """
    classes = len(objective.ldm.grid.classes)
    if not 1 <= size <= classes:
        raise ValueError(f"the shortlist must hold 1 to {classes} classes, got {size}")
    shortlist = rank_classes(objective, latents, rank_pairs, state)[:, :size]
    ranking = Cost(forward=len(rank_pairs), backward=len(rank_pairs))
    return [replace(result, cost=ranking + result.cost)
            for result in eliminate(objective, latents, pairs, elimination, shortlist)]
