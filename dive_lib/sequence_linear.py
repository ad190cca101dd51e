"""Linear maps of sequences by oneDNN, on processors where PyTorch would give them to MKL.

MKL leaves AVX-512 unused on AMD's processors: there PyTorch's float32 matrix products run at less than half of what the
core can do (`python -m benchmarks.training_cost`). A convolution of one pixel is the same map, and goes to oneDNN,
which asks for no maker's name. On a GPU, in another precision and for anything but sequences all stays as it is.

What a sample gives does not depend on the samples beside it, to the last bit: searches leave out what they have
computed before, and must find the same without it.
"""

import torch
import torch.nn.functional as F
from torch import nn

FEWEST = 16  # images for which PyTorch calls oneDNN whatever the number of threads
MKL = torch.backends.mkl.is_available()


class SequenceLinear(nn.Linear):
    """nn.Linear with the same weights under the same names; answers differ by rounding.

    (B, L, C) -> (B, L, D), or any shape that nn.Linear takes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not MKL or x.ndim != 3 or x.device.type != "cpu" or x.dtype is not torch.float32:
            return super().forward(x)
        if len(x) >= FEWEST:
            return self._convolve(x)
        tokens = x.flatten(0, 1)  # few long sequences are cut into more short ones
        cut = F.pad(tokens, (0, 0, 0, -len(tokens) % FEWEST)).unflatten(0, (FEWEST, -1))
        return self._convolve(cut).flatten(0, 1)[:len(tokens)].unflatten(0, x.shape[:2])

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        pixels = x.unsqueeze(2).permute(0, 3, 1, 2)  # (B, C, L, 1), channels last: in memory what x is
        return F.conv2d(pixels, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1).squeeze(2)


def use_sequence_linear(model: nn.Module) -> None:
    """Changes the linear maps of a model in place, trainable or frozen."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = SequenceLinear  # the same weights under the same name


def use_matrix_products(model: nn.Module) -> nn.Module:
    """Undoes `use_sequence_linear`, in place, and returns the model: to compare."""
    for module in model.modules():
        if type(module) is SequenceLinear:
            module.__class__ = nn.Linear
    return model
