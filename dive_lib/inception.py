"""The Inception network, whose features the usual measures of generated images read, and what stands in its place.

Inception-v3 in the form in which the Frechet inception distance was published: TensorFlow's network of 2015-12-05, as
github.com/mseitzer/pytorch-fid ported it (src/pytorch_fid/inception.py), whose file of weights is read here. It differs
from torchvision's Inception-v3, whose names of layers it has: 1008 answers, averages without the padding, and a maximum
in place of the average in the last block.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dive_lib import checkpoint, classifiers, weight_files
from dive_lib.denoisers import in_format_of

SIDE, CLASSES = 299, 1008
SOURCE = "github.com/mseitzer/pytorch-fid/releases/tag/fid_weights"
Step = tuple  # (width, kernel[, stride]) of a convolution


class Convolution(nn.Module):
    """Convolution, batch normalisation, relu."""

    def __init__(self, before: int, width: int, kernel: int | tuple[int, int], stride: int = 1,
                 padding: int | tuple[int, int] = 0):
        super().__init__()
        self.conv = nn.Conv2d(before, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=0.001)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Branches side by side, their channels joined: (B, before, h, w) -> (B, sum of the widths, h', w').

    branches: {name: steps}. A step is a convolution, (width, kernel) that keeps the map's size or (width, kernel, 2)
    that halves it without padding, or a list of convolutions of the same input. Convolutions are named name_1, name_2a,
    name_2b, ..., or by the name alone where it is the only step. pooling: what the branch "branch_pool" reads.
    """

    def __init__(self, before: int, branches: Mapping[str, Sequence[Step | list[Step]]], pooling: nn.Module):
        super().__init__()
        self.pooling, self.branches = pooling, {}
        for branch, steps in branches.items():
            width, self.branches[branch] = before, []
            for number, step in enumerate(steps, start=1):
                forks = step if isinstance(step, list) else [step]
                stem = f"{branch}_{number}" if len(steps) > 1 else branch
                names = [stem + letter for letter in ("ab" if len(forks) > 1 else [""])]
                for name, fork in zip(names, forks):
                    self.add_module(name, _convolution(width, *fork))
                self.branches[branch].append(names)
                width = sum(fork[0] for fork in forks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = []
        for branch, steps in self.branches.items():
            y = self.pooling(x) if branch == "branch_pool" else x
            for names in steps:
                y = torch.cat([self.get_submodule(name)(y) for name in names], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


def _convolution(before: int, width: int, kernel: int | tuple[int, int], stride: int = 1) -> Convolution:
    sides = kernel if isinstance(kernel, tuple) else (kernel, kernel)
    return Convolution(before, width, kernel, stride, tuple(side // 2 for side in sides) if stride == 1 else 0)


def _average() -> nn.Module:
    return nn.AvgPool2d(3, 1, 1, count_include_pad=False)


def block_a(before: int, pooled: int) -> Mixed:
    """-> 224 + pooled channels."""
    return Mixed(before, {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
                          "branch3x3dbl": [(64, 1), (96, 3), (96, 3)], "branch_pool": [(pooled, 1)]}, _average())


def block_b(before: int) -> Mixed:
    """-> 480 + before channels, half the size."""
    return Mixed(before, {"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)],
                          "branch_pool": []}, nn.MaxPool2d(3, 2))


def block_c(before: int, middle: int) -> Mixed:
    """-> 768 channels. middle: of the convolutions that see one direction."""
    across, down = (1, 7), (7, 1)
    double = [(middle, 1), (middle, down), (middle, across), (middle, down), (192, across)]
    return Mixed(before, {"branch1x1": [(192, 1)], "branch7x7": [(middle, 1), (middle, across), (192, down)],
                          "branch7x7dbl": double, "branch_pool": [(192, 1)]}, _average())


def block_d(before: int) -> Mixed:
    """-> 512 + before channels, half the size."""
    return Mixed(before, {"branch3x3": [(192, 1), (320, 3, 2)],
                          "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)], "branch_pool": []},
                 nn.MaxPool2d(3, 2))


def block_e(before: int, pooling: nn.Module) -> Mixed:
    """-> 2048 channels."""
    fork = [(384, (1, 3)), (384, (3, 1))]
    return Mixed(before, {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork],
                          "branch3x3dbl": [(448, 1), (384, 3), fork], "branch_pool": [(192, 1)]}, pooling)


class Inception(nn.Sequential):
    """Images (B, 1 or 3, S, S) in [-1, 1] of any S -> logits (B, 1008); before the last layer 2048 features.

    The last layer has no bias: the inception score was published with the weights alone (Salimans et al. 2016).
    """

    def __init__(self):
        super().__init__(OrderedDict(
            Conv2d_1a_3x3=Convolution(3, 32, 3, stride=2), Conv2d_2a_3x3=Convolution(32, 32, 3),
            Conv2d_2b_3x3=Convolution(32, 64, 3, padding=1), maxpool1=nn.MaxPool2d(3, 2),
            Conv2d_3b_1x1=Convolution(64, 80, 1), Conv2d_4a_3x3=Convolution(80, 192, 3), maxpool2=nn.MaxPool2d(3, 2),
            Mixed_5b=block_a(192, 32), Mixed_5c=block_a(256, 64), Mixed_5d=block_a(288, 64),
            Mixed_6a=block_b(288), Mixed_6b=block_c(768, 128), Mixed_6c=block_c(768, 160), Mixed_6d=block_c(768, 160),
            Mixed_6e=block_c(768, 192), Mixed_7a=block_d(768), Mixed_7b=block_e(1280, _average()),
            Mixed_7c=block_e(2048, nn.MaxPool2d(3, 1, 1)), avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
            fc=nn.Linear(2048, CLASSES, bias=False)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(F.interpolate(images.expand(-1, 3, -1, -1), (SIDE, SIDE), mode="bilinear"))


class InFormat(nn.Module):
    """A classifier that gets images (B, C, S, S) as it was trained on them: see `denoisers.in_format_of`."""

    def __init__(self, network: nn.Module, channels: int, side: int):
        super().__init__()
        self.network, self.channels, self.side = network, channels, side

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(in_format_of(images, self.channels, self.side))


def load(file: Path | str) -> Inception:
    """The frozen network with the weights of a file: pytorch-fid's .pth, or the same tensors as .safetensors.

    file: absolute, or relative to the repository root. Raises FileNotFoundError that says what to download and where
    to put it, ValueError for a damaged file and for the weights of another Inception.
    """
    weights = weight_files.read(file, SOURCE)
    weights.pop("fc.bias", None)
    network = Inception()
    weight_files.fill(network, weights, file, SOURCE)
    return checkpoint.freeze(network)


def choose(file: str, folder: Path | str) -> tuple[nn.Module, str]:
    """The frozen network that `generation_quality` reads images with, and its name, format and classes for a table.

    file: of the Inception network's weights, which must be there; "": a classifier trained in the pipeline stands in.
    folder: of that classifier (`classifiers.load`). Either takes images (B, C, S, S) in [-1, 1] of any size, grey or
    coloured. Raises what `load` and `classifiers.load` raise.
    """
    if file:
        return load(file), f"Inception-v3, 3 x {SIDE} x {SIDE}, {CLASSES} classes"
    config = checkpoint.load_config(folder)
    channels, side, classes = (config[key] for key in ("channels", "image_size", "classes"))
    network = checkpoint.freeze(InFormat(classifiers.load(folder), channels, side))
    return network, f"{Path(folder).name}, {channels} x {side} x {side}, {classes} classes"
