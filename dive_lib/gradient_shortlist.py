"""A shortlist of classes from one gradient: what few passes of DIVE say about all classes at once.

To first order, the loss of class c is L(v) + g . (v_c - v) with the gradient g of the loss at one state v, the null
class for example. So a forward and a backward pass on a few pairs rank the whole vocabulary, whatever its size, and
the Diffusion Classifier decides among the best. An approximation of ours: a class that the shortlist misses is lost.

Far classes lie beyond the first order. `LossReading` learns what the same gradients say about them, from images whose
classes need not be known: its targets are the model's own losses, as the Diffusion Classifier finds them.
"""

from dataclasses import replace

import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from torch import nn

from dive_lib import checkpoint
from dive_lib.diffusion_classifier import Classified, Elimination, eliminate
from dive_lib.objective import Cost, Objective, Pairs


class LossReading(nn.Module):
    """A linear map from the gradients (I, P, d) at the null class, of P fixed pairs, to the losses (I, K) of all
    classes, up to a number for each image."""

    def __init__(self, pairs: int, width: int, classes: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(pairs * width))
        self.register_buffer("spread", torch.ones(pairs * width))
        self.register_buffer("weight", torch.zeros(pairs * width, classes))
        self.register_buffer("bias", torch.zeros(classes))

    def forward(self, gradients: torch.Tensor) -> torch.Tensor:
        return (gradients.flatten(1) - self.mean) / self.spread @ self.weight + self.bias

    def restricted(self, classes: list[int]) -> "LossReading":
        """The reading of a vocabulary cut to some classes."""
        part = LossReading(1, len(self.mean), len(classes)).to(self.mean.device)
        part.load_state_dict(self.state_dict() | {"weight": self.weight[:, classes], "bias": self.bias[classes]})
        return part


def fit_reading(gradients: torch.Tensor, errors: torch.Tensor, strength: float) -> LossReading:
    """Ridge regression of errors (N, K), less their mean over the classes, on gradients (N, P, d) of the same images.

    strength: of the penalty, times the number of features.
    """
    features = gradients.flatten(1).double().cpu().numpy()
    scaler = StandardScaler().fit(features)
    ridge = Ridge(alpha=strength * features.shape[1])
    ridge.fit(scaler.transform(features), (errors - errors.mean(1, keepdim=True)).double().cpu().numpy())
    reading = LossReading(gradients.shape[1], gradients.shape[2], errors.shape[1])
    reading.load_state_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in (
        ("mean", scaler.mean_), ("spread", scaler.scale_), ("weight", ridge.coef_.T), ("bias", ridge.intercept_))})
    return reading


def load_reading(directory, config: dict) -> LossReading:
    """A reading written by `checkpoint.save_model`. config: `checkpoint.load_config` of the folder."""
    reading = LossReading(config["pairs"], config["width"], config["classes"])
    return checkpoint.freeze(checkpoint.load_weights(directory, reading))


def class_gradients(objective: Objective, latents: torch.Tensor, pairs: Pairs,
                    state: int | None = None) -> torch.Tensor:
    """(I, P, d) gradient of the loss on each pair with respect to the class's embedding, for latents (I, 4, h, w).

    state: the class at which it is taken, by default the null class. Every pair costs a forward and a backward pass.
    """
    grid, vocabulary = objective.ldm.grid, objective.ldm.vocabulary
    if len(pairs) < 1:
        raise ValueError("ranking classes needs at least one pair")
    token = grid.none_tokens if state is None else torch.tensor([state])
    context = objective.ldm.context(vocabulary(grid.encode(token).to(latents.device))).detach()
    index, parts = torch.arange(len(latents) * len(pairs), device=latents.device), []
    for part in index.split(objective.chunk):
        _, gradients = objective.image_gradients(latents[part // len(pairs)], context.expand(len(part), -1),
                                                 pairs[part % len(pairs)])
        parts.append(gradients)
    objective.cost += Cost(forward=len(index), backward=len(index))
    return torch.cat(parts).view(len(latents), len(pairs), -1)


def predicted_losses(objective: Objective, latents: torch.Tensor, pairs: Pairs, state: int | None = None,
                     reading: LossReading | None = None) -> torch.Tensor:
    """(I, K) loss of all classes for latents (I, 4, h, w), up to a number for each image: to first order around
    `state`, or as `reading` has it, which was fitted at the null class on these pairs."""
    gradients = class_gradients(objective, latents, pairs, state)
    if reading is not None:
        return reading(gradients)
    return gradients.mean(1) @ objective.ldm.vocabulary.table(0)[:-1].T  # L(v) - g . v is the same for all classes


def rank_classes(predicted: torch.Tensor) -> torch.Tensor:
    """(I, K) all classes, the most likely first, by their predicted losses (I, K)."""
    return predicted.argsort(dim=1, stable=True).cpu()


def classify_by_shortlist(objective: Objective, latents: torch.Tensor, rank_pairs: Pairs, pairs: Pairs, size: int,
                          elimination: Elimination, reading: LossReading | None = None,
                          trust: float = 0.0) -> list[Classified]:
    """Ranks the classes by the gradients on rank_pairs, and eliminates among the `size` first ones on pairs.

    trust: number of pairs for which a prediction counts in the elimination. Far classes lie beyond the first order, so
    only a reading's predictions deserve any.
    Raises ValueError for a shortlist of no class or of more classes than there are.
    """
    classes = len(objective.ldm.grid.classes)
    if not 1 <= size <= classes:
        raise ValueError(f"the shortlist must hold 1 to {classes} classes, got {size}")
    predicted = predicted_losses(objective, latents, rank_pairs, reading=reading)
    shortlist = rank_classes(predicted)[:, :size]
    ranking = Cost(forward=len(rank_pairs), backward=len(rank_pairs))
    return [replace(result, cost=ranking + result.cost)
            for result in eliminate(objective, latents, pairs, elimination, shortlist, predicted, trust)]
