"""Algorithm 1 on models of a few thousand parameters: every shortcut must equal the plain computation."""

import dataclasses

import pytest
import torch

from dive_lib import parameters
from dive_lib.inversion import InversionConfig, _Run, fixed_pairs, invert, monitor_pairs
from dive_lib.objective import Pairs
from tests.tiny import latents, layouts, objective

CONFIG = InversionConfig(steps=12, batch=4, lr=0.2, t_low=0, t_high=1000, t_interval=100, monitor_pairs=5,
                         monitor_every=3)


def test_matches_autograd_and_torch_adamw():
    """One image, one loop: the memoised, context-wise gradients and the batched AdamW against the textbook form."""
    dive = objective(weight=0.5)
    x, config = latents(1), dataclasses.replace(CONFIG, steps=5, monitor_every=1, lr_end=0.5)
    result, = invert(dive, x, config)
    vocabulary, generator, queue = dive.ldm.vocabulary, torch.Generator().manual_seed(0), torch.empty(0).long()
    v = vocabulary(dive.ldm.grid.empty(1)).detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([v], lr=0.2, weight_decay=0.01)
    monitor, values = monitor_pairs(dive, config), []
    from dive_lib.straight_through import nearest_tokens
    for step in range(6):
        tokens = nearest_tokens(v, vocabulary)
        values.append(dive.evaluate(x, tokens, monitor).item())
        while len(queue) < 4:
            queue = torch.cat([queue, torch.randperm(10, generator=generator)])
        index, queue = queue[:4], queue[4:]
        pairs = Pairs.draw(dive.ldm, config.timesteps[index], generator)
        straight = (vocabulary(tokens) - v).detach() + v  # equation 6
        z_t = dive.ldm.schedule.add_noise(x.expand(4, -1, -1, -1), pairs.noise, pairs.t)
        image = (dive.ldm(z_t, pairs.t, straight.expand(4, -1, -1, -1)) - pairs.noise).square().mean()
        prior = dive.prior.loss(straight.expand(4, -1, -1, -1), pairs.t, pairs.prior_noise).mean()
        optimizer.zero_grad()
        (image + 0.5 * prior).backward()
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - 0.5 * step / 5)
        optimizer.step()
    torch.testing.assert_close(torch.tensor([value for _, value, _ in result.curve]), torch.tensor(values),
                               atol=1e-5, rtol=0)
    assert len({round(value, 6) for value in values}) > 1, "the state never changed: the test shows nothing"


@pytest.mark.parametrize("settings", [{}, {"fixed_pairs": True}, {"in_vocabulary": False}, {"legal": True},
                                      {"coarse_steps": 4}])
def test_many_images_equal_one_at_a_time(settings):
    dive, config = objective(), dataclasses.replace(CONFIG, **settings)
    together = invert(dive, latents(3), config)
    for k, x in enumerate(latents(3)):
        alone, = invert(dive, x[None], config)
        assert torch.equal(alone.tokens, together[k].tokens)
        assert alone.convergence_step == together[k].convergence_step
        torch.testing.assert_close(torch.tensor(alone.curve), torch.tensor(together[k].curve), atol=1e-5, rtol=0)


def test_timesteps_go_from_coarse_to_fine_and_then_come_from_all():
    config = dataclasses.replace(CONFIG, t_low=0, t_high=1000, t_interval=50, batch=4, fixed_pairs=True, coarse_steps=6)
    run = _Run(objective(prior=False), latents(1), config, None)
    drawn = [run.draw(step)[1].t for step in range(6 + 5)]
    assert drawn[0].min() >= 500 and drawn[5].max() < 600 and all(len(t) == 4 for t in drawn)
    assert sorted(torch.cat(drawn[6:]).tolist()) == config.timesteps.tolist()
    with pytest.raises(ValueError, match="lower batch or t_interval"):
        dataclasses.replace(config, batch=11)


def test_memoised_states_change_nothing_but_the_cost():
    dive = objective(prior=False)
    config = dataclasses.replace(CONFIG, steps=40, fixed_pairs=True, lr=0.05)
    plain = invert(dive, latents(2), dataclasses.replace(config, memoise=False))
    memo = invert(dive, latents(2), config)
    for a, b in zip(plain, memo):
        assert torch.equal(a.tokens, b.tokens)
        torch.testing.assert_close(torch.tensor(a.curve)[:, :2], torch.tensor(b.curve)[:, :2], atol=1e-6, rtol=0)
        assert b.cost.reused > 0 and b.cost.backward + b.cost.reused == a.cost.backward == 40 * 4


@pytest.mark.parametrize("settings", [{}, {"legal": True}, {"memo_states": 1}, {"patience": 6}])
@pytest.mark.parametrize("prior", [False, True])
def test_layouts_too_can_be_monitored_on_their_own_pairs(prior, settings):
    config = dataclasses.replace(CONFIG, steps=24, fixed_pairs=True, lr=0.05, monitor_pairs=0, **settings)
    plain, memo = (invert(objective(prior), latents(2), dataclasses.replace(config, memoise=memoise))
                   for memoise in (False, True))
    for a, b in zip(plain, memo):
        assert torch.equal(a.tokens, b.tokens) and a.convergence_step == b.convergence_step
        torch.testing.assert_close(torch.tensor(a.curve)[:, :2], torch.tensor(b.curve)[:, :2], atol=1e-6, rtol=0)
        assert b.cost.forward_equivalents < a.cost.forward_equivalents


def test_the_monitor_evaluates_each_state_once_and_selects_the_least():
    dive = objective()
    result, = invert(dive, latents(1), dataclasses.replace(CONFIG, monitor_every=1))
    assert result.cost.forward - result.cost.backward == 5 * result.states_visited
    values = [value for _, value, _ in result.curve]
    assert result.monitor == min(values)
    assert result.convergence_step == result.curve[values.index(min(values))][0]
    again = dive.evaluate(latents(1), result.tokens[None], monitor_pairs(dive, CONFIG))
    assert abs(again.item() - result.monitor) < 1e-5


def test_the_papers_monitor_begins_after_a_loop():
    """The layout without objects, with which a run starts, is no answer that the monitor could choose."""
    assert not InversionConfig(**parameters.named("searches", "straight_through", "paper")).monitor_start
    result, = invert(objective(), latents(1), dataclasses.replace(CONFIG, monitor_start=False))
    assert [step for step, *_ in result.curve] == [3, 6, 9, 12] and result.convergence_step >= 3


def test_early_stopping_equals_reading_it_off_the_full_run():
    dive, config = objective(), dataclasses.replace(CONFIG, steps=40, monitor_every=2)
    full = invert(dive, latents(3), config)
    stopped = invert(dive, latents(3), dataclasses.replace(config, patience=6))
    assert any(s.curve[-1][0] < 40 for s in stopped)
    for a, b in zip(full, stopped):
        assert b.curve[-1][0] == a.stopped_at(6)
        assert torch.equal(a.after(b.curve[-1][0]).tokens, b.tokens)


def test_shorter_runs_can_be_read_off_a_long_one():
    dive = objective()
    long = invert(dive, latents(2), dataclasses.replace(CONFIG, steps=24))
    short = invert(dive, latents(2), CONFIG)
    for a, b in zip(long, short):
        assert torch.equal(a.after(12).tokens, b.tokens) and a.after(12).monitor == pytest.approx(b.monitor, abs=1e-6)


def test_noises_drawn_ahead_are_the_same(monkeypatch):
    """As with a GPU; also where a run ends before all steps are drawn."""
    for config in (CONFIG, dataclasses.replace(CONFIG, monitor_every=1, patience=1)):
        usual = invert(objective(), latents(2), config)
        with monkeypatch.context() as patch:
            patch.setattr(_Run, "draws_ahead", property(lambda run: True))
            ahead = invert(objective(), latents(2), config)
        assert [(r.curve, r.cost, r.tokens.tolist()) for r in ahead] == [
            (r.curve, r.cost, r.tokens.tolist()) for r in usual]
    assert max(r.curve[-1][0] for r in usual) < config.steps


def test_starts_from_a_given_layout():
    dive = objective()
    result = invert(dive, latents(3), dataclasses.replace(CONFIG, lr=1e-6), start=layouts())
    assert all(torch.equal(r.tokens, t) for r, t in zip(result, layouts()))


def test_weights_receive_no_gradients():
    dive = objective()
    invert(dive, latents(1), CONFIG)
    assert all(p.grad is None and not p.requires_grad for p in dive.ldm.parameters())


@pytest.mark.parametrize("settings", [{"metric": "dot"}, {"steps": 0}, {"t_low": 9, "t_high": 9}])
def test_refuses_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError):
        dataclasses.replace(CONFIG, **settings)


def test_noises_of_fixed_pairs_and_monitor_may_be_opposite():
    dive = objective()
    for draw in (fixed_pairs, monitor_pairs):
        own, opposite = (draw(dive, dataclasses.replace(CONFIG, antithetic=antithetic)) for antithetic in (False, True))
        half = len(own) // 2 * 2
        assert torch.equal(own.t, opposite.t) and half >= 4 and opposite.prior_noise.numel()
        for before, after in ((own.noise, opposite.noise), (own.prior_noise, opposite.prior_noise)):
            assert torch.equal(before[::2], after[::2]) and torch.equal(after[1::2], -before[:half:2])
