"""A class-conditional model, DiT or LDM, of the data of classification: trained on them, or a published one."""

from functools import partial

import torch
from torch import nn

from dive_lib import class_data, class_models, paths
from dive_lib.batch_parts import DrawnLoss
from dive_lib.checkpoint import fingerprint
from dive_lib.class_data import ClassData
from dive_lib.class_models import ClassModel
from dive_lib.layout_ldm import draw_step, noise_losses
from dive_lib.train import TrainingConfig, train


def obtain(data: ClassData, encoder: nn.Module, architecture: dict, config: TrainingConfig, *, checkpoint: str = "",
           dropout: float = 0.1, antithetic: bool = False, focus: dict | None = None,
           early: dict[str, torch.Tensor] | None = None) -> tuple[ClassModel, list[float]]:
    """Trains a model on the training split and returns it with the loss of every step; or loads a published one.

    architecture: keyword arguments of DiT or of ClassLDM. checkpoint: of `published`; empty: train. dropout,
    antithetic, focus: of `class_loss`. early: of `train`. A stopped training continues. Raises ValueError where images
    and model do not fit.
    """
    if checkpoint:
        return published(data, encoder, architecture, checkpoint), []
    torch.manual_seed(config.seed)
    model = class_models.make(data.classes, architecture)
    latents = _latents_of(model, data, encoder)
    draws = {"dropout": dropout, "antithetic": antithetic, "focus": focus or {}}
    loss_of = class_loss(latents, data.train.labels, config.batch_size, **draws)
    losses = train(model.to(class_data.device()), loss_of, config, scratch=paths.scratch() / "dit", label="DiT",
                   early=early, identity=fingerprint(latents, data.train.labels, model.config, draws))
    return model, losses


def published(data: ClassData, encoder: nn.Module, architecture: dict, checkpoint: str) -> ClassModel:
    """A published model, for the images of these data as the encoder gives them.

    checkpoint: a DiT's folder in diffusers' format or an LDM's file in CompVis's, absolute or relative to the
    repository root. Raises ValueError where images and model do not fit.
    """
    model = class_models.load_published(checkpoint, architecture, data.classes)
    _latents_of(model, data, encoder, [0])
    return model


def _latents_of(model: ClassModel, data: ClassData, encoder: nn.Module, index: list[int] | None = None) -> torch.Tensor:
    latents = class_data.encode(encoder, data.train, index, label="training latents")
    if latents.shape[1:] != model.latent_shape:
        raise ValueError(f"the model diffuses {model.latent_shape}, the encoded images are {tuple(latents.shape[1:])}; "
                         "change in_channels and sample_size of the architecture, the image size, or the encoder")
    return latents


def class_loss(latents: torch.Tensor, labels: torch.Tensor, batch: int, *, dropout: float = 0.1,
               antithetic: bool = False, focus: dict | None = None, kind: str = "l2") -> DrawnLoss:
    """Equation 1 as an objective for train(): latents (n, 4, h, w) and labels (n,) of the same n images.

    dropout: share of the labels that are replaced by the null class. focus: low, high and share of the timesteps
    drawn from that range. antithetic: `batch` evaluations are of half as many images, each under a noise and under its
    opposite, so that what of the gradient is odd in the noise cancels. A learned variance is not trained.
    """
    if len(latents) != len(labels):
        raise ValueError(f"{len(latents)} latents and {len(labels)} labels are not of the same images")
    if antithetic and batch % 2:
        raise ValueError(f"each image is seen under two noises; the size of a batch must be even, got {batch}")
    focus = focus or {"low": 0, "high": 1, "share": 0.0}
    images = batch // 2 if antithetic else batch

    def draw(model: ClassModel, step: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        device = model.vocabulary.class_table.device
        index = torch.randint(len(latents), (images,), generator=generator)
        dropped = torch.rand(images, generator=generator) < dropout
        tokens = model.grid.encode(torch.where(dropped, model.grid.none_tokens, labels[index])).to(device)
        return draw_step(model, latents[index].to(device), tokens, generator, focus=focus, antithetic=antithetic)

    return DrawnLoss(draw, partial(noise_losses, kind=kind))
