"""The cache of features: found again, and never used for another configuration."""

import pytest
import torch

from dive_lib import feature_cache
from dive_lib.classifiers import ResNet
from dive_lib.comparison_backbones import ResNetFeatures
from dive_lib.denoiser_features import DenoiserFeatures
from dive_lib.feature_cache import FeatureCache, reduced
from dive_lib.feature_noise import Noise
from tests import tiny
from tests.test_denoiser_features import images, layout

IMAGES = images(3)


def counting(backbone):
    """The backbone, and a list of the stages of each of its passes."""
    passes, original = [], backbone.features

    def features(images, t, stages=None, condition=None):
        passes.append(tuple(stages))
        return original(images, t, stages, condition)

    backbone.features = features
    return backbone, passes


def test_what_is_there_is_not_computed_again(tmp_path):
    backbone, passes = counting(layout())
    first = FeatureCache(tmp_path, batch=2).features(backbone, IMAGES, 300)
    assert passes == [backbone.stages] * 2, "two batches, all stages in one pass each"
    again = FeatureCache(tmp_path, batch=2).features(backbone, IMAGES, 300, ("mid", "up1"))
    assert len(passes) == 2 and all(torch.equal(first[stage], again[stage]) for stage in again)
    expected = layout().features(IMAGES, 300)
    for stage in backbone.stages:
        torch.testing.assert_close(first[stage], expected[stage], atol=1e-5, rtol=1e-5)


def test_only_missing_stages_are_computed(tmp_path):
    backbone, passes = counting(layout())
    cache = FeatureCache(tmp_path)
    cache.features(backbone, IMAGES, 300, ("mid",))
    cache.features(backbone, IMAGES, 300, ("down0", "mid", "up1"))
    assert passes == [("mid",), ("down0", "up1")]


def other_weights(backbone):
    with torch.no_grad():
        next(iter(backbone.denoiser.ldm.unet.parameters())).add_(1e-3)
    return backbone


def variant(change):
    """(backbone, images, keywords of the call) after one change."""
    keywords = {"t": 300, "stages": ("mid",), "condition": None, "side": None}
    backbone, pictures = layout(), IMAGES.clone()
    match change:
        case "weights":
            backbone = other_weights(backbone)
        case "heads":  # an architecture's setting that no weight tells
            attention = next(m for m in backbone.denoiser.modules() if type(m).__name__ == "Attention")
            attention.heads = 1 + attention.heads % 2
        case "first stage":
            with torch.no_grad():
                backbone.denoiser.first_stage.latent_mean.add_(0.1)
        case "mode":
            backbone = backbone.with_noise(Noise("ddim_inv"))
        case "seed":
            backbone = backbone.with_noise(Noise("ddpm", seed=1, steps=2))
        case "draw":
            backbone = backbone.with_noise(Noise("ddpm", draw=1, steps=2))
        case "inversion steps":
            backbone = backbone.with_noise(Noise("ddpm", steps=3))
        case "bf16":
            backbone = DenoiserFeatures(backbone.denoiser, backbone.noise, bf16=True)
        case "schedule":
            backbone.denoiser.schedule.config["beta_end"] = 0.03
        case "image":
            pictures[2, 0, 5, 5] += 1 / 127.5
        case "order of images":
            pictures = pictures.flip(0)
        case "t":
            keywords["t"] = 301
        case "walk":
            keywords["t"] = (600, 300)
        case "stage":
            keywords["stages"] = ("up0",)
        case "cross-attention":
            keywords["stages"] = ("cross_up0",)
        case "condition":
            keywords["condition"] = tiny.layouts()
        case "another condition":
            keywords["condition"] = tiny.layouts().flip(0)
        case "side":
            keywords["side"] = 1
    return backbone, pictures, keywords


CHANGES = ["weights", "heads", "first stage", "mode", "seed", "draw", "inversion steps", "bf16", "schedule", "image",
           "order of images", "t", "walk", "stage", "cross-attention", "condition", "another condition", "side"]


def test_every_determinant_is_part_of_the_key(tmp_path):
    """Each change misses the cache that holds the unchanged features and those of all changes before it."""
    cache = FeatureCache(tmp_path)
    for change in ["none", *CHANGES]:
        backbone, pictures, keywords = variant(change)
        backbone, passes = counting(backbone)
        cache.features(backbone, pictures, **keywords)
        assert passes, change
    backbone, passes = counting(layout())
    cache.features(backbone, IMAGES, 300, ("mid",))
    assert not passes, "and what was there is still found"


def test_versions_are_part_of_the_key(tmp_path, monkeypatch):
    cache = FeatureCache(tmp_path)
    cache.features(layout(), IMAGES, 300, ("mid",))
    for target, name, value in ((feature_cache, "version", lambda name: "9.9"), (feature_cache, "FORMAT", 99),
                                (feature_cache, "device", lambda: "cuda")):
        backbone, passes = counting(layout())
        with monkeypatch.context() as patch:
            patch.setattr(target, name, value)
            described = cache._describe(backbone, IMAGES, 300, None, None) | {"stage": "mid"}
        assert not cache.path(described).exists()


def test_other_backbones_have_files_of_their_own(tmp_path):
    torch.manual_seed(0)
    networks = [ResNetFeatures(ResNet(3, 5, 64, widths=[4, 8], blocks=1, stem="pixels")) for _ in range(2)]
    cache = FeatureCache(tmp_path)
    first, second = (cache.features(network, IMAGES, side=1)["layer1"] for network in networks)
    assert first.shape == (3, 8, 1, 1) and not torch.equal(first, second)
    assert len(list(tmp_path.iterdir())) == 4


def test_a_file_of_another_description_is_not_used(tmp_path):
    cache, (backbone, passes) = FeatureCache(tmp_path), counting(layout())
    cache.features(backbone, IMAGES, 300, ("mid",))
    other = cache.path(cache._describe(backbone, IMAGES, 400, None, None) | {"stage": "mid"})
    next(tmp_path.iterdir()).rename(other)
    cache.features(backbone, IMAGES, 400, ("mid",))
    assert len(passes) == 2


def test_damage_and_wrong_conditions_are_named(tmp_path):
    cache = FeatureCache(tmp_path)
    cache.features(layout(), IMAGES, 300, ("mid",))
    next(tmp_path.iterdir()).write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="damaged.*delete it"):
        cache.features(layout(), IMAGES, 300, ("mid",))
    with pytest.raises(ValueError, match="2 conditions for 3 images"):
        cache.features(layout(), IMAGES, 300, condition=tiny.layouts()[:2])


def test_maps_are_reduced_by_averaging():
    maps = torch.arange(16.0).view(1, 1, 4, 4)
    assert reduced(maps, 1).item() == maps.mean() and reduced(maps, None) is maps and reduced(maps, 8) is maps
    assert reduced(maps, 2)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]


def test_features_lie_in_memory_as_those_from_the_file(tmp_path):
    """A convolution or a mean over maps of another order of axes rounds differently: a first run beside a second."""
    backbone, original = layout(), DenoiserFeatures.features
    backbone.features = lambda *given: {stage: maps.contiguous(memory_format=torch.channels_last)
                                        for stage, maps in original(backbone, *given).items()}
    first, again = (FeatureCache(tmp_path).features(backbone, IMAGES, 300, ("mid",))["mid"] for _ in range(2))
    assert first.stride() == again.stride() and first.is_contiguous() and min(first.shape[1:]) > 1
