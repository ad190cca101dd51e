"""Corruptions, what they cost, and whose failure an imperfect image is."""

import pytest
import torch

from dive_lib import objective as objective_module
from dive_lib.diagnosis import (class_from_gradient, corruptions, failures, gap_table, layout_corruptions, moved,
                                perfect_images, prior_ranking)
from dive_lib.objective import Objective, Pairs
from tests.tiny import GRID, latents, layout_ldm, layout_prior, layouts, objective


def test_each_corruption_changes_what_it_says():
    truth = layouts()[:2]
    wrong = corruptions(truth, GRID, torch.Generator().manual_seed(0))
    assert (wrong["empty"] == GRID.none_tokens).all()
    assert (wrong["wrong_class"][..., 1:] == truth[..., 1:]).all()
    assert ((wrong["wrong_class"][..., 0] != truth[..., 0]).sum(1) == 1).all()
    present = (wrong["one_dropped"] != GRID.none_tokens).all(-1).sum(1)
    assert present.tolist() == [1, 0]
    shift = (moved(truth, GRID, 4) - truth)[0, :2]
    assert shift[:, [1, 3]].abs().max() == 1 and (shift[:, [0, 2, 4]] == 0).all()


def test_prior_corruptions():
    truth = layouts()
    wrong = layout_corruptions(truth, GRID, torch.Generator().manual_seed(0))
    assert torch.equal(wrong["illegal"][0, 0], truth[0, 0, [0, 3, 2, 1, 4]])
    assert torch.equal(wrong["duplicated"][0, 2], truth[0, 0])
    flat = truth[(truth != GRID.none_tokens).all(-1)]
    mixed = wrong["shuffled"][(truth != GRID.none_tokens).all(-1)]
    assert torch.equal(flat.sort(0).values, mixed.sort(0).values)


def test_gaps_are_differences_on_the_same_noises():
    ldm, truth = layout_ldm(), layouts()
    rows = gap_table(ldm, latents(), truth, {"same": truth, "empty": GRID.empty(3)}, ranges=[(0, 100)], draws=2, seed=0)
    assert rows[0]["gap"] == 0 and rows[0]["share"] == 0
    pairs = Pairs.draw(ldm, torch.tensor([25, 75]), torch.Generator().manual_seed(0), prior=False)
    plain = Objective(ldm)
    expected = plain.evaluate(latents(), GRID.empty(3), pairs) - plain.evaluate(latents(), truth, pairs)
    assert abs(rows[1]["gap"] - expected.mean().item()) < 1e-6


def test_ranking_of_equal_layouts_is_a_tie():
    ldm = layout_ldm()
    empty = {"empty": GRID.empty(3)}
    rows = prior_ranking({"all": layout_prior(ldm)}, ldm.vocabulary, layouts(), empty, seed=0, steps=2)
    assert rows[0]["prior"] == "all" and rows[0]["true_loss"] > 0 and 0 <= rows[0]["share"] <= 1


def test_a_prior_of_classes_is_level_where_only_boxes_differ():
    """Whatever differs is what a prior reads: each object meets the same noise in all layouts."""
    ldm, generator = layout_ldm(), torch.Generator().manual_seed(3)
    truth = layouts().repeat(5, 1, 1)
    wrong = layout_corruptions(truth, GRID, generator)
    priors = {fields: layout_prior(ldm, fields=fields) for fields in ("classes", "boxes")}
    rows = {(row["prior"], row["corruption"]): row
            for row in prior_ranking(priors, ldm.vocabulary, truth, wrong, seed=0, steps=2)}
    for prior, blind in (("classes", "illegal"), ("boxes", "wrong_class")):
        assert rows[prior, blind]["gap"] == 0 and rows[prior, blind]["share"] == 0.5
    assert rows["classes", "wrong_class"]["gap"] != 0 and rows["boxes", "illegal"]["gap"] != 0


def test_a_ranking_is_the_same_in_batches_and_of_evenly_spread_layouts():
    ldm, generator = layout_ldm(), torch.Generator().manual_seed(7)
    truth = layouts().repeat(5, 1, 1)[:, torch.randperm(3, generator=generator)]
    wrong, prior = layout_corruptions(truth, GRID, generator), layout_prior(ldm)
    given = {"all": prior, "again": prior}

    def plainly(truth, wrong, steps=3):
        """All noises are drawn first and kept, and every pass takes all layouts."""
        generator = torch.Generator().manual_seed(5)
        order = torch.rand(truth.shape[:2], generator=generator).argsort(1)
        truth, *others = (tokens[torch.arange(len(order))[:, None], order] for tokens in (truth, *wrong.values()))
        draws = [(25 + 50 * k, torch.randn(len(truth), 3, 5, 8, generator=generator)) for k in range(steps)]

        def loss(tokens):
            return sum(prior.loss(ldm.vocabulary(tokens), torch.full((len(tokens),), t), noise)
                       for t, noise in draws) / steps

        gaps = {name: loss(tokens) - loss(truth) for name, tokens in zip(wrong, others)}
        return [{"prior": own, "corruption": name, "true_loss": loss(truth).mean().item(), "gap": gap.mean().item(),
                 "share": (gap.sign() / 2 + 0.5).mean().item()} for own in given for name, gap in gaps.items()]

    def rank(**options):
        return prior_ranking(given, ldm.vocabulary, truth, wrong, seed=5, steps=3, **options)

    assert rank() == plainly(truth, wrong), "to the last bit"
    for row, expected in zip(rank(batch=4), rank(), strict=True):
        assert row["prior"] == expected["prior"] and row["gap"] == pytest.approx(expected["gap"], abs=1e-6)
    few = [0, 3, 7, 11]
    assert rank(most=4) == plainly(truth[few], {name: tokens[few] for name, tokens in wrong.items()})


def test_contexts_of_many_layouts_are_encoded_in_parts(monkeypatch):
    dive, sizes, original = objective(prior=False), [], layout_ldm().context
    pairs = Pairs.draw(dive.ldm, torch.tensor([100, 500]), torch.Generator().manual_seed(0), prior=False)
    whole = dive.losses_per_pair(latents(), layouts(), pairs)
    monkeypatch.setattr(objective_module, "ENCODED", 2)
    monkeypatch.setattr(type(dive.ldm), "context", lambda self, v: sizes.append(len(v)) or original(v))
    torch.testing.assert_close(dive.losses_per_pair(latents(), layouts(), pairs), whole)
    assert sizes == [2, 1]


def test_failures_are_the_searchs_or_the_models():
    found, true = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.5, 1.0, 2.0])
    row = failures(found, true, [True, False, False])
    assert (row["perfect"], row["search_failures"], row["model_failures"]) == (1, 1, 1)


def test_perfect_means_every_object_and_nothing_else():
    box = {"bbox": [0, 0, 10, 10], "category_id": 1, "image_id": 1}
    truth = {"images": [{"id": 1}, {"id": 2}], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
             "annotations": [box | {"id": 1, "area": 100, "iscrowd": 0}]}
    right = box | {"score": 0.1}
    assert perfect_images(truth, [right], [1, 2]) == [True, True]
    assert perfect_images(truth, [right, right], [1]) == [False]
    assert perfect_images(truth, [right | {"category_id": 2}], [1]) == [False]
    assert perfect_images(truth, [right | {"image_id": 2}], [1, 2]) == [False, False]


def test_objective_is_the_sum_of_both_terms_and_counts_its_cost():
    dive = objective(weight=0.5)
    pairs = Pairs.draw(dive.ldm, torch.tensor([100, 500]), torch.Generator().manual_seed(0))
    value = dive.evaluate(latents(), layouts(), pairs)
    image = dive.losses_per_pair(latents(), layouts(), pairs).mean(1)
    embeddings = dive.ldm.vocabulary(layouts())
    prior = sum(dive.prior.loss(embeddings, pairs.t[k].expand(3), pairs.prior_noise[k].expand(3, -1, -1, -1))
                for k in range(2)) / 2
    torch.testing.assert_close(value, image + 0.5 * prior)
    assert dive.cost.forward == 12 and dive.cost.prior_forward == 6
    total = objective(weight=0.5, reduction="sum").evaluate(latents(), layouts(), pairs)
    torch.testing.assert_close(total, image * 256 + 0.5 * prior * 120)
    absolute = objective(prior=False, loss="l1").evaluate(latents(), layouts(), pairs)
    assert not torch.allclose(absolute, image)


def test_the_gradient_names_the_class_where_the_loss_is_linear_in_it(monkeypatch):
    ldm, truth = layout_ldm(), layouts()[:2]
    table = ldm.vocabulary.class_table
    table[:-1] /= table[:-1].norm(dim=1, keepdim=True)
    wanted = {image.sum().item(): table[tokens[0, 0]] for image, tokens in zip(latents(2), truth)}
    sign = -1

    def losses(self, images, context, pairs):  # falls, or with the other sign rises, towards the first object's class
        return torch.stack([sign * (c[0] * wanted[image.sum().item()]).sum() for image, c in zip(images, context)])

    monkeypatch.setattr(type(ldm), "context", lambda self, v: v[:, 0, :1])
    monkeypatch.setattr(Objective, "image_losses", losses)
    monkeypatch.setattr(Objective, "evaluate", lambda self, z, tokens, pairs, prior: losses(
        self, z, ldm.context(ldm.vocabulary(tokens)), pairs))
    pairs = Pairs.draw(ldm, torch.tensor([25, 75]), torch.Generator().manual_seed(0), prior=False)
    for sign, share in ((-1, 1), (1, 0)):
        rows = class_from_gradient(Objective(ldm), latents(2), truth, pairs, torch.Generator().manual_seed(0))
        assert rows == [{"class": name, "gradient": share, "evaluation": share} for name in ("none", "another")]
