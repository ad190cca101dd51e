"""The first stage: a vector-quantised autoencoder with downsampling factor 8 (diffusers.VQModel).

The latent diffusion model works on the encoder's output *before* quantisation, as in LDM; decoding quantises first.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import VQModel
from torch import nn

from dive_lib import checkpoint, compvis, paths
from dive_lib.batch_parts import DrawnLoss
from dive_lib.coco import CocoLayouts
from dive_lib.decoding import stacked


class FirstStage(nn.Module):
    """VQModel with an optional pixel-unshuffle stem and latents of unit scale.

    model: keyword arguments of diffusers.VQModel, without in_channels and out_channels.
    unshuffle: side of the pixel blocks that are folded into channels before the first convolution; 1 is the
    published architecture, 4 makes a small model ten times faster on a CPU at the same downsampling factor.
    """

    def __init__(self, model: dict, unshuffle: int = 1):
        super().__init__()
        self.config = {"model": dict(model), "unshuffle": unshuffle}
        channels = 3 * unshuffle**2
        self.unshuffle = unshuffle
        self.vq = VQModel(in_channels=channels, out_channels=channels, **model)
        latent = self.vq.config.latent_channels
        self.register_buffer("latent_mean", torch.zeros(latent))
        self.register_buffer("latent_std", torch.ones(latent))

    @property
    def factor(self) -> int:
        """Downsampling factor of the latents: 8."""
        return self.unshuffle * 2 ** (len(self.vq.config.block_out_channels) - 1)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> standardised latents (B, 4, H/8, W/8), before quantisation."""
        return (self.raw_latents(images) - self._mean) / self._std

    def decode(self, latents: torch.Tensor, *, quantize: bool = True) -> torch.Tensor:
        """Standardised latents (B, 4, h, w) -> images (B, 3, 8 h, 8 w)."""
        return self.decode_raw(latents * self._std + self._mean, quantize=quantize)

    def raw_latents(self, images: torch.Tensor) -> torch.Tensor:
        return self.vq.encode(F.pixel_unshuffle(images, self.unshuffle)).latents

    def decode_raw(self, raw: torch.Tensor, *, quantize: bool = True) -> torch.Tensor:
        folded = self.vq.decode(raw, force_not_quantize=not quantize).sample
        return F.pixel_shuffle(folded, self.unshuffle)

    def codes(self, images: torch.Tensor) -> torch.Tensor:
        """(B, h, w) index of the codebook entry of every latent."""
        raw = self.raw_latents(images)
        _, _, (_, _, indices) = self.vq.quantize(raw)
        return indices.view(len(raw), *raw.shape[2:])

    @torch.no_grad()
    def standardise(self, images: torch.Tensor) -> None:
        """Sets the latents' mean and standard deviation per channel from images (B, 3, H, W)."""
        raw = torch.cat([self.raw_latents(part) for part in images.split(64)])
        self.latent_mean.copy_(raw.mean((0, 2, 3)))
        self.latent_std.copy_(raw.std((0, 2, 3)))

    @property
    def _mean(self):
        return self.latent_mean[:, None, None]

    @property
    def _std(self):
        return self.latent_std[:, None, None]


class ImagePool:
    """Random batches of a split's images: generator -> (B, 3, S, S) in [-1, 1], on the computing device.

    Splits of up to `keep` bytes are decoded once and kept as bytes; larger ones are read at every draw.
    """

    def __init__(self, layouts: CocoLayouts, batch: int, keep: int = 2 * 10**9):
        self.layouts, self.batch = layouts, batch
        self.identity = [layouts.image_id(i) for i in range(len(layouts))] + [layouts.image_size, batch]
        self.bytes = None
        if len(layouts) * 3 * layouts.image_size**2 <= keep:
            self.bytes = stacked(self._pixels, range(len(layouts)))
            self.identity.append(checkpoint.fingerprint(self.bytes))

    def __call__(self, generator: torch.Generator) -> torch.Tensor:
        return self.take(torch.randint(len(self.layouts), (self.batch,), generator=generator))

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        if self.bytes is not None:
            return (self.bytes[indices].float() / 127.5 - 1).to(device())
        return stacked(self.layouts.load_image, indices).to(device())

    def _pixels(self, index: int) -> torch.Tensor:
        return ((self.layouts.load_image(index) + 1) * 127.5).round().byte()

    def first(self, count: int) -> torch.Tensor:
        return self.take(torch.arange(min(count, len(self.layouts))))


@functools.cache
def device() -> str:
    """Where models are trained and inverted: "cuda" where there is one, else "cpu".

    On CUDA the first call lets float32 matrix products be TF32, as in the published programs (`--allow_tf32`; PyTorch
    has it on for convolutions already). Later calls change nothing, so a program may set another precision after it.
    """
    if not torch.cuda.is_available():
        return "cpu"
    torch.set_float32_matmul_precision("high")
    return "cuda"


def adopt_compvis(model: FirstStage, path: str) -> list[float]:
    """Fills a model of the architecture `vq-f8` with CompVis's weights. Latents keep their scale, as in LDM.

    path: absolute, or relative to the repository root.
    """
    config = compvis.vq_first_stage_config(**compvis.VQ_F8)
    state = compvis.convert_vq_first_stage(compvis.load_compvis_state(paths.ROOT / path, "first_stage"), config)
    model.vq.load_state_dict(state)
    model.to(device()).eval()
    return []


def reconstruction_loss(images: Callable[[torch.Generator], torch.Tensor], *, quantize_from: int,
                        restart_every: int = 100, restart_until: int = 10**9,
                        l1: float = 0.3) -> DrawnLoss:
    """The training objective: squared plus absolute error plus, from step `quantize_from` on, VQ's two terms.

    A codebook that is learned from the start collapses here to a tenth of its entries. So the autoencoder first
    learns without quantisation; then k-means on its latents fills the codebook; and every `restart_every` steps,
    until step `restart_until`, entries that the current batch leaves unused are moved onto latents of the batch.
    images: function generator -> batch (B, 3, H, W).
    """

    @torch.no_grad()
    def draw(model: FirstStage, step: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        batch = images(generator)
        if step == quantize_from:
            latents = torch.cat([model.raw_latents(images(generator)) for _ in range(24)])
            _fill_codebook(model, latents.float(), generator)
        if step >= quantize_from and step % restart_every == 0 and step < restart_until:
            _restart_unused(model, model.raw_latents(batch).float(), generator)
        return batch, torch.full((len(batch),), step >= quantize_from)

    def losses(model: FirstStage, batch: torch.Tensor, quantise: torch.Tensor) -> torch.Tensor:
        codes = model.raw_latents(batch)
        quantisation = codes.new_zeros(())
        if quantise.all():
            with torch.autocast(codes.device.type, enabled=False):
                codes, quantisation, _ = model.vq.quantize(codes.float())
        # The straight-through codes go into the decoder as they are: quantising twice would change nothing.
        error = model.decode_raw(codes, quantize=False).float() - batch
        return (error.square() + l1 * error.abs()).flatten(1).mean(1) + quantisation

    return DrawnLoss(draw, losses)


def _rows(latents: torch.Tensor) -> torch.Tensor:
    return latents.permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def _fill_codebook(model: FirstStage, latents: torch.Tensor, generator: torch.Generator, rounds: int = 10) -> None:
    """k-means of the latents (Lloyd's iterations; entries that lose all points move to random latents)."""
    rows, table = _rows(latents), model.vq.quantize.embedding.weight
    centres = rows[torch.randperm(len(rows), generator=generator)[:len(table)].to(rows.device)].clone()
    if len(centres) < len(table):
        raise ValueError(f"{len(rows)} latents cannot fill {len(table)} codes; use larger batches")
    for _ in range(rounds):
        nearest = torch.cdist(rows, centres).argmin(1)
        counts = torch.bincount(nearest, minlength=len(table))
        sums = torch.zeros_like(centres).index_add_(0, nearest, rows)
        fresh = rows[torch.randint(len(rows), (len(table),), generator=generator).to(rows.device)]
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp(min=1), fresh)
    table.copy_(centres)


@torch.no_grad()
def _restart_unused(model: FirstStage, latents: torch.Tensor, generator: torch.Generator) -> None:
    rows, table = _rows(latents), model.vq.quantize.embedding.weight
    used = torch.cdist(rows, table).argmin(1)
    unused = (torch.bincount(used, minlength=len(table)) == 0).nonzero()[:, 0]
    fresh = rows[torch.randint(len(rows), (len(unused),), generator=generator).to(rows.device)]
    table[unused] = fresh


def load(directory) -> FirstStage:
    """Loads a trained first stage, frozen."""
    model = FirstStage(**checkpoint.load_config(directory))
    return checkpoint.freeze(checkpoint.load_weights(directory, model))
