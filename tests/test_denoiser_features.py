"""Features of frozen denoisers: all stages from one forward pass, which ends early, whatever the batch."""

import pytest
import torch

from dive_lib.checkpoint import freeze
from dive_lib.class_vocabulary import ClassGrid
from dive_lib.classifiers import ResNet
from dive_lib.comparison_backbones import PixelFeatures, ResNetFeatures
from dive_lib.denoiser_features import DenoiserFeatures, attention_map
from dive_lib.denoisers import DiTDenoiser, LayoutDenoiser, untrained_dit, untrained_layout_ldm
from dive_lib.dit import DiT
from dive_lib.feature_noise import Noise
from dive_lib.first_stage import FirstStage
from dive_lib.image_encoder import Pixels
from tests import tiny

VQ = {"block_out_channels": [8, 8], "down_block_types": ["DownEncoderBlock2D"] * 2, "latent_channels": 4,
      "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1, "num_vq_embeddings": 8, "norm_num_groups": 4,
      "mid_block_add_attention": False}
PIXEL_DIT = {"sample_size": 16, "in_channels": 1, "out_channels": 1, "patch_size": 4, "num_layers": 3,
             "num_attention_heads": 2, "attention_head_dim": 8}
MODES = ("ddpm", "ddim_inv", "free", "uniform", "ddim_inversion")


def layout(mode="ddpm", position_attention=True):
    torch.manual_seed(3)
    return DenoiserFeatures(LayoutDenoiser(tiny.layout_ldm(position_attention), freeze(FirstStage(VQ, 4))),
                            Noise(mode, steps=2))


def transformer(mode="ddpm"):
    torch.manual_seed(3)
    model = DiT(4, PIXEL_DIT, std=0.5)
    return DenoiserFeatures(DiTDenoiser(untrained_dit(model), Pixels()), Noise(mode, steps=2))


def images(count=3):
    return torch.randint(256, (count, 3, 64, 64), generator=torch.Generator().manual_seed(2)) / 127.5 - 1


@pytest.fixture(params=[layout, transformer], ids=["layout LDM", "DiT"])
def make(request):
    return request.param


def test_stages_channels_and_sizes():
    maps = layout().features(images(), 200)
    assert {stage: tuple(m.shape[1:]) for stage, m in maps.items()} == {
        "down0": (8, 4, 4), "down1": (16, 4, 4), "mid": (16, 4, 4), "up0": (16, 8, 8), "up1": (8, 8, 8)}
    maps = transformer().features(images(), 200)
    assert {stage: tuple(m.shape[1:]) for stage, m in maps.items()} == {f"block{k}": (16, 4, 4) for k in range(3)}
    for backbone in (layout(), transformer()):
        own = backbone.features(images(), 200, (*backbone.stages, *backbone.cross_stages))
        assert {stage: m.shape[1] for stage, m in own.items()} == backbone.channels


@pytest.mark.parametrize("mode", MODES)
def test_one_forward_gives_what_separate_full_forwards_give(make, mode):
    backbone = make(mode)
    denoiser, together = backbone.denoiser, backbone.features(images(), 300)
    kept = {}

    def run_to_the_end(stage):
        hook = denoiser.blocks[stage].register_forward_hook(lambda m, i, o: kept.update({stage: o}))
        deepest = list(denoiser.blocks)[-1]
        backbone.features(images(), 300, (stage, deepest))  # all blocks run
        hook.remove()
        return denoiser.as_map(kept[stage], torch.zeros(3, 1, 16, 16))

    for stage in backbone.stages:
        assert torch.equal(together[stage], run_to_the_end(stage)), stage
        assert torch.equal(together[stage], backbone.features(images(), 300, (stage,))[stage]), stage
        assert not together[stage].requires_grad


def test_the_hooked_forward_is_the_denoisers_own(make):
    """The last block's output, taken on, gives the prediction of a forward pass without any hook."""
    backbone = make()
    denoiser, kept = backbone.denoiser, {}
    z = denoiser.encode(images())
    t, context = torch.full((3,), 300), denoiser.context(None, 3)
    z = denoiser.schedule.add_noise(z, torch.randn((1, *z.shape[1:]), generator=torch.Generator().manual_seed(8888))
                                    .expand_as(z), t)
    last = list(denoiser.blocks)[-1]
    hook = denoiser.blocks[last].register_forward_hook(lambda m, i, o: kept.update({last: o}))
    with torch.no_grad():
        denoiser.predict_noise(z, t, context)
    hook.remove()
    assert torch.equal(denoiser.as_map(kept[last], z), backbone.features(images(), 300, (last,))[last])


def test_ends_after_the_deepest_stage(make):
    backbone, called = make(), []
    names = list(backbone.denoiser.blocks)
    for stage, block in backbone.denoiser.blocks.items():
        block.register_forward_hook(lambda m, i, o, stage=stage: called.append(stage))
    for k, stage in enumerate(names):
        called.clear()
        backbone.features(images(), 300, (names[0], stage))
        # A block's own recorder, registered later, ends the pass after this one has seen the call.
        assert called == names[:k + 1], "each block up to it once, none behind it"


def test_no_hook_is_left_behind(make):
    backbone = make()
    backbone.features(images(), 300, (*backbone.stages, *backbone.cross_stages))
    with pytest.raises(ValueError):
        backbone.features(images(), 300, condition=torch.zeros(1, 1))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.denoiser.modules())


@pytest.mark.parametrize("mode", MODES)
def test_do_not_depend_on_the_batch(make, mode):
    backbone = make(mode)
    stages = (*backbone.stages, *backbone.cross_stages)
    whole = backbone.features(images(), 300, stages)
    parts = [backbone.features(images()[k:k + 1], 300, stages) for k in range(3)]
    for stage in stages:
        torch.testing.assert_close(whole[stage], torch.cat([p[stage] for p in parts]), atol=1e-4, rtol=1e-4)


def test_time_noise_and_condition_reach_the_features(make):
    backbone = make()
    last = backbone.stages[-1]
    ldm = backbone.name == "layout LDM"
    condition = tiny.layouts() if ldm else torch.tensor([0, 1, 2])
    first = backbone.features(images(), 300)[last]
    assert not torch.allclose(first, backbone.features(images(), 600)[last])
    assert not torch.allclose(first, backbone.features(images(), 300, condition=condition)[last])
    other = [backbone.with_noise(Noise(mode, steps=2)).features(images(), 300)[last] for mode in MODES[1:]]
    assert not any(torch.allclose(first, o) for o in other)
    empty = backbone.denoiser.ldm.grid.empty(3) if ldm else torch.full((3,), 4)
    assert torch.equal(first, backbone.features(images(), 300, condition=empty)[last])


def test_several_time_steps_end_at_the_last():
    backbone = layout()
    walked = backbone.features(images(), (600, 300), ("up1",))["up1"]
    assert walked.shape == (3, 8, 8, 8) and not torch.allclose(walked, backbone.features(images(), 300)["up1"])


@pytest.mark.parametrize("position_attention", [True, False])
def test_cross_attention_is_what_the_network_uses(position_attention):
    backbone = layout(position_attention=position_attention)
    maps = backbone.features(images(), 300, backbone.cross_stages, tiny.layouts())
    assert {stage: m.shape for stage, m in maps.items()} == {
        "cross_up0": (3, backbone.denoiser.tokens, 4, 4), "cross_up1": (3, backbone.denoiser.tokens, 8, 8)}
    for m in maps.values():
        torch.testing.assert_close(m.sum(1), torch.ones(m.shape[0], *m.shape[2:]))
    # With values that name the token, the module's own output is the map.
    attention = backbone.denoiser.attentions["up1"][0]
    context = torch.randn(1, 3, attention.to_k.in_features, generator=torch.Generator().manual_seed(0))
    states = torch.randn(1, 64, attention.to_q.in_features, generator=torch.Generator().manual_seed(1))
    value = torch.randn(1, 3, attention.to_v.out_features, generator=torch.Generator().manual_seed(2))
    attention.heads, attention.scale = 1, attention.to_q.out_features ** -0.5
    attention.to_v = torch.nn.Identity()
    attention.to_v.forward = lambda x: value
    with torch.no_grad():
        mixed = attention_map(attention, states, context).flatten(2).mT @ value
        expected = attention.to_out[0](mixed) + (attention.processor.grid_value if position_attention else 0)
        torch.testing.assert_close(attention(states, context), expected, atol=1e-5, rtol=1e-4)


def test_bfloat16_is_near():
    backbone = layout()
    fast = DenoiserFeatures(backbone.denoiser, backbone.noise, bf16=True)
    exact, near = (b.features(images(), 300)["mid"] for b in (backbone, fast))
    assert near.dtype == torch.float32 and not torch.equal(exact, near)
    assert (exact - near).abs().mean() < 0.05 * exact.abs().mean()
    assert backbone.identity != fast.identity


def test_untrained_copies_are_seeded_and_share_the_architecture():
    before = torch.get_rng_state()
    ldm, model = tiny.layout_ldm(seed=5), tiny.dit(seed=5)
    torch.set_rng_state(before)
    for copy, original in ((untrained_layout_ldm, ldm), (untrained_dit, model)):
        first, again, other = copy(original), copy(original), copy(original, seed=1)
        assert first.config == original.config
        assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
        assert any(not torch.equal(a, b) for a, b in zip(first.state_dict().values(), other.state_dict().values()))
        assert any(not torch.equal(a, b) for a, b in zip(first.state_dict().values(), original.state_dict().values()))
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"
    maps = DenoiserFeatures(DiTDenoiser(untrained_dit(DiT(4, PIXEL_DIT)), Pixels())).features(images(), 300)
    assert not torch.allclose(maps["block0"], maps["block1"]), "a fresh DiT's blocks would all be the identity"


def test_a_pixel_dit_gets_grey_images_of_its_size():
    denoiser = transformer().denoiser
    colour, grey = images(), images().mean(1, keepdim=True)
    pooled = torch.nn.functional.avg_pool2d(grey, 4)
    torch.testing.assert_close(denoiser.encode(colour), pooled)
    assert torch.equal(denoiser.encode(pooled), pooled)


@pytest.mark.parametrize("call, message", [
    (lambda b: b.features(images(), 300, ("up7",)), "no stage up7; choose of down0"),
    (lambda b: b.features(images(), 300, ()), "no stage asked for"),
    (lambda b: b.features(images(), 1000), "0 to 999"),
    (lambda b: b.features(images(), 300, condition=tiny.layouts()[:2]), r"tokens \(3, 3, 5\), got \(2, 3, 5\)")])
def test_bad_requests_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(layout())


def test_labels_must_fit():
    with pytest.raises(ValueError, match=r"labels \(3,\), got \(2,\)"):
        transformer().features(images(), 300, condition=torch.tensor([0, 1]))
    assert ClassGrid(4).none_tokens.tolist() == [4]


# Other backbones


def test_pixels_and_a_supervised_network_have_the_same_interface():
    torch.manual_seed(0)
    network = ResNet(3, 5, 64, widths=[4, 8, 12], blocks=2, stem="pixels")
    resnet, pixels = ResNetFeatures(network), PixelFeatures(8)
    maps = resnet.features(images())
    assert {stage: tuple(m.shape[1:]) for stage, m in maps.items()} == {
        "layer0": (4, 64, 64), "layer1": (8, 32, 32), "layer2": (12, 16, 16)}
    assert {stage: m.shape[1] for stage, m in maps.items()} == resnet.channels
    head = torch.nn.Sequential(*list(network)[-3:])
    assert torch.equal(head(maps["layer2"]), network(images())), "the last stage is what the network pools"
    assert resnet.joins == ("layer2", "layer1", "layer0")
    assert pixels.features(images(), t=5)["pixels"].shape == (3, 3, 8, 8)
    for backbone in (resnet, pixels):
        with pytest.raises(ValueError, match="no stage mid"):
            backbone.features(images(), 0, ("mid",))
