"""A layout LDM of the data of detection, trained on them (equation 1)."""

import torch

from dive_lib import paths
from dive_lib.checkpoint import fingerprint
from dive_lib.dataset import Dataset
from dive_lib.first_stage import FirstStage, device
from dive_lib.latents import LayoutTokens, cached_latents
from dive_lib.layout_ldm import LayoutLDM, layout_ldm_loss
from dive_lib.train import TrainingConfig, train


def obtain(data: Dataset, first_stage: FirstStage, architecture: dict, config: TrainingConfig, *, dropout: dict,
           focus: dict, kind: str = "l2", label: str = "layout LDM",
           early: dict[str, torch.Tensor] | None = None) -> tuple[LayoutLDM, list[float]]:
    """Trains a layout LDM on the training split and returns it with the loss of every step.

    architecture: keyword arguments of LayoutLDM without the grid. dropout, focus, kind: of `layout_ldm_loss`. early: of
    `train`. A stopped training continues. Raises ValueError where architecture and latents do not fit.
    """
    torch.manual_seed(config.seed)
    model = LayoutLDM(data.grid, **architecture)
    latents = cached_latents(first_stage, data.train, paths.scratch() / "latents", label="training latents")
    if latents.shape[1:] != model.latent_shape:
        raise ValueError(f"the layout LDM diffuses {model.latent_shape}, the first stage's latents are "
                         f"{tuple(latents.shape[1:])}; change in_channels and sample_size of the architecture")
    layouts = LayoutTokens(data.train, data.grid)
    loss_of = layout_ldm_loss(latents, layouts, config.batch_size, dropout=dropout, focus=focus, kind=kind)
    losses = train(model.to(device()), loss_of, config, scratch=paths.scratch() / "layout_ldm", label=label,
                   early=early, identity=fingerprint(latents, layouts.tokens, model.config, dropout, focus, kind))
    return model, losses
