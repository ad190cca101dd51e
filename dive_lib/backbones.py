"""The frozen backbones of a profile by name, behind the one interface of `denoiser_features`.

layout_ldm, dit        trained by this pipeline; untrained_layout_ldm, untrained_dit: the same with drawn weights
stable_diffusion       Stable Diffusion 1.5 from a local folder
pixels                 the image itself
numbers_resnet         13_classifiers' residual network, supervised on the numbers 00 to 99: the mini profile's expert
resnet18, dino, dinov2 the paper's experts from local folders
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from dive_lib import classifiers, dit, expert, first_stage, image_encoder, layout_ldm, paths, stable_diffusion
from dive_lib.comparison_backbones import PixelFeatures, ResNetFeatures
from dive_lib.denoiser_features import DenoiserFeatures
from dive_lib.denoisers import DiTDenoiser, LayoutDenoiser, untrained_dit, untrained_layout_ldm
from dive_lib.feature_noise import Noise

EXPERTS = ("resnet18", "dino", "dinov2")
NAMES = ("layout_ldm", "dit", "untrained_layout_ldm", "untrained_dit", "stable_diffusion", "pixels", "numbers_resnet",
         *EXPERTS)


def load(profile: str, name: str, *, noise: str = "ddpm", folder: str = "", bf16: bool = False):
    """A backbone of NAMES on the device where models run. folder: of downloaded weights, relative to the repository.

    Raises ValueError for an unknown name, FileNotFoundError for weights that are not there.
    """
    if name not in NAMES:
        raise ValueError(f"backbone {name!r} is unknown; choose one of {', '.join(NAMES)}")
    runs, device = paths.runs(profile), first_stage.device()
    if name == "pixels":
        return PixelFeatures()
    if name == "numbers_resnet":
        return GreyResNetFeatures(classifiers.load(runs / "classifiers" / "resnet").to(device), side=16)
    if name in EXPERTS:
        found = expert.load(name, folder)
        found.network.to(device)
        return found
    if name == "stable_diffusion":
        denoiser = stable_diffusion.load(folder)
    elif name.endswith("layout_ldm"):
        ldm = layout_ldm.load(runs / "layout_ldm")
        denoiser = LayoutDenoiser(untrained_layout_ldm(ldm) if name.startswith("untrained") else ldm,
                                  first_stage.load(runs / "first_stage"), name)
    else:
        model = dit.load(runs / "dit")
        model = untrained_dit(model) if name.startswith("untrained") else model
        denoiser = DiTDenoiser(model, image_encoder.load(), name)
    return DenoiserFeatures(denoiser.to(device), Noise(noise), bf16=bf16)


class GreyResNetFeatures(ResNetFeatures):
    """A network trained on small grey images: colour images are made grey and reduced to `side` by area."""

    def __init__(self, network: classifiers.ResNet, side: int, name: str = "numbers ResNet"):
        super().__init__(network, name)
        self.side = side

    @torch.no_grad()
    def features(self, images: torch.Tensor, t: int | Sequence[int] = 0, stages: Sequence[str] | None = None,
                 condition=None) -> dict[str, torch.Tensor]:
        grey = F.interpolate(images.mean(1, keepdim=True), (self.side, self.side), mode="area")
        return super().features(grey, t, stages, condition)
