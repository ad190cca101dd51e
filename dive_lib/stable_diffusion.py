"""Stable Diffusion 1.5 as a backbone of features, from a local folder in diffusers' format.

Latents are the posterior's mean x 0.18215, betas scaled-linear from 0.00085 to 0.012, and the condition is the last
hidden state of CLIP's text tower, 77 tokens of 768 channels (published code: src/model/feature_extractors.py).
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from dive_lib import checkpoint, paths
from dive_lib.denoiser_features import Denoiser
from dive_lib.denoisers import unet_attentions, unet_blocks, unet_channels
from dive_lib.image_encoder import AutoencoderLatents
from dive_lib.schedule import NoiseSchedule
from dive_lib.text_targets import need_files, read_pretrained

SOURCE = "huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5"
FILES = ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "vae/config.json",
         "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "text_encoder/model.safetensors",
         "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer/tokenizer_config.json")
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


class StableDiffusion(Denoiser):
    """unet, autoencoder, text_encoder, tokenizer: of diffusers and transformers. Conditions: a text for each image;
    empty: the empty text."""

    name = "Stable Diffusion 1.5"

    def __init__(self, unet: UNet2DConditionModel, autoencoder: AutoencoderKL, text_encoder: torch.nn.Module,
                 tokenizer):
        super().__init__()
        self.unet, self.encoder = unet, AutoencoderLatents(autoencoder)
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.blocks, self.channels, self.attentions = unet_blocks(unet), unet_channels(unet), unet_attentions(unet)
        self.schedule, self.tokens = NoiseSchedule(**BETAS), tokenizer.model_max_length

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.encoder.encode(images)

    def context(self, condition: Sequence[str] | None, batch: int) -> torch.Tensor:
        texts = [""] * batch if condition is None else list(condition)
        if len(texts) != batch or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{self.name}: {batch} images need as many texts, got {len(texts)} conditions")
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        return self.text_encoder(tokens["input_ids"].to(self.text_encoder.device)).last_hidden_state

    def predict_noise(self, z: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.unet(z, t, context, return_dict=False)[0]


def load(folder: Path | str, *, trained: bool = True, seed: int = 0) -> StableDiffusion:
    """Stable Diffusion 1.5, frozen. folder: absolute, or relative to the repository root. Not `trained`: its UNet has
    weights drawn from `seed`; autoencoder and text encoder are the trained ones.

    Raises FileNotFoundError for the first missing file, with what to download and where to put it, and ValueError for
    a part that is damaged or is not of this model.
    """
    from transformers import CLIPTextModel, CLIPTokenizer
    directory = paths.ROOT / folder
    need_files(directory, FILES, SOURCE)

    def part(kind, name: str, **options):
        return read_pretrained(kind, directory / name, SOURCE, **options)

    unet = part(UNet2DConditionModel, "unet", use_safetensors=True, low_cpu_mem_usage=False)
    autoencoder = part(AutoencoderKL, "vae", use_safetensors=True, low_cpu_mem_usage=False)
    text_encoder = part(CLIPTextModel, "text_encoder", use_safetensors=True)
    if unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise ValueError(f"{paths.shorten(directory)}: the UNet takes texts of width "
                         f"{unet.config.cross_attention_dim}, "
                         f"the text encoder gives {text_encoder.config.hidden_size}; download both again from {SOURCE}")
    if not trained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = UNet2DConditionModel.from_config(unet.config)
    model = StableDiffusion(unet, autoencoder, text_encoder, part(CLIPTokenizer, "tokenizer"))
    model.name = StableDiffusion.name if trained else f"untrained {StableDiffusion.name}"
    return checkpoint.freeze(model)
