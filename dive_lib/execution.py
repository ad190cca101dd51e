"""How the frozen networks of a run are executed: how many samples at once, in bfloat16, compiled.

Both options are for GPUs, where they let a network of the papers' size run at a good part of the chip's rate
(`python -m benchmarks.full_size`). They hold for the large networks, U-Net, DiT and prior, in every search alike.
Schedule, losses, embeddings and the optimiser stay in float32. bfloat16 changes results (`benchmarks/devices.py`
measures how much); compiled networks round differently, as another device does.
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from dive_lib.cuda_graphs import Recorded
from dive_lib.layout_ldm import LayoutLDM
from dive_lib.layout_prior import LayoutPrior
from dive_lib.objective import Objective
from dive_lib.unet_kernels import use_fast_kernels

VERSIONS = 64  # of the networks of all runs in one process; PyTorch's own limit is 8


@dataclass(frozen=True)
class Execution:
    """chunk: most samples in one network call. bf16: the networks' weights and activations are bfloat16, and so are the
    matrix products of the layout encoder. compile: the networks pass through torch.compile, once for calls with and
    once for calls without a gradient, and on a GPU each is recorded as a CUDA graph. A compiled network is only ever
    called with `chunk` samples: a smaller call is filled up, so `chunk` should divide what a run asks for, as 50 does a
    step of 50 pairs and a monitor of 200; a larger one raises ValueError. What is recorded keeps its memory: about 0.19
    GiB a sample for the gradient of LDM-8 in bfloat16 and 0.09 for that of its prior, twice that in float32."""

    chunk: int = 256
    bf16: bool = False
    compile: bool = False

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 sample, got {self.chunk}")

    def prepare(self, objective: Objective) -> Objective:
        """The objective, whose models' networks are changed to run this way."""
        objective.chunk = self.chunk
        models = [objective.ldm]
        if objective.prior is not None:
            models += [module for module in objective.prior.modules() if isinstance(module, LayoutPrior)]
        for model in models if self.bf16 or self.compile else ():
            self._replace_forward(model.network)
        if self.bf16 and isinstance(objective.ldm, LayoutLDM):
            objective.ldm.encoder.forward = functools.partial(_in_bfloat16, objective.ldm.encoder.forward)
        return objective

    def _replace_forward(self, network: nn.Module) -> None:
        """Of a frozen network, whose attributes stay in reach."""
        if self.bf16:
            network.to(torch.bfloat16, memory_format=torch.channels_last)
        if self.compile and isinstance(network, UNet2DConditionModel):
            use_fast_kernels(network)
        forward = network.forward
        if self.compile:  # networks of one class share the limit of compiled versions, beyond which all run uncompiled
            torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VERSIONS)
            forward = Recorded(torch.compile(forward, dynamic=False))
        network.forward = functools.partial(self._call, forward)

    def _call(self, forward, *args, **kwargs):
        """forward on tensors of B samples, in the dtype and for the number of samples that it is made for."""
        count, dtype = len(args[0]), args[0].dtype
        missing = self.chunk - count if self.compile else 0
        if missing < 0:
            raise ValueError(f"a network compiled for {self.chunk} samples was called with {count}")
        out = forward(*(self._cast_and_pad(a, missing) if torch.is_tensor(a) else a for a in args), **kwargs)
        single = torch.is_tensor(out)
        outs = [part[:count].to(dtype) for part in ([out] if single else out)]
        return outs[0] if single else tuple(outs)

    def _cast_and_pad(self, tensor: torch.Tensor, missing: int) -> torch.Tensor:
        if self.bf16 and tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        tensor = F.pad(tensor, [0, 0] * (tensor.ndim - 1) + [0, missing]) if missing else tensor
        return tensor.contiguous() if self.compile else tensor  # other strides would be compiled anew


def _in_bfloat16(forward, embeddings: torch.Tensor) -> torch.Tensor:
    """Matrix products and attention in bfloat16; weights, norms and sums over layers stay in float32."""
    with torch.autocast(embeddings.device.type, torch.bfloat16, cache_enabled=False):
        return forward(embeddings).to(embeddings.dtype)
