"""Recorded networks answer as the networks themselves, and never with another call's answer or gradient."""

import pytest
import torch
from torch import nn

from dive_lib.checkpoint import freeze
from dive_lib.cuda_graphs import Recorded
from dive_lib.execution import Execution
from dive_lib.inversion import InversionConfig, invert
from dive_lib.layout_ldm import LayoutLDM
from dive_lib.objective import Objective, Pairs
from tests import tiny


def recorded_in_place(made):
    """A stand-in for torch.cuda.make_graphed_callables with its memory: one set of inputs, outputs and gradients."""

    def make(forward, samples):
        made.append([(tuple(sample.shape), sample.requires_grad) for sample in samples])
        static = {}

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *inputs):
                for sample, given in zip(samples, inputs):
                    sample.data.copy_(given)
                with torch.set_grad_enabled(any(sample.requires_grad for sample in samples)):
                    out = forward(*samples)
                static["tuple"], static["out"] = isinstance(out, tuple), out[0] if isinstance(out, tuple) else out
                kept = static.setdefault("kept", static["out"].detach().clone())
                return kept.copy_(static["out"].detach()).detach()

            @staticmethod
            def backward(ctx, gradient):
                needed = [sample for sample in samples if sample.requires_grad]
                found = iter(torch.autograd.grad(static["out"], needed, gradient))
                computed = [next(found) if sample.requires_grad else None for sample in samples]
                kept = static.setdefault("gradients", [g if g is None else g.clone() for g in computed])
                return tuple(k if k is None else k.copy_(g).detach() for k, g in zip(kept, computed))

        def replay(*inputs):
            out = Replay.apply(*inputs)
            return (out,) if static["tuple"] else out

        return replay

    return make


@pytest.fixture
def made(monkeypatch):
    """Kinds of calls that were recorded, by the stand-in."""
    kinds = []
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorded_in_place(kinds))
    monkeypatch.setattr(Recorded, "records", lambda self, tensor: True)
    return kinds


def test_a_kind_of_call_is_recorded_once_and_its_answers_stay_valid(made):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).requires_grad_(False)
    recorded, inputs = Recorded(network.forward), [torch.randn(4, 3).requires_grad_() for _ in range(3)]
    outs, gradients = [], []
    for x in inputs:
        outs.append(recorded(x))
        gradients.append(torch.autograd.grad(outs[-1].square().sum(), x)[0])
    with torch.no_grad():
        answers = [recorded(x) for x in inputs]
    for x, out, gradient, answer in zip(inputs, outs, gradients, answers):
        assert torch.allclose(out, network(x)) and torch.allclose(answer, network(x))
        assert torch.allclose(gradient, torch.autograd.grad(network(x).square().sum(), x)[0])
    assert made == [[((4, 3), True)], [((4, 3), False)]]
    recorded(torch.randn(2, 3))
    assert made[2:] == [[((2, 3), False)]]


def test_the_gradient_of_a_call_that_was_overwritten_is_refused(made):
    recorded, x = Recorded(lambda x: x.square()), torch.ones(2).requires_grad_()
    first, second = recorded(x), recorded(2 * x)
    with pytest.raises(RuntimeError, match="or after the next call"):
        first.sum().backward()
    with torch.no_grad():
        recorded(x)  # another kind
    assert torch.equal(torch.autograd.grad(second[0], x, retain_graph=True)[0], torch.tensor([8.0, 0.0]))
    with pytest.raises(RuntimeError, match="asked for twice"):
        torch.autograd.grad(second[1], x)  # the first one overwrote what it needs


def test_on_a_processor_the_network_is_called_itself():
    assert torch.equal(Recorded(lambda x, *, factor: factor * x)(torch.ones(2), factor=3), torch.full((2,), 3.0))


def test_tensors_are_given_by_position_and_options_by_name(made):
    recorded = Recorded(lambda x, *, factor=1: factor * x)
    for wrong in (lambda: recorded(torch.ones(2), 3), lambda: recorded(torch.ones(2), factor=torch.ones(()))):
        with pytest.raises(TypeError, match="by position"):
            wrong()
    assert [float(recorded(torch.ones(1), factor=k)) for k in (2, 3, 2)] == [2, 3, 2] and len(made) == 2


@pytest.mark.parametrize("bf16", [False, True])
def test_a_search_on_recorded_networks_finds_the_same(made, monkeypatch, bf16):
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)
    config = InversionConfig(steps=4, batch=3, monitor_pairs=6, monitor_every=2, lr=0.2)
    found = invert(Execution(chunk=4, bf16=bf16, compile=True).prepare(tiny.objective()), tiny.latents(2), config)
    expected = invert(tiny.objective(), tiny.latents(2), config)
    assert len(made) == 4  # U-Net and prior, with and without a gradient
    for a, b in zip(found, expected):
        assert a.cost == b.cost and a.monitor == pytest.approx(b.monitor, rel=0.05 if bf16 else 1e-5)


def wide_ldm():
    torch.manual_seed(0)
    unet = tiny.UNET | {"block_out_channels": [32, 64], "attention_head_dim": [1, 2], "sample_size": 16}
    return freeze(LayoutLDM(tiny.GRID, tiny.VOCABULARY, {"layers": 1, "heads": 2, "head_width": 4}, unet))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", ["layout", "heads of 32", "positions", "class"])
def test_compiled_and_recorded_on_a_gpu(kind, bf16, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # else a token may be another by rounding
    def objective():
        ldm = {"class": tiny.dit, "heads of 32": wide_ldm}.get(kind, lambda: tiny.layout_ldm(kind == "positions"))()
        return Objective(ldm.cuda(), None if kind == "class" else tiny.layout_prior(ldm).cuda())

    config = InversionConfig(steps=6, batch=4, monitor_pairs=8, monitor_every=2, lr=0.2, legal=kind != "class")
    fast, plain = Execution(chunk=8, bf16=bf16, compile=True).prepare(objective()), objective()
    latents = torch.randn(3, *plain.ldm.latent_shape, generator=torch.Generator().manual_seed(5)).cuda()
    for a, b in zip(invert(fast, latents, config), invert(plain, latents, config)):
        assert a.cost.forward_equivalents == pytest.approx(b.cost.forward_equivalents, rel=0.3 if bf16 else 0)
        assert a.monitor == pytest.approx(b.monitor, rel=0.05 if bf16 else 1e-3)
    pairs = Pairs.draw(plain.ldm, torch.tensor([50, 200, 400, 700]), torch.Generator().manual_seed(0), prior=False)
    tokens = plain.ldm.grid.empty(4) if kind != "class" else plain.ldm.grid.encode(torch.arange(4))
    context = plain.ldm.context(plain.ldm.vocabulary(tokens.cuda()))
    latents = latents[[0, 1, 2, 0]]
    for _ in range(2):
        for a, b in zip(fast.image_gradients(latents, context, pairs), plain.image_gradients(latents, context, pairs)):
            assert torch.allclose(a, b, rtol=0.1 if bf16 else 1e-3, atol=(0.1 if bf16 else 1e-3) * b.abs().max())
