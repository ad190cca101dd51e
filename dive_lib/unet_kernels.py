"""The same U-Net in operations that compile to faster kernels: for frozen networks on a GPU.

Measured on the gradient of LDM-8 (`python -m benchmarks.full_size`), of which attention with its heads of 32 channels
is a third. Weights and function stay as they are; answers differ by rounding.
"""

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

NARROW = 32  # channels of a head


def use_fast_kernels(unet: nn.Module) -> None:
    """Changes convolutions and transformer blocks of a frozen diffusers U-Net in place. Attention with a processor of
    its own (`position_attention`) is left as it is. Raises ValueError for a U-Net with trainable weights, which would
    get no gradient."""
    if any(weights.requires_grad for weights in unet.parameters()):
        raise ValueError("the U-Net has trainable weights; freeze it (dive_lib.checkpoint.freeze) or leave it as it is")
    unet.to(memory_format=torch.channels_last)
    for block in unet.modules():
        if type(block) is nn.Conv2d and ChannelsLastConv2d.can_be(block):
            block.__class__ = ChannelsLastConv2d  # the same weights under the same name
        if isinstance(block, BasicTransformerBlock):
            if isinstance(block.ff.net[0], GEGLU):
                block.ff.net[0] = SplitGEGLU(block.ff.net[0])
            for attention in (block.attn1, block.attn2):
                if attention is not None and isinstance(attention.processor, AttnProcessor2_0):
                    attention.set_processor(FlexProcessor())


class ChannelsLastConv2d(nn.Conv2d):
    """A convolution (B, C, h, w) -> (B, D, h', w') by `Convolution`."""

    @staticmethod
    def can_be(convolution: nn.Conv2d) -> bool:
        return (convolution.padding_mode == "zeros" and convolution.groups == 1 and convolution.dilation == (1, 1)
                and not isinstance(convolution.padding, str))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Convolution.apply(x, self.weight, self.bias, self.stride, self.padding)


class Convolution(torch.autograd.Function):
    """A convolution with frozen weights on channels-last tensors, whose gradient is a transposed convolution.

    Group norms leave channels first, and torch.compile hands tensors to a convolution and to its gradient as they
    are: each was copied into the other layout first, as was the input, which the gradient does not need. That took 8
    percent of the time of LDM-8's gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(weight)
        ctx.stride, ctx.padding, ctx.size = stride, padding, x.shape[2:]
        return F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, stride, padding)

    @staticmethod
    def backward(ctx, gradient):
        weight, = ctx.saved_tensors
        missing = [size - ((part - 1) * stride - 2 * padding + kernel) for size, part, stride, padding, kernel
                   in zip(ctx.size, gradient.shape[2:], ctx.stride, ctx.padding, weight.shape[2:])]
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        return F.conv_transpose2d(gradient, weight, None, ctx.stride, ctx.padding, missing), None, None, None, None


class SplitGEGLU(nn.Module):
    """value(x) * gelu(gate(x)): (B, L, C) -> (B, L, D). diffusers has one linear map for both, whose gradient would be
    joined from two parts in a kernel that computes both parts for every element."""

    def __init__(self, joined: GEGLU):
        super().__init__()
        weights = joined.proj.weight.chunk(2)
        biases = joined.proj.bias.chunk(2) if joined.proj.bias is not None else (None, None)
        self.value, self.gate = (_linear(weight, bias) for weight, bias in zip(weights, biases))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.value(x) * F.gelu(self.gate(x))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return linear


class FlexProcessor:
    """diffusers' attention by PyTorch's flex_attention where heads of 32 channels are compiled for a GPU in bfloat16:
    the kernels behind scaled_dot_product_attention are made for wider heads."""

    def __call__(self, attn, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None,
                 attention_mask: torch.Tensor | None = None, temb: torch.Tensor | None = None) -> torch.Tensor:
        if attention_mask is not None:
            raise ValueError("attention with a mask is not computed here")
        states = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            project(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (B, heads, L, head width)
            for project, x in ((attn.to_q, hidden_states), (attn.to_k, states), (attn.to_v, states)))
        flex = (query.shape[-1] == NARROW and query.dtype is torch.bfloat16 and query.is_cuda
                and torch.compiler.is_compiling())
        mixed = (flex_attention if flex else F.scaled_dot_product_attention)(query, key, value)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))
