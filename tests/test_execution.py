"""Frozen networks in bfloat16 and compiled answer as in float32, up to rounding, whatever the number of samples."""

import pytest
import torch

from dive_lib.execution import Execution
from dive_lib.inversion import InversionConfig, invert
from dive_lib.objective import Objective, Pairs
from tests import tiny


def losses(objective, images=3):
    pairs = Pairs.draw(objective.ldm, torch.tensor([100, 400]), torch.Generator().manual_seed(0))
    return objective.losses_per_pair(tiny.latents(images), tiny.layouts()[:1].expand(images, -1, -1), pairs)


def test_what_is_not_asked_for_is_left_alone():
    objective = Execution(chunk=7).prepare(tiny.objective())
    assert objective.chunk == 7 and "forward" not in vars(objective.ldm.unet)
    assert torch.allclose(losses(objective), losses(tiny.objective()), rtol=1e-6)


def test_bfloat16_is_that_of_networks_alone():
    plain, fast = tiny.objective(), Execution(bf16=True).prepare(tiny.objective())
    assert fast.ldm.unet.dtype is fast.prior.transformer.norm.weight.dtype is torch.bfloat16
    assert fast.ldm.vocabulary.class_table.dtype is next(fast.ldm.encoder.parameters()).dtype is torch.float32
    expected, found = losses(plain), losses(fast)
    assert found.dtype is torch.float32 and not torch.equal(found, expected)
    assert torch.allclose(found, expected, rtol=0.05)


@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_networks_are_called_with_whole_chunks(monkeypatch, bf16):
    """torch.compile itself needs a compiler; what it is given and what becomes of its answer does not."""
    sizes = []

    def compiled(forward, *, dynamic):
        def call(*args, **kwargs):
            assert dynamic is False and all(len(a) == len(args[0]) for a in args)
            sizes.append(len(args[0]))
            return forward(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    objective = Execution(chunk=4, bf16=bf16, compile=True).prepare(tiny.objective())
    assert torch.allclose(losses(objective), losses(tiny.objective()), rtol=0.05 if bf16 else 1e-5)
    assert sizes == [4, 4]  # six samples
    config = InversionConfig(steps=3, batch=3, monitor_pairs=3, monitor_every=2, lr=0.2)
    found = invert(objective, tiny.latents(2), config)
    expected = invert(tiny.objective(), tiny.latents(2), config)
    assert set(sizes) == {4}
    for a, b in zip(found, expected):
        assert a.cost == b.cost and a.monitor == pytest.approx(b.monitor, rel=0.05 if bf16 else 1e-5)


def test_a_class_model_is_executed_alike():
    dit = tiny.dit()
    latents, tokens = torch.randn(2, *dit.latent_shape), dit.grid.encode(torch.tensor([0, 1]))
    pairs = Pairs.draw(dit, torch.tensor([50, 300]), torch.Generator().manual_seed(0), prior=False)
    expected = Objective(dit).losses_per_pair(latents, tokens, pairs)
    found = Execution(chunk=3, bf16=True).prepare(Objective(dit)).losses_per_pair(latents, tokens, pairs)
    assert torch.allclose(found, expected, rtol=0.05) and not torch.equal(found, expected)


def test_a_compiled_network_takes_no_more_than_a_chunk(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)
    dit = tiny.dit()
    Execution(chunk=2, compile=True).prepare(Objective(dit))
    z, context = torch.randn(3, *dit.latent_shape), torch.randn(3, dit.vocabulary.width)
    with pytest.raises(ValueError, match="compiled for 2 samples was called with 3"):
        dit.predict_noise(z, torch.tensor([1, 2, 3]), context)


def test_a_chunk_holds_a_sample():
    with pytest.raises(ValueError, match="chunk"):
        Execution(chunk=0)
