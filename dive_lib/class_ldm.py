"""The class-conditional latent diffusion model with a U-Net: LDM-4, DIVE's second model of p(x | class).

The network is CompVis's `UNetModel` as diffusers' `UNet2DConditionModel`; the embedding of the class is the only token
of its cross-attention. Attention over one token gives it the weight one, whatever the query: every attention layer adds
a linear map of the class embedding to all places alike. The published model is `cin256-v2` of CompVis/latent-diffusion:
ImageNet at 256 x 256, latents of the first stage VQ-f4 (`image_encoder.VQLatents`), 401M parameters, and the null class
1000 in the last row of the table.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from dive_lib import checkpoint, compvis, paths
from dive_lib.class_vocabulary import ClassConditional, ClassGrid, ClassVocabulary
from dive_lib.image_encoder import LDM_4_SOURCE
from dive_lib.schedule import NoiseSchedule

BETAS = {"steps": 1000, "beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}
TABLE = "cond_stage_model.embedding.weight"  # CompVis's ClassEmbedder
# The first stage is read by `image_encoder`. An average is kept by some configurations, not by cin256-v2's.
PARTS = (compvis.PARTS["unet"], compvis.PARTS["first_stage"], TABLE, "model_ema.")


class ClassLDM(ClassConditional):
    """eps_theta(z_t, t, v_theta(y)) with a latent U-Net.

    classes: names of the K classes, or K. unet, schedule: keyword arguments of diffusers' UNet2DConditionModel and of
    NoiseSchedule (LDM's betas by default). width: of the class embeddings. std: of the initial class table.
    """

    def __init__(self, classes: Sequence[str] | int, unet: dict, width: int = 512, schedule: dict | None = None,
                 std: float = 1.0):
        super().__init__()
        self.grid = ClassGrid(classes)
        self.config = {"classes": list(self.grid.classes), "unet": dict(unet), "width": width,
                       "schedule": BETAS | dict(schedule or {}), "std": std}
        self.unet = UNet2DConditionModel(**_arguments(unet, width))
        self.vocabulary = ClassVocabulary(self.grid, width, std=std)
        self.schedule = NoiseSchedule(**self.config["schedule"])

    @property
    def network(self) -> nn.Module:
        """What predicts the noise, and takes nearly all of the time."""
        return self.unet

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent: LDM-4 has (3, 64, 64)."""
        config = self.unet.config
        return config.in_channels, config.sample_size, config.sample_size

    def predict_noise(self, z_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """eps_theta: z_t (B, C, h, w), t (B,), context (B, d) -> (B, C, h, w)."""
        return self.unet(z_t, t, context[:, None], return_dict=False)[0]


def load_published(path: Path | str, architecture: dict, classes: Sequence[str] | None = None) -> ClassLDM:
    """Loads a class-conditional model in CompVis's format, frozen: one file, .ckpt or .safetensors, with U-Net, class
    table and, for `image_encoder`, first stage.

    architecture: keyword arguments of ClassLDM without the classes. classes: their names, by default their numbers.
    Raises FileNotFoundError for a missing file, and ValueError for one that is damaged or is not of such a model; both
    name the file, the tensors and what to do.
    """
    path = Path(path)
    where, remedy = paths.shorten(path), f"give the checkpoint {LDM_4_SOURCE} with the architecture LDM-4"
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such file; download {LDM_4_SOURCE} there")
    # The reader cuts out the token transformer of a layout model. There is none here, so it gives all tensors.
    state = compvis.load_compvis_state(path, "token_transformer")
    if TABLE not in state:
        raise ValueError(f"{where}: lacks {TABLE}, the table of the classes; {remedy}")
    left = sorted(name for name in state if "." in name and not name.startswith(PARTS))
    if left:  # names without a dot are the noise schedule's
        raise ValueError(f"{where}: has {left[0]}, which is no part of a class-conditional model; {remedy}")
    table = state[TABLE]
    count = len(table) - 1
    if classes is not None and len(classes) != count:
        raise ValueError(f"{where}: {TABLE} has {count} classes and a null class, but {len(classes)} class names are "
                         "given; give the images of the classes that the model was trained on")
    model = ClassLDM(count if classes is None else classes, **architecture)
    if table.shape[1] != model.vocabulary.width:
        raise ValueError(f"{where}: {TABLE} has width {table.shape[1]}, the architecture asks for "
                         f"{model.vocabulary.width}; {remedy}")
    _check_schedule(state, model, where)
    try:
        unet = compvis.convert_layout_unet(state, _arguments(model.config["unet"], model.vocabulary.width))
    except (KeyError, ValueError) as error:  # the layout model's U-Net has the same names
        raise ValueError(f"{where}: {error.args[0].removeprefix('layout ')}; {remedy}") from error
    model.unet.load_state_dict(unet)
    model.vocabulary.class_table.data = table.float().clone()
    return checkpoint.freeze(model)


def _arguments(unet: dict, width: int) -> dict:
    """Of UNet2DConditionModel, which wants tuples where YAML and JSON have lists."""
    return {key: tuple(value) if isinstance(value, list) else value
            for key, value in unet.items()} | {"cross_attention_dim": width}


def _check_schedule(state: dict, model: ClassLDM, where: str) -> None:
    """A model that runs on another schedule than its own predicts well enough to hide it."""
    recorded, ours = state.get("alphas_cumprod"), model.schedule.alphas_cumprod
    if recorded is not None and (recorded.shape != ours.shape or
                                 not torch.allclose(recorded.float(), ours, rtol=0, atol=1e-4)):
        raise ValueError(f"{where}: alphas_cumprod is not of the schedule {model.schedule.config}; give the "
                         "architecture the betas that the model was trained with")
