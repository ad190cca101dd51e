"""Frozen experts from folders in the published formats, with tiny weights, and what is said when a folder is wrong."""

import json

import pytest
import torch

from dive_lib import expert
from dive_lib.feature_cache import FeatureCache
from dive_lib.u_head import UHead
from tests import stand_ins

MAKE = {"resnet18": stand_ins.resnet18, "dino": lambda folder: stand_ins.vit(folder, "dino"),
        "dinov2": lambda folder: stand_ins.vit(folder, "dinov2")}
CHANNELS = {"resnet18": {"layer4": 20, "layer3": 16, "layer2": 12},
            "dino": {"block11": 16, "block8": 16, "block5": 16, "block2": 16}}
CHANNELS["dinov2"] = CHANNELS["dino"]


def images(count=2, side=64):
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module", params=list(MAKE))
def loaded(request, tmp_path_factory):
    folder = MAKE[request.param](tmp_path_factory.mktemp("expert") / request.param)
    return request.param, expert.load(request.param, folder)


def test_maps_coarse_to_fine(loaded):
    kind, own = loaded
    assert own.channels == CHANNELS[kind] and own.joins == own.stages == tuple(CHANNELS[kind])
    maps = own.features(images())
    sides = (2, 4, 8) if kind == "resnet18" else (4, 8, 16, 32)
    assert [tuple(maps[stage].shape) for stage in own.joins] == [
        (2, CHANNELS[kind][stage], side, side) for stage, side in zip(own.joins, sides)]


def test_is_frozen_and_does_not_depend_on_the_batch(loaded):
    _, own = loaded
    assert not own.network.training and not any(p.requires_grad for p in own.network.parameters())
    whole = own.features(images())
    alone = own.features(images()[1:])
    for stage in own.stages:
        torch.testing.assert_close(whole[stage][1:], alone[stage], atol=1e-4, rtol=1e-4)


def test_joins_the_head_and_is_cached(loaded, tmp_path):
    kind, own = loaded
    maps = FeatureCache(tmp_path).features(own, images())
    head = UHead([8, 8, 8, 8], 16, fusion="pico", expert=[own.channels[stage] for stage in own.joins])
    diffusion = [torch.randn(2, 8, side, side) for side in (4, 8, 16, 32)]
    assert head(diffusion, [maps[stage] for stage in own.joins]).shape == (2, 16)


def test_blocks_are_the_published_ones(tmp_path):
    own = expert.load("dinov2", stand_ins.vit(tmp_path))
    kept = {}
    for k in expert.BLOCKS:
        own.network.encoder.layer[k].register_forward_hook(lambda m, i, o, k=k: kept.update(
            {k: o[0] if isinstance(o, tuple) else o}))
    maps = own.features(images())
    assert torch.equal(maps["block2"].mean((2, 3)).shape and maps["block5"],
                       torch.nn.functional.interpolate(kept[5][:, 1:].mT.unflatten(2, (16, 16)), (16, 16),
                                                       mode="bilinear"))


@pytest.mark.parametrize("kind", list(MAKE))
@pytest.mark.parametrize("name", expert.FILES)
def test_a_missing_file_says_what_to_download_and_where(kind, name, tmp_path):
    folder = MAKE[kind](tmp_path / "expert")
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"expert/{name}: no such file; download .*{expert.SOURCES[kind]} into"):
        expert.load(kind, folder)


def test_another_model_damage_and_unknown_kinds_are_refused(tmp_path):
    folder = stand_ins.resnet18(tmp_path / "resnet")
    with pytest.raises(ValueError, match="model_type is 'resnet'.*'dinov2' needs 'dinov2'.*facebook/dinov2-base"):
        expert.load("dinov2", folder)
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="not a ResNetModel.*download it again"):
        expert.load("resnet18", folder)
    with pytest.raises(ValueError, match="expert 'vgg' is unknown; choose one of resnet18, dino, dinov2"):
        expert.load("vgg", folder)
    with pytest.raises(ValueError, match="more than 11 blocks.*got 4"):
        expert.load("dinov2", stand_ins.vit(tmp_path / "small", layers=4))
    (folder / "config.json").write_text(json.dumps({"no": "model"}))
    with pytest.raises(ValueError, match="download it again"):
        expert.load("resnet18", folder)
