"""Exact reuse: in-vocabulary search revisits discrete states, and a state's gradient on a fixed pair is a constant."""

from collections import OrderedDict

import torch


class GradientMemo:
    """Gradients of one image, by discrete state and pair.

    pairs: number of fixed pairs. states: how many of the latest states are kept; a search returns to the states
    that it left last, and memory is bounded this way.
    """

    def __init__(self, pairs: int, states: int = 4):
        self.pairs, self.states = pairs, states
        self.known: OrderedDict[bytes, dict[int, torch.Tensor]] = OrderedDict()
        self.current: dict[int, torch.Tensor] = {}

    def enter(self, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
        """Makes the state (N, 5) the current one and returns what is known of it: {pair: gradient}."""
        key = tokens.cpu().numpy().tobytes()
        self.current = self.known.setdefault(key, {})
        self.known.move_to_end(key)
        while len(self.known) > self.states:
            self.known.popitem(last=False)
        return self.current

    def store(self, pair: int, gradient: torch.Tensor) -> None:
        """Keeps the gradient of the current state on a pair."""
        if not 0 <= pair < self.pairs:
            raise IndexError(f"pair {pair} is not one of the {self.pairs} fixed pairs")
        self.current[pair] = gradient.clone()
