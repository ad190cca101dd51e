"""The frozen backbones of a profile by name, behind the one interface of `denoiser_features`.

layout_ldm, dit        trained by this pipeline; untrained_layout_ldm, untrained_dit: the same with drawn weights
stable_diffusion       Stable Diffusion 1.5 from a local folder; untrained_stable_diffusion: its UNet with drawn weights
pixels                 the image itself
numbers_resnet         12_classifiers' residual network, supervised on the numbers 00 to 99: the mini profile's expert
resnet18, dino, dinov2 the paper's experts from local folders
"""

from collections.abc import Iterable, Mapping, Sequence

import torch

from dive_lib import (captions, class_data, class_models, classifiers, expert, first_stage, image_encoder, layout_ldm,
                      paths, stable_diffusion, text_targets)
from dive_lib.comparison_backbones import PixelFeatures, ResNetFeatures
from dive_lib.denoiser_features import DenoiserFeatures
from dive_lib.denoisers import DiTDenoiser, LayoutDenoiser, in_format_of, untrained_dit, untrained_layout_ldm
from dive_lib.feature_noise import Noise

EXPERTS = ("resnet18", "dino", "dinov2")
NAMES = ("layout_ldm", "dit", "untrained_layout_ldm", "untrained_dit", "stable_diffusion", "untrained_stable_diffusion",
         "pixels", "numbers_resnet", "untrained_numbers_resnet", *EXPERTS)
DOWNLOADS = {"stable_diffusion": (stable_diffusion.FILES, stable_diffusion.SOURCE),
             "untrained_stable_diffusion": (stable_diffusion.FILES, stable_diffusion.SOURCE),
             **{name: (expert.FILES, expert.SOURCES[name]) for name in EXPERTS},
             "clip": (text_targets.CLIP_FILES, text_targets.CLIP_SOURCE),
             "blip": (captions.FILES, captions.SOURCE)}
"""Files and source of what is downloaded: backbones, CLIP's text tower (`ClipText`), BLIP (`captions.Captioner`)."""


def require(names: Iterable[str], folders: Mapping[str, str]) -> None:
    """Checks that the files of downloaded models are there, before work starts; no weights are read.

    names: of NAMES and DOWNLOADS; what is not downloaded needs nothing. folders: by name, relative to the repository;
    an untrained copy may have the folder of the trained network.
    Raises one FileNotFoundError that lists every missing file with its source, and ValueError for an unknown name.
    """
    lacking = []
    for name in dict.fromkeys(names):
        if name not in NAMES and name not in DOWNLOADS:
            raise ValueError(f"{name!r} is unknown; choose one of {', '.join(dict.fromkeys([*NAMES, *DOWNLOADS]))}")
        files, source = DOWNLOADS.get(name, ((), ""))
        folder = folders.get(name) or folders.get(name.removeprefix("untrained_"), "")
        if files and not folder:
            lacking.append(f"{name}: its parameters name no folder; download {', '.join(files)} of {source} into one")
        elif missing := [file for file in files if not (paths.ROOT / folder / file).is_file()]:
            lacking.append(f"{name}: download {', '.join(missing)} of {source} into "
                           f"{paths.shorten(paths.ROOT / folder)}")
    if lacking:
        raise FileNotFoundError("\n".join(["files are missing:", *lacking]))


def load(profile: str, name: str, *, noise: str = "ddpm", folder: str = "", bf16: bool = False):
    """A backbone of NAMES on the device where models run. folder: of downloaded weights, relative to the repository.

    Raises ValueError for an unknown name, FileNotFoundError for weights that are not there.
    """
    if name not in NAMES:
        raise ValueError(f"backbone {name!r} is unknown; choose one of {', '.join(NAMES)}")
    runs, device = paths.runs(profile), first_stage.device()
    if name == "pixels":
        return PixelFeatures()
    if name.endswith("numbers_resnet"):
        network = classifiers.load(runs / "classifiers" / "resnet", trained=not name.startswith("untrained"))
        return GreyResNetFeatures(network.to(device), side=16)
    if name in EXPERTS:
        found = expert.load(name, folder)
        found.network.to(device)
        return found
    if name.endswith("stable_diffusion"):
        denoiser = stable_diffusion.load(folder, trained=not name.startswith("untrained"))
    elif name.endswith("layout_ldm"):
        ldm = layout_ldm.load(runs / "layout_ldm")
        denoiser = LayoutDenoiser(untrained_layout_ldm(ldm) if name.startswith("untrained") else ldm,
                                  first_stage.load(runs / "first_stage"), name)
    else:
        model = class_models.load(runs / "dit")
        model = untrained_dit(model) if name.startswith("untrained") else model
        denoiser = DiTDenoiser(model, image_encoder.load(class_data.description(profile)["encoder"]), name)
    return DenoiserFeatures(denoiser.to(device), Noise(noise), bf16=bf16)


class GreyResNetFeatures(ResNetFeatures):
    """A network trained on small grey images: colour images are made grey and reduced to `side` by area."""

    def __init__(self, network: classifiers.ResNet, side: int, name: str = "numbers ResNet"):
        super().__init__(network, name)
        self.side = side

    @property
    def identity(self) -> dict:
        return super().identity | {"side": self.side}

    @torch.no_grad()
    def features(self, images: torch.Tensor, t: int | Sequence[int] = 0, stages: Sequence[str] | None = None,
                 condition=None) -> dict[str, torch.Tensor]:
        return super().features(in_format_of(images, 1, self.side), t, stages, condition)
