"""The Diffusion Classifier: the original's errors, its stages, and the shortlist from one gradient."""

import pytest
import torch

from dive_lib.diffusion_classifier import Elimination, class_errors, eliminate, enumerate_classes, evenly_spread
from dive_lib.gradient_shortlist import classify_by_shortlist, predicted_losses, rank_classes
from dive_lib.objective import Objective, Pairs
from dive_lib.schedule import evenly_spaced
from tests import tiny
from tests.published_inversion import read_published

CLASSES, COUNT = 6, 20


@pytest.fixture(scope="module")
def published(shared):
    return read_published(shared / "fixtures" / "dive_classification")


@pytest.fixture(scope="module")
def objective():
    return Objective(tiny.dit(CLASSES), chunk=23)


@pytest.fixture(scope="module")
def pairs(objective):
    return Pairs.draw(objective.ldm, evenly_spaced(0, 1000, 1000 // COUNT), torch.Generator().manual_seed(3),
                      prior=False)


def test_errors_are_those_of_the_original(published):
    errors = class_errors(Objective(published.model), published.latents, published.pairs)
    torch.testing.assert_close(errors.double(), published.errors.double(), atol=1e-5, rtol=0)
    results = enumerate_classes(Objective(published.model), published.latents, published.pairs)
    assert [r.prediction for r in results] == published.errors.mean(2).argmin(1).tolist()
    assert all(r.cost.forward_equivalents == r.cost.forward == 10 * 50 for r in results)


def test_stages_follow_the_published_rule():
    """t_to_eval[len // n // 2::len // n][:n] without what was evaluated before."""
    stages = Elimination((4, 2, 1), (2, 5, 20)).stages(20)
    assert [s.tolist() for s in stages[:2]] == [[5, 15], [2, 6, 10, 14, 18]]
    assert sorted(torch.cat(stages).tolist()) == list(range(20)), "the last stage completes the set"


def test_of_opposite_noises_both_are_taken(objective, pairs):
    """Half of what cancels would not: a stage takes couples, and half of one only where the number is odd."""
    assert not pairs.opposite and pairs.antithetic().opposite and pairs.antithetic()[1:5].opposite is False
    assert evenly_spread(4, 10, opposite=True) == [2, 3, 6, 7] and evenly_spread(3, 10, opposite=True) == [2, 3, 6]
    assert evenly_spread(1, 10, opposite=True) == [4] and evenly_spread(10, 10, opposite=True) == list(range(10))
    assert evenly_spread(11, 11, opposite=True) == list(range(11)), "the last of an odd number has no opposite"
    with pytest.raises(ValueError, match="11 of 10 pairs"):
        evenly_spread(11, 10, opposite=True)
    elimination = Elimination((2, 1), (2, 4))
    assert [stage.tolist() for stage in elimination.stages(10, opposite=True)] == [[4, 5], [2, 3, 6, 7]]
    result, = eliminate(objective, tiny.latents(1), pairs.antithetic(), elimination)
    errors = class_errors(objective, tiny.latents(1), pairs.antithetic())[0]
    taken = torch.cat(elimination.stages(COUNT, opposite=True))
    torch.testing.assert_close(result.errors[result.prediction].float(), errors[result.prediction, taken].mean())


def test_adaptive_is_the_published_loop_image_by_image(objective, pairs):
    elimination, latents = Elimination((4, 2, 1), (2, 5, 20)), tiny.latents(3)
    errors = class_errors(objective, latents, pairs)
    results = eliminate(objective, latents, pairs, elimination)
    for image, result in enumerate(results):
        remaining, seen, cost = list(range(CLASSES)), [], 0
        for keep, new in zip(elimination.keep, elimination.stages(COUNT)):
            seen += new.tolist()
            cost += len(remaining) * len(new)
            means = torch.tensor([errors[image, k, seen].mean() for k in remaining])
            remaining = [remaining[k] for k in torch.topk(-means, keep).indices]
        assert result.prediction == remaining[0] and result.cost.forward == cost < CLASSES * COUNT
        assert result.evaluated[result.prediction] == COUNT and result.evaluated.sum() == cost
        torch.testing.assert_close(result.errors[result.prediction].float(), errors[image, result.prediction].mean())


def test_with_all_classes_kept_it_is_the_enumeration(objective, pairs):
    every = enumerate_classes(objective, tiny.latents(3), pairs)
    kept = eliminate(objective, tiny.latents(3), pairs, Elimination((CLASSES, CLASSES), (5, COUNT)))
    for a, b in zip(every, kept):
        assert a.prediction == b.prediction and a.cost == b.cost
        torch.testing.assert_close(a.errors, b.errors)


def test_images_do_not_influence_each_other_and_runs_repeat(objective, pairs):
    elimination = Elimination((3, 1), (4, COUNT))
    together, again = (eliminate(objective, tiny.latents(3), pairs, elimination) for _ in range(2))
    for i, (a, b) in enumerate(zip(together, again)):
        assert a.prediction == b.prediction and torch.equal(a.errors, b.errors)
        alone, = eliminate(objective, tiny.latents(3)[i:i + 1], pairs, elimination)
        assert alone.prediction == a.prediction and alone.cost == a.cost
        torch.testing.assert_close(alone.errors, a.errors)


def test_every_evaluation_is_counted(pairs):
    objective = Objective(tiny.dit(CLASSES))
    results = eliminate(objective, tiny.latents(2), pairs, Elimination((3, 1), (4, COUNT)))
    assert sum(r.cost.forward for r in results) == objective.cost.forward > 0


def test_a_shortlist_of_all_classes_is_the_enumeration_plus_the_ranking(objective, pairs):
    few, every = pairs[torch.tensor([3, 9, 15])], enumerate_classes(objective, tiny.latents(2), pairs)
    found = classify_by_shortlist(objective, tiny.latents(2), few, pairs, CLASSES, Elimination((1,), (COUNT,)))
    for a, b in zip(every, found):
        assert a.prediction == b.prediction and torch.equal(a.errors, b.errors)
        assert b.cost.forward_equivalents == a.cost.forward_equivalents + 2 * 3


def test_ranking_is_exact_where_the_loss_is_linear(pairs):
    """Classes that lie close to the null class are ranked as their losses are."""
    model = tiny.dit(CLASSES)
    with torch.no_grad():
        table = model.vocabulary.class_table
        table.copy_(table[-1] + (table - table[-1]) * 1e-2)
        model.double()
    objective, latents = Objective(model), tiny.latents(3).double()
    pairs = Pairs(pairs.t, pairs.noise.double(), pairs.prior_noise)
    expected = class_errors(objective, latents, pairs).mean(2).argsort(1)
    assert torch.equal(rank_classes(predicted_losses(objective, latents, pairs)), expected)


def test_the_shortlist_alone_is_evaluated(objective, pairs):
    few = pairs[torch.tensor([3, 9, 15])]
    ranked = rank_classes(predicted_losses(objective, tiny.latents(2), few))
    assert ranked.sort(1).values.tolist() == [list(range(CLASSES))] * 2
    assert not torch.equal(ranked, rank_classes(predicted_losses(objective, tiny.latents(2), few, state=2)))
    for order, result in zip(ranked, classify_by_shortlist(objective, tiny.latents(2), few, pairs, 2,
                                                           Elimination((1,), (COUNT,)))):
        assert result.prediction in order[:2].tolist()
        assert result.evaluated[order[:2]].tolist() == [COUNT] * 2 and result.errors[order[2:]].isinf().all()
        assert result.cost.forward == 3 + 2 * COUNT and result.cost.backward == 3


def test_a_trusted_prediction_counts_as_so_many_pairs(objective, pairs):
    latents, elimination = tiny.latents(2), Elimination((1,), (5,))
    measured = torch.stack([result.errors for result in eliminate(objective, latents, pairs, elimination)])
    predicted = torch.randn(2, CLASSES, generator=torch.Generator().manual_seed(0))
    for trust in (0.0, 3.0, 1e6):
        found = eliminate(objective, latents, pairs, elimination, predicted=predicted, trust=trust)
        mixed = (5 * measured + trust * predicted) / (5 + trust)
        assert [result.prediction for result in found] == mixed.argmin(1).tolist()
        assert torch.equal(torch.stack([result.errors for result in found]), measured), "errors are those measured"
    assert mixed.argmin(1).tolist() == predicted.argmin(1).tolist() != measured.argmin(1).tolist()


@pytest.mark.parametrize("keep, counts", [((), ()), ((1,), (2, 4)), ((2, 3), (2, 4)), ((2, 1), (4, 4)), ((0,), (1,))])
def test_refuses_stages_that_make_no_sense(keep, counts):
    with pytest.raises(ValueError):
        Elimination(keep, counts)


def test_refuses_bad_input(objective, pairs):
    latents = tiny.latents(2)
    with pytest.raises(ValueError, match="there are 20"):
        eliminate(objective, latents, pairs, Elimination((1,), (21,)))
    with pytest.raises(ValueError, match="classes from 0 to 5"):
        class_errors(objective, latents, pairs, torch.tensor([[0, 6]] * 2))
    with pytest.raises(ValueError, match="2 images"):
        class_errors(objective, latents, pairs, torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="at least one pair"):
        class_errors(objective, latents, pairs[:0])
    with pytest.raises(ValueError, match="1 to 6 classes"):
        classify_by_shortlist(objective, latents, pairs, pairs, 7, Elimination((1,), (5,)))
    with pytest.raises(ValueError, match="at least one pair"):
        predicted_losses(objective, latents, pairs[:0])
