"""The noise schedule of all diffusion models here: z_t = sqrt(abar_t) z + sqrt(1 - abar_t) eps.

A thin wrapper over diffusers' schedulers. CompVis calls betas that are linear in their square roots "linear";
diffusers calls them "scaled_linear".
"""

import torch
from diffusers import DDIMScheduler
from torch import nn


class NoiseSchedule:
    """steps: number of diffusion steps; beta_start, beta_end: LDM's layout model uses 0.0015 and 0.0205."""

    def __init__(self, steps: int = 1000, beta_start: float = 0.0015, beta_end: float = 0.0205,
                 beta_schedule: str = "scaled_linear"):
        self.config = dict(steps=steps, beta_start=beta_start, beta_end=beta_end, beta_schedule=beta_schedule)
        self.scheduler = DDIMScheduler(num_train_timesteps=steps, beta_start=beta_start, beta_end=beta_end,
                                       beta_schedule=beta_schedule, clip_sample=False, set_alpha_to_one=False)
        self.alphas_cumprod = self.scheduler.alphas_cumprod
        self.steps = steps

    def add_noise(self, clean: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """z_t of clean (B, ...), noise (B, ...) and integer timesteps t (B,)."""
        abar = self.alphas_cumprod.to(clean.device)[t].view(-1, *[1] * (clean.ndim - 1))
        return abar.sqrt() * clean + (1 - abar).sqrt() * noise

    def sample(self, predict_noise, shape: tuple[int, ...], generator: torch.Generator, *, steps: int = 50,
               device: torch.device | str = "cpu") -> torch.Tensor:
        """DDIM samples of `shape`. predict_noise: function (z_t, t (B,)) -> eps."""
        self.scheduler.set_timesteps(steps)
        z = torch.randn(shape, generator=generator).to(device)
        for t in self.scheduler.timesteps:
            noise = predict_noise(z, t.expand(shape[0]).to(device))
            z = self.scheduler.step(noise, int(t), z).prev_sample
        return z


def evenly_spaced(low: int, high: int, interval: int) -> torch.Tensor:
    """Timesteps low + interval // 2, then every `interval`, below `high`.

    evenly_spaced(0, 1000, 5) are DIVE's 200 timesteps (2, 7, ..., 997), evenly_spaced(0, 1000, 4) the 250 of its
    classification experiments.
    """
    if not 0 <= low < high or interval < 1:
        raise ValueError(f"timesteps need 0 <= low < high and interval >= 1, got {low}, {high}, {interval}")
    return torch.arange(low + interval // 2, high, interval)


def draw_timesteps(count: int, steps: int, generator: torch.Generator, *, focus: tuple[int, int] | None = None,
                   share: float = 0.5) -> torch.Tensor:
    """(count,) timesteps, uniform over all steps; a `share` of them uniform within `focus` when it is given.

    Focusing on the range in which the layout decides the picture makes a small model learn the layout sooner.
    """
    t = torch.randint(0, steps, (count,), generator=generator)
    if focus is None:
        return t
    inside = torch.randint(focus[0], focus[1], (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < share, inside, t)


class ConditionalDenoiser(nn.Module):
    """eps_theta(z_t, t, v_theta(y)) of a layout or a class y: what every such model does with its parts.

    It has `vocabulary` (tokens -> embeddings), `context` (embeddings -> what the network reads), `network` (the U-Net
    or transformer), `predict_noise` (z_t, t (B,), context -> noise like z_t), `schedule` and `latent_shape` (C, h, w).
    """

    def forward(self, z_t: torch.Tensor, t: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
        return self.predict_noise(z_t, t, self.context(embeddings))

    @torch.no_grad()
    def sample(self, tokens: torch.Tensor, generator: torch.Generator, steps: int = 50) -> torch.Tensor:
        """Latents (B, C, h, w) drawn for layouts (B, N, 5) or classes (B, 1, 1) by DDIM, without guidance."""
        context = self.context(self.vocabulary(tokens))
        return self.schedule.sample(lambda z, t: self.predict_noise(z, t, context),
                                    (len(tokens), *self.latent_shape), generator, steps=steps,
                                    device=context.device)
