"""A DiT of the data of classification: trained on them, or a published one."""

import torch
from torch import nn

from dive_lib import class_data, dit, paths
from dive_lib.checkpoint import fingerprint
from dive_lib.class_data import ClassData
from dive_lib.train import TrainingConfig, train


def obtain(data: ClassData, encoder: nn.Module, architecture: dict, config: TrainingConfig, *, checkpoint: str = "",
           dropout: float = 0.1, focus: dict | None = None, label: str = "DiT") -> tuple[dit.DiT, list[float]]:
    """Trains a DiT on the training split and returns it with the loss of every step; or loads a published one, without.

    architecture: keyword arguments of DiT. checkpoint: folder of the published transformer in diffusers' format,
    absolute or relative to the repository root; empty: train. dropout, focus: of `dit_loss`. A stopped training
    continues. Raises ValueError where images and architecture do not fit.
    """
    if checkpoint:
        return dit.load_published(paths.ROOT / checkpoint, data.classes), []
    torch.manual_seed(config.seed)
    model = dit.DiT(data.classes, **architecture)
    latents = class_data.encode(encoder, data.train, label="training latents")
    if latents.shape[1:] != model.latent_shape:
        raise ValueError(f"the DiT diffuses {model.latent_shape}, the encoded images are {tuple(latents.shape[1:])}; "
                         "change in_channels and sample_size of the architecture, or the image size")
    loss_of = dit.dit_loss(latents, data.train.labels, config.batch_size, dropout=dropout, focus=focus)
    losses = train(model.to(class_data.device()), loss_of, config, scratch=paths.scratch() / "dit", label=label,
                   identity=fingerprint(latents, data.train.labels, model.config, dropout, focus or {}))
    return model, losses
