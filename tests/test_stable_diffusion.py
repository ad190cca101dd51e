"""Stable Diffusion's loader and features, with tiny weights in the published layout of a folder."""

import shutil

import pytest
import torch

from dive_lib import captions, condition_probes, stable_diffusion, stage_groups
from dive_lib.denoiser_features import DenoiserFeatures
from dive_lib.feature_cache import FeatureCache
from dive_lib.feature_noise import Noise
from tests import stand_ins
from tests.test_probes import probe_data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return stand_ins.stable_diffusion(tmp_path_factory.mktemp("sd") / "sd")


@pytest.fixture()
def copied(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sd")
    return tmp_path / "sd"


@pytest.fixture(scope="module")
def backbone(folder):
    return DenoiserFeatures(stable_diffusion.load(folder))


def images(count=2):
    return torch.randint(256, (count, 3, 128, 128), generator=torch.Generator().manual_seed(0)) / 127.5 - 1


def test_stages_have_the_published_order_widths_and_sizes(backbone):
    maps = backbone.features(images(), 200)
    assert {stage: tuple(m.shape[1:]) for stage, m in maps.items()} == {
        "down0": (10, 8, 8), "down1": (20, 4, 4), "down2": (40, 2, 2), "down3": (40, 2, 2), "mid": (40, 2, 2),
        "up0": (40, 4, 4), "up1": (40, 8, 8), "up2": (20, 16, 16), "up3": (10, 16, 16)}
    assert {stage: m.shape[1] for stage, m in maps.items()} == {s: backbone.channels[s] for s in backbone.stages}


@pytest.mark.parametrize("group", stage_groups.GROUPS)
def test_groups_are_the_published_ones(backbone, group):
    table = {"mid+up": [40, 40, 40, 30], "up": [40, 40, 20, 10], "down": [40, 40, 20, 10], "down+mid": [40, 40, 20, 10],
             "down+mid+up": [40, 60, 50, 30], "mid": [40]}
    stages = stage_groups.stages_of(group, backbone.stages)
    maps = stage_groups.scales(group, backbone.features(images(), 200, stages), backbone.stages)
    assert [m.shape[1] for m in maps] == table[group] == stage_groups.channels(group, backbone, 16)


def test_cross_attention_of_77_tokens_joins_the_scales(backbone):
    assert backbone.cross_stages == ("cross_up1", "cross_up2", "cross_up3")
    maps = backbone.features(images(), 200, (*backbone.stages, *backbone.cross_stages), ["a cat", "a red three"])
    assert [maps[stage].shape[1:] for stage in backbone.cross_stages] == [(77, 4, 4), (77, 8, 8), (77, 16, 16)]
    joined = stage_groups.scales("mid+up", maps, backbone.stages)
    assert [m.shape[1] for m in joined] == [40, 117, 117, 107], "here the finest side is 16"
    assert stage_groups.channels("mid+up", backbone, 64, attention=True) == [40, 117, 117, 30]


@pytest.mark.parametrize("mode", ["ddpm", "ddim_inv", "free", "ddim_inversion"])
def test_one_forward_and_any_batch_give_the_same(folder, mode):
    backbone = DenoiserFeatures(stable_diffusion.load(folder), Noise(mode, steps=2))
    texts = ["a cat", "a red three"]
    whole = backbone.features(images(), 100, condition=texts)
    for stage in backbone.stages:
        alone = backbone.features(images()[1:], 100, (stage,), texts[1:])[stage]
        torch.testing.assert_close(alone, whole[stage][1:], atol=1e-4, rtol=1e-4)


def test_an_untrained_copy_differs_in_its_unet_alone(folder):
    trained, drawn, again = (stable_diffusion.load(folder, trained=flag, seed=1) for flag in (True, False, False))
    assert drawn.name == "untrained Stable Diffusion 1.5" and trained.name == "Stable Diffusion 1.5"
    for name, value in trained.state_dict().items():
        assert torch.equal(drawn.state_dict()[name], again.state_dict()[name]), name
        if not name.startswith("unet"):
            assert torch.equal(value, drawn.state_dict()[name]), name
    convolution = "unet.conv_in.weight"
    assert not torch.equal(trained.state_dict()[convolution], drawn.state_dict()[convolution])


def test_text_reaches_the_features_and_the_empty_one_is_the_default(backbone):
    none, empty, cat = (backbone.features(images(), 200, ("mid",), c)["mid"] for c in (None, ["", ""], ["cat"] * 2))
    assert torch.equal(none, empty) and not torch.allclose(none, cat)
    with pytest.raises(ValueError, match="2 images need as many texts, got 1"):
        backbone.features(images(), 200, condition=["cat"])


def test_context_latents_and_schedule_are_the_published_ones(backbone):
    denoiser = backbone.denoiser
    assert denoiser.context(None, 2).shape == (2, 77, 16) and denoiser.encode(images()).shape == (2, 4, 16, 16)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    torch.testing.assert_close(denoiser.schedule.alphas_cumprod, (1 - betas).cumprod(0), atol=1e-6, rtol=0)
    assert not any(p.requires_grad for p in denoiser.parameters())


def test_features_are_cached_by_their_texts(backbone, tmp_path):
    cache = FeatureCache(tmp_path, batch=1)
    first, second = (cache.features(backbone, images(), 200, ("mid",), condition=c) for c in (["a", "b"], ["a", "c"]))
    assert torch.equal(first["mid"][0], second["mid"][0]) and not torch.equal(first["mid"][1], second["mid"][1])


def test_rows_of_prompts_mark_the_one_that_leaks(backbone, tmp_path):
    """The prompts of 15_features on a text-to-image model, all kinds of which a network of captions is not needed."""
    data, cache = probe_data(), FeatureCache(tmp_path)
    kinds = [kind for kind in captions.KINDS if kind != "blip"]
    texts = {kind: {split: captions.prompts(kind, part.images, names=[data.classes[k] for k in part.labels])
                    for split, part in data.photos.items()} for kind in kinds}
    made = condition_probes.text_features(backbone, 200, "mid", texts, data, cache)
    rows = condition_probes.classification_rows(made, {s: p.labels for s, p in data.photos.items()}, 2, resamples=20,
                                                seed=0)
    assert list(rows) == kinds and set(captions.LEAKS) <= set(kinds)
    assert not torch.equal(made["empty"]["test"], made["true_class"]["test"])


@pytest.mark.parametrize("name", stable_diffusion.FILES)
def test_a_missing_file_says_what_to_download_and_where(copied, name):
    (copied / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"sd/{name}: no such file; download .*{stable_diffusion.SOURCE} into"):
        stable_diffusion.load(copied)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/unet/config.json"):
        stable_diffusion.load(tmp_path / "nowhere")


def test_damage_and_parts_of_other_models_are_refused(copied):
    shutil.rmtree(copied / "text_encoder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(stand_ins.TEXT, "hidden_size", 24)
        stand_ins.clip_text(copied / "text_encoder", projection=False)
    with pytest.raises(ValueError, match="takes texts of width 16, the text encoder gives 24"):
        stable_diffusion.load(copied)
    (copied / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="sd/vae: not a AutoencoderKL.*download it again"):
        stable_diffusion.load(copied)
