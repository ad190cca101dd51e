"""From images to what a DiT diffuses: the pixels themselves, or the latents of Stable Diffusion's autoencoder.

Both are a module with `encode` and `decode`, so that nothing else asks which of them is in use.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import nn

from dive_lib import checkpoint, paths

SCALE = 0.18215  # of Stable Diffusion's latents
FILES = ("config.json", "diffusion_pytorch_model.safetensors")


class Pixels(nn.Module):
    """The identity: a small DiT works on the pixels."""

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, C, S, S) in [-1, 1] -> the same."""
        return images

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


class AutoencoderLatents(nn.Module):
    """Means of the posteriors of an AutoencoderKL, scaled: what the published DIVE and Diffusion Classifier take."""

    def __init__(self, autoencoder: AutoencoderKL):
        super().__init__()
        self.autoencoder = autoencoder

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S) in [-1, 1] -> latents (B, 4, S/8, S/8)."""
        return self.autoencoder.encode(images).latent_dist.mean * SCALE

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return self.autoencoder.decode(latents / SCALE).sample


def load(folder: Path | str = "") -> nn.Module:
    """The encoder of a folder in diffusers' format, frozen; the pixels for an empty name.

    folder: absolute, or relative to the repository root. Raises FileNotFoundError that says what to download, and
    ValueError for a damaged file.
    """
    if not str(folder):
        return checkpoint.freeze(Pixels())
    directory = paths.ROOT / folder
    for name in FILES:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{paths.shorten(directory / name)}: no such file; download "
                                    f"{' and '.join(FILES)} of huggingface.co/stabilityai/sd-vae-ft-ema into "
                                    f"{paths.shorten(directory)}")
    try:
        autoencoder = AutoencoderKL.from_pretrained(directory, local_files_only=True, use_safetensors=True,
                                                    low_cpu_mem_usage=False)
    except Exception as error:  # diffusers and safetensors raise errors of many types for damaged files
        raise ValueError(f"{paths.shorten(directory)}: not an AutoencoderKL that can be read ({error}); download it "
                         "again") from error
    return checkpoint.freeze(AutoencoderLatents(autoencoder))


def fingerprint(folder: Path | str) -> str:
    """Identifies the encoder in the description of a run."""
    return checkpoint.fingerprint(paths.ROOT / folder / FILES[1]) if str(folder) else "pixels"
