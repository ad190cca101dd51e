"""The local search, in a world whose answer is known."""

import dataclasses

import torch

from dive_lib.local_search import LocalSearch, SearchConfig, box_proposals, coverage, overlap, pack
from dive_lib.objective import Objective
from tests.tiny import GRID, latents, layout_ldm, layouts

CONFIG = SearchConfig(rounds=2, proposals=24, proposal_pairs=2, refine_pairs=2, class_pairs=2, monitor_pairs=2)
BOXES = torch.tensor([[x, y, x + 6, y + 8] for x in range(0, 11, 2) for y in (1, 4, 7)])


class Painter(Objective):
    """A world with a known answer: the error of a layout is its distance from a hidden layout, where it differs."""

    def __init__(self, truth: torch.Tensor, latents: torch.Tensor):
        super().__init__(layout_ldm())
        self.truth, self.latents = truth, latents

    def paint(self, tokens):
        canvas = torch.zeros(*tokens.shape[:-2], len(GRID.classes) + 1, 8, 8)  # presence last
        present = (tokens[..., 1:] != GRID.none_tokens[1:]).all(-1)
        masks = coverage(tokens[..., 1:], 8, GRID.bins, margin=0) * present[..., None, None]
        canvas[..., -1, :, :] = masks.amax(-3)
        for k in range(len(GRID.classes)):
            canvas[..., k, :, :] = (masks * (tokens[..., 0] == k)[..., None, None]).amax(-3)
        return canvas

    def error_maps(self, latents, tokens, pairs):
        image = (latents[:, None] == self.latents[None]).flatten(2).all(-1).float().argmax(1)
        truth = self.truth[image]
        self.cost.forward += len(tokens) * len(pairs)
        return (self.paint(tokens) - self.paint(truth)).abs().sum(1)


def test_finds_a_known_layout_exactly():
    truth = layouts()[:2]
    config = dataclasses.replace(CONFIG, steps_px=(4, 4), polish_px=(4, 4))
    search = LocalSearch(Painter(truth, latents(2)), latents(2), config, BOXES)
    found = search.run()
    for result, expected in zip(found, truth):
        rows = sorted(row for row in result.tokens.tolist() if row != GRID.none_tokens.tolist())
        assert rows == sorted(row for row in expected.tolist() if row != GRID.none_tokens.tolist())


def test_empty_images_stay_empty():
    result, = LocalSearch(Painter(GRID.empty(1), latents(1)), latents(1), CONFIG, BOXES).run()
    assert torch.equal(result.tokens, GRID.empty(1)[0])


def test_images_do_not_influence_each_other():
    truth = layouts()
    together = LocalSearch(Painter(truth, latents(3)), latents(3), CONFIG, BOXES).run()
    for k in range(3):
        alone, = LocalSearch(Painter(truth[k:k + 1], latents(3)[k:k + 1]), latents(3)[k:k + 1], CONFIG, BOXES).run()
        assert torch.equal(alone.tokens, together[k].tokens)


def test_every_evaluation_is_counted():
    painter = Painter(layouts(), latents(3))
    results = LocalSearch(painter, latents(3), CONFIG, BOXES).run()
    assert sum(r.cost.forward for r in results) == painter.cost.forward > 0


def test_no_layout_is_evaluated_twice_on_the_same_pairs():
    painter, seen = Painter(layouts(), latents(3)), set()
    paint = painter.error_maps

    def error_maps(own, tokens, pairs):
        for latent, layout in zip(own, tokens):
            key = (float(latent.sum()), layout.numpy().tobytes(), float(pairs.noise.sum()))
            assert key not in seen
            seen.add(key)
        return paint(own, tokens, pairs)

    painter.error_maps = error_maps
    results = LocalSearch(painter, latents(3), CONFIG, BOXES).run()
    assert all(r.cost.reused > 0 for r in results)


def test_coverage_measures_area():
    cover = coverage(torch.tensor([4, 2, 8, 16]), side=8, bins=17, margin=0)
    assert cover.sum() == 2 * 7 and cover[1, 2] == 1 and cover[0, 2] == 0 and cover[3, 4] == 0


def test_overlap_is_relative_to_the_smaller_box():
    boxes = torch.tensor([[0, 0, 4, 4], [2, 0, 4, 4], [4, 4, 8, 8]])
    assert overlap(boxes, boxes).tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_packs_hold_every_box_once_and_keep_their_distance():
    groups = pack(BOXES, size=3, gap=1)
    assert sorted(k for g in groups for k in g) == list(range(len(BOXES)))
    assert max(map(len, groups)) > 1
    for group in groups:
        inside = overlap(BOXES[group], BOXES[group])
        assert (inside.fill_diagonal_(0) == 0).all()


def test_proposals_are_typical_boxes():
    proposals = box_proposals(layouts(), GRID, count=2)
    assert sorted(proposals.tolist()) == [[1, 2, 7, 10], [8, 3, 15, 15]]


def test_noises_may_be_opposite():
    search = LocalSearch(Objective(layout_ldm()), latents(1), dataclasses.replace(CONFIG, antithetic=True), BOXES)
    noise = search.pairs(5, 1).noise
    assert len(noise) == 5 and torch.equal(noise[1::2], -noise[:4:2]) and search.config.monitor.antithetic
