"""Linear maps of sequences by oneDNN, on processors where PyTorch would give them to MKL.

MKL leaves AVX-512 unused on AMD's processors: there PyTorch's float32 matrix products run at less than half of what the
core can do (`python -m benchmarks.training_cost`). A convolution of one pixel is the same map, and goes to oneDNN,
which asks for no maker's name. On a GPU, in another precision, for few samples or single tokens all stays as it is.
"""

import torch
import torch.nn.functional as F
from torch import nn

FEWEST = 16  # samples: with fewer, PyTorch's choice of a kernel depends on the number of threads


class SequenceLinear(nn.Linear):
    """nn.Linear with the same weights under the same names; answers differ by rounding.

    (B, L, C) -> (B, L, D), or any shape that nn.Linear takes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim != 3 or len(x) < FEWEST or x.shape[1] == 1 or x.device.type != "cpu" \
                or x.dtype is not torch.float32 or not torch.backends.mkl.is_available():
            return super().forward(x)
        pixels = x.unsqueeze(2).permute(0, 3, 1, 2)  # (B, C, L, 1), channels last: in memory what x is
        return F.conv2d(pixels, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1).squeeze(2)


def use_sequence_linear(model: nn.Module) -> None:
    """Changes the linear maps of a model in place, trainable or frozen."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = SequenceLinear  # the same weights under the same name


def use_matrix_products(model: nn.Module) -> None:
    """Undoes `use_sequence_linear`: to compare."""
    for module in model.modules():
        if type(module) is SequenceLinear:
            module.__class__ = nn.Linear
