"""Published ImageNet classifiers, the discriminative rows of DIVE's Table IV at its sizes: read, never trained.

The weights are torchvision's first ones of each network, from local files, with the preprocessing that torchvision
states for them. The 1000 answers are in the order of ImageNet's sorted synsets, which is that of `class_images`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dive_lib import torchvision_names, weight_files
from dive_lib.expert import IMAGENET_MEAN, IMAGENET_STD

SIDE = 224  # pixels that every network reads
RESIZED = 256  # pixels of the image of whose centre they are, where nothing else is said
MODES = ("bilinear", "bicubic")
SOURCE = "download.pytorch.org/models"


class PretrainedClassifier(nn.Module):
    """Images (B, C, S, S) in [-1, 1] of any S -> logits (B, K).

    network: from normalised images (B, C, 224, 224) to logits. The image is resized to `resized` pixels, of which the
    centre's 224 x 224 are read. mode: of the resizing, one of MODES. Raises ValueError for other values.
    """

    def __init__(self, network: nn.Module, *, resized: int = RESIZED, mode: str = "bilinear"):
        if mode not in MODES or resized < SIDE:
            raise ValueError(f"images are resized to at least {SIDE} pixels by {' or '.join(MODES)}, got {resized} and "
                             f"{mode!r}; correct architectures.classifiers")
        super().__init__()
        self.network, self.resized, self.mode = network, resized, mode
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = F.interpolate((images + 1) / 2, (self.resized, self.resized), mode=self.mode, antialias=True)
        start = (self.resized - SIDE) // 2
        seen = pixels.clamp(0, 1)[:, :, start:start + SIDE, start:start + SIDE]
        return self.network((seen - self.mean) / self.std)


def require(networks: Mapping[str, Mapping]) -> None:
    """Raises FileNotFoundError for the first of `architectures.classifiers` whose published weights are not there: to
    be asked before long work starts."""
    for own in networks.values():
        if own.get("kind") == "torchvision":
            weight_files.need(own["file"], SOURCE)


def from_torchvision(network: nn.Module, file: Path | str, *, resized: int = RESIZED,
                     mode: str = "bilinear") -> PretrainedClassifier:
    """Puts the weights of a torchvision file into the same network of ours.

    network: one of `classifiers`, at the size that the weights are of. file: such as "checkpoints/alexnet-owt-
    7be5be79.pth", absolute, or relative to the repository root. resized, mode: see PretrainedClassifier. Raises
    FileNotFoundError for a missing file, ValueError for a damaged one and for weights of another network.
    """
    if Path(file).suffix != ".pth":  # other formats lose the layers' order, by which some networks are filled
        raise ValueError(f"{file}: torchvision's files are .pth; download one from {SOURCE}")
    given = weight_files.read(file, SOURCE)
    own = [name for name in network.state_dict() if not name.endswith(weight_files.COUNTER)]
    try:
        named = network.published_names(given) if hasattr(network, "published_names") else \
            torchvision_names.in_order(given, own)
    except ValueError as error:
        raise weight_files.other_network(file, SOURCE, str(error)) from None
    weight_files.fill(network, named, file, SOURCE)
    return PretrainedClassifier(network, resized=resized, mode=mode)
