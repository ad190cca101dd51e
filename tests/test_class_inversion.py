"""The published classification loop, number by number, and its exact short cuts."""

import dataclasses
import functools

import pytest
import torch

from dive_lib.inversion import Inverted, cumulative_order, fixed_pairs, invert, monitor_pairs
from dive_lib.inversion_config import InversionConfig
from dive_lib.objective import Cost, Objective
from dive_lib.straight_through import nearest_tokens
from tests import tiny
from tests.published_inversion import TRACES, read_published, read_recording

TOLERANCE = 1e-4
ROUNDING = 1e-6  # of a monitor value: a mean of fp32 losses
CONFIG = InversionConfig(steps=12, batch=5, lr=0.2, t_interval=100, fixed_pairs=True, metric="l2", exclude_none=True,
                         monitor_pairs=0, monitor_every=2, memo_states=0)


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "fixtures" / "dive_classification"


@pytest.fixture(scope="module")
def published(folder):
    return read_published(folder)


@pytest.fixture(scope="module")
def repeat(folder, published):
    """Function (name of a trace, changed settings) -> (recording, results, steps) of the same run here."""

    @functools.cache
    def run(name, **changes):
        recording, steps = read_recording(folder, name), []
        config = dataclasses.replace(recording.config, **changes)
        results = invert(Objective(published.model), published.latents, config, recording.start,
                         pairs=published.pairs, order=recording.order, trace=steps.append)
        return recording, results, steps

    return run


@pytest.mark.parametrize("name", TRACES)
def test_every_step_is_that_of_the_published_program(repeat, published, name):
    recording, results, steps = repeat(name, memoise=False)
    table = published.model.vocabulary
    for i in range(3):
        fields = {key: values[i] for key, values in recording.fields.items()}
        gradients, embeddings = (torch.stack([getattr(s, key)[i, 0, 0] for s in steps])
                                 for key in ("gradient", "embeddings"))
        near = nearest_tokens(embeddings[:, None, None], table, recording.config.metric, exclude_none=True)
        assert torch.equal(near.flatten(), fields["nearest"])
        assert_near(gradients, fields["grad"])
        assert_near(embeddings, fields["embedding"])
        losses = torch.stack([s.losses[i] for s in steps]).view(*fields["train_loss"].shape, -1).mean(-1)
        assert_near(losses, fields["train_loss"])
        assert_near([value for _, value, _ in results[i].curve], fields["monitor"])


@pytest.mark.parametrize("memoise", [False, True])
@pytest.mark.parametrize("name", TRACES)
def test_selects_the_same_class_at_the_same_loop(repeat, name, memoise):
    """A class has one monitor value, so of the loops that end at the best class the first one is selected.

    The published program evaluates it anew in every loop, in another order, and rounding picks one of these loops.
    """
    recording, results, _ = repeat(name, memoise=memoise)
    for i, result in enumerate(results):
        recorded = recording.fields["monitor"][i]
        assert result.nearest.tolist() == result.tokens.tolist() == [recording.fields["selected"][i].tolist()]
        assert selected_loop(result, recording) == first_loop(recorded, rounding=ROUNDING)
        assert recorded[int(recording.fields["selected_loop"][i]) - 1] - result.monitor == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", TRACES)
def test_selection_is_that_of_the_published_program(folder, name):
    """Given the recorded monitor values: strictly below all earlier ones, so the earliest minimum."""
    recording = read_recording(folder, name)
    per_loop = recording.config.steps // recording.loops
    for i in range(3):
        result = Inverted(torch.empty(0), torch.empty(0))
        for loop, value in enumerate(recording.fields["monitor"][i].tolist()):
            near = recording.fields["nearest"][i][(loop + 1) * per_loop - 1]
            result.consider((loop + 1) * per_loop, value, 0, near, near)
        assert selected_loop(result, recording) == recording.fields["selected_loop"][i]
        assert result.nearest == recording.fields["selected"][i]


@pytest.mark.parametrize("name", TRACES[:2])
def test_memoised_run_is_the_same_for_a_third_of_the_cost(repeat, name):
    recording, memoised, steps = repeat(name)
    _, plain, plain_steps = repeat(name, memoise=False)
    for a, b in zip(steps, plain_steps):
        assert torch.equal(a.tokens, b.tokens)
        assert_near(a.embeddings, b.embeddings)
    for a, b in zip(memoised, plain):
        assert torch.equal(a.nearest, b.nearest) and a.convergence_step == b.convergence_step
        assert_near([value for _, value, _ in a.curve], [value for _, value, _ in b.curve])
        assert a.cost.forward_equivalents <= recording.published_cost / 3
        assert a.cost.forward_equivalents <= 2 * len(recording.config.timesteps) * a.states_visited


@pytest.mark.parametrize("name", TRACES)
def test_images_of_a_batch_are_as_alone(published, repeat, name):
    recording, together, _ = repeat(name)
    for i in range(3):
        alone, = invert(Objective(published.model, chunk=17), published.latents[i:i + 1], recording.config,
                        recording.start[i:i + 1], pairs=published.pairs, order=recording.order)
        assert torch.equal(alone.nearest, together[i].nearest)
        assert alone.convergence_step == together[i].convergence_step and alone.cost == together[i].cost
        assert_near([value for _, value, _ in alone.curve], [value for _, value, _ in together[i].curve])


# The same on a random model


def test_monitor_and_steps_share_their_losses():
    """A state costs a forward pass on every pair and a backward pass on those that steps used, whatever the order."""
    steps, objective = [], Objective(tiny.dit())
    results = invert(objective, tiny.latents(2), CONFIG, trace=steps.append)
    for i, result in enumerate(results):
        states = {int(s.tokens[i]) for s in steps} | {int(result.nearest)}
        assert result.cost.backward <= 10 * len(states) and result.cost.backward + result.cost.reused == 12 * 5
        assert result.cost.backward <= result.cost.forward <= 10 * len(states)
        assert [step for step, *_ in result.curve] == list(range(0, 13, 2))
    again = invert(objective, tiny.latents(2), dataclasses.replace(CONFIG, patience=1000))
    assert [r.curve[-1][1] for r in again] == pytest.approx([r.curve[-1][1] for r in results], abs=1e-6)
    assert all(late.cost.forward_equivalents <= soon.cost.forward_equivalents for late, soon in zip(results, again))


def test_the_curve_counts_what_a_run_that_ends_there_would_have_cost():
    objective = Objective(tiny.dit())
    long = invert(objective, tiny.latents(2), CONFIG)
    for steps in (2, 6, 12):
        short = invert(objective, tiny.latents(2), dataclasses.replace(CONFIG, steps=steps))
        assert [r.cost.forward_equivalents for r in short] == [r.curve[steps // 2][2] for r in long]


def test_bounded_memory_changes_the_cost_only():
    objective = Objective(tiny.dit())
    for a, b in zip(*(invert(objective, tiny.latents(2), dataclasses.replace(CONFIG, memo_states=n)) for n in (0, 1))):
        assert torch.equal(a.nearest, b.nearest) and a.cost.forward_equivalents <= b.cost.forward_equivalents
        assert_near([value for _, value, _ in a.curve], [value for _, value, _ in b.curve])


def test_the_papers_text_is_a_setting_of_the_same_loop():
    """Start at [none], cosine, fresh noise, a monitor of its own; the null class is never an answer."""
    config = InversionConfig(steps=8, batch=4, lr=0.2, t_interval=100, exclude_none=True, monitor_pairs=5)
    objective = Objective(tiny.dit())
    results = invert(objective, tiny.latents(3), config)
    assert all(0 <= int(result.tokens) < 4 and result.tokens.shape == (1, 1) for result in results)
    assert results[0].cost == Cost(forward=8 * 4 + 5 * results[0].states_visited, backward=8 * 4)
    for i in range(3):
        alone, = invert(objective, tiny.latents(3)[i:i + 1], config)
        assert torch.equal(alone.tokens, results[i].tokens)


def test_random_start_is_one_vector_with_the_tables_mean_and_deviation():
    model, steps = tiny.dit(classes=40), []
    with torch.no_grad():
        model.vocabulary.class_table.add_(2.0)
    config = dataclasses.replace(CONFIG, init="random", lr=1e-9, weight_decay=0.0, steps=1)
    invert(Objective(model), tiny.latents(2), config, trace=steps.append)
    start, table = steps[0].embeddings, model.vocabulary.class_table
    assert torch.equal(start[0], start[1])
    assert abs(start.mean() - table.mean()) < 0.2 * table.std() and 0.7 < start[0].std() / table.std() < 1.3


def test_order_is_followed_and_then_drawn():
    steps, objective = [], Objective(tiny.dit())
    order = torch.arange(10).flip(0)[None]
    config = dataclasses.replace(CONFIG, memoise=False)
    invert(objective, tiny.latents(1), config, order=order, trace=steps.append)
    start = objective.ldm.grid.empty(1)
    near = nearest_tokens(objective.ldm.vocabulary(start), objective.ldm.vocabulary, "l2", exclude_none=True)
    losses = objective.losses_per_pair(tiny.latents(1), near, fixed_pairs(objective, config))[0]
    assert_near(steps[0].losses[0], losses[order[0, :5]])
    assert len(steps) == 12


def test_shuffles_accumulate():
    permutations = torch.tensor([[2, 0, 1], [1, 2, 0]])
    assert cumulative_order(permutations).tolist() == [[2, 0, 1], [0, 1, 2]]


def test_the_monitor_can_be_the_fixed_pairs():
    objective = Objective(tiny.dit())
    assert torch.equal(monitor_pairs(objective, CONFIG).noise, fixed_pairs(objective, CONFIG).noise)


@pytest.mark.parametrize("settings, message", [
    ({"init": "mean"}, "init"), ({"accumulation": 2}, "accumulation"), ({"fixed_pairs": False}, "fixed_pairs"),
    ({"monitor_nearest": False}, "monitor_nearest"), ({"memo_states": -1}, "memo_states")])
def test_refuses_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **settings)


def test_refuses_what_does_not_fit_a_class_or_the_timesteps():
    objective = Objective(tiny.dit())
    with pytest.raises(ValueError, match="legal"):
        invert(objective, tiny.latents(1), dataclasses.replace(CONFIG, legal=True))
    pairs = fixed_pairs(objective, dataclasses.replace(CONFIG, t_interval=50))
    with pytest.raises(ValueError, match="timesteps"):
        invert(objective, tiny.latents(1), CONFIG, pairs=pairs)
    with pytest.raises(ValueError, match="order"):
        invert(objective, tiny.latents(1), CONFIG, order=torch.arange(9)[None])


def selected_loop(result, recording):
    return result.convergence_step * recording.loops // recording.config.steps


def first_loop(monitor, rounding):
    return int((monitor <= monitor.min() + rounding).nonzero()[0]) + 1


def assert_near(found, expected):
    torch.testing.assert_close(torch.as_tensor(found).double(), torch.as_tensor(expected).double(), atol=TOLERANCE,
                               rtol=0)
