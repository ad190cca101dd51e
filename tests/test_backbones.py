"""Backbones by name: a DiT sees images through its profile's encoder, and missing downloads are named before work."""

import pytest
import torch
from diffusers import AutoencoderKL

from dive_lib import backbones, image_encoder, paths, stable_diffusion
from dive_lib.checkpoint import save_model
from dive_lib.dit import DiT
from dive_lib.files import write_json
from tests import stand_ins
from tests.test_class_data import AUTOENCODER

TRANSFORMER = {"sample_size": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2, "num_attention_heads": 2,
               "attention_head_dim": 8}
FOLDERS = {"stable_diffusion": "checkpoints/sd", "resnet18": "checkpoints/resnet", "clip": "checkpoints/clip",
           "blip": "checkpoints/blip"}


def save_dit(**transformer):
    model = DiT(("a", "b"), TRANSFORMER | transformer, std=0.5)
    save_model(paths.runs("x") / "dit", model, model.config)


def images(count=2, side=16):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name", ["dit", "untrained_dit"])
def test_a_dit_on_latents_gets_them_from_the_encoder_of_its_classes(tmp_path, name):
    torch.manual_seed(0)
    save_dit()
    with pytest.raises(FileNotFoundError, match="classes.json: run notebooks/09_class_data.ipynb"):
        backbones.load("x", name)
    AutoencoderKL(**AUTOENCODER).save_pretrained(tmp_path / "vae")
    write_json(paths.runs("x") / "classes.json", {"encoder": str(tmp_path / "vae")})
    backbone = backbones.load("x", name)
    maps = backbone.features(images(), 100)
    assert {stage: tuple(m.shape) for stage, m in maps.items()} == {f"block{k}": (2, 16, 4, 4) for k in range(2)}
    expected = image_encoder.load(tmp_path / "vae").encode(images())
    torch.testing.assert_close(backbone.denoiser.encode(images().to(backbone_device(backbone))).cpu(), expected,
                               atol=1e-4, rtol=1e-4)


def backbone_device(backbone):
    return next(backbone.network.parameters()).device


def test_a_dit_on_pixels_gets_pixels():
    save_dit(in_channels=1, out_channels=1, patch_size=4)
    write_json(paths.runs("x") / "classes.json", {"encoder": ""})
    assert isinstance(backbones.load("x", "dit").denoiser.encoder, image_encoder.Pixels)


def test_all_missing_downloads_are_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    stand_ins.stable_diffusion(tmp_path / "checkpoints" / "sd")
    stand_ins.resnet18(tmp_path / "checkpoints" / "resnet")
    stand_ins.clip_text(tmp_path / "checkpoints" / "clip")
    stand_ins.blip(tmp_path / "checkpoints" / "blip")
    names = [*FOLDERS, "layout_ldm", "pixels", "numbers_resnet"]
    backbones.require(names, FOLDERS)
    for lost in ("sd/unet/config.json", "sd/vae/config.json", "clip/merges.txt", "blip/vocab.txt"):
        (tmp_path / "checkpoints" / lost).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        backbones.require([*names, "stable_diffusion", "dinov2"], FOLDERS)
    assert str(caught.value).splitlines() == [
        "files are missing:",
        f"stable_diffusion: download unet/config.json, vae/config.json of {stable_diffusion.SOURCE} into "
        "checkpoints/sd",
        "clip: download merges.txt of huggingface.co/openai/clip-vit-large-patch14 into checkpoints/clip",
        "blip: download vocab.txt of huggingface.co/Salesforce/blip-image-captioning-base into checkpoints/blip",
        "dinov2: its parameters name no folder; download config.json, model.safetensors of "
        "huggingface.co/facebook/dinov2-base into one"]


def test_what_is_trained_here_needs_no_download_and_unknown_names_are_refused():
    backbones.require(["layout_ldm", "untrained_dit", "pixels"], {})
    with pytest.raises(ValueError, match="'vgg' is unknown; choose one of layout_ldm, .*blip"):
        backbones.require(["vgg"], {})
