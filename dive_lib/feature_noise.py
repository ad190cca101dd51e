"""The noisy latents that a frozen denoiser reads an image from, in the modes of Vermouth and three more.

A mode says how a clean latent becomes the network's input at a time step t (published code:
src/model/feature_extractors.py):

ddpm            noise of a fixed seed (8888) is added at the first, largest t. One noise for all images: an image's
                features must not depend on its place in a batch, as they do when a batch is drawn at once.
ddim_inv        no noise at all: the network sees the clean latent and the time embedding of t.
free            as ddpm, with another noise for every image, drawn from a seed made of the image and of `draw`.
uniform         as ddpm, with the same noise at every place: a value for each channel. A control, see `noise_controls`.
ddim_inversion  true DDIM inversion (Song et al., 2021, equation 13 run backwards): the network's own noise carries
                the latent from clean to t in `steps` steps. No published row has it.

With several time steps the latent walks from one to the next by DDIM steps, and the features are those of the last:
downwards from the largest t (ddpm, free, uniform), upwards from the clean latent (ddim_inv, ddim_inversion).  The
published program also evaluates an unconditional pass with a guidance scale; it feeds these steps alone, and nothing
where there is one t, so it is not reproduced.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch

from dive_lib.schedule import NoiseSchedule

MODES = ("ddpm", "ddim_inv", "free", "uniform", "ddim_inversion")
DOWNWARDS = ("ddpm", "free", "uniform")
Predict = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Noise:
    """mode: one of MODES. seed: of the fixed noise. draw: number of the free noise, so that an image can have several.
    steps: of DDIM inversion."""

    mode: str = "ddpm"
    seed: int = 8888
    draw: int = 0
    steps: int = 10

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"noise mode {self.mode!r} is unknown; choose one of {', '.join(MODES)}")
        if self.steps < 1:
            raise ValueError(f"DDIM inversion needs steps >= 1, got {self.steps}")

    def to_dict(self) -> dict:
        return asdict(self)


def time_steps(t: int | Sequence[int], noise: Noise, steps: int) -> tuple[int, ...]:
    """The time steps as a tuple in the order of the walk. Raises ValueError for none, for one outside 0 ... steps - 1
    and for a wrong order."""
    times = (int(t),) if isinstance(t, int) else tuple(int(value) for value in t)
    outside = [value for value in times if not 0 <= value < steps]
    if not times or outside:
        raise ValueError(f"time steps {times}: need one or more of 0 to {steps - 1}")
    ordered = tuple(sorted(set(times), reverse=noise.mode in DOWNWARDS))
    if times != ordered:
        raise ValueError(f"time steps {times}: mode {noise.mode!r} walks through {ordered}; give them in this order")
    return times


def noisy_latents(clean: torch.Tensor, images: torch.Tensor, times: Sequence[int], noise: Noise,
                  schedule: NoiseSchedule, predict: Predict) -> torch.Tensor:
    """The network's input (B, C, h, w) at the last of `times`, from clean latents (B, C, h, w) of images (B, ...).

    predict: (z (B, C, h, w), t) -> the network's noise; called only where there is a walk.
    """
    if noise.mode == "ddim_inversion":
        z, here = clean, 0
        for goal in times:
            z, here = invert(z, here, goal, noise.steps, schedule, predict, clean=here == 0), goal
        return z
    z = clean
    if noise.mode in DOWNWARDS:
        eps = free_noise(images, clean.shape[1:], noise.draw) if noise.mode == "free" else \
            fixed_noise(clean.shape[1:] if noise.mode == "ddpm" else (clean.shape[1], 1, 1), noise.seed)
        t = torch.full((len(clean),), times[0], device=clean.device)
        z = schedule.add_noise(clean, eps.to(clean.device).expand_as(clean), t)
    for here, goal in zip(times[:-1], times[1:]):
        z = ddim_step(z, predict(z, here), abar(schedule, here), abar(schedule, goal))
    return z


def fixed_noise(shape: Sequence[int], seed: int = 8888) -> torch.Tensor:
    """(1, C, h, w) one noise for all images."""
    return torch.randn((1, *shape), generator=torch.Generator().manual_seed(seed))


def free_noise(images: torch.Tensor, shape: Sequence[int], draw: int = 0) -> torch.Tensor:
    """(B, C, h, w) a noise for every image, the same whichever batch the image is in.

    Images (B, C, H, W) in [-1, 1] count as their 8-bit pixels, so rounding does not change their noise.
    """
    pixels = ((images.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    seeds = [int.from_bytes(hashlib.sha256(bytes([draw % 256]) + image.numpy().tobytes()).digest()[:7])
             for image in pixels]
    return torch.stack([torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def abar(schedule: NoiseSchedule, t: int) -> float:
    """Signal share of step t."""
    return float(schedule.alphas_cumprod[t])


def ddim_step(z: torch.Tensor, eps: torch.Tensor, before: float, after: float) -> torch.Tensor:
    """Carries z from the signal share abar `before` to `after`, towards noise or towards the image, with the
    predicted noise eps (DDIM, equation 12 with sigma = 0)."""
    image = (z - (1 - before) ** 0.5 * eps) / before ** 0.5
    return after ** 0.5 * image + (1 - after) ** 0.5 * eps


def invert(z: torch.Tensor, start: int, goal: int, steps: int, schedule: NoiseSchedule, predict: Predict, *,
           clean: bool = True) -> torch.Tensor:
    """DDIM inversion from time `start` to `goal` in at most `steps` steps. clean: z has no noise at all (abar = 1).

    At goal 0 the latent is the clean one: the first step has nothing to follow yet.
    """
    grid = torch.linspace(start, goal, steps + 1).round().long().unique().tolist()
    for here, there in zip(grid[:-1], grid[1:]):
        level = 1.0 if clean and here == start else abar(schedule, here)
        z = ddim_step(z, predict(z, here), level, abar(schedule, there))
    return z
