"""The layout prior p(y): a transformer that denoises the frozen vocabulary's embeddings (equation 3).

Its body is the layout encoder's architecture, here as denoising network; at paper size it has 58 million
parameters. `DecoupledPrior` is the ablation of Table III with one model for classes and one for boxes.
"""

import math

import torch
from torch import nn

from dive_lib import checkpoint
from dive_lib.batch_parts import DrawnLoss
from dive_lib.latents import LayoutTokens
from dive_lib.layout import LayoutGrid
from dive_lib.schedule import NoiseSchedule
from dive_lib.token_transformer import TokenTransformer
from dive_lib.vocabulary import LayoutVocabulary

FIELDS = {"all": [0, 1, 2, 3, 4], "classes": [0], "boxes": [1, 2, 3, 4]}


class LayoutPrior(nn.Module):
    """eps_phi(v_t, t) over the embeddings of some fields of the layout.

    grid, vocabulary: as the layout LDM's; the tables are copied in by `adopt` and frozen. width, layers, heads,
    head_width: of the transformer. fields: "all", "classes" or "boxes". unit_scale: divide the embeddings by
    their standard deviation, so that signal and noise are of one scale (the paper does not say).
    object_tokens: one token per object in place of one per field, as in the small layout encoder.
    """

    def __init__(self, grid: LayoutGrid | dict, vocabulary: dict, width: int, layers: int, heads: int,
                 head_width: int, *, fields: str = "all", unit_scale: bool = True, object_tokens: bool = False,
                 schedule: dict | None = None):
        super().__init__()
        if fields not in FIELDS:
            raise ValueError(f"fields must be one of {list(FIELDS)}, got {fields!r}")
        grid = grid if isinstance(grid, LayoutGrid) else LayoutGrid(**grid)
        self.config = {"grid": grid.to_dict(), "vocabulary": dict(vocabulary), "width": width, "layers": layers,
                       "heads": heads, "head_width": head_width, "fields": fields, "unit_scale": unit_scale,
                       "object_tokens": object_tokens, "schedule": dict(schedule or {})}
        self.grid, self.fields, self.object_tokens = grid, FIELDS[fields], object_tokens
        self.unit_scale, self.width = unit_scale, width
        self.vocabulary = LayoutVocabulary(grid, **vocabulary).requires_grad_(False)
        self.register_buffer("scale", torch.ones(()))
        token = self.vocabulary.width * (len(self.fields) if object_tokens else 1)
        length = None if object_tokens else grid.slots * len(self.fields)
        self.into = nn.Linear(token, width)
        self.time = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width), nn.SiLU(),
                                  nn.Linear(4 * width, width))
        self.transformer = TokenTransformer(width, layers, heads, head_width, length=length)
        self.out = nn.Linear(width, token)
        self.schedule = NoiseSchedule(**(schedule or {}))

    @property
    def network(self) -> nn.Module:
        """What takes nearly all of the time."""
        return self.transformer

    def adopt(self, vocabulary: LayoutVocabulary) -> "LayoutPrior":
        """Copies the layout LDM's trained tables, which stay frozen."""
        self.vocabulary.load_state_dict(vocabulary.state_dict())
        if self.unit_scale:
            self.scale.fill_(1 / vocabulary.std)
        return self

    def forward(self, noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Predicted noise of noisy scaled embeddings (B, N, F, d), with t (B,)."""
        shape = noisy.shape
        tokens = self.into(noisy.flatten(2) if self.object_tokens else noisy.flatten(1, 2))
        hidden = self.transformer(tokens + self.time(time_features(t, self.width).to(tokens.dtype))[:, None])
        return self.out(hidden).view(shape)

    def loss(self, embeddings: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Equation 3 per sample (B,): mean squared error over the prior's fields.

        embeddings, noise: (B, N, 5, d); differentiable with respect to the embeddings.
        """
        clean, noise = embeddings[:, :, self.fields] * self.scale, noise[:, :, self.fields]
        predicted = self(self.schedule.add_noise(clean, noise, t), t)
        return (predicted - noise).square().flatten(1).mean(1)

    @torch.no_grad()
    def sample(self, count: int, generator: torch.Generator, steps: int = 50) -> torch.Tensor:
        """Scaled back embeddings (count, N, F, d) of layouts drawn by DDIM."""
        shape = (count, self.grid.slots, len(self.fields), self.vocabulary.width)
        return self.schedule.sample(self, shape, generator, steps=steps, device=self.scale.device) / self.scale


class DecoupledPrior(nn.Module):
    """A prior for classes and one for boxes, weighted by their share of a layout's elements."""

    def __init__(self, classes: LayoutPrior, boxes: LayoutPrior):
        super().__init__()
        self.classes, self.boxes = classes, boxes

    def loss(self, embeddings: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return (self.classes.loss(embeddings, t, noise) + 4 * self.boxes.loss(embeddings, t, noise)) / 5


def layout_prior_loss(layouts: LayoutTokens, batch: int) -> DrawnLoss:
    """Equation 3 as an objective for train()."""

    def draw(model: LayoutPrior, step: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        device = model.scale.device
        tokens = layouts.draw(torch.randint(len(layouts), (batch,), generator=generator), generator)
        embeddings = model.vocabulary(tokens.to(device))
        t = torch.randint(0, model.schedule.steps, (batch,), generator=generator).to(device)
        noise = torch.randn(embeddings.shape, generator=generator).to(device)
        return embeddings, t, noise

    return DrawnLoss(draw, LayoutPrior.loss)


def time_features(t: torch.Tensor, width: int) -> torch.Tensor:
    """(B,) -> (B, width) sines and cosines of the timestep."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def load(directory) -> LayoutPrior:
    """Loads a trained prior, frozen."""
    model = LayoutPrior(**checkpoint.load_config(directory))
    return checkpoint.freeze(checkpoint.load_weights(directory, model))


def load_decoupled(classes_directory, boxes_directory) -> DecoupledPrior:
    """Loads the two priors of the ablation, frozen."""
    return DecoupledPrior(load(classes_directory), load(boxes_directory))
