"""Tiny randomly initialised networks, saved in the formats of the published ones, for the loaders of `paper`."""

import json

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import (BertTokenizer, BlipConfig, BlipForConditionalGeneration, CLIPTextConfig, CLIPTextModel,
                          CLIPTextModelWithProjection, CLIPTokenizer, Dinov2Config, Dinov2Model, ResNetConfig,
                          ResNetModel, ViTConfig, ViTModel)

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]", "a", "picture", "of", "red", "three", "cat"]
# The tables of Stable Diffusion 1.5, one thirty-second as wide.
UNET = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "block_out_channels": (10, 20, 40, 40),
        "layers_per_block": 1, "norm_num_groups": 5, "attention_head_dim": 2, "cross_attention_dim": 16,
        "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3}
TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "projection_dim": 12, "max_position_embeddings": 77}


def clip_tokenizer(folder) -> int:
    """Saves a byte-level tokenizer without merges and returns the size of its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(code) for code in range(33, 127)]
    words = letters + [letter + "</w>" for letter in letters] + [START, END]
    (folder / "vocab.json").write_text(json.dumps({word: k for k, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), bos_token=START, eos_token=END,
                              unk_token=END, pad_token=END, model_max_length=77)
    tokenizer.save_pretrained(folder)
    return len(words)


def clip_text(folder, *, projection: bool = True, seed: int = 0):
    size = clip_tokenizer(folder)
    torch.manual_seed(seed)
    kind = CLIPTextModelWithProjection if projection else CLIPTextModel
    kind(CLIPTextConfig(vocab_size=size, bos_token_id=size - 2, eos_token_id=size - 1, pad_token_id=size - 1,
                        **TEXT)).save_pretrained(folder)
    return folder


def autoencoder(folder):
    """Eight times as coarse as the images, as Stable Diffusion's."""
    AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
                  up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4,
                  norm_num_groups=4).save_pretrained(folder)
    return folder


def stable_diffusion(folder, seed: int = 0):
    torch.manual_seed(seed)
    UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    autoencoder(folder / "vae")
    clip_text(folder / "text_encoder", projection=False)
    clip_tokenizer(folder / "tokenizer")
    return folder


def blip(folder, seed: int = 0):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt"), bos_token="[DEC]").save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(seed)
    special = {"bos_token_id": 5, "pad_token_id": 0, "sep_token_id": 3, "eos_token_id": 3}
    text = {"vocab_size": len(WORDS), "hidden_size": 16, "encoder_hidden_size": 16, "intermediate_size": 32,
            "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32, **special}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 16}
    BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(
        folder)
    return folder


def resnet18(folder, seed: int = 0):
    torch.manual_seed(seed)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[2, 2, 2, 2],
                             layer_type="basic")).save_pretrained(folder)
    return folder


def vit(folder, kind: str = "dinov2", layers: int = 12, seed: int = 0):
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    model = Dinov2Model(Dinov2Config(patch_size=14, image_size=28, **shape)) if kind == "dinov2" else \
        ViTModel(ViTConfig(patch_size=16, image_size=224, intermediate_size=32, **shape))
    model.save_pretrained(folder)
    return folder
