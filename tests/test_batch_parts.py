"""A training step in parts: the gradient of the whole batch, and the same bytes for any number of cores."""

import dataclasses
import threading
import time

import pytest
import torch
from torch import nn

from dive_lib.batch_parts import DrawnLoss, Parts
from dive_lib.class_training import class_loss
from dive_lib.layout_ldm import layout_ldm_loss
from dive_lib.layout_prior import layout_prior_loss
from dive_lib.train import TrainingConfig, train
from tests import tiny

CONFIG = TrainingConfig(steps=12, lr=0.05, batch_size=8, ema=0.9, parts=2)


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 300), nn.GELU(), nn.Linear(300, 300), nn.GELU(), nn.Linear(300, 1))


def draw(net, step, generator):
    return torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)


def losses(net, x, y):
    return (net(x) - y).square().mean(1)


LOSS = DrawnLoss(draw, losses)


def on(monkeypatch, count: int) -> None:
    """As on a machine with so many cores."""
    monkeypatch.setattr("dive_lib.batch_parts.cores", lambda: count)


def gradients(count: int, objective=LOSS, net: nn.Module | None = None) -> list[torch.Tensor]:
    """The loss of a step and the gradients that it leaves."""
    net = net or model()
    parts = Parts(count, net)
    with parts.at_once():
        loss = parts.step(objective, 0, torch.Generator().manual_seed(1))
    return [loss, *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_gradients_of_parts_are_those_of_the_batch(count):
    """Also of parts of different sizes: 8 in three are 3, 3 and 2."""
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(count), gradients(1), strict=True))


@pytest.mark.parametrize("count", [2, 3])
def test_a_training_in_parts_has_the_same_bytes_on_any_number_of_cores(tmp_path, monkeypatch, count):
    config, results = dataclasses.replace(CONFIG, parts=count), []
    for cores in (1, 2, 4):
        on(monkeypatch, cores)
        net = model()
        curve = train(net, LOSS, config, scratch=tmp_path / str(cores), identity="x")
        results.append((curve, [p.detach().clone() for p in net.parameters()]))
    first, *others = results
    assert all(curve == first[0] and all(map(torch.equal, weights, first[1])) for curve, weights in others)
    assert first[0][-1] != first[0][0]


@pytest.mark.parametrize("count", [1, 2])
def test_draws_keep_the_precision_of_the_weights(count):
    """The first stage fills its codebook from latents as it draws."""
    seen = []

    def see(name, function):
        return lambda *given: seen.append((name, torch.is_autocast_enabled("cpu"))) or function(*given)

    parts = Parts(count, model(), lambda: torch.autocast("cpu", torch.bfloat16))
    with parts.at_once():
        parts.step(DrawnLoss(see("draw", draw), see("losses", losses)), 0, torch.Generator().manual_seed(1))
    assert seen == [("draw", False)] + count * [("losses", True)]


def test_parts_run_at_once_with_one_thread_each(monkeypatch):
    """Each waits for the other: one after the other, this would not end in time."""
    met, seen = threading.Barrier(2, timeout=30), []

    def wait(net, x, y):
        met.wait()
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return losses(net, x, y)

    on(monkeypatch, 2)
    gradients(2, DrawnLoss(draw, wait))
    assert len({ident for ident, _ in seen}) == 2 and [count for _, count in seen] == [1, 1]


def test_on_one_core_parts_come_one_after_another(monkeypatch):
    running = []

    def alone(net, x, y):
        running.append(1)
        time.sleep(0.05)
        assert len(running) == 1
        running.pop()
        return losses(net, x, y)

    on(monkeypatch, 1)
    gradients(2, DrawnLoss(draw, alone))


def test_parameters_that_no_part_uses_have_no_gradient():
    net = model()
    net.idle = nn.Parameter(torch.ones(3))
    gradients(2, net=net)
    assert net.idle.grad is None and net[0].weight.grad is not None


def test_an_objective_without_parts_is_refused(tmp_path):
    with pytest.raises(TypeError, match="has no parts; set parts to 1, not 2"):
        train(model(), lambda net, step, generator: LOSS(net, step, generator), CONFIG, scratch=tmp_path, identity="x")
    with pytest.raises(ValueError, match="a batch of 8 has 1 to 8 parts, got 9"):
        dataclasses.replace(CONFIG, parts=9)


@pytest.mark.parametrize("layer", [nn.Dropout(0.1), nn.BatchNorm1d(1)])
def test_a_model_whose_samples_are_not_independent_is_refused(layer):
    with pytest.raises(ValueError, match=rf"1 \({type(layer).__name__}\) reads the whole batch or draws"):
        Parts(2, nn.Sequential(nn.Linear(4, 1), layer))
    Parts(1, nn.Sequential(nn.Linear(4, 1), layer))
    Parts(2, nn.Sequential(nn.Linear(4, 1), nn.Dropout(0.0)))


@pytest.mark.parametrize("kind", ["layout LDM", "prior", "DiT"])
def test_objectives_of_the_pipeline_have_parts(kind, monkeypatch):
    """The same gradients as of the whole batch, and the same bytes on one core and on two."""
    net, objective = pipeline(kind)
    on(monkeypatch, 2)
    whole, two = gradients(1, objective, net), gradients(2, objective, net)
    on(monkeypatch, 1)
    one = gradients(2, objective, net)
    assert len(whole) > 10 and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, two, strict=True))
    assert all(map(torch.equal, one, two))


def pipeline(kind: str):
    """A tiny model that learns, and what it learns by."""
    if kind == "DiT":
        labels = torch.tensor([0, 1, 2])
        return tiny.dit(3).requires_grad_(True), class_loss(tiny.latents(3), labels, 8, antithetic=True)
    ldm = tiny.layout_ldm()
    if kind == "prior":
        prior = tiny.layout_prior(ldm).requires_grad_(True)
        prior.vocabulary.requires_grad_(False)
        return prior, layout_prior_loss(Layouts(), 8)
    return ldm.requires_grad_(True), layout_ldm_loss(
        tiny.latents(3), Layouts(), 8, focus={"low": 0, "high": 1, "share": 0.0},
        dropout={"partial": 0.2, "objects": 0.1, "layouts": 0.1})


class Layouts:
    """As LayoutTokens, of three layouts."""

    def __len__(self) -> int:
        return 3

    def draw(self, indices, generator):
        return tiny.layouts()[indices]


def test_a_loss_that_is_not_finite_names_the_step(tmp_path):
    def bad(net, x, y):
        return losses(net, x, y) / 0

    with pytest.raises(FloatingPointError, match="at step 0"):
        train(model(), DrawnLoss(draw, bad), CONFIG, scratch=tmp_path, identity="x")
