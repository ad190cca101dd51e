"""The groups of stages: the channel tables of Stable Diffusion 1.5, and their analogue elsewhere."""

import pytest
import torch

from dive_lib import stage_groups
from dive_lib.stage_groups import GROUPS, channels, scales, stages_of

WIDTHS = (320, 640, 1280, 1280)


class Backbone:
    """Stages and channels of a U-Net of given widths, without a network."""

    def __init__(self, widths=WIDTHS, tokens=77, plain=1):
        levels = len(widths)
        self.channels = {f"down{k}": w for k, w in enumerate(widths)} | {"mid": widths[-1]} | {
            f"up{k}": w for k, w in enumerate(reversed(widths))}
        self.stages = tuple(self.channels)
        self.cross_stages = tuple(f"cross_up{k}" for k in range(plain, levels))
        self.channels |= dict.fromkeys(self.cross_stages, tokens)


TABLE = {"mid+up": [1280, 1280, 1280, 960], "up": [1280, 1280, 640, 320], "down": [1280, 1280, 640, 320],
         "down+mid": [1280, 1280, 640, 320], "down+mid+up": [1280, 1920, 1600, 960], "mid": [1280]}


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("side", [64, 32])
def test_channels_and_sizes_of_stable_diffusion(group, side):
    backbone = Backbone()
    assert channels(group, backbone, side) == TABLE[group]
    sides = stage_groups._sides(backbone.stages, side)
    features = {s: torch.zeros(1, backbone.channels[s] // 320, sides[s], sides[s])
                for s in stages_of(group, backbone.stages)}
    maps = scales(group, features, backbone.stages)
    assert [m.shape[1] for m in maps] == [c // 320 for c in TABLE[group]]
    assert [m.shape[-1] for m in maps] == [side // 8, side // 4, side // 2, side][:len(maps)]


@pytest.mark.parametrize("side", [64, 32])
def test_cross_attention_joins_the_second_and_third_scale(side):
    assert channels("mid+up", Backbone(), side, attention=True) == [1280, 1357, 1357, 960]


def test_down_and_mid_replaces_the_last_down_output():
    stages = Backbone().stages
    assert stages_of("down+mid", stages) == ("down0", "down1", "down2", "mid")
    assert stages_of("down", stages) == ("down0", "down1", "down2", "down3")


def test_the_coarsest_maps_are_averaged():
    backbone = Backbone((1, 2, 4, 4))
    sides = stage_groups._sides(backbone.stages, 16)
    features = {stage: torch.full((1, backbone.channels[stage], sides[stage], sides[stage]), float(k))
                for k, stage in enumerate(backbone.stages)}
    coarsest = scales("down+mid+up", features, backbone.stages)[0]
    assert torch.equal(coarsest, torch.full((1, 4, 2, 2), 3.0)), "the mean of down2, down3 and mid: 2, 3, 4"


@pytest.mark.parametrize("widths, table", [
    ((48, 96), {"mid+up": [96, 144], "up": [96, 48], "down": [96, 48], "down+mid": [96, 48],
                "down+mid+up": [144, 144], "mid": [96]}),
    ((192, 384, 768), {"mid+up": [768, 768, 576], "up": [768, 384, 192], "down+mid+up": [1152, 960, 576]})])
def test_unets_of_fewer_levels_have_the_natural_analogue(widths, table):
    backbone = Backbone(widths, tokens=9, plain=0)
    assert {group: channels(group, backbone, 8) for group in table} == table
    joined = channels("mid+up", backbone, 8, attention=True)
    assert joined == [table["mid+up"][0], *(c + 9 for c in table["mid+up"][1:])]


def test_a_transformers_blocks_have_one_size_each():
    stages = tuple(f"block{k}" for k in range(4))
    assert [stages_of(group, stages) for group in ("down", "mid", "up", "mid+up")] == [
        stages[:2], stages[2:3], stages[3:], stages[2:]]
    features = {stage: torch.zeros(1, 8, 4, 4) for stage in stages}
    assert [m.shape for m in scales("down+mid+up", features, stages)] == [(1, 8, 4, 4)] * 4


def test_unknown_groups_and_backbones_without_blocks_are_refused():
    with pytest.raises(ValueError, match="no group of stages 'all'"):
        stages_of("all", Backbone().stages)
    with pytest.raises(ValueError, match="the stages are pixels"):
        stages_of("mid", ("pixels",))
