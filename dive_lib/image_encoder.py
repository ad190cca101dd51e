"""From images to what a class-conditional model diffuses: the pixels themselves, or the latents of an autoencoder:
Stable Diffusion's, on which DiT works, or LDM's first stage VQ-f4, on which LDM-4 does.

All are a module with `encode` and `decode`, so that nothing else asks which of them is in use.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, VQModel
from torch import nn

from dive_lib import checkpoint, compvis, paths
from dive_lib.files import read_json

SCALE = 0.18215  # of Stable Diffusion's latents
FILES = ("config.json", "diffusion_pytorch_model.safetensors")
DECODED = 16  # most latents that are decoded in one call: each becomes an image with 128 channels on the way
# The first stage (f = 4, 8192 codes of 3 channels) within CompVis's class-conditional checkpoint, and where that is.
VQ_F4 = {"ddconfig": {"double_z": False, "z_channels": 3, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
                      "ch_mult": [1, 2, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0},
         "embed_dim": 3, "n_embed": 8192}
LDM_4_SOURCE = "https://ommer-lab.com/files/latent-diffusion/nitro/cin/model.ckpt"


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
        return torch.cat([self.autoencoder.decode(part / SCALE).sample for part in latents.split(DECODED)])


class VQLatents(nn.Module):
    """A VQ first stage as LDM's `VQModelInterface`: latents are diffused before quantisation, and as they are."""

    def __init__(self, vq: VQModel):
        super().__init__()
        self.vq = vq

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, S, S) in [-1, 1] -> latents (B, 3, S/4, S/4), not quantised."""
        return self.vq.encode(images).latents

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents (B, 3, h, w) -> images (B, 3, 4 h, 4 w), by way of each latent's nearest code."""
        return torch.cat([self.vq.decode(part).sample for part in latents.split(DECODED)])


def load(folder: Path | str = "") -> nn.Module:
    """The encoder of a folder in diffusers' format (AutoencoderKL or VQModel), or of CompVis's checkpoint with a VQ-f4
    first stage (.ckpt or .safetensors), frozen; the pixels for an empty name.

    folder: absolute, or relative to the repository root. Raises FileNotFoundError that says what to download, and
    ValueError for a damaged file.
    """
    if not str(folder):
        return checkpoint.freeze(Pixels())
    directory = paths.ROOT / folder
    if _is_checkpoint(directory):
        return checkpoint.freeze(VQLatents(_first_stage_of(directory)))
    for name in FILES:
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{paths.shorten(directory / name)}: no such file; download "
                                    f"{' and '.join(FILES)} of huggingface.co/stabilityai/sd-vae-ft-ema into "
                                    f"{paths.shorten(directory)}")
    try:
        quantised = read_json(directory / FILES[0]).get("_class_name") == "VQModel"
        autoencoder = (VQModel if quantised else AutoencoderKL).from_pretrained(
            directory, local_files_only=True, use_safetensors=True, low_cpu_mem_usage=False)
    except Exception as error:  # diffusers and safetensors raise errors of many types for damaged files
        raise ValueError(f"{paths.shorten(directory)}: not an AutoencoderKL or VQModel that can be read ({error}); "
                         "download it again") from error
    return checkpoint.freeze(VQLatents(autoencoder) if quantised else AutoencoderLatents(autoencoder))


def fingerprint(folder: Path | str) -> str:
    """Identifies the encoder in the description of a run."""
    if not str(folder):
        return "pixels"
    path = paths.ROOT / folder
    return checkpoint.fingerprint(path if _is_checkpoint(path) else path / FILES[1])


def _is_checkpoint(path: Path) -> bool:
    return path.suffix in (".ckpt", ".safetensors")


def _first_stage_of(path: Path) -> VQModel:
    where = paths.shorten(path)
    if not path.is_file():
        raise FileNotFoundError(f"{where}: no such file; download {LDM_4_SOURCE} there")
    config, state = compvis.vq_first_stage_config(**VQ_F4), compvis.load_compvis_state(path, "first_stage")
    try:
        state = compvis.convert_vq_first_stage(state, config)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where}: {error.args[0]}; give a checkpoint with a VQ-f4 first stage, such as "
                         f"{LDM_4_SOURCE}") from error
    model = VQModel(**config)
    model.load_state_dict(state)
    return model
