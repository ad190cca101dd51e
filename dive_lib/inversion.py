"""Algorithm 1 of DIVE: the layout of an image by gradient descent on the condition of a frozen diffusion model.

Many images are inverted in one batch. Each has its own embeddings and optimiser state, and all share the draws of
timesteps and noises, so an image's result does not depend on its batch. Only gradients with respect to the
condition are computed, and nothing is computed twice for the same discrete state and (t, noise) pair.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from dive_lib.memo import GradientMemo
from dive_lib.objective import Cost, Objective, Pairs
from dive_lib.progress import Progress
from dive_lib.schedule import evenly_spaced
from dive_lib.straight_through import legal_objects, nearest_tokens, open_illegal_pairs


@dataclass(frozen=True)
class InversionConfig:
    """The settings of Algorithm 1; the defaults are the paper's.

    steps: optimiser steps. init_noise: scale of the noise added to the initial embeddings, in standard deviations
    of the vocabulary; without positions in the encoder all [none] slots are alike, and only noise tells them
    apart. batch: pairs per step. lr: AdamW's rate, falling linearly to lr * lr_end. eps: AdamW's; of the size of
    the gradients, it lets a token move the faster the more the loss depends on it. t_low, t_high, t_interval: the
    evenly spaced timesteps. coarse_steps: for so many steps they come from a window of half the grid that moves from
    its top, where boxes attract from afar, to its bottom (0: from all of it, the paper). fixed_pairs: one fixed
    noise per timestep, as in the published classification code, or fresh noise at every draw, as in the text.
    in_vocabulary: equation 6, or v' = v. metric: "cosine" or "l2". legal: search among legal layouts only: illegal
    boxes are opened in the forward pass, and the monitor reads whole objects (off in the paper). monitor_pairs,
    monitor_every: size and interval of the fixed-noise monitor. patience: stop an image when its monitor has not
    fallen for so many steps (0: never). memoise: reuse what is known of a (state, pair). bf16: bfloat16 autocast.
    seed: of all draws.
    """

    steps: int = 2000
    init_noise: float = 0.0
    batch: int = 50
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
    legal: bool = False
    monitor_pairs: int = 200
    monitor_every: int = 4
    patience: int = 0
    memoise: bool = True
    bf16: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.metric not in ("cosine", "l2"):
            raise ValueError(f"metric must be 'cosine' or 'l2', got {self.metric!r}")
        if min(self.steps, self.batch, self.monitor_every, self.monitor_pairs) < 1:
            raise ValueError(f"steps, batch, monitor_every and monitor_pairs must be >= 1, got {self}")
        count = len(self.timesteps)
        if self.coarse_steps and (count + 1) // 2 < self.batch:
            raise ValueError(f"half of the {count} timesteps are fewer than a batch of {self.batch}; "
                             "lower batch or t_interval, or set coarse_steps to 0")

    @property
    def timesteps(self) -> torch.Tensor:
        return evenly_spaced(self.t_low, self.t_high, self.t_interval)


@dataclass
class Inverted:
    """The result for one image.

    tokens (N, 5): the selected layout y*, before objects are dropped. nearest (N, 5): the nearest entries that it was
    read from, the same unless the configuration asks for legal layouts. monitor: its monitor value.
    convergence_step: the step that reached it. curve: [step, monitor, forward-equivalents so far] at every
    evaluation. improvements: [step, monitor, tokens, nearest] whenever the monitor fell. cost: of this image alone.
    """

    tokens: torch.Tensor
    nearest: torch.Tensor
    monitor: float = float("inf")
    convergence_step: int = 0
    curve: list = field(default_factory=list)
    improvements: list = field(default_factory=list)
    states_visited: int = 0
    cost: Cost = field(default_factory=Cost)

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


def monitor_pairs(objective: Objective, config: InversionConfig) -> Pairs:
    """The monitor's fixed pairs, the same for all images: timesteps spread evenly over the grid, noises saved once."""
    grid = config.timesteps
    index = torch.linspace(0, len(grid) - 1, config.monitor_pairs).round().long()
    generator = torch.Generator().manual_seed(config.seed + 7919)
    return Pairs.draw(objective.ldm, grid[index], generator, prior=objective.uses_prior)


def invert(objective: Objective, latents: torch.Tensor, config: InversionConfig,
           start: torch.Tensor | None = None, label: str = "inversion") -> list[Inverted]:
    """Inverts images, given as latents (I, 4, h, w). start: initial tokens (I, N, 5), all [none] by default."""
    return _Run(objective, latents, config, start).finish(label)


class _Run:
    """The state of one batch. `active` indexes the images that are not stopped."""

    def __init__(self, objective, latents, config, start):
        self.objective, self.latents, self.config = copy.copy(objective), latents, config
        self.ldm, self.vocabulary = objective.ldm, objective.ldm.vocabulary
        self.none = self.vocabulary.grid.none_tokens.to(latents.device)
        tokens = self.ldm.grid.empty(len(latents)) if start is None else start
        self.v = self.vocabulary(tokens.to(latents.device)).detach().clone()
        if config.init_noise:  # the same for all images
            noise = torch.randn(self.v.shape[1:], generator=torch.Generator().manual_seed(config.seed + 15485863))
            self.v = self.v + config.init_noise * self.vocabulary.std * noise.to(latents.device)
        self.moments = [torch.zeros_like(self.v), torch.zeros_like(self.v)]
        self.generator = torch.Generator().manual_seed(config.seed)
        self.monitor = monitor_pairs(objective, config)
        self.fixed = None
        if config.fixed_pairs:
            fixed = torch.Generator().manual_seed(config.seed + 104729)
            self.fixed = Pairs.draw(self.ldm, config.timesteps, fixed, prior=objective.uses_prior)
        self.queue = torch.empty(0, dtype=torch.long)
        self.results = [Inverted(t.cpu(), t.cpu()) for t in self.nearest(torch.arange(len(latents)))]
        self.monitored = [{} for _ in self.results]
        memoise = config.memoise and config.fixed_pairs and config.in_vocabulary
        self.memos = [GradientMemo(len(config.timesteps)) if memoise else None for _ in self.results]
        self.active = torch.arange(len(latents))

    def finish(self, label):
        config = self.config
        with Progress(config.steps, label) as progress:
            self.watch(0)
            for step in range(config.steps):
                self.step(step)
                if (step + 1) % config.monitor_every == 0 or step + 1 == config.steps:
                    self.watch(step + 1)
                progress.update(images=len(self.active))
                if len(self.active) == 0:
                    break
        for result, seen in zip(self.results, self.monitored):
            result.states_visited = len(seen)
        return self.results

    def nearest(self, images):
        """NN(v) of some images."""
        return nearest_tokens(self.v[images], self.vocabulary, self.config.metric)

    def watch(self, step):
        """The monitor: evaluates states that it has not seen, selects the best iterate, stops patient images."""
        nearest = self.nearest(self.active)
        tokens = nearest
        if self.config.legal:
            tokens = legal_objects(nearest, self.v[self.active], self.vocabulary, self.config.metric)
        keys = [t.cpu().numpy().tobytes() for t in tokens]
        new = [k for k, i in enumerate(self.active.tolist()) if keys[k] not in self.monitored[i]]
        if new:
            images = self.active[new]
            with self.autocast():
                values = self.objective.evaluate(self.latents[images], tokens[new], self.monitor)
            for k, image, value in zip(new, images.tolist(), values.tolist()):
                self.monitored[image][keys[k]] = value
                self.count(image, forward=len(self.monitor), prior=len(self.monitor))
        keep = []
        for k, image in enumerate(self.active.tolist()):
            result, value = self.results[image], self.monitored[image][keys[k]]
            result.curve.append([step, value, result.cost.forward_equivalents])
            if value < result.monitor:
                result.tokens, result.nearest = tokens[k].cpu(), nearest[k].cpu()
                result.monitor, result.convergence_step = value, step
                result.improvements.append([step, value, tokens[k].tolist(), nearest[k].tolist()])
            waited = step - result.convergence_step
            keep.append(not self.config.patience or waited < self.config.patience)
        self.active = self.active[torch.tensor(keep, dtype=torch.bool)]

    def step(self, step):
        """One AdamW step on the embeddings of all active images."""
        config, images = self.config, self.active
        index, pairs = self.draw(step)
        tokens = self.nearest(images)
        if config.legal:
            tokens = open_illegal_pairs(tokens, self.none)
        v = self.vocabulary(tokens) if config.in_vocabulary else self.v[images]  # the value of v', equation 6
        v = v.detach().requires_grad_()
        with torch.enable_grad(), self.autocast():
            gradient = self.image_gradient(v, tokens, images, index, pairs)
            if self.objective.uses_prior:
                gradient = gradient + self.prior_gradient(v, tokens, images, index, pairs)
        self.adamw(images, gradient, step)

    def draw(self, step):
        """Indices (batch,) into the timesteps, and their pairs; after coarse_steps, every loop visits all timesteps."""
        config, grid = self.config, self.config.timesteps
        if step < config.coarse_steps:
            width = (len(grid) + 1) // 2
            low = round((len(grid) - width) * (1 - step / config.coarse_steps))
            index = low + torch.randperm(width, generator=self.generator)[:config.batch]
        else:
            while len(self.queue) < config.batch:
                self.queue = torch.cat([self.queue, torch.randperm(len(grid), generator=self.generator)])
            index, self.queue = self.queue[:config.batch], self.queue[config.batch:]
        if self.fixed is not None:
            return index, self.fixed[index]
        return index, Pairs.draw(self.ldm, grid[index], self.generator, prior=self.objective.uses_prior)

    def image_gradient(self, v, tokens, images, index, pairs):
        """Gradient of the mean image loss with respect to v (I, N, 5, d).

        The denoiser's gradient is taken with respect to the context, per (image, pair), so that it can be kept;
        the encoder, linear in it, is passed once per image.
        """
        context = self.ldm.context(v)
        total = torch.zeros_like(context)
        todo = []
        for k, image in enumerate(images.tolist()):
            memo = self.memos[image]
            known = memo.enter(tokens[k]) if memo else None
            for j, pair in enumerate(index.tolist()):
                if known is not None and pair in known:
                    total[k] += known[pair]
                    self.results[image].cost.reused += 1
                else:
                    todo.append((k, j))
                    self.count(image, forward=1, backward=1)
        for start in range(0, len(todo), self.objective.chunk):
            rows, columns = torch.tensor(todo[start:start + self.objective.chunk]).T.to(v.device)
            leaf = context.detach()[rows].requires_grad_()
            losses = self.objective.image_losses(self.latents[images][rows], leaf, pairs[columns])
            gradients, = torch.autograd.grad(losses.sum(), leaf)
            total.index_add_(0, rows, gradients)
            for row, column, gradient in zip(rows.tolist(), columns.tolist(), gradients):
                if self.memos[images[row]]:
                    self.memos[images[row]].store(int(index[column]), gradient)
        return torch.autograd.grad(context, v, total / len(index))[0]

    def prior_gradient(self, v, tokens, images, index, pairs):
        """Gradient of the mean prior loss with respect to v (I, N, 5, d)."""
        count, batch = len(v), len(index)
        total = torch.zeros_like(v)
        rows = torch.arange(count, device=v.device).repeat_interleave(batch)
        columns = torch.arange(batch, device=v.device).repeat(count)
        for r, c in zip(rows.split(self.objective.chunk), columns.split(self.objective.chunk)):
            losses = self.objective.prior_losses(v[r], pairs[c])
            total = total + torch.autograd.grad(losses.sum() / batch, v)[0]
        for image in images.tolist():
            self.count(image, prior=batch, prior_backward=batch)
        return total

    def adamw(self, images, gradient, step, betas=(0.9, 0.999)):
        """AdamW as torch.optim has it, on the rows of the active images."""
        config = self.config
        lr = config.lr * (1 + (config.lr_end - 1) * step / config.steps)
        first, second = (moment[images] for moment in self.moments)
        first = first.lerp(gradient, 1 - betas[0])
        second = second * betas[1] + gradient.square() * (1 - betas[1])
        self.moments[0][images], self.moments[1][images] = first, second
        scale = (second / (1 - betas[1] ** (step + 1))).sqrt() + config.eps
        v = self.v[images] * (1 - lr * config.weight_decay)
        self.v[images] = v - lr / (1 - betas[0] ** (step + 1)) * first / scale

    def count(self, image, forward=0, backward=0, prior=0, prior_backward=0):
        cost = self.results[image].cost
        cost.forward += forward
        cost.backward += backward
        if self.objective.uses_prior:
            cost.prior_forward += prior
            cost.prior_backward += prior_backward

    def autocast(self):
        device = self.latents.device.type
        return torch.autocast(device, torch.bfloat16) if self.config.bf16 else nullcontext()
