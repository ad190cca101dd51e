"""Discriminative classifiers, trained on the same images: what DIVE's answers are compared with.

Small networks of known kinds, since the environment has no library of them: a plain convolutional network, residual
networks (widths 64, 128, 256, 512 with two blocks each are ResNet-18), and a vision transformer. The same ones read
generated images, and a head of residual blocks reads the features of a frozen DiT.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dive_lib import checkpoint
from dive_lib.dit import DiT
from dive_lib.first_stage import device
from dive_lib.token_transformer import TokenTransformer


class ConvNet(nn.Sequential):
    """Convolutions of 3 x 3 that halve the image, then a linear layer: (B, C, S, S) -> (B, K)."""

    def __init__(self, channels: int, classes: int, image_size: int, widths: Sequence[int] = (32, 64, 128)):
        layers, before = [], channels
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.ReLU()]
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, classes))


class Block(nn.Module):
    """Two convolutions of 3 x 3 beside a shortcut (ResNet's basic block)."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.path = nn.Sequential(nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                                  nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.shortcut = nn.Identity() if stride == 1 and before == width else nn.Sequential(
            nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


class ResNet(nn.Sequential):
    """widths: of the stages, each of `blocks` basic blocks and half as large as the one before.

    stem: "pixels" for small images and features (3 x 3), "imagenet" for large images (7 x 7, then pooling).
    """

    def __init__(self, channels: int, classes: int, image_size: int, widths: Sequence[int] = (64, 128, 256, 512),
                 blocks: int = 2, stem: str = "imagenet"):
        if stem not in ("pixels", "imagenet"):
            raise ValueError(f"stem must be 'pixels' or 'imagenet', got {stem!r}")
        first = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False) if stem == "pixels" else \
            nn.Conv2d(channels, widths[0], 7, 2, 3, bias=False)
        layers = [first, nn.BatchNorm2d(widths[0]), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2, 1)] if stem == "imagenet" else []
        before = widths[0]
        for stage, width in enumerate(widths):
            for number in range(blocks):
                layers.append(Block(before, width, 2 if stage and not number else 1))
                before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class VisionTransformer(nn.Module):
    """Patches as tokens, a transformer, the mean of its output, a linear layer."""

    def __init__(self, channels: int, classes: int, image_size: int, patch: int = 16, width: int = 768,
                 layers: int = 12, heads: int = 12):
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.transformer = TokenTransformer(width, layers, heads, width // heads, length=(image_size // patch) ** 2)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.transformer(tokens).mean(1))


KINDS = {"convnet": ConvNet, "resnet": ResNet, "vit": VisionTransformer}


def make(settings: dict, *, channels: int, classes: int, image_size: int) -> nn.Module:
    """settings: {"kind": one of KINDS, keyword arguments of it}. channels, image_size: of its input."""
    options = {key: value for key, value in settings.items() if key != "kind"}
    if settings.get("kind") not in KINDS:
        raise ValueError(f"classifier {settings}: kind must be one of {', '.join(KINDS)}")
    return KINDS[settings["kind"]](channels, classes, image_size, **options)


def load(directory) -> nn.Module:
    """Loads a network trained here, frozen; its configuration is what `make` was given."""
    config = checkpoint.load_config(directory)
    shape = {key: config.pop(key) for key in ("channels", "classes", "image_size")}
    return checkpoint.freeze(checkpoint.load_weights(directory, make(config, **shape)))


class DiffusionFeatures:
    """Features of a frozen DiT: images' latents with fixed noise at t, after transformer block `block`, under the null
    class; a map (B, width, h, w) with a place for every patch."""

    def __init__(self, model: DiT, t: int, block: int):
        self.model, self.t = checkpoint.freeze(model), t
        self.block = model.transformer.transformer_blocks[block]
        self.noise = torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(0))
        self.side = model.latent_shape[1] // model.transformer.config.patch_size
        self.identity = checkpoint.fingerprint(*model.state_dict().values(), t, block)

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        kept = []
        hook = self.block.register_forward_hook(lambda module, inputs, output: kept.append(output))
        try:
            t = torch.full((len(latents),), self.t, device=latents.device)
            null = self.model.grid.none_tokens.expand(len(latents)).to(latents.device)
            noisy = self.model.schedule.add_noise(latents, self.noise.to(latents.device), t)
            self.model.predict_noise(noisy, t, self.model.vocabulary.class_table[null])
        finally:
            hook.remove()
        return kept[0].transpose(1, 2).unflatten(2, (self.side, self.side))


def classifier_loss(take: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor, batch: int, *,
                    shift: int = 0) -> Callable[[nn.Module, int, torch.Generator], torch.Tensor]:
    """Cross entropy as an objective for train(). take: indices (B,) -> images, or features of them; labels (n,).

    shift: images are moved by up to so many pixels, the same for a batch.
    """
    def loss_of(model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        index = torch.randint(len(labels), (batch,), generator=generator)
        images = take(index)
        if shift:
            down, right = torch.randint(-shift, shift + 1, (2,), generator=generator).tolist()
            images = images.roll((down, right), dims=(2, 3))
        return F.cross_entropy(model(images), labels[index].to(images.device))

    return loss_of


@torch.no_grad()
def calibrate(model: nn.Module, take: Callable[[torch.Tensor], torch.Tensor], count: int, *, batch: int,
              batches: int = 50) -> None:
    """Batch normalisation's statistics for averaged weights, from `batches` random batches."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    model.train()
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches if norms else 0):
        model(take(torch.randint(count, (batch,), generator=generator)))
    model.eval()


@torch.no_grad()
def predict(model: nn.Module, take: Callable[[torch.Tensor], torch.Tensor], count: int, batch: int = 100) -> list[int]:
    """The answers for indices 0 ... count - 1."""
    model.eval().to(device())
    return [int(k) for part in torch.arange(count).split(batch) for k in model(take(part)).argmax(1)]
