"""Exact reuse: in-vocabulary search revisits discrete states, and a state's loss on a fixed pair is a constant.

So is its gradient. A stretch of steps in which the state stays the same costs nothing once its pairs are known.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

import torch


@dataclass
class Known:
    """What is known of one discrete state, by pair: image losses and their gradients with respect to the context, and
    the prior loss's gradients with respect to the embeddings."""

    losses: dict[int, float] = field(default_factory=dict)
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)
    prior_gradients: dict[int, torch.Tensor] = field(default_factory=dict)


class StateMemo:
    """What is known of the states of one image.

    states: how many of the latest states are kept; a search among layouts returns to the states that it left last,
    and memory is bounded this way. 0: all, as for classes, of which few are visited.
    """

    def __init__(self, states: int = 4):
        self.states = states
        self.known: OrderedDict[bytes, Known] = OrderedDict()

    def enter(self, tokens: torch.Tensor) -> Known:
        """What is known of the state (N, F), which becomes the latest one. To be filled by the caller."""
        key = state_key(tokens)
        known = self.known.setdefault(key, Known())
        self.known.move_to_end(key)
        while self.states and len(self.known) > self.states:
            self.known.popitem(last=False)
        return known

    def losses(self, tokens: torch.Tensor) -> int:
        """On how many pairs the state's loss is known; the state does not become the latest one."""
        return len(self.known.get(state_key(tokens), Known()).losses)


def state_key(state: torch.Tensor) -> bytes:
    """Tokens or embeddings as a dictionary key."""
    return state.cpu().numpy().tobytes()
