"""Frozen discriminative experts whose maps, adapted, join the denoiser's scales in the U-head.

An expert is a backbone like any other (`features`, `stages`, `channels`, `identity`); `joins` names its stages that
the head takes, coarse to fine, the last of them for the finest scale (published code: Classification/models, SBIR).

resnet18   ImageNet's ResNet-18: layer4, layer3, layer2 (512, 256, 128 channels) for the three finest scales.
dino       DINO ViT-B/16: blocks 2, 5, 8, 11 (0-based), resized to the four scales, block 11 the coarsest.
dinov2     DINOv2 ViT-B/14: the same at 224 px.
small      a residual network trained here (`comparison_backbones.ResNetFeatures`).

The published classification code leaves ResNet's batch normalisation in training mode until its first test; here an
expert is frozen with its stored statistics. Block outputs are taken before the final layer norm.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dive_lib import checkpoint, paths
from dive_lib.feature_backbone import FeatureBackbone
from dive_lib.text_targets import need_files, read_pretrained

FILES = ("config.json", "model.safetensors")
SOURCES = {"resnet18": "huggingface.co/microsoft/resnet-18", "dino": "huggingface.co/facebook/dino-vitb16",
           "dinov2": "huggingface.co/facebook/dinov2-base"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BLOCKS = (2, 5, 8, 11)  # of a ViT, finest scale first
VIT_SIDE = 224


def load(kind: str, folder: Path | str, *, sides: Sequence[int] = (4, 8, 16, 32)) -> "ResNet18Expert | VitExpert":
    """The expert of a folder in Hugging Face's format, frozen.

    kind: one of SOURCES. folder: absolute, or relative to the repository root. sides: of the scales, coarse to fine,
    to which a ViT's maps are resized. Raises FileNotFoundError that says what to download, and ValueError for a
    damaged folder or one of another model.
    """
    from transformers import AutoConfig, Dinov2Model, ResNetModel, ViTModel
    kinds = {"resnet18": ResNetModel, "dino": ViTModel, "dinov2": Dinov2Model}
    if kind not in kinds:
        raise ValueError(f"expert {kind!r} is unknown; choose one of {', '.join(kinds)}")
    directory = paths.ROOT / folder
    need_files(directory, FILES, SOURCES[kind])
    found = read_pretrained(AutoConfig, directory, SOURCES[kind]).model_type
    if found != kinds[kind].config_class.model_type:
        raise ValueError(f"{paths.shorten(directory / FILES[0])}: model_type is {found!r}, but the expert {kind!r} "
                         f"needs {kinds[kind].config_class.model_type!r}; download {SOURCES[kind]}")
    options = {"use_safetensors": True} | ({} if kind == "resnet18" else {"add_pooling_layer": False}
                                           if kind == "dino" else {})
    model = checkpoint.freeze(read_pretrained(kinds[kind], directory, SOURCES[kind], **options))
    return ResNet18Expert(model) if kind == "resnet18" else VitExpert(model, kind, sides)


class ImageNetExpert(FeatureBackbone):
    """What both kinds share: ImageNet's normalisation."""

    @property
    def joins(self) -> tuple[str, ...]:
        """Stages for the head, coarse to fine."""
        return self.stages

    @torch.no_grad()
    def features(self, images: torch.Tensor, t: int | Sequence[int] = 0, stages: Sequence[str] | None = None,
                 condition=None) -> dict[str, torch.Tensor]:
        """{stage: (B, C, h, w)} for images (B, 3, H, W) in [-1, 1]; t and condition are ignored."""
        stages = self.asked(stages)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        maps = self.maps(((images + 1) / 2 - mean) / std)
        return {stage: maps[stage] for stage in stages}

    def maps(self, normalised: torch.Tensor) -> dict[str, torch.Tensor]:
        """All stages for normalised images."""
        raise NotImplementedError


class ResNet18Expert(ImageNetExpert):
    """model: transformers' ResNetModel."""

    name = "ResNet-18"

    def __init__(self, model: nn.Module):
        self.network = model
        widths = model.config.hidden_sizes
        self.stages = ("layer4", "layer3", "layer2")
        self.channels = dict(zip(self.stages, reversed(widths[1:])))

    def maps(self, normalised: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = self.network(normalised, output_hidden_states=True).hidden_states  # stem, then layers 1 to 4
        return {f"layer{k}": hidden[k] for k in (4, 3, 2)}


class VitExpert(ImageNetExpert):
    """model: transformers' ViTModel or Dinov2Model, of 12 blocks; class token removed. sides: coarse to fine."""

    def __init__(self, model: nn.Module, name: str, sides: Sequence[int] = (4, 8, 16, 32)):
        self.network, self.name, self.sides = model, name, tuple(sides)
        layers = model.config.num_hidden_layers
        if layers <= max(BLOCKS) or len(sides) != len(BLOCKS):
            raise ValueError(f"{name}: needs more than {max(BLOCKS)} blocks and {len(BLOCKS)} sides, got {layers} and "
                             f"{len(sides)}; give the base model")
        self.stages = tuple(f"block{k}" for k in reversed(BLOCKS))
        self.channels = dict.fromkeys(self.stages, model.config.hidden_size)

    @property
    def identity(self) -> dict:
        return super().identity | {"sides": list(self.sides)}

    def maps(self, normalised: torch.Tensor) -> dict[str, torch.Tensor]:
        resized = F.interpolate(normalised, (VIT_SIDE, VIT_SIDE), mode="bilinear", align_corners=False)
        keywords = {"interpolate_pos_encoding": True} if self.name == "dino" else {}
        hidden = self.network(resized, output_hidden_states=True, **keywords).hidden_states  # embeddings, then blocks
        grid = VIT_SIDE // self.network.config.patch_size
        maps = {}
        for stage, side in zip(self.stages, self.sides):
            tokens = hidden[int(stage.removeprefix("block")) + 1][:, 1:]
            own = tokens.mT.unflatten(2, (grid, grid))
            maps[stage] = F.interpolate(own, (side, side), mode="bilinear", align_corners=False)
        return maps
