"""A training step in parts: the gradient of the whole batch, and the same bytes for any number of cores."""

import dataclasses
import threading
import time

import pytest
import torch
from torch import nn

from dive_lib.batch_parts import DrawnLoss, Parts
from dive_lib.train import TrainingConfig, train

CONFIG = TrainingConfig(steps=12, lr=0.05, batch_size=8, ema=0.9, parts=2)


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 300), nn.GELU(), nn.Linear(300, 300), nn.GELU(), nn.Linear(300, 1))


def draw(net, generator):
    return torch.randn(8, 4, generator=generator), torch.randn(8, 1, generator=generator)


def losses(net, x, y):
    return (net(x) - y).square().mean(1)


LOSS = DrawnLoss(draw, losses)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def gradients(count: int, objective=LOSS) -> list[torch.Tensor | None]:
    net = model()
    parameters = list(net.parameters())
    parts = Parts(count, parameters)
    with parts.at_once():
        parts.loss = parts.step(objective, net, 0, torch.Generator().manual_seed(1))
    return [parts.loss, *(p.grad for p in parameters)]


@pytest.mark.parametrize("count", [2, 3, 8])
def test_gradients_of_parts_are_those_of_the_batch(count):
    """Also of parts of different sizes: 8 in three are 3, 3 and 2."""
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients(count), gradients(1), strict=True))


@pytest.mark.parametrize("count", [2, 3])
def test_a_training_in_parts_has_the_same_bytes_on_any_number_of_cores(tmp_path, count):
    config, results = dataclasses.replace(CONFIG, parts=count), []
    for cores in (1, 2, 4):
        torch.set_num_threads(cores)
        net = model()
        curve = train(net, LOSS, config, scratch=tmp_path / str(cores), identity="x")
        assert torch.get_num_threads() == cores
        results.append((curve, [p.detach().clone() for p in net.parameters()]))
    first, *others = results
    assert all(curve == first[0] and all(map(torch.equal, weights, first[1])) for curve, weights in others)
    assert first[0][-1] != first[0][0]


def test_parts_run_at_once_with_one_thread_each():
    """Each waits for the other: one after the other, this would not end in time."""
    met, seen = threading.Barrier(2, timeout=30), []

    def wait(net, x, y):
        met.wait()
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return losses(net, x, y)

    torch.set_num_threads(2)
    gradients(2, DrawnLoss(draw, wait))
    assert len({ident for ident, _ in seen}) == 2 and [count for _, count in seen] == [1, 1]


def test_on_one_core_parts_come_one_after_another():
    running = []

    def alone(net, x, y):
        running.append(1)
        time.sleep(0.05)
        assert len(running) == 1
        running.pop()
        return losses(net, x, y)

    torch.set_num_threads(1)
    gradients(2, DrawnLoss(draw, alone))


def test_parameters_that_no_part_uses_have_no_gradient():
    net = model()
    idle = nn.Parameter(torch.ones(3))
    parts = Parts(2, [*net.parameters(), idle])
    with parts.at_once():
        parts.step(LOSS, net, 0, torch.Generator())
    assert idle.grad is None and net[0].weight.grad is not None


def test_an_objective_without_parts_is_refused(tmp_path):
    with pytest.raises(TypeError, match="has no parts; set parts to 1, not 2"):
        train(model(), lambda net, step, generator: LOSS(net, step, generator), CONFIG, scratch=tmp_path, identity="x")
    with pytest.raises(ValueError, match="a batch of 8 has 1 to 8 parts, got 9"):
        dataclasses.replace(CONFIG, parts=9)
    with pytest.raises(ValueError, match="one part or more"):
        Parts(0, [])


def test_a_loss_that_is_not_finite_names_the_step_and_threads_come_back(tmp_path):
    def bad(net, x, y):
        return losses(net, x, y) / 0

    torch.set_num_threads(2)
    with pytest.raises(FloatingPointError, match="at step 0"):
        train(model(), DrawnLoss(draw, bad), CONFIG, scratch=tmp_path, identity="x")
    assert torch.get_num_threads() == 2
