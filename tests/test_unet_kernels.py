"""The U-Net in operations that compile to faster kernels is the same function."""

import copy

import pytest
import torch

from dive_lib.position_attention import PositionAttention
from dive_lib.unet_kernels import FlexProcessor, SplitGEGLU, use_fast_kernels
from tests import tiny


@pytest.mark.parametrize("positions", [False, True])
def test_it_answers_and_has_the_gradient_of_the_unet(positions):
    ldm = tiny.layout_ldm(positions)
    fast = copy.deepcopy(ldm)
    use_fast_kernels(fast.unet)
    assert any(isinstance(module, SplitGEGLU) for module in fast.unet.modules())
    context = ldm.context(ldm.vocabulary(tiny.layouts())).requires_grad_()
    t, weights = torch.tensor([10, 300, 900]), torch.randn(3, 4, 8, 8)
    answers = [model.predict_noise(tiny.latents(), t, context) for model in (ldm, fast)]
    gradients = [torch.autograd.grad((answer * weights).sum(), context)[0] for answer in answers]
    assert torch.allclose(*answers, rtol=1e-5, atol=1e-6) and gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_attention_with_a_processor_of_its_own_keeps_it():
    unet = tiny.layout_ldm(True).unet
    use_fast_kernels(unet)
    kinds = {name.split(".processor")[0].rsplit(".", 1)[1]: type(processor)
             for name, processor in unet.attn_processors.items()}
    assert kinds == {"attn1": FlexProcessor, "attn2": PositionAttention}


def test_a_network_without_transformer_blocks_of_that_kind_is_left_alone():
    dit = tiny.dit()
    before = {name: type(module) for name, module in dit.transformer.named_modules()}
    use_fast_kernels(dit.transformer)
    assert before == {name: type(module) for name, module in dit.transformer.named_modules()}
