"""What a denoiser's features are compared with, behind the same interface: raw pixels and a supervised network.

Neither has a time step or a condition: both are accepted and ignored, so that one probe takes every backbone.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dive_lib.checkpoint import freeze
from dive_lib.classifiers import Residual, ResNet
from dive_lib.feature_backbone import FeatureBackbone


class PixelFeatures(FeatureBackbone):
    """The image itself, reduced by area to `side` x `side`: one stage, "pixels", of three channels.

    Averaged over the image it would be a mere colour, so a probe takes all pixels (`pool_side`).
    """

    name = "raw pixels"

    def __init__(self, side: int = 16):
        self.side, self.pool_side, self.stages, self.channels = side, side, ("pixels",), {"pixels": 3}

    @property
    def identity(self) -> dict:
        return {"backbone": self.name, "side": self.side}

    @torch.no_grad()
    def features(self, images: torch.Tensor, t: int | Sequence[int] = 0, stages: Sequence[str] | None = None,
                 condition=None) -> dict[str, torch.Tensor]:
        """{"pixels": (B, 3, side, side)} for images (B, 3, H, W) in [-1, 1]; H and W at least `side`."""
        self.asked(stages)
        return {"pixels": F.interpolate(images, (self.side, self.side), mode="area")}


class ResNetFeatures(FeatureBackbone):
    """The stages of a residual network trained here with labels, "layer0" (finest) to the last; frozen."""

    def __init__(self, network: ResNet, name: str = "supervised ResNet"):
        self.network, self.name = freeze(network), name
        self.layers = nn.ModuleList(_stages(network))
        self.stages = tuple(f"layer{k}" for k in range(len(self.layers)))
        self.channels = {stage: _width(layer) for stage, layer in zip(self.stages, self.layers)}

    @property
    def joins(self) -> tuple[str, ...]:
        """The three coarsest stages, coarse to fine: what a head takes when this network is its expert."""
        return tuple(reversed(self.stages))[:3]

    @torch.no_grad()
    def features(self, images: torch.Tensor, t: int | Sequence[int] = 0, stages: Sequence[str] | None = None,
                 condition=None) -> dict[str, torch.Tensor]:
        """{stage: (B, C, h, w)} for images (B, 3, H, W) in [-1, 1]; ends after the last stage asked for."""
        stages = self.asked(stages)
        kept, x = {}, images
        for stage, layer in zip(self.stages, self.layers):
            x = layer(x)
            if stage in stages:
                kept[stage] = x
            if len(kept) == len(set(stages)):
                break
        return kept


def _stages(network: ResNet) -> list[nn.Sequential]:
    """The network's layers up to its pooling, cut before every block that halves the image."""
    layers = list(network)[:-3]  # pooling, flattening, linear layer
    parts: list[list[nn.Module]] = [[]]
    for layer in layers:
        if isinstance(layer, Residual) and layer.stride != 1:
            parts.append([])
        parts[-1].append(layer)
    return [nn.Sequential(*part) for part in parts]


def _width(layer: nn.Sequential) -> int:
    return layer[-1].width
