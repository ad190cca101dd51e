"""The layout-to-image latent diffusion model: p(x | y).

vocabulary -> layout encoder (transformer) -> cross-attention of diffusers.UNet2DConditionModel. At paper size
(LDM-8) these are 363 million parameters. Three switches help a small model and are off at paper size:

object_tokens       one context token per object (its five embeddings through a small network) in place of one
                    context token per field.
linear              that network is a single linear map. A straight-through step follows the first-order change of
                    the loss from one vocabulary entry to another, which says the more, the more nearly linear the
                    model is in its condition.
position_attention  the cross-attention knows where an object's box lies (`position_attention.py`).
"""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

from dive_lib import checkpoint
from dive_lib.batch_parts import DrawnLoss
from dive_lib.latents import LayoutTokens
from dive_lib.layout import LayoutGrid, drop_fields
from dive_lib.position_attention import use_position_attention
from dive_lib.schedule import ConditionalDenoiser, NoiseSchedule, draw_timesteps
from dive_lib.sequence_linear import use_sequence_linear
from dive_lib.token_transformer import TokenTransformer
from dive_lib.vocabulary import LayoutVocabulary


class LayoutEncoder(nn.Module):
    """Token embeddings (B, N, 5, d) -> context (B, L, width of the cross-attention).

    Published form (object_tokens off): the 5 N embeddings are one sequence of width d with learnable positions.
    object_tokens on: L = N + 1 tokens of width `width`, the last a learned register for pixels without an object;
    linear: without a hidden layer, most useful with layers = 0.
    carry_boxes appends each object's four coordinate embeddings to its context token (position attention).
    """

    def __init__(self, slots: int, embedding: int, layers: int, heads: int, head_width: int, *,
                 object_tokens: bool = False, linear: bool = False, width: int | None = None,
                 carry_boxes: bool = False, dropout: float = 0.0):
        super().__init__()
        if carry_boxes and not object_tokens:
            raise ValueError("position_attention needs object_tokens: a context token must own a whole box")
        if linear and not object_tokens:
            raise ValueError("linear needs object_tokens: it is the map from an object's fields to its token")
        self.object_tokens, self.carry_boxes = object_tokens, carry_boxes
        width = (width or embedding) if object_tokens else embedding
        if object_tokens:
            self.join = nn.Linear(5 * embedding, width) if linear else nn.Sequential(
                nn.Linear(5 * embedding, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
            self.register = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        # Objects have no order, so object tokens carry no positions.
        length = None if object_tokens else 5 * slots
        self.transformer = TokenTransformer(width, layers, heads, head_width, length=length, dropout=dropout)
        self.context_width = width + (4 * embedding if carry_boxes else 0)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        if not self.object_tokens:
            return self.transformer(embeddings.flatten(1, 2))
        objects = self.join(embeddings.flatten(2))
        register = self.register.expand(len(objects), -1, -1)
        context = self.transformer(torch.cat([objects, register], dim=1))
        if self.carry_boxes:
            boxes = F.pad(embeddings[:, :, 1:].flatten(2), (0, 0, 0, 1))  # the register has no box
            context = torch.cat([context, boxes.to(context.dtype)], dim=2)
        return context


class LayoutLDM(ConditionalDenoiser):
    """eps_theta(z_t, t, v_theta(y)).

    grid: LayoutGrid or its dictionary. vocabulary, encoder, unet, schedule: keyword arguments of
    LayoutVocabulary, LayoutEncoder, diffusers.UNet2DConditionModel and NoiseSchedule.
    position_attention: see the module's head.
    """

    def __init__(self, grid: LayoutGrid | dict, vocabulary: dict, encoder: dict, unet: dict,
                 schedule: dict | None = None, position_attention: bool = False):
        super().__init__()
        grid = grid if isinstance(grid, LayoutGrid) else LayoutGrid(**grid)
        self.config = {"grid": grid.to_dict(), "vocabulary": dict(vocabulary), "encoder": dict(encoder),
                       "unet": dict(unet), "schedule": dict(schedule or {}),
                       "position_attention": position_attention}
        self.grid = grid
        self.vocabulary = LayoutVocabulary(grid, **vocabulary)
        self.encoder = LayoutEncoder(grid.slots, self.vocabulary.width, carry_boxes=position_attention, **encoder)
        unet = {key: tuple(value) if isinstance(value, list) else value for key, value in unet.items()}
        self.unet = UNet2DConditionModel(cross_attention_dim=self.encoder.context_width, **unet)
        if position_attention:
            use_position_attention(self.unet, self.vocabulary)
        self.schedule = NoiseSchedule(**(schedule or {}))
        use_sequence_linear(self.unet)

    @property
    def network(self) -> nn.Module:
        """What predicts the noise, and takes nearly all of the time."""
        return self.unet

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of a latent."""
        side = self.unet.config.sample_size
        return self.unet.config.in_channels, side, side

    def context(self, embeddings: torch.Tensor) -> torch.Tensor:
        """(B, N, 5, d) -> (B, L, c): computed once for all timesteps of one layout."""
        return self.encoder(embeddings)

    def predict_noise(self, z_t: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """eps_theta: z_t (B, 4, h, w), t (B,), context (B, L, c) -> (B, 4, h, w)."""
        return self.unet(z_t, t, context, return_dict=False)[0]


def denoising_loss(predicted: torch.Tensor, noise: torch.Tensor, kind: str = "l2") -> torch.Tensor:
    """Mean error per sample (B,). "l2" is DIVE's equation 1; LDM's own layout configuration uses "l1"."""
    error = predicted - noise
    if kind not in ("l1", "l2"):
        raise ValueError(f"the loss must be 'l2' or 'l1', got {kind!r}")
    return (error.abs() if kind == "l1" else error.square()).flatten(1).mean(1)


def draw_step(model: nn.Module, clean: torch.Tensor, tokens: torch.Tensor, generator: torch.Generator, *,
                focus: dict, antithetic: bool = False) -> tuple[torch.Tensor, ...]:
    """What a step of training is about: latents, their tokens, timesteps and noises, on the latents' device.

    model: a LayoutLDM or DiT. clean (B, 4, h, w). focus: low, high and share of the timesteps drawn from that range.
    antithetic: everything twice, under each drawn noise and under its opposite.
    """
    t = draw_timesteps(len(clean), model.schedule.steps, generator, focus=(focus["low"], focus["high"]),
                       share=focus["share"]).to(clean.device)
    noise = torch.randn(clean.shape, generator=generator).to(clean.device)
    if antithetic:
        return *(torch.cat([part, part]) for part in (clean, tokens, t)), torch.cat([noise, -noise])
    return clean, tokens, t, noise


def noise_losses(model: nn.Module, clean: torch.Tensor, tokens: torch.Tensor, t: torch.Tensor, noise: torch.Tensor,
                 kind: str = "l2") -> torch.Tensor:
    """Equation 1 of each sample (B,), of what `draw_step` gave."""
    predicted = model(model.schedule.add_noise(clean, noise, t), t, model.vocabulary(tokens))
    return denoising_loss(predicted.float(), noise, kind)


def layout_ldm_loss(latents: torch.Tensor, layouts: LayoutTokens, batch: int, *, dropout: dict, focus: dict,
                    kind: str = "l2") -> DrawnLoss:
    """Equation 1 as an objective for train(): latents (n, 4, h, w) and layouts of the same n images.

    dropout: shares of `drop_fields`. focus: low, high and share of the timesteps drawn from that range.
    """
    if len(latents) != len(layouts):
        raise ValueError(f"{len(latents)} latents and {len(layouts)} layouts are not of the same images")

    def draw(model: LayoutLDM, step: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        device = model.vocabulary.class_table.device
        index = torch.randint(len(latents), (batch,), generator=generator)
        tokens = drop_fields(layouts.draw(index, generator), model.grid, generator, **dropout).to(device)
        return draw_step(model, latents[index].to(device), tokens, generator, focus=focus)

    return DrawnLoss(draw, partial(noise_losses, kind=kind))


def load(directory) -> LayoutLDM:
    """Loads a trained layout LDM, frozen."""
    model = LayoutLDM(**checkpoint.load_config(directory))
    return checkpoint.freeze(checkpoint.load_weights(directory, model))
