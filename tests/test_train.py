"""The training loop: resuming, averaging, stopping."""

import csv
import dataclasses
import math
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from dive_lib import checkpoint, paths, stage_scratch
from dive_lib.checkpoint import load_tensors
from dive_lib.train import TrainingConfig, train, write_loss_curve

CONFIG = TrainingConfig(steps=20, lr=0.05, batch_size=8, ema=0.9, warmup=2)


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))


def loss_of(net, step, generator):
    x = torch.randn(8, 4, generator=generator)
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_interrupted_and_continued_equals_uninterrupted(tmp_path):
    whole = model()
    losses = train(whole, loss_of, CONFIG, scratch=tmp_path / "a", identity="x")
    for stop in (7, 15):
        train(model(), loss_of, CONFIG, scratch=tmp_path / "b", identity="x", stop_after=stop)
    parts = model()
    again = train(parts, loss_of, CONFIG, scratch=tmp_path / "b", identity="x")
    assert torch.equal(weights(whole), weights(parts)) and losses == again
    assert losses[-1] < losses[0]
    assert list((tmp_path / "b").iterdir()) == [], "the resume state is removed at the end"


def test_a_training_without_early_weights_leaves_no_older_ones(tmp_path):
    net = model()
    checkpoint.save_early(tmp_path / "early", net, {"a": 1}, net.state_dict())
    assert checkpoint.load_config(tmp_path / "early") == {"a": 1}
    checkpoint.save_early(tmp_path / "early", net, {"a": 1}, {})
    assert list((tmp_path / "early").iterdir()) == []


@pytest.mark.parametrize("stops", [(), (3,), (5, 9)])
def test_early_weights_are_those_of_a_shorter_way(tmp_path, stops):
    """The average after five steps, however often it is interrupted; the weights of the end are as without."""
    config, plain, kept, after = dataclasses.replace(CONFIG, early=5), model(), {}, {}
    train(plain, loss_of, CONFIG, scratch=tmp_path / "plain", identity="x")
    for stop in stops:
        train(model(), loss_of, config, scratch=tmp_path / "a", identity="x", stop_after=stop)
    net = model()
    train(net, loss_of, config, scratch=tmp_path / "a", identity="x", early=kept)
    assert torch.equal(weights(net), weights(plain)) and kept.keys() == net.state_dict().keys()
    state = tmp_path / "b"
    train(model(), loss_of, CONFIG, scratch=state, identity="x", stop_after=5)
    tensors, _ = load_tensors(next(state.iterdir()))
    assert all(torch.equal(kept[name], tensors[f"average.{name}"]) for name, _ in net.named_parameters())
    longer = dataclasses.replace(CONFIG, early=500)
    train(net, loss_of, longer, scratch=tmp_path / "c", identity="x", early=after)
    assert all(torch.equal(after[name], value) for name, value in net.state_dict().items()), "more than all: all"
    none = {}
    train(model(), loss_of, CONFIG, scratch=tmp_path / "d", identity="x", early=none)
    assert none == {}
    with pytest.raises(ValueError, match="early weights"):
        dataclasses.replace(CONFIG, early=-1)


def never(*arguments):
    raise AssertionError("a finished training was repeated")


@pytest.mark.parametrize("ema", [0.9, 0.0])
@pytest.mark.parametrize("stop_after", [None, 7, 20])
def test_a_finished_training_of_a_stage_is_not_repeated(monkeypatch, ema, stop_after):
    monkeypatch.setenv("DIVE_STAGE", "mini-02@first")
    config, scratch = dataclasses.replace(CONFIG, ema=ema), paths.scratch() / "toy"
    first = with_norm()
    if stop_after:
        train(with_norm(), loss_of, config, scratch=scratch, identity="x", stop_after=stop_after)
    losses = train(first, loss_of, config, scratch=scratch, identity="x", keep_after=0)
    drawn = torch.rand(3)
    monkeypatch.setenv("DIVE_STAGE", "mini-02@second")
    again = with_norm()
    torch.manual_seed(99)
    assert train(again, never, config, scratch=scratch, identity="x", keep_after=1e9) == losses and len(losses) == 20
    assert not again.training and torch.equal(torch.rand(3), drawn), "what follows draws the same numbers"
    assert all(torch.equal(again.state_dict()[name], value) for name, value in first.state_dict().items())
    stage_scratch.forget("mini-02@first")
    assert len(saved(scratch)) == 1
    stage_scratch.forget("mini-02@second")
    assert not saved(scratch)


def test_only_long_or_continued_trainings_of_a_stage_are_kept(monkeypatch):
    scratch = paths.scratch() / "toy"
    train(model(), loss_of, CONFIG, scratch=scratch, identity="no stage", keep_after=0)
    monkeypatch.setenv("DIVE_STAGE", "mini-02@1")
    train(model(), loss_of, CONFIG, scratch=scratch, identity="short")
    assert not saved(scratch)
    train(model(), loss_of, CONFIG, scratch=scratch, identity="continued", stop_after=3)
    train(model(), loss_of, CONFIG, scratch=scratch, identity="continued")
    monkeypatch.delenv("DIVE_STAGE")
    train(model(), never, CONFIG, scratch=scratch, identity="continued")
    assert len(saved(scratch)) == 1, "who looks at a failed stage in JupyterLab leaves what it keeps"


def with_norm() -> nn.Module:
    """With buffers, which are not averaged."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 1))


TRAINING = """
import dataclasses, sys, time
from pathlib import Path
from dive_lib.checkpoint import save_tensors
from dive_lib.train import train
from tests.test_train import CONFIG, loss_of, model

def slow(*arguments):
    time.sleep(0.01)
    return loss_of(*arguments)

net = model()
train(net, slow, dataclasses.replace(CONFIG, steps=100), scratch=Path(sys.argv[1]), identity="x", save_every=0.0)
save_tensors(Path(sys.argv[2]), dict(net.named_parameters()))
"""


def test_killed_at_any_moment_the_same_command_ends_with_the_same_weights(tmp_path):
    scratch, out = tmp_path / "scratch", tmp_path / "weights.safetensors"
    command = [sys.executable, "-c", TRAINING, str(scratch), str(out)]
    for pause in (0.0, 0.23, 0.41):
        process = subprocess.Popen(command, cwd=paths.ROOT)
        deadline = time.monotonic() + 60
        before = saved(scratch)
        while saved(scratch) == before and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(pause)
        assert process.poll() is None, "the training ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not out.exists() and saved(scratch)
    subprocess.run(command, cwd=paths.ROOT, check=True)
    whole = model()
    train(whole, loss_of, dataclasses.replace(CONFIG, steps=100), scratch=tmp_path / "whole", identity="x")
    killed, _ = load_tensors(out)
    assert all(torch.equal(killed[name], p) for name, p in whole.named_parameters())


def saved(scratch):
    """Time of every resume state; a hidden neighbour that is still being written may vanish at any moment."""
    states = [path for path in scratch.glob("*.safetensors") if not path.name.startswith(".")]
    return {path: path.stat().st_mtime_ns for path in states}


@pytest.mark.parametrize("change", ["config", "identity"])
def test_a_changed_parameter_never_continues_a_stale_run(tmp_path, change):
    train(model(), loss_of, CONFIG, scratch=tmp_path, identity="x", stop_after=10)
    config = dataclasses.replace(CONFIG, lr=0.04) if change == "config" else CONFIG
    fresh, reference = model(), model()
    train(fresh, loss_of, config, scratch=tmp_path, identity="y" if change == "identity" else "x")
    train(reference, loss_of, config, scratch=tmp_path / "new", identity="z")
    assert torch.equal(weights(fresh), weights(reference))


def test_a_non_finite_loss_stops_and_names_the_step(tmp_path):
    with pytest.raises(FloatingPointError, match="step 4"):
        train(model(), lambda net, step, g: loss_of(net, step, g) * (math.nan if step == 4 else 1), CONFIG,
              scratch=tmp_path, identity="x")


def test_schedules():
    rates = [CONFIG.rate(step) for step in range(20)]
    assert rates[0] < rates[1] < rates[2] and rates[2] > rates[10] > rates[19] > 0
    assert dataclasses.replace(CONFIG, schedule="constant").rate(19) == 0.05
    with pytest.raises(ValueError, match="linear"):
        dataclasses.replace(CONFIG, schedule="linear")


def test_averaged_weights_follow_the_formula(tmp_path):
    """Two steps by hand: average <- average + (1 - decay) (weights - average), decay = (1 + n) / (10 + n)."""
    net = model()
    seen = []
    config = TrainingConfig(steps=2, lr=0.05, batch_size=8, ema=0.9)

    def watch(net, step, generator):
        seen.append(weights(net).clone())
        return loss_of(net, step, generator)

    raw = model()
    train(raw, watch, dataclasses.replace(config, ema=0.0), scratch=tmp_path / "raw", identity="x")
    seen.append(weights(raw))
    train(net, loss_of, config, scratch=tmp_path / "ema", identity="x")
    first = seen[0] + 0.9 * (seen[1] - seen[0])
    torch.testing.assert_close(weights(net), first + 9 / 11 * (seen[2] - first))


def test_loss_curve(tmp_path):
    write_loss_curve(tmp_path / "loss.csv", [4.0, 2.0, 1.0], every=2)
    assert list(csv.reader(open(tmp_path / "loss.csv"))) == [["step", "loss"], ["2", "3"], ["3", "1"]]
