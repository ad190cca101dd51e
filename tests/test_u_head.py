"""The U-head: the published head's numbers, the paper's sizes, and heads of other shapes."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dive_lib import u_head
from dive_lib.train import TrainingConfig, train
from tests.published_inversion import read_arrays

SD = [1280, 1280, 1280, 960]  # mid+up of Stable Diffusion 1.5, without cross-attention maps
SD_CROSS = [1280, 1357, 1357, 960]


@pytest.fixture(scope="module")
def folder(shared):
    return shared / "fixtures" / "vermouth_uhead"


@pytest.mark.parametrize("fusion, suffix", [("pico", ""), ("add", "_add")])
def test_gives_the_numbers_of_the_published_head(folder, fusion, suffix):
    config, io = json.loads((folder / "config.json").read_text()), read_arrays(folder / "io.npz")
    diffusion, expert = ([io[f"{kind}_{k}"].float() for k in range(4)] for kind in ("diffusion", "expert"))
    head = u_head.UHead(config["diffusion_channels"], config["embedding"], fusion=fusion, heads=config["heads"],
                        expert=config["expert_channels"], widths=[config["embedding"]] if fusion == "add" else None)
    head.load_state_dict(u_head.from_published(load_file(folder / "model.safetensors"), fusion))

    def same(ours, name):
        torch.testing.assert_close(ours, io[name].to(ours.dtype), atol=1e-5, rtol=0)

    for k, (adapter, own) in enumerate(zip(head.adapters, expert)):
        same(adapter(own), f"adapted_{k}")
    same(head.fuse(head.join(diffusion, expert)), "fused" + suffix)
    embedding = head(diffusion, expert)
    same(embedding, "embedding" + suffix)
    if not suffix:
        text, scale = io["text"].float(), config["logit_scale"]
        same(u_head.similarity_logits(embedding, text, scale=scale), "logits")
        same(u_head.text_loss(embedding, text, io["labels"], scale=scale, temperature=config["temperature"]), "loss")
        assert u_head.RETRIEVAL == {"scale": scale, "temperature": config["temperature"]}


@pytest.mark.parametrize("expert, millions", [([768] * 4, 11.7), ([512, 256, 128], 9.3)])
def test_has_the_papers_size(expert, millions):
    with torch.device("meta"):
        head = u_head.UHead(SD_CROSS, 768, fusion="tiny", expert=expert)
    assert abs(sum(p.numel() for p in head.parameters()) / 1e6 - millions) < 0.1


def maps(channels, sides, batch=2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, c, s, s, generator=generator) for c, s in zip(channels, sides)]


@pytest.mark.parametrize("fusion", u_head.FUSIONS)
@pytest.mark.parametrize("normalise", [False, True])
def test_takes_the_scales_of_a_small_unet(fusion, normalise):
    torch.manual_seed(0)
    head = u_head.UHead([12, 20], 16, fusion=fusion, expert=[8], normalise=normalise, widths=[64, 32])
    embedding = head(maps([12, 20], [4, 8]), maps([8], [16]))
    assert embedding.shape == (2, 16) and embedding.isfinite().all()
    alone = head([m[:1] for m in maps([12, 20], [4, 8])], [maps([8], [16])[0][:1]])
    torch.testing.assert_close(alone, embedding[:1], atol=1e-5, rtol=1e-5)


def test_normalised_maps_forget_their_scale():
    torch.manual_seed(0)
    head = u_head.UHead([8, 8], 16, fusion="pico", expert=[8], normalise=True)
    diffusion, expert = maps([8, 8], [4, 8]), maps([8], [8])
    first = head.join(diffusion, expert)[1]
    torch.testing.assert_close(first, head.join([m * 3 for m in diffusion], expert)[1])
    assert torch.equal(head.join(diffusion, expert)[0], diffusion[0]), "a scale without an expert stays as it is"


def test_small_has_a_second_stage_and_pico_is_narrow():
    sizes = {name: sum(p.numel() for p in u_head.UHead([8, 8], 16, fusion=name).parameters())
             for name in u_head.FUSIONS}
    assert sizes["pico"] < sizes["add"] < sizes["tiny"] < sizes["small"]


def test_the_second_stage_is_the_published_one():
    """Its sum passes one more SiLU, and on the two finest of four scales its kernel has nine places."""
    head = u_head.UHead([8] * 4, 16, fusion="small", widths=[32] * 4)
    assert [block.stage2[0].kernel_size for block in head.fuse.blocks] == [(1, 1), (1, 1), (3, 3), (3, 3)]
    block, x = head.fuse.blocks[3], torch.randn(1, 8, 4, 4)
    first = block.stage1(x)
    torch.testing.assert_close(block(x), torch.nn.functional.silu(first + block.stage2(first)))


@pytest.mark.parametrize("settings, message", [
    ({"fusion": "huge"}, "fusion 'huge'.*pico, tiny, small, add"),
    ({"expert": [8, 8, 8]}, "expert of 3 maps cannot join 2 scales")])
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        u_head.UHead([8, 8], 16, **settings)


def test_more_scales_than_published_need_widths():
    with pytest.raises(ValueError, match="4 scales, got 5; give widths"):
        u_head.UHead([8] * 5, 16)


def test_a_missing_expert_is_named():
    with pytest.raises(ValueError, match="built for 1 maps of an expert, got 0"):
        u_head.UHead([8, 8], 16, expert=[8], fusion="pico")(maps([8, 8], [4, 8]))


def test_learns_with_the_one_training_loop(tmp_path):
    torch.manual_seed(0)
    head, own = u_head.UHead([8, 8], 16, widths=[32, 16]), maps([8, 8], [4, 8], batch=6)
    text, labels = torch.nn.functional.normalize(torch.randn(3, 16), dim=1), torch.tensor([0, 1, 2, 0, 1, 2])
    losses = train(head, lambda model, step, generator: u_head.text_loss(model(own), text, labels,
                                                                         **u_head.CLASSIFICATION),
                   TrainingConfig(steps=40, lr=0.003, batch_size=6), scratch=tmp_path, identity="")
    assert losses[-1] < 0.5 * losses[0]
