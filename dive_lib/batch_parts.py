"""A training step in parts of its batch, each on one core.

A small network's operations are too short for several threads, which wait for each other after every one. Parts of a
batch that are computed at the same time, each by a thread of its own, wait once per step. Their gradients are added in
a fixed order, so a step has the same bytes however many of its parts run at once: on one core, one after the other.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from dive_lib.provenance import cores


@dataclass(frozen=True)
class DrawnLoss:
    """An objective for train() whose batches can be split.

    draw: function (model, step, generator) -> tensors with the batch as first dimension: all that is random of a step.
    losses: function (model, *those tensors) -> (B,), the loss of each sample, which draws nothing.
    """

    draw: Callable[..., Sequence[torch.Tensor]]
    losses: Callable[..., torch.Tensor]

    def __call__(self, model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        return self.losses(model, *self.draw(model, step, generator)).mean()


class Parts:
    """Computes the gradients of what learns in a model, in `count` parts of each batch. One, or a model on a GPU: the
    plain step. context: makes what each forward pass runs under (autocast), in each thread anew.

    Raises ValueError for a model whose samples depend on each other or on the order of the parts.
    """

    def __init__(self, count: int, model: nn.Module, context: Callable[[], AbstractContextManager] = nullcontext):
        self.model, self.context, self._pool = model, context, None
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.count = 1 if self.parameters[0].is_cuda else count
        for name, module in model.named_modules() if self.count > 1 else ():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "p", 0) and \
                    isinstance(module, nn.modules.dropout._DropoutNd):
                raise ValueError(f"{type(model).__name__} has no parts: {name} ({type(module).__name__}) reads the "
                                 "whole batch or draws; set parts to 1")

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """In this block parts run beside each other, on as many cores as there are."""
        if self.count == 1:
            yield
            return
        with ThreadPoolExecutor(min(self.count, cores()), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            self._pool = pool
            try:
                yield
            finally:
                self._pool = None

    def step(self, objective: Callable[..., torch.Tensor], step: int, generator: torch.Generator) -> torch.Tensor:
        """The loss of one step, in a block of `at_once`; the gradients are left in the parameters, also where the loss
        is not finite. Raises TypeError where parts are asked for and the objective is no DrawnLoss.
        """
        if self.count == 1:
            if isinstance(objective, DrawnLoss):  # what draws by the network itself draws in the weights' precision
                drawn = objective.draw(self.model, step, generator)
                with self.context():
                    loss = objective.losses(self.model, *drawn).mean()
            else:
                with self.context():
                    loss = objective(self.model, step, generator)
            for parameter in self.parameters:
                parameter.grad = None
            loss.backward()
            return loss.detach()
        if not isinstance(objective, DrawnLoss):
            raise TypeError(f"this objective draws as it computes and has no parts; set parts to 1, not {self.count}")
        drawn = objective.draw(self.model, step, generator)
        chunks = zip(*(tensor.tensor_split(self.count) for tensor in drawn), strict=True)

        def part(chunk: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
            with self.context():
                loss = objective.losses(self.model, *chunk).sum() / len(drawn[0])
            return loss.detach(), torch.autograd.grad(loss, self.parameters, allow_unused=True)

        losses, gradients = zip(*self._pool.map(part, chunks))
        for parameter, *of_parts in zip(self.parameters, *gradients):
            known = [gradient for gradient in of_parts if gradient is not None]
            # laid out like the parameter, as the optimiser reads it, and no one else's
            parameter.grad = torch.empty_like(parameter).copy_(sum(known[1:], known[0])) if known else None
        return sum(losses[1:], losses[0])
