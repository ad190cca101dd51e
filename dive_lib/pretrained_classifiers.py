"""Published ImageNet classifiers, the discriminative rows of DIVE's Table IV at its sizes: read, never trained.

Two forms of published weights are read from the disk, each with the preprocessing that belongs to it:

from_folder       a folder in Hugging Face's format: ResNets, vision transformers, Swin
from_torchvision  torchvision's file for one of our own networks: AlexNet and ResNeXt, which transformers does not have

Both give their 1000 answers in the order of ImageNet's sorted synsets, which is that of `class_images`.
"""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dive_lib import paths
from dive_lib.expert import IMAGENET_MEAN, IMAGENET_STD
from dive_lib.files import read_json
from dive_lib.text_targets import need_files, read_pretrained

FILES = ("config.json", "model.safetensors")
PREPROCESSOR = "preprocessor_config.json"
SIDE = 224  # pixels that a network reads where nothing else is said
SHARE = 224 / 256  # of the resized image's side that is cut out of its centre
WHOLE_FROM = 384  # pixels from which on transformers' ConvNeXt preprocessing, ResNet's too, no longer crops
MODES = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
TORCHVISION = "download.pytorch.org/models"


class PretrainedClassifier(nn.Module):
    """Images (B, C, S, S) in [-1, 1] of any S -> logits (B, K).

    network: from normalised images (B, C, side, side) to logits, or to an output that has them. The image is resized
    to `resized` pixels, of which the centre's side x side are read. mean, std: of each channel, for values in [0, 1].
    mode: of the resizing, "bilinear" or "bicubic".
    """

    def __init__(self, network: nn.Module, *, side: int = SIDE, resized: int = round(SIDE / SHARE),
                 mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD, mode: str = "bilinear"):
        super().__init__()
        self.network, self.side, self.resized, self.mode = network, side, resized, mode
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = F.interpolate((images + 1) / 2, (self.resized, self.resized), mode=self.mode, antialias=True)
        start = (self.resized - self.side) // 2
        seen = pixels.clamp(0, 1)[:, :, start:start + self.side, start:start + self.side]
        output = self.network((seen - self.mean) / self.std)
        return getattr(output, "logits", output)


def from_folder(channels: int, classes: int, image_size: int, folder: Path | str, source: str) -> PretrainedClassifier:
    """The image classifier of a local folder in Hugging Face's format (config.json, model.safetensors).

    channels, classes: what the data have, and the model must have. image_size: of the data; any. folder: absolute, or
    relative to the repository root. source: the repository to download, such as "microsoft/resnet-50". Raises
    FileNotFoundError for missing files, ValueError for damaged ones, a model without a classifier's weights, and one
    of other channels or classes.
    """
    from transformers import AutoModelForImageClassification
    directory, address = paths.ROOT / folder, f"huggingface.co/{source}"
    need_files(directory, FILES, address)
    network, info = read_pretrained(AutoModelForImageClassification, directory, address, use_safetensors=True,
                                    output_loading_info=True)
    where = paths.shorten(directory)
    if info["missing_keys"]:
        raise ValueError(f"{where}: {len(info['missing_keys'])} weights of a {type(network).__name__} are missing "
                         f"(first: {min(info['missing_keys'])}); download the classifier {address}")
    _check_shape(where, address, channels, classes, getattr(network.config, "num_channels", channels),
                 network.config.num_labels)
    return PretrainedClassifier(network, **preprocessing(directory, getattr(network.config, "image_size", SIDE)))


def preprocessing(directory: Path, side: int = SIDE) -> dict:
    """The settings of PretrainedClassifier that preprocessor_config.json states; ImageNet's statistics and the whole
    image at `side` pixels where it is silent or absent. Raises ValueError that names the file for what is not known
    here."""
    path = directory / PREPROCESSOR
    stated = read_json(path) if path.is_file() else {}
    side = resized = _side(stated.get("size", side), path)
    if stated.get("crop_size") and stated.get("do_center_crop"):
        side = _side(stated["crop_size"], path)
    elif stated.get("crop_pct") and side < WHOLE_FROM:
        resized = int(side / stated["crop_pct"])
    if side > resized:
        raise ValueError(f"{paths.shorten(path)}: a crop of {side} pixels from images of {resized}; give a smaller one")
    number = stated.get("resample", 2)
    if number not in MODES:
        raise ValueError(f"{paths.shorten(path)}: resample {number} is not known here; choose one of {MODES}")
    return {"side": side, "resized": resized, "mode": MODES[number],
            "mean": stated.get("image_mean", IMAGENET_MEAN), "std": stated.get("image_std", IMAGENET_STD)}


def _side(size: int | Mapping, path: Path) -> int:
    """Of 224, {"shortest_edge": 224} or {"height": 224, "width": 224}; the images are square."""
    sides = set(size.values()) if isinstance(size, Mapping) else {size}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int):
        raise ValueError(f"{paths.shorten(path)}: size {size} is not that of a square; give one number of pixels")
    return side


def from_torchvision(network: nn.Module, file: Path | str) -> PretrainedClassifier:
    """Puts the weights of a torchvision file into the same network of ours.

    network: one of `classifiers`, at the size that the weights are of. file: such as "checkpoints/alexnet-owt-
    7be5be79.pth", absolute, or relative to the repository root. Layers correspond in their order and tensors within a
    layer by name. Raises FileNotFoundError for a missing file, ValueError for a damaged one and for other shapes.
    """
    path = paths.ROOT / file
    need_files(path.parent, (path.name,), TORCHVISION)
    remedy = f"download {path.name} again from {TORCHVISION}"
    try:
        given = _layers(torch.load(path, map_location="cpu", weights_only=True))
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError) as error:
        raise ValueError(f"{paths.shorten(path)}: not a file of weights that can be read; {remedy}") from error
    state = network.state_dict()
    own = _layers(state)
    shapes = [[{name: tuple(tensor.shape) for name, tensor in layer.items()} for layer in layers.values()]
              for layers in (own, given)]
    if shapes[0] != shapes[1]:
        pairs = zip(own, given, *shapes)
        first = next((f"{b} is {y}, {a} is {x}" for a, b, x, y in pairs if x != y),
                     f"{len(given)} layers, not {len(own)}")
        raise ValueError(f"{paths.shorten(path)}: weights of another network ({first}); {remedy}, or change the "
                         "classes or the network's settings")
    for (prefix, layer), theirs in zip(own.items(), given.values()):
        state.update({f"{prefix}.{name}": theirs[name] for name in layer})
    network.load_state_dict(state)
    return PretrainedClassifier(network)


def _layers(state: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """{layer: {"weight": tensor, ...}} in order. Old files lack the counters of batch normalisation, which matter to
    training alone."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        prefix, _, name = key.rpartition(".")
        if name != "num_batches_tracked":
            layers.setdefault(prefix, {})[name] = tensor
    return layers


def _check_shape(where: str, address: str, channels: int, classes: int, their_channels: int,
                 their_classes: int) -> None:
    if their_classes != classes:
        raise ValueError(f"{where}: the model has {their_classes} classes, the data have {classes}; download {address} "
                         "for ImageNet's 1000, or train a network (another kind in architectures.classifiers)")
    if their_channels != channels:
        raise ValueError(f"{where}: the model reads images of {their_channels} channels, the data have {channels}; "
                         "set class_data.channels, or train a network (another kind in architectures.classifiers)")
