"""What an inversion gives back for an image, and what it tells on its way."""

from dataclasses import dataclass, field

import torch

from dive_lib.objective import Cost


@dataclass
class Inverted:
    """The result for one image.

    tokens (N, F): the selected layout y*, before objects are dropped. nearest (N, F): the nearest entries that it was
    read from, the same unless the configuration asks for legal layouts. monitor: its monitor value.
    convergence_step: the step that reached it. curve: [step, monitor, forward-equivalents had the run ended here] at
    every evaluation. improvements: [step, monitor, tokens, nearest] whenever the monitor fell. cost: of this image
    alone.
    """

    tokens: torch.Tensor
    nearest: torch.Tensor
    monitor: float = float("inf")
    convergence_step: int = 0
    curve: list = field(default_factory=list)
    improvements: list = field(default_factory=list)
    states_visited: int = 0
    cost: Cost = field(default_factory=Cost)

    def consider(self, step: int, value: float, cost: int, tokens: torch.Tensor, nearest: torch.Tensor) -> None:
        """Takes the iterate of a step if its monitor value is below all earlier ones: the earliest minimum wins."""
        self.curve.append([step, value, cost])
        if value < self.monitor:
            self.tokens, self.nearest = tokens.cpu(), nearest.cpu()
            self.monitor, self.convergence_step = value, step
            self.improvements.append([step, value, tokens.tolist(), nearest.tolist()])

    def after(self, steps: int) -> "Inverted":
        """What a run of so many steps would have selected; exact where lr_end = 1. Of the cost, `curve` has the sum."""
        result = Inverted(self.tokens, self.nearest, curve=[c for c in self.curve if c[0] <= steps])
        for improvement in self.improvements:
            step, value, tokens, nearest = improvement
            if step <= steps:
                result.tokens, result.nearest = torch.tensor(tokens), torch.tensor(nearest)
                result.monitor, result.convergence_step = value, step
                result.improvements.append(improvement)
        return result

    def stopped_at(self, patience: int) -> int:
        """The step at which early stopping with this patience would have ended the run."""
        for step, *_ in self.curve:
            best = max(s for s, *_ in self.improvements if s <= step)
            if step - best >= patience:
                return step
        return self.curve[-1][0]


@dataclass
class Step:
    """What a trace is told after an optimiser step, of the I images that are not stopped.

    index: of the step, from 0. images (I,). tokens (I, N, F): the state that was differentiated. losses (I, batch) on
    the drawn pairs. gradient (I, N, F, d): of the step. embeddings (I, N, F, d): v after the step.
    """

    index: int
    images: torch.Tensor
    tokens: torch.Tensor
    losses: torch.Tensor
    gradient: torch.Tensor
    embeddings: torch.Tensor
