"""The U-Net in operations that compile to faster kernels is the same function."""

import copy

import pytest
import torch
from torch import nn
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from dive_lib.execution import Execution
from dive_lib.objective import Objective
from dive_lib.position_attention import PositionAttention
from dive_lib.unet_kernels import ChannelsLastConv2d, FlexProcessor, SplitGEGLU, use_fast_kernels
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


def test_torch_compile_can_follow_it():
    """Tracing as for a GPU, without kernels, whose making needs a compiler and a minute."""
    ldm = tiny.layout_ldm(False)
    fast = copy.deepcopy(ldm.unet)
    use_fast_kernels(fast)
    compiled = torch.compile(fast.forward, dynamic=False, fullgraph=True, backend="aot_eager")
    context = ldm.context(ldm.vocabulary(tiny.layouts())).requires_grad_()
    t = torch.tensor([10, 300, 900])
    answers = [forward(tiny.latents(), t, context, return_dict=False)[0] for forward in (ldm.unet, compiled)]
    gradients = [torch.autograd.grad(answer.square().sum(), context)[0] for answer in answers]
    assert torch.allclose(*answers, rtol=1e-5, atol=1e-6) and torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_what_it_cannot_do_is_refused():
    unet = tiny.layout_ldm(False).unet
    use_fast_kernels(unet)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    with pytest.raises(ValueError, match="mask"):
        attention(torch.randn(1, 4, 16), attention_mask=torch.zeros(1, 4, 4))
    with pytest.raises(ValueError, match="trainable weights"):
        use_fast_kernels(unet.requires_grad_(True))


def test_convolutions_and_their_gradients_find_channels_last():
    """What torch.compile is given, on tensors without data: group norms leave channels first."""
    def layouts(change):
        ldm = tiny.layout_ldm(False).to("meta")
        unet = ldm.unet.to(memory_format=torch.channels_last)  # as in bfloat16
        if change:
            use_fast_kernels(unet)
        z, t, context = (torch.empty(shape, device="meta") for shape in ((2, 4, 8, 8), (2,), (2, 15, 8)))

        def gradient(z, t, context, weights):
            context = context.detach().requires_grad_()
            return torch.autograd.grad(unet(z, t, context, return_dict=False)[0], context, weights)[0]

        traced = make_fx(gradient, decomposition_table=select_decomp_table())(z, t, context, z)
        return [node.args[0].meta["val"].is_contiguous(memory_format=torch.channels_last) and
                not node.args[0].meta["val"].is_contiguous() for node in traced.graph.nodes
                if "convolution" in str(node.target) and min(node.args[0].meta["val"].shape[1:]) > 1]

    before, after = layouts(False), layouts(True)
    assert len(before) == len(after) and not all(before) and all(after)


@pytest.mark.parametrize("size, kernel, stride, padding", [(8, 3, 1, 1), (8, 3, 2, 1), (7, 3, 2, 1), (8, 1, 1, 0),
                                                           (9, 4, 3, 2)])
def test_the_gradient_of_a_convolution(size, kernel, stride, padding):
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 5, kernel, stride, padding).requires_grad_(False)
    fast = copy.deepcopy(plain)
    fast.__class__ = ChannelsLastConv2d
    x = torch.randn(2, 3, size, size).requires_grad_()
    expected, found = (torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (plain, fast))
    assert torch.allclose(expected, found, rtol=1e-5, atol=1e-5) and torch.allclose(plain(x), fast(x), atol=1e-6)


def test_convolutions_of_another_kind_are_left_alone():
    kinds = [nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2),
             nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")]
    use_fast_kernels(nn.ModuleList(kinds).requires_grad_(False))
    assert {type(kind) for kind in kinds} == {nn.Conv2d}


def test_attention_with_a_processor_of_its_own_keeps_it():
    unet = tiny.layout_ldm(True).unet
    use_fast_kernels(unet)
    kinds = {name.split(".processor")[0].rsplit(".", 1)[1]: type(processor)
             for name, processor in unet.attn_processors.items()}
    assert kinds == {"attn1": FlexProcessor, "attn2": PositionAttention}


def test_only_compiled_unets_are_changed(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)
    dit, unet = tiny.dit(), tiny.layout_ldm(False)
    before = [type(module) for module in dit.modules()]
    Execution(compile=True).prepare(Objective(dit))
    assert before == [type(module) for module in dit.modules()]
    for compiled in (False, True):
        Execution(compile=compiled).prepare(Objective(unet))
        assert any(isinstance(module, SplitGEGLU) for module in unet.modules()) is compiled
