"""The settings of Algorithm 1, for layouts and for classes."""

from dataclasses import dataclass

import torch

from dive_lib.schedule import evenly_spaced


@dataclass(frozen=True)
class InversionConfig:
    """The settings of Algorithm 1; the defaults are the paper's for detection, but for monitor_start.

    steps: optimiser steps. init: start from "none", or from a "random" vector with mean and standard deviation of the
    vocabulary, the same for all images (the published classification code). init_noise: scale of the noise added to
    the initial embeddings, in standard deviations of the vocabulary; without positions in the encoder all [none]
    slots are alike, and only noise tells them apart. batch: pairs per step. accumulation: micro-batches of a step;
    the published code adds up their mean losses, so the gradient is that of the mean times this number. lr: AdamW's
    rate, falling linearly to lr * lr_end. eps: AdamW's; of the size of the gradients, it lets a token move the faster
    the more the loss depends on it. t_low, t_high, t_interval: the evenly spaced timesteps. coarse_steps: for so many
    steps they come from a window of half the grid that moves from its top, where boxes attract from afar, to its
    bottom (0: from all of it, the paper). fixed_pairs: one fixed noise per timestep, as in the published
    classification code, or fresh noise at every draw, as in the text. in_vocabulary: equation 6, or v' = v.
    metric: "cosine" or "l2". exclude_none: search among the entries other than [none]. legal: search among legal
    layouts only: illegal boxes are opened in the forward pass, and the monitor reads whole objects (off in the paper).
    monitor_pairs, monitor_every: size and interval of the fixed-noise monitor; with 0 pairs the fixed pairs
    themselves are the monitor (published code). monitor_start: it also evaluates the start (the paper's monitor begins
    after a loop over the timesteps). monitor_nearest: it evaluates NN(v); off, it evaluates v (published code without
    in_vocabulary). patience: stop an image when its monitor has not fallen for so many steps (0: never).
    memoise: reuse what is known of a (state, pair). memo_states: for so many of the latest states (0: for all).
    antithetic: every second noise of the fixed pairs and of the monitor's is the opposite of the one before. seed: of
    all draws.
    """

    steps: int = 2000
    init: str = "none"
    init_noise: float = 0.0
    batch: int = 50
    accumulation: int = 1
    lr: float = 0.01
    lr_end: float = 1.0
    weight_decay: float = 0.01
    eps: float = 1e-8
    t_low: int = 0
    t_high: int = 1000
    t_interval: int = 5
    coarse_steps: int = 0
    fixed_pairs: bool = False
    in_vocabulary: bool = True
    metric: str = "cosine"
    exclude_none: bool = False
    legal: bool = False
    monitor_pairs: int = 200
    monitor_every: int = 4
    monitor_start: bool = True
    monitor_nearest: bool = True
    patience: int = 0
    memoise: bool = True
    memo_states: int = 4
    antithetic: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.metric not in ("cosine", "l2"):
            raise ValueError(f"metric must be 'cosine' or 'l2', got {self.metric!r}")
        if self.init not in ("none", "random"):
            raise ValueError(f"init must be 'none' or 'random', got {self.init!r}")
        if min(self.steps, self.batch, self.monitor_every) < 1 or min(self.monitor_pairs, self.memo_states) < 0:
            raise ValueError("steps, batch and monitor_every must be >= 1, monitor_pairs and memo_states >= 0, "
                             f"got {self}")
        if self.accumulation < 1 or self.batch % self.accumulation:
            raise ValueError(f"accumulation must divide the batch of {self.batch} pairs, got {self.accumulation}")
        if self.monitor_pairs == 0 and not self.fixed_pairs:
            raise ValueError("monitor_pairs = 0 makes the fixed pairs the monitor; set fixed_pairs to true")
        if not self.monitor_nearest and (self.in_vocabulary or self.legal):
            raise ValueError("monitor_nearest can only be false without in_vocabulary and legal")
        count = len(self.timesteps)
        if self.coarse_steps and (count + 1) // 2 < self.batch:
            raise ValueError(f"half of the {count} timesteps are fewer than a batch of {self.batch}; "
                             "lower batch or t_interval, or set coarse_steps to 0")

    @property
    def timesteps(self) -> torch.Tensor:
        return evenly_spaced(self.t_low, self.t_high, self.t_interval)
