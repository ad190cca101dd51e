"""Another search for equation 5's image term: moves of all objects at once, judged where they act.

The straight-through step moves each token by its own gradient, which sees only a few pixels around a box. This
search evaluates exact discrete changes instead, and saves evaluations by one observation: a change to one object
changes the denoising error where that object is. So one network call tries a change of *every* object (or several
proposed boxes at once), and the error map of the latent tells which of them helped. No gradients are needed.

    propose   boxes without a class, packed so that the boxes of one layout do not meet
    refine    every object's corners moved by the same step in one direction at a time
    classify  every object set to class 0, 1, ...: the class with the least error inside its box
    prune     objects whose removal costs less than a threshold are dropped

The thresholds stand in the prior's place: they decide how many objects there are.
"""

from collections import Counter
from dataclasses import dataclass

import torch

from dive_lib.inversion import Inverted, InversionConfig
from dive_lib.layout import illegal_boxes
from dive_lib.memo import state_key
from dive_lib.objective import Objective, Pairs
from dive_lib.progress import Progress
from dive_lib.schedule import evenly_spaced


@dataclass(frozen=True)
class SearchConfig:
    """rounds: times that propose ... prune are repeated. proposals: number of box proposals. boxes_per_layout: how
    many of them share a layout. proposal_pairs, refine_pairs, class_pairs, monitor_pairs: (t, noise) pairs of each
    step. t_low, t_high: their range; coarse_t_low, coarse_t_high: while classes are unknown (at high noise a box
    attracts from farther away). steps_px: step sizes of the refinement before, and polish_px after the class
    is known. propose_gain: least fall of the error for which a box without a class is added. keep_gain: least rise of
    the loss for which an object is kept. antithetic: every second noise is the opposite of the one before. seed: of
    the noises.
    """

    rounds: int = 2
    proposals: int = 256
    boxes_per_layout: int = 3
    proposal_pairs: int = 6
    refine_pairs: int = 8
    class_pairs: int = 16
    monitor_pairs: int = 25
    t_low: int = 100
    t_high: int = 600
    coarse_t_low: int = 400
    coarse_t_high: int = 700
    steps_px: tuple[int, ...] = (4, 2)
    polish_px: tuple[int, ...] = (4, 2, 2)
    propose_gain: float = 0.0003
    keep_gain: float = 0.001
    antithetic: bool = False
    seed: int = 0

    @property
    def monitor(self) -> InversionConfig:
        """Settings under which `inversion.monitor_pairs` draws the pairs that score what was found."""
        return InversionConfig(t_low=self.t_low, t_high=self.t_high, t_interval=1, monitor_pairs=self.monitor_pairs,
                               antithetic=self.antithetic, seed=self.seed)


def box_proposals(tokens: torch.Tensor, grid, count: int, seed: int = 0, rounds: int = 20) -> torch.Tensor:
    """k-means of the boxes of training layouts (L, N, 5): (count, 4) coordinate tokens."""
    boxes = tokens[(tokens != grid.none_tokens).all(-1)][:, 1:].float()
    generator = torch.Generator().manual_seed(seed)
    centres = boxes[torch.randperm(len(boxes), generator=generator)[:count]]
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in boxes.split(8192)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, boxes)
        counts = torch.bincount(nearest, minlength=len(centres))[:, None]
        centres = torch.where(counts > 0, sums / counts.clamp(min=1), centres)
    return centres.round().long()


def coverage(boxes: torch.Tensor, side: int, bins: int, margin: float = 0.5) -> torch.Tensor:
    """Share of each latent cell that lies in a box: coordinate tokens (..., 4) -> (..., side, side).

    margin: cells by which the box is enlarged; a convolution sees that far.
    """
    edges = boxes.float() * side / (bins - 1)
    cells = torch.arange(side, device=boxes.device)

    def along(low, high):
        low, high = low[..., None] - margin, high[..., None] + margin
        return (torch.minimum(high, cells + 1.0) - torch.maximum(low, cells.float())).clamp(0, 1)

    x, y = along(edges[..., 0], edges[..., 2]), along(edges[..., 1], edges[..., 3])
    return y[..., :, None] * x[..., None, :]


def overlap(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Intersection over the smaller area: (n, 4), (m, 4) -> (n, m)."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    inter = (high - low).clamp(min=0).prod(-1).float()
    area = [(x[:, 2:] - x[:, :2]).clamp(min=0).prod(-1).float() for x in (a, b)]
    return inter / torch.minimum(area[0][:, None], area[1][None]).clamp(min=1)


def pack(boxes: torch.Tensor, size: int, gap: int) -> list[list[int]]:
    """Groups of at most `size` boxes (K, 4) that keep `gap` coordinate steps between each other."""
    grown = torch.cat([boxes[:, :2] - gap, boxes[:, 2:] + gap], dim=1)
    meets = overlap(grown, boxes) > 0
    groups: list[list[int]] = []
    for k in range(len(boxes)):
        group = next((g for g in groups if len(g) < size and not meets[k, g].any()), None)
        if group is None:
            groups.append([k])
        else:
            group.append(k)
    return groups


class LocalSearch:
    """Searches the layouts of latents (I, 4, h, w). proposals: (K, 4) coordinate tokens (`box_proposals`)."""

    def __init__(self, objective: Objective, latents: torch.Tensor, config: SearchConfig, proposals: torch.Tensor):
        self.objective, self.latents, self.config = objective, latents, config
        self.grid = objective.ldm.grid
        self.none = self.grid.none_tokens.to(latents.device)
        self.proposals = proposals.to(latents.device)
        self.side = latents.shape[-1]
        self.evaluations, self.reused = [0] * len(latents), [0] * len(latents)
        self.known, self.known_on = [], None  # error maps by image and layout, on the latest pairs
        self.tokens = self.grid.empty(len(latents)).to(latents.device)

    def run(self, label: str = "search") -> list[Inverted]:
        config = self.config
        with Progress(config.rounds, label) as progress:
            for k in range(config.rounds):
                self.propose(self.pairs(config.proposal_pairs, 10 * k + 1, coarse=True))
                pairs = self.pairs(config.refine_pairs, 10 * k + 2, coarse=True)
                for px in config.steps_px:
                    self.refine(pairs, px)
                self.classify(self.pairs(config.class_pairs, 10 * k + 3))
                pairs = self.pairs(config.refine_pairs, 10 * k + 4)
                for px in config.polish_px:
                    self.refine(pairs, px)
                self.prune(self.pairs(config.class_pairs, 10 * k + 5))
                progress.update()
        pairs = self.pairs(config.monitor_pairs, 6)
        self.classify(pairs)
        self.prune(pairs)
        results = []
        for image, tokens in enumerate(self.tokens.cpu()):
            result = Inverted(tokens, tokens, convergence_step=config.rounds)
            result.cost.forward, result.cost.reused = self.evaluations[image], self.reused[image]
            results.append(result)
        return results

    def pairs(self, count: int, salt: int, coarse: bool = False) -> Pairs:
        config = self.config
        low, high = (config.coarse_t_low, config.coarse_t_high) if coarse else (config.t_low, config.t_high)
        t = evenly_spaced(low, high, max(1, (high - low) // count))[:count]
        generator = torch.Generator().manual_seed(config.seed * 1000 + salt)
        return Pairs.draw(self.objective.ldm, t, generator, prior=False, antithetic=config.antithetic)

    def maps(self, candidates: torch.Tensor, pairs: Pairs, images: torch.Tensor | None = None) -> torch.Tensor:
        """Error maps (I, C, h, w) of candidate layouts (I, C, N, 5), in units of the mean loss per cell.

        A layout whose map on these pairs is known is not evaluated again: the unmoved one of a second pass, say.
        """
        images = torch.arange(len(candidates)) if images is None else images
        if pairs is not self.known_on:
            self.known, self.known_on = [{} for _ in self.latents], pairs
        keys = [[state_key(layout) for layout in own] for own in candidates.cpu()]
        new = {(image, key): (row, column) for row, image in enumerate(images.tolist())
               for column, key in enumerate(keys[row]) if key not in self.known[image]}
        if new:
            rows, columns = map(list, zip(*new.values()))
            found = self.objective.error_maps(self.latents[images[rows]], candidates[rows, columns], pairs)
            for (image, key), error_map in zip(new, found / self.side**2):
                self.known[image][key] = error_map
        evaluated = Counter(image for image, _ in new)
        for image, own in zip(images.tolist(), keys):
            self.evaluations[image] += evaluated[image] * len(pairs)
            self.reused[image] += (len(own) - evaluated[image]) * len(pairs)
        return torch.stack([torch.stack([self.known[image][key] for key in own])
                            for image, own in zip(images.tolist(), keys)])

    @property
    def present(self) -> torch.Tensor:
        """(I, N) slots with an object (a box; its class may still be [none])."""
        return (self.tokens[..., 1:] != self.none[1:]).all(-1)

    def propose(self, pairs: Pairs) -> None:
        """Adds the boxes that lower the error most, in free slots, class [none]."""
        sizes = (~self.present).sum(1).clamp(max=self.config.boxes_per_layout)
        for size in sizes.unique().tolist():  # an image's proposals must not depend on its batch
            if size:
                self.propose_for(torch.nonzero(sizes == size)[:, 0], size, pairs)

    def propose_for(self, images: torch.Tensor, size: int, pairs: Pairs) -> None:
        """`propose` for some images, `size` boxes in one layout."""
        groups, slots = pack(self.proposals, size, gap=self.grid.bins // 16), self.tokens.shape[1]
        candidates = self.tokens[images][:, None].repeat(1, len(groups) + 1, 1, 1)
        free = (~self.present[images]).float().argsort(dim=1, descending=True, stable=True)  # free slots first
        rows = torch.arange(len(images))
        group_of = torch.zeros(len(self.proposals), dtype=torch.long)
        for g, members in enumerate(groups):
            for place, k in enumerate(members):
                candidates[rows, g, free[:, place], 1:] = self.proposals[k]
                group_of[k] = g
        maps = self.maps(candidates, pairs, images)
        drop = maps[:, -1:] - maps[:, group_of]  # (I, K, h, w)
        gains = (drop * coverage(self.proposals, self.side, self.grid.bins)).sum((2, 3))
        meets = overlap(self.proposals, self.proposals) > 0.4
        for row, i in enumerate(images.tolist()):
            taken = self.tokens[i, self.present[i], 1:]
            allowed = torch.ones(len(self.proposals), dtype=torch.bool, device=self.proposals.device)
            if len(taken):
                allowed &= (overlap(self.proposals, taken) < 0.4).all(1)
            for place in range(slots - len(taken)):
                best = torch.where(allowed, gains[row], -torch.inf).argmax()
                if not allowed[best] or gains[row, best] < self.config.propose_gain:
                    break
                self.tokens[i, free[row, place], 1:] = self.proposals[best]
                allowed &= ~meets[best]

    def refine(self, pairs: Pairs, px: int) -> None:
        """Moves each box's corners, or the whole box, by px pixels where that lowers the error around it."""
        step = max(1, round(px / self.grid.pixels_per_bin))
        moves = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]])
        moves = torch.cat([moves, -moves, torch.zeros(1, 4, dtype=torch.long)]).to(self.tokens.device) * step
        boxes = self.tokens[:, None, :, 1:] + moves[:, None]  # (I, M, N, 4)
        boxes = boxes.clamp(0, self.grid.bins - 1)
        legal = ~illegal_boxes(boxes) & self.present[:, None]
        candidates = self.tokens[:, None].repeat(1, len(moves), 1, 1)
        candidates[..., 1:] = torch.where(legal[..., None], boxes, candidates[..., 1:])
        maps = self.maps(candidates, pairs)
        region = torch.maximum(coverage(candidates[..., 1:], self.side, self.grid.bins),
                               coverage(self.tokens[:, None, :, 1:], self.side, self.grid.bins))
        drop = (maps[:, -1:] - maps)[:, :, None]  # (I, M, 1, h, w)
        gains = torch.where(legal, (drop * region).sum((3, 4)), -torch.inf)  # (I, M, N)
        best = gains.argmax(1)
        chosen = candidates.gather(1, best[:, None, :, None].expand(-1, 1, -1, 5))[:, 0]
        moved = gains.gather(1, best[:, None])[:, 0] > 0
        self.tokens = torch.where((moved & self.present)[..., None], chosen, self.tokens)

    def classify(self, pairs: Pairs) -> None:
        """Sets each object to the class with the least error inside its box."""
        classes = torch.arange(len(self.grid.classes), device=self.tokens.device)
        candidates = self.tokens[:, None].repeat(1, len(classes), 1, 1)
        present = self.present
        candidates[..., 0] = torch.where(present[:, None], classes[:, None], self.none[0])
        maps = self.maps(candidates, pairs)
        region = coverage(self.tokens[..., 1:], self.side, self.grid.bins)  # (I, N, h, w)
        errors = torch.einsum("ichw,inhw->icn", maps, region)
        self.tokens[..., 0] = torch.where(present, errors.argmin(1), self.none[0])

    def prune(self, pairs: Pairs) -> None:
        """Drops each image's least useful object if its removal raises the whole error by less than keep_gain."""
        counts = self.present.sum(1)
        for images in (torch.nonzero(counts == n)[:, 0] for n in counts.unique().tolist() if n):
            count = int(counts[images[0]])
            slots = self.present[images].float().argsort(dim=1, descending=True, stable=True)[:, :count]
            candidates = self.tokens[images][:, None].repeat(1, count + 1, 1, 1)
            rows = torch.arange(len(images))
            for k in range(count):
                candidates[rows, k, slots[:, k]] = self.none
            losses = self.maps(candidates, pairs, images).sum((2, 3))
            gains = losses[:, :-1] - losses[:, -1:]
            worst = gains.argmin(1)
            useless = gains.gather(1, worst[:, None])[:, 0] < self.config.keep_gain
            for i in useless.nonzero()[:, 0].tolist():
                self.tokens[images[i], slots[i, worst[i]]] = self.none
