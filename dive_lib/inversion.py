"""Algorithm 1 of DIVE: the condition of a frozen diffusion model by gradient descent, the layout or class of an image.

A class is a layout of one object with one field: the number of fields, F below, is 5 for layouts and 1 for classes.
Many images are inverted in one batch. Each has its own embeddings and optimiser state, and all share the draws of
timesteps and noises, so an image's result depends on its batch by rounding alone. (Within the vocabulary that hardly
ever changes a token; continuous embeddings, `in_vocabulary` false, amplify it: after a hundred steps some of their
answers are others.) Only gradients with respect to the condition are computed, and nothing is computed twice for the
same discrete state and (t, noise) pair.
"""

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from dive_lib.cuda_graphs import RECORDING
from dive_lib.inversion_config import InversionConfig
from dive_lib.inversion_result import Inverted, Step
from dive_lib.memo import StateMemo, state_key
from dive_lib.objective import Objective, Pairs
from dive_lib.progress import Progress
from dive_lib.straight_through import legal_objects, nearest_tokens, open_illegal_pairs


def fixed_pairs(objective: Objective, config: InversionConfig) -> Pairs:
    """One pair for each timestep of the grid, the same for all images."""
    generator = torch.Generator().manual_seed(config.seed + 104729)
    return Pairs.draw(objective.ldm, config.timesteps, generator, prior=objective.uses_prior,
                      antithetic=config.antithetic)


def published_pairs(objective: Objective, config: InversionConfig) -> Pairs:
    """The pairs of the published classification program, for a DiT, which has no prior.

    Its `save_noise.py` draws `torch.manual_seed(42); randn(1024, 4, 32, 32)` on the processor, and row k belongs to the
    k-th timestep of `range(2, 1000, 4)`, which is that of t_low 0, t_high 1000 and t_interval 4.
    """
    t, device = config.timesteps, objective.ldm.vocabulary.class_table.device
    noise = torch.randn(1024, *objective.ldm.latent_shape, generator=torch.Generator().manual_seed(42))[:len(t)]
    return Pairs(t, noise.clone(), torch.empty(len(t), 0)).to(device)


def monitor_pairs(objective: Objective, config: InversionConfig) -> Pairs:
    """The monitor's fixed pairs, the same for all images: timesteps spread evenly over the grid, noises saved once."""
    if config.monitor_pairs == 0:
        return fixed_pairs(objective, config)
    grid = config.timesteps
    index = torch.linspace(0, len(grid) - 1, config.monitor_pairs).round().long()
    generator = torch.Generator().manual_seed(config.seed + 7919)
    return Pairs.draw(objective.ldm, grid[index], generator, prior=objective.uses_prior, antithetic=config.antithetic)


def cumulative_order(permutations: torch.Tensor) -> torch.Tensor:
    """Orders (loops, P) in which the published code visits its pairs: every loop shuffles the list of the last one."""
    orders = [permutations[0]]
    for permutation in permutations[1:]:
        orders.append(orders[-1][permutation])
    return torch.stack(orders)


def invert(objective: Objective, latents: torch.Tensor, config: InversionConfig, start: torch.Tensor | None = None,
           label: str = "inversion", *, pairs: Pairs | None = None, order: torch.Tensor | None = None,
           trace: Callable[[Step], None] | None = None) -> list[Inverted]:
    """Inverts images, given as latents (I, 4, h, w).

    start: initial tokens (I, N, F) or embeddings (I, N, F, d), by default those of `config.init`. pairs: the fixed
    pairs, one for each of config.timesteps; drawn by default. order: (loops, P) order of the timesteps in the first
    loops; drawn by default, a new permutation for every loop. trace: called after every step.
    """
    return _Run(objective, latents, config, start, pairs, order, trace).finish(label)


class _Run:
    """The state of one batch. `active` indexes the images that are not stopped."""

    def __init__(self, objective, latents, config, start, pairs=None, order=None, trace=None):
        self.objective, self.latents, self.config, self.trace = copy.copy(objective), latents, config, trace
        self.ldm, self.vocabulary = objective.ldm, objective.ldm.vocabulary
        self.none = self.ldm.grid.none_tokens.to(latents.device)
        if config.legal and len(self.none) != 5:
            raise ValueError("legal is about boxes; a class condition has none, set it to false")
        count = len(config.timesteps)
        if pairs is not None and not (config.fixed_pairs and torch.equal(pairs.t.cpu(), config.timesteps)):
            raise ValueError("given pairs need fixed_pairs and exactly the configuration's timesteps, in their order")
        if order is not None and not torch.equal(order.sort(1).values, torch.arange(count).expand(len(order), -1)):
            raise ValueError(f"each row of order must be a permutation of the {count} timesteps' indices")
        self.v = self.initial(start)
        self.moments = [torch.zeros_like(self.v), torch.zeros_like(self.v)]
        self.generator = torch.Generator().manual_seed(config.seed)
        self.fixed = pairs
        if config.fixed_pairs and pairs is None:
            self.fixed = fixed_pairs(objective, config)
        self.monitor = self.fixed if config.monitor_pairs == 0 else monitor_pairs(objective, config)
        self.queue = torch.empty(0, dtype=torch.long) if order is None else order.flatten()
        self.results = [Inverted(t.cpu(), t.cpu()) for t in self.nearest(torch.arange(len(latents)))]
        self.monitored = [{} for _ in self.results]  # value by state
        self.noted = [{} for _ in self.results]  # states without a value yet
        self.iterates = []  # not considered yet
        memoise = config.memoise and config.fixed_pairs and config.in_vocabulary
        self.memos = [StateMemo(config.memo_states) if memoise else None for _ in self.results]
        # Where the monitor's pairs are the training's, its values follow from the losses of the steps.
        self.shares = memoise and config.monitor_pairs == 0 and not objective.uses_prior
        self.active = torch.arange(len(latents))

    def initial(self, start):
        """The embeddings (I, N, F, d) before the first step; what is random is the same for all images."""
        config, device = self.config, self.latents.device
        tokens = self.ldm.grid.empty(len(self.latents)) if start is None else start
        v = self.objective.embeddings(tokens.to(device)).detach().clone()
        if config.init == "random" and start is None:
            draw = torch.randn(v.shape[1:], generator=torch.Generator().manual_seed(config.seed + 32452843)).to(device)
            for field in range(v.shape[2]):
                table = self.vocabulary.table(field).detach()
                v[:, :, field] = draw[:, field] * table.std() + table.mean()
        if config.init_noise:
            noise = torch.randn(v.shape[1:], generator=torch.Generator().manual_seed(config.seed + 15485863))
            v = v + config.init_noise * self.vocabulary.std * noise.to(device)
        return v

    def finish(self, label):
        config = self.config
        with Progress(config.steps, label) as progress:
            if config.monitor_start:
                self.watch(0)
            for step, (index, pairs) in enumerate(self.draws()):
                self.step(step, index, pairs)
                if (step + 1) % config.monitor_every == 0 or step + 1 == config.steps:
                    self.watch(step + 1)
                progress.update(images=len(self.active))
                if len(self.active) == 0:
                    break
        self.select()
        for result, seen in zip(self.results, self.monitored):
            result.states_visited = len(seen)
        return self.results

    def nearest(self, images):
        """NN(v) of some images."""
        return nearest_tokens(self.v[images], self.vocabulary, self.config.metric,
                              exclude_none=self.config.exclude_none)

    def watch(self, step):
        """The monitor: notes the iterates, selects the best so far, stops patient images.

        Nobody asks for the values before the end if no image can stop. Where they follow from the losses of the
        steps, they wait until then: by that time most of these losses are known.
        """
        nearest = self.nearest(self.active)
        tokens = nearest
        if self.config.legal:
            tokens = legal_objects(nearest, self.v[self.active], self.vocabulary, self.config.metric)
        states = tokens if self.config.monitor_nearest else self.v[self.active].clone()
        for k, image in enumerate(self.active.tolist()):
            key = state_key(states[k])
            if key not in self.monitored[image]:
                self.noted[image][key] = states[k]
            cost = self.results[image].cost.forward_equivalents
            cost += sum(len(self.monitor) - self.known_losses(image, s) for s in self.noted[image].values())
            self.iterates.append((image, key, step, cost, tokens[k], nearest[k]))
        if not self.shares or self.config.patience:
            self.select()
        waited = torch.tensor([step - self.results[image].convergence_step for image in self.active.tolist()])
        self.active = self.active[(waited < self.config.patience) | (self.config.patience == 0)]

    def known_losses(self, image, state):
        return self.memos[image].losses(state) if self.shares else 0

    def select(self):
        """Evaluates the noted states, and has the results consider the iterates."""
        todo = [(image, key, state) for image, noted in enumerate(self.noted) for key, state in noted.items()]
        if todo:
            images = torch.tensor([image for image, *_ in todo])
            states = torch.stack([state for *_, state in todo])
            values = self.shared_values(images, states) if self.shares else self.values(images, states)
            for (image, key, _), value in zip(todo, values.tolist()):
                self.monitored[image][key] = value
                del self.noted[image][key]
        for image, key, *iterate in self.iterates:
            step, cost, tokens, nearest = iterate
            self.results[image].consider(step, self.monitored[image][key], cost, tokens, nearest)
        self.iterates = []

    def values(self, images, states):
        """(B,) monitor values of states (B, N, F) of images (B,)."""
        for image in images.tolist():
            self.count(image, forward=len(self.monitor), prior=len(self.monitor))
        return self.objective.evaluate(self.latents[images], states, self.monitor)

    def shared_values(self, images, states):
        """The same from the losses that the steps left in the memo, and from new ones for the other pairs."""
        pairs = range(len(self.monitor))
        known = [self.memos[image].enter(state).losses for image, state in zip(images.tolist(), states)]
        todo = [(k, pair) for k, losses in enumerate(known) for pair in pairs if pair not in losses]
        if todo:
            rows, columns = torch.tensor(todo).T.to(states.device)
            new = self.objective.losses_at(self.latents[images], states, self.monitor, rows, rows, columns)
            for (k, pair), loss in zip(todo, new.tolist()):
                known[k][pair] = loss
                self.count(int(images[k]), forward=1)
        return torch.tensor([[losses[pair] for pair in pairs] for losses in known], dtype=torch.float64).mean(1)

    def step(self, step, index, pairs):
        """One AdamW step on the embeddings of all active images, on pairs of the timesteps `index`."""
        config, images = self.config, self.active
        tokens = self.nearest(images)
        if config.legal:
            tokens = open_illegal_pairs(tokens, self.none)
        v = self.vocabulary(tokens) if config.in_vocabulary else self.v[images]  # the value of v', equation 6
        v = v.detach().requires_grad_()
        with torch.enable_grad():
            gradient, losses = self.image_gradient(v, tokens, images, index, pairs)
            if self.objective.uses_prior:
                gradient = gradient + self.prior_gradient(v, tokens, images, index, pairs)
        gradient = gradient * config.accumulation
        self.adamw(images, gradient, step)
        if self.trace:
            self.trace(Step(step, images, tokens, losses, gradient, self.v[images]))

    @property
    def draws_ahead(self) -> bool:
        """Fresh noises come from the processor, so that all devices have the same: 13 million a step at paper size."""
        return self.fixed is None and self.latents.device.type != "cpu"

    def draws(self) -> Iterator[tuple[torch.Tensor, Pairs]]:
        """What `draw` gives for each step; ahead, while the GPU works on the step before."""
        if not self.draws_ahead:
            yield from map(self.draw, range(self.config.steps))
            return
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(self.draw, 0)
            for step in range(1, self.config.steps + 1):
                drawn = coming.result()
                if step < self.config.steps:
                    coming = thread.submit(self.draw, step)
                yield drawn

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
        with RECORDING:
            return index, Pairs.draw(self.ldm, grid[index], self.generator, prior=self.objective.uses_prior)

    def image_gradient(self, v, tokens, images, index, pairs):
        """Gradient of the mean image loss with respect to v (I, N, F, d), and the losses (I, batch).

        The denoiser's gradient is taken with respect to the context, per (image, pair), so that it can be kept;
        the encoder's backward pass, linear in it, is done once per image.
        """
        context = self.ldm.context(v)
        total, losses = torch.zeros_like(context), torch.zeros(len(images), len(index))
        known = self.known(tokens, images)

        def compute(rows, columns):
            values, gradients = self.objective.image_gradients(self.latents[images][rows], context[rows],
                                                               pairs[columns])
            losses[rows.cpu(), columns.cpu()] = values.float().cpu()
            for row, column, value in zip(rows.tolist(), columns.tolist(), values.tolist()):
                if known[row]:
                    known[row].losses[int(index[column])] = value
            return gradients

        new = self.accumulate(total, [state and state.gradients for state in known], index, compute)
        for k, image in enumerate(images.tolist()):
            for j, pair in enumerate(index.tolist()):
                if (k, j) in new:
                    self.count(image, forward=1, backward=1)
                else:
                    losses[k, j] = known[k].losses[pair]
                    self.results[image].cost.reused += 1
        return torch.autograd.grad(context, v, total / len(index))[0], losses

    def prior_gradient(self, v, tokens, images, index, pairs):
        """Gradient of the mean prior loss with respect to v (I, N, F, d)."""
        def compute(rows, columns):
            own = v.detach()[rows].requires_grad_()
            return torch.autograd.grad(self.objective.prior_losses(own, pairs[columns]).sum(), own)[0]

        total, known = torch.zeros_like(v), self.known(tokens, images)
        for k, _ in self.accumulate(total, [state and state.prior_gradients for state in known], index, compute):
            self.count(int(images[k]), prior=1, prior_backward=1)
        return total / len(index)

    def known(self, tokens, images):
        """What the memo has of each image's state; None without a memo."""
        return [self.memos[image] and self.memos[image].enter(tokens[k]) for k, image in enumerate(images.tolist())]

    def accumulate(self, total, remembered, index, compute):
        """Adds to the images' rows of total their gradients on the pairs `index`: those that are remembered (of each
        image {pair: gradient}, or None), then those of compute(rows, columns), which will be. Returns {(row, column)}
        of the latter."""
        todo = []
        for k, gradients in enumerate(remembered):
            for j, pair in enumerate(index.tolist()):
                if gradients is not None and pair in gradients:
                    total[k] += gradients[pair]
                else:
                    todo.append((k, j))
        for start in range(0, len(todo), self.objective.chunk):
            rows, columns = torch.tensor(todo[start:start + self.objective.chunk]).T.to(total.device)
            computed = compute(rows, columns)
            total.index_add_(0, rows, computed)
            for row, column, gradient in zip(rows.tolist(), columns.tolist(), computed):
                if remembered[row] is not None:
                    remembered[row][int(index[column])] = gradient.clone()
        return set(todo)

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
