"""Discriminative classifiers, trained on the same images: what DIVE's answers are compared with.

Networks of the kinds of Table IV at any size: plain convolutional networks, residual networks of basic, bottleneck
and grouped bottleneck blocks (ResNet-18 and -50, ResNeXt), vision transformers, and Swin. The same ones read
generated images, and a head of residual blocks reads the features of a frozen DiT. Published weights are those of
`pretrained_classifiers`.

Why not torchvision's networks: its wheels are compiled against the default (CUDA) build of PyTorch and do not load
beside the processor's, and most of its networks are laid out for 224 pixels, where the smallest images here have 16.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dive_lib import checkpoint, paths, pretrained_classifiers, torchvision_names
from dive_lib.dit import DiT
from dive_lib.files import write_json
from dive_lib.first_stage import device
from dive_lib.pretrained_classifiers import PretrainedClassifier
from dive_lib.token_transformer import TokenTransformer
from dive_lib.train import TrainingConfig, train


class ConvNet(nn.Sequential):
    """Convolutions of 3 x 3 that halve the image, then a linear layer: (B, C, S, S) -> (B, K)."""

    def __init__(self, channels: int, classes: int, image_size: int, widths: Sequence[int] = (32, 64, 128)):
        layers, before = [], channels
        for width in widths:
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1), nn.ReLU()]
            before = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * before, classes))


class AlexNet(nn.Sequential):
    """AlexNet in its later form of one column, torchvision's: (B, C, S, S) -> (B, K), S at least 63 pixels."""

    def __init__(self, channels: int, classes: int, image_size: int):
        if image_size < 63:
            raise ValueError(f"AlexNet reads images of at least 63 pixels, got {image_size}; use the kind convnet")
        super().__init__(
            nn.Conv2d(channels, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(), nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), nn.AdaptiveAvgPool2d(6), nn.Flatten(),
            nn.Dropout(), nn.Linear(256 * 36, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(),
            nn.Linear(4096, classes))


class Residual(nn.Module):
    """relu(path(x) + shortcut(x)); the shortcut is a convolution where the shape changes.

    before: channels of x. width: channels of the result. stride: by which the path makes the image smaller.
    """

    def __init__(self, path: nn.Sequential, before: int, width: int, stride: int):
        super().__init__()
        self.path, self.width, self.stride = path, width, stride
        self.shortcut = nn.Identity() if stride == 1 and before == width else nn.Sequential(
            nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.path(x) + self.shortcut(x))


class Block(Residual):
    """Two convolutions of 3 x 3 (ResNet's basic block)."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__(nn.Sequential(nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width),
                                       nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1, bias=False),
                                       nn.BatchNorm2d(width)), before, width, stride)


class Bottleneck(Residual):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1, the last to 4 width channels (ResNet-50's block, ResNeXt's with groups).

    groups: of the 3 x 3 convolution. inner: its channels in multiples of `width`. The stride is that of the 3 x 3
    convolution, as in the published weights, not of the first one, as in ResNet's paper.
    """

    def __init__(self, before: int, width: int, stride: int, groups: int = 1, inner: int = 1):
        middle, after = inner * width, 4 * width
        super().__init__(nn.Sequential(
            nn.Conv2d(before, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, middle, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, after, 1, bias=False), nn.BatchNorm2d(after)), before, after, stride)


class ResNet(nn.Sequential):
    """widths: of the stages, each half as large as the one before. blocks: of each stage, or one number for all.

    stem: "pixels" for small images and features (3 x 3), "imagenet" for large images (7 x 7, then pooling).
    bottleneck: `Bottleneck` blocks with these groups and inner channels, else basic ones. Widths 64, 128, 256, 512 are
    ResNet-18 with 2 basic blocks, ResNet-50 with 3, 4, 6, 3 bottlenecks, ResNeXt-50 32x4d with 32 groups and inner 2
    besides, ResNeXt-101 32x8d with blocks 3, 4, 23, 3 and inner 4.
    """

    def __init__(self, channels: int, classes: int, image_size: int, widths: Sequence[int] = (64, 128, 256, 512),
                 blocks: int | Sequence[int] = 2, stem: str = "imagenet", bottleneck: bool = False, groups: int = 1,
                 inner: int = 1):
        if stem not in ("pixels", "imagenet"):
            raise ValueError(f"stem must be 'pixels' or 'imagenet', got {stem!r}")
        counts = [blocks] * len(widths) if isinstance(blocks, int) else list(blocks)
        if len(counts) != len(widths):
            raise ValueError(f"{len(widths)} widths need as many numbers of blocks, got {counts}")
        if not bottleneck and (groups, inner) != (1, 1):
            raise ValueError(f"groups {groups} and inner {inner} are settings of bottleneck blocks; set bottleneck")
        options = {"groups": groups, "inner": inner} if bottleneck else {}
        first = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False) if stem == "pixels" else \
            nn.Conv2d(channels, widths[0], 7, 2, 3, bias=False)
        layers = [first, nn.BatchNorm2d(widths[0]), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2, 1)] if stem == "imagenet" else []
        before = widths[0]
        for stage, (width, count) in enumerate(zip(widths, counts)):
            for number in range(count):
                stride = 2 if stage and not number else 1
                layers.append((Bottleneck if bottleneck else Block)(before, width, stride, **options))
                before = layers[-1].width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes))


class VisionTransformer(nn.Module):
    """Patches as tokens, a transformer, the mean of its output, a linear layer.

    Positions start on the scale of the embedded patches: much smaller ones are learned late in a short training.
    """

    def __init__(self, channels: int, classes: int, image_size: int, patch: int = 16, width: int = 768,
                 layers: int = 12, heads: int = 12):
        super().__init__()
        self.patches = nn.Conv2d(channels, width, patch, patch)
        self.transformer = TokenTransformer(width, layers, heads, width // heads, length=(image_size // patch) ** 2,
                                            position_std=0.5)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(self.transformer(tokens).mean(1))


class ClassTokenTransformer(nn.Module):
    """The published vision transformer, transformers' ViT: (B, C, S, S) -> (B, K), read off a token for the class.

    patch: side of a patch in pixels. width: of the tokens; layers, heads: of the transformer. The defaults are
    ViT-B/16; ViT-L/32 has patch 32, width 1024, 24 layers and 16 heads.
    """

    published_names = staticmethod(torchvision_names.vit)  # of published weights, into own ones

    def __init__(self, channels: int, classes: int, image_size: int, patch: int = 16, width: int = 768,
                 layers: int = 12, heads: int = 12):
        from transformers import ViTConfig, ViTForImageClassification
        if image_size % patch or width % heads:
            raise ValueError(f"ViT: images of {image_size} pixels have no whole number of patches of {patch}, or "
                             f"{heads} heads do not share {width} channels")
        super().__init__()
        self.network = ViTForImageClassification(ViTConfig(
            image_size=image_size, patch_size=patch, num_channels=channels, hidden_size=width,
            num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * width, layer_norm_eps=1e-6,
            num_labels=classes))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images).logits


class Swin(nn.Module):
    """transformers' Swin: (B, C, S, S) -> (B, K). Each stage halves the map of S / patch; the last must hold a window.

    patch: side of a patch in pixels. width: channels of the first stage, doubled in each of the next. depths, heads:
    layers and attention heads of each stage. window: side of the attention's windows in patches; every second layer
    shifts them by half, where the map is larger than a window. positions: learned positions of the patches beside the
    relative ones within windows (an option of Swin). The defaults are Swin-B.
    """

    published_names = staticmethod(torchvision_names.swin)  # of published weights, into own ones

    def __init__(self, channels: int, classes: int, image_size: int, patch: int = 4, width: int = 128,
                 depths: Sequence[int] = (2, 2, 18, 2), heads: Sequence[int] = (4, 8, 16, 32), window: int = 7,
                 positions: bool = False):
        from transformers import SwinConfig, SwinForImageClassification
        last = patch * 2 ** (len(depths) - 1)
        if len(depths) != len(heads) or image_size % last or image_size // last < window:
            raise ValueError(f"Swin: images of {image_size} pixels, patches of {patch} and windows of {window} patches "
                             f"do not fit the stages of {list(depths)} layers and {list(heads)} heads")
        super().__init__()
        self.network = SwinForImageClassification(SwinConfig(
            image_size=image_size, patch_size=patch, num_channels=channels, embed_dim=width, depths=list(depths),
            num_heads=list(heads), window_size=window, num_labels=classes, use_absolute_embeddings=positions))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images).logits


def _torchvision(channels: int, classes: int, image_size: int, file: str, network: Mapping,
                 **preprocessing) -> PretrainedClassifier:
    own = make(network, channels=channels, classes=classes, image_size=pretrained_classifiers.SIDE)
    return pretrained_classifiers.from_torchvision(own, file, **preprocessing)


KINDS = {"convnet": ConvNet, "alexnet": AlexNet, "resnet": ResNet, "vit": VisionTransformer,
         "vit_class_token": ClassTokenTransformer, "swin": Swin, "torchvision": _torchvision}


def make(settings: Mapping, *, channels: int, classes: int, image_size: int) -> nn.Module:
    """settings: {"kind": one of KINDS, keyword arguments of it}. channels, image_size: of its input.

    Published weights are {"kind": "torchvision", "file", "network": settings of the network that they are of}, with
    "resized" and "mode" where its preprocessing is not the usual one (see `pretrained_classifiers`): they raise
    FileNotFoundError for a missing file and ValueError for an unfit one. ValueError for an unknown kind.
    """
    options = {key: value for key, value in settings.items() if key != "kind"}
    if settings.get("kind") not in KINDS:
        raise ValueError(f"classifier {settings}: kind must be one of {', '.join(KINDS)}")
    return KINDS[settings["kind"]](channels, classes, image_size, **options)


def load(directory, *, trained: bool = True) -> nn.Module:
    """Loads a network kept by `fit`, frozen; its configuration is what `make` was given. trained: with its weights;
    otherwise with drawn ones, as a control."""
    config = checkpoint.load_config(directory)
    shape = {key: config.pop(key) for key in ("channels", "classes", "image_size")}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(config, **shape)
    if trained and not isinstance(model, PretrainedClassifier):
        checkpoint.load_weights(directory, model)
    return checkpoint.freeze(model)


class DiffusionFeatures:
    """Features of a frozen DiT: images' latents with fixed noise at t, after transformer block `block`, under the null
    class; a map (B, width, h, w) with a place for every patch."""

    def __init__(self, model: DiT, t: int, block: int):
        blocks = len(model.transformer.transformer_blocks)
        if not 0 <= block < blocks:
            raise ValueError(f"feature.block: {block}; the DiT has the blocks 0 to {blocks - 1}")
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


def fit(settings: Mapping, shape: Mapping, take: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor,
        config: TrainingConfig, *, directory: Path, identity, shift: int = 0) -> nn.Module:
    """A network of `settings`, trained and kept in `directory` (its name labels the progress), on the computing device.

    shape: the other arguments of `make`. take, labels, shift: see `classifier_loss`. identity: JSON-serialisable, of
    what `take` gives. Published weights are neither trained nor copied: only their settings are kept, for `load`.
    Raises what `make` and `train` raise.
    """
    torch.manual_seed(config.seed)
    model = make(settings, **shape).to(device())
    described = {**settings, **shape}
    if isinstance(model, PretrainedClassifier):
        write_json(Path(directory) / "config.json", described)
        return checkpoint.freeze(model)
    loss_of = classifier_loss(take, labels, config.batch_size, shift=shift)
    train(model, loss_of, config, scratch=paths.scratch() / "classifiers", label=Path(directory).name,
          identity=checkpoint.fingerprint(identity, settings, shift))
    calibrate(model, take, len(labels), batch=config.batch_size)
    checkpoint.save_model(directory, model, described)
    return model


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
