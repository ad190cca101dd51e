"""CompVis weights under our names: the original programs' numbers, round trips of names, refusals, files."""

import json
import os
import sys
import types

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel, VQModel
from safetensors.torch import load_file, save_file

from dive_lib import compvis
from dive_lib.token_transformer import TokenTransformer

TOLERANCE = 1e-4
PAPER_UNET = {  # latent diffusion's COCO layout model (LDM paper, tables 15 and 17)
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 192, "channel_mult": [1, 2, 4],
    "num_res_blocks": 2, "attention_resolutions": [1, 2, 4], "num_head_channels": 32,
    "use_spatial_transformer": True, "transformer_depth": 2, "context_dim": 512,
}  # fmt: skip
SMALL_UNET = PAPER_UNET | {  # no attention in its first level, two resolutions
    "image_size": 8, "model_channels": 32, "channel_mult": [1, 2], "num_res_blocks": 1,
    "attention_resolutions": [2], "num_head_channels": 16, "transformer_depth": 1, "context_dim": 24,
}  # fmt: skip
SMALL_VQ = {
    "ddconfig": {
        "z_channels": 4, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 2],
        "num_res_blocks": 2, "attn_resolutions": [16, 8],
    },
    "embed_dim": 3,
    "n_embed": 17,
}  # fmt: skip


def read_fixture(folder):
    """(configuration, arrays as tensors, state) of a reference folder."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(folder / "io.npz").items()}
    return json.loads((folder / "config.json").read_text()), arrays, load_file(folder / "model.safetensors")


def assert_near(ours, theirs):
    """At most 1e-4 apart, also as a share of the largest reference value."""
    difference = (ours.detach() - theirs).abs().max().item()
    assert ours.shape == theirs.shape
    assert difference <= TOLERANCE * min(1.0, theirs.abs().max().item()), difference


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def fake_checkpoint(model, table, prefix="", convolutions=()):
    """The state of `model` under CompVis's names: the table used backwards."""
    backwards = {ours: theirs for theirs, ours in table.items()}
    assert len(backwards) == len(table), "two CompVis modules share a place"
    state = {}
    for name, tensor in model.state_dict().items():
        theirs = prefix + compvis.rename(name, backwards)
        matrix = tensor.ndim == 2 and any(f".{part}." in theirs for part in convolutions)
        state[theirs] = tensor[:, :, None, None] if matrix else tensor
    return state


def small_vq():
    torch.manual_seed(0)
    config = compvis.vq_first_stage_config(**SMALL_VQ)
    model = VQModel(**config)
    table = compvis.vq_first_stage_table(config)
    return model, config, fake_checkpoint(model, table, convolutions=("q", "k", "v", "proj_out"))


def assert_same(state, expected):
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


# Against the original programs


def test_first_stage_gives_the_numbers_of_compvis(shared):
    config, io, state = read_fixture(shared / "fixtures" / "compvis_vq_f8")
    config = compvis.vq_first_stage_config(**config)
    model = VQModel(**config).eval()
    model.load_state_dict(compvis.convert_vq_first_stage(state, config))
    with torch.no_grad():
        latents = model.encode(io["images"]).latents
        quantized, _, (_, _, indices) = model.quantize(latents)
        assert_near(latents, io["latents"])
        assert_near(quantized, io["quantized"])
        assert torch.equal(indices.view_as(io["indices"]), io["indices"])
        assert_near(model.decode(latents).sample, io["reconstructions"])
        assert_near(model.decode(latents, force_not_quantize=True).sample, io["reconstructions_unquantized"])


def test_layout_model_gives_the_numbers_and_the_gradient_of_compvis(shared):
    config, io, state = read_fixture(shared / "fixtures" / "compvis_layout_ldm")
    unet_config = compvis.layout_unet_config(config["unet"])
    unet = UNet2DConditionModel(**unet_config).eval()
    unet.load_state_dict(compvis.convert_layout_unet(state, unet_config))
    encoder = TokenTransformer(**compvis.token_transformer_config(config["cond_stage"])).eval()
    weights, table = compvis.convert_token_transformer(state)
    encoder.load_state_dict(weights)
    assert table.shape == (config["cond_stage"]["vocab_size"], config["cond_stage"]["n_embed"])

    tokens = table[io["tokens"]].requires_grad_()
    context = encoder(tokens)
    eps = unet(io["x"], io["t"], context).sample
    loss = (eps - io["noise"]).square().mean()
    (gradient,) = torch.autograd.grad(loss, tokens)
    assert_near(context, io["context"])
    assert_near(eps, io["eps"])
    assert_near(loss, io["loss"])
    assert_near(gradient, io["grad_token_embeddings"])


def test_number_of_heads_matters(shared):
    """The trap: 16 channels per head read as 16 heads passes every check of names and shapes."""
    config, io, state = read_fixture(shared / "fixtures" / "compvis_layout_ldm")
    unet_config = compvis.layout_unet_config(config["unet"])
    assert unet_config["attention_head_dim"] == (2, 4)
    wrong = unet_config | {"attention_head_dim": config["unet"]["num_head_channels"]}
    unet = UNet2DConditionModel(**wrong).eval()
    unet.load_state_dict(compvis.convert_layout_unet(state, wrong))
    with torch.no_grad():
        assert (unet(io["x"], io["t"], io["context"]).sample - io["eps"]).abs().max() > 10 * TOLERANCE


# Sizes


def test_paper_unet_has_312_million_parameters():
    config = compvis.layout_unet_config(PAPER_UNET)
    with torch.device("meta"):
        model = UNet2DConditionModel(**config)
    assert parameters(model) == 312_241_540
    assert config["attention_head_dim"] == (6, 12, 24)
    one_head = PAPER_UNET | {"num_head_channels": -1, "num_heads": 1}
    assert compvis.layout_unet_config(one_head)["attention_head_dim"] == (1, 1, 1)
    state = fake_checkpoint(model, compvis.layout_unet_table(config))
    assert list(compvis.convert_layout_unet(state, config)) == list(model.state_dict())


def test_public_first_stage_has_the_size_of_compvis():
    def conv(inputs, outputs, size):
        return inputs * outputs * size**2 + outputs

    def resnet(inputs, outputs):
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return 2 * inputs + conv(inputs, outputs, 3) + 2 * outputs + conv(outputs, outputs, 3) + shortcut

    def attention(width):
        return 2 * width + 4 * conv(width, width, 1)

    # Written from the published description: 128, 256, 256, 512 channels, two (decoder: three) residual
    # blocks per level, attention at 32 x 32 and in the middle.
    middle = 2 * resnet(512, 512) + attention(512)
    encoder = conv(3, 128, 3) + 2 * resnet(128, 128) + resnet(128, 256) + 3 * resnet(256, 256)
    encoder += resnet(256, 512) + resnet(512, 512) + 2 * attention(512) + middle
    encoder += conv(128, 128, 3) + 2 * conv(256, 256, 3) + 2 * 512 + conv(512, 4, 3)
    decoder = conv(4, 512, 3) + middle + 3 * resnet(512, 512) + 3 * attention(512)
    decoder += resnet(512, 256) + 5 * resnet(256, 256) + resnet(256, 128) + 2 * resnet(128, 128)
    decoder += conv(512, 512, 3) + 2 * conv(256, 256, 3) + 2 * 128 + conv(128, 3, 3)
    config = compvis.vq_first_stage_config(**compvis.VQ_F8)
    with torch.device("meta"):
        model = VQModel(**config)
    assert parameters(model) == encoder + decoder + 2 * conv(4, 4, 1) + 16384 * 4
    state = fake_checkpoint(model, compvis.vq_first_stage_table(config), "", ("q", "k", "v", "proj_out"))
    assert list(compvis.convert_vq_first_stage(state, config)) == list(model.state_dict())
    assert state["decoder.up.0.block.2.conv1.weight"].shape == (128, 128, 3, 3)
    assert state["decoder.up.3.attn.2.q.weight"].shape == (512, 512, 1, 1)
    assert state["encoder.down.2.downsample.conv.weight"].shape == (256, 256, 3, 3)
    assert "decoder.up.0.upsample.conv.weight" not in state


# Names, there and back


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_first_stage_round_trip(prefix):
    model, config, state = small_vq()
    state = {prefix + name: tensor for name, tensor in state.items()}
    if prefix:
        state |= {"model.diffusion_model.out.2.bias": torch.zeros(4), "betas": torch.zeros(1000)}
    assert f"{prefix}encoder.down.0.attn.0.q.weight" not in state
    assert f"{prefix}encoder.down.1.attn.1.q.weight" in state
    assert_same(compvis.convert_vq_first_stage(state, config), model.state_dict())


def test_unet_round_trip_with_a_level_without_attention():
    torch.manual_seed(0)
    config = compvis.layout_unet_config(SMALL_UNET)
    model = UNet2DConditionModel(**config)
    state = fake_checkpoint(model, compvis.layout_unet_table(config), "model.diffusion_model.")
    names = {name.removeprefix("model.diffusion_model.") for name in state}
    assert {"input_blocks.2.0.op.weight", "input_blocks.3.1.proj_in.weight"} <= names
    assert {"output_blocks.1.2.conv.weight", "output_blocks.3.0.skip_connection.weight"} <= names
    assert "input_blocks.1.1.proj_in.weight" not in names
    assert_same(compvis.convert_layout_unet(state, config), model.state_dict())


def test_upsampling_after_a_level_without_attention_moves_one_place_up():
    config = compvis.layout_unet_config(SMALL_UNET | {"attention_resolutions": [1]})
    table = compvis.layout_unet_table(config)
    assert table["output_blocks.1.1.conv"] == "up_blocks.0.upsamplers.0.conv"


def test_token_transformer_round_trip():
    torch.manual_seed(0)
    model, tokens = TokenTransformer(width=24, layers=3, heads=2, length=7), torch.randn(11, 24)
    prefix = "cond_stage_model.transformer."
    state = fake_checkpoint(model, compvis.token_transformer_table(3), prefix)
    state |= {prefix + "token_emb.weight": tokens, prefix + "to_logits.weight": torch.zeros(11, 24)}
    assert state[prefix + "attn_layers.layers.5.1.net.0.0.weight"].shape == (96, 24)
    converted, table = compvis.convert_token_transformer(state)
    assert_same(converted, model.state_dict())
    assert torch.equal(table, tokens)


# Refusals


def test_leftover_missing_and_misshapen_tensors_are_named():
    _, config, state = small_vq()
    with pytest.raises(KeyError, match="has not: encoder.down.0.attn.0.q.weight"):
        compvis.convert_vq_first_stage(state | {"encoder.down.0.attn.0.q.weight": torch.zeros(1)}, config)
    with pytest.raises(KeyError, match="has not: model_ema.decay"):
        compvis.convert_vq_first_stage(state | {"model_ema.decay": torch.zeros(1)}, config)
    lacking = {name: tensor for name, tensor in state.items() if name != "quant_conv.bias"}
    with pytest.raises(KeyError, match="lacks tensors that the configuration has: quant_conv.bias"):
        compvis.convert_vq_first_stage(lacking, config)
    state["decoder.up.0.block.0.conv1.weight"] = torch.zeros(32, 99, 3, 3)
    with pytest.raises(ValueError, match=r"decoder.up.0.block.0.conv1.weight has shape \(32, 99, 3, 3\)"):
        compvis.convert_vq_first_stage(state, config)
    with pytest.raises(KeyError, match="pos_emb.emb.weight.*layout model"):
        compvis.convert_token_transformer(state)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 4}, "either num_heads or num_head_channels"),
        ({"num_head_channels": -1}, "either num_heads or num_head_channels"),
        ({"num_head_channels": 24}, "32 channels cannot be split"),
        ({"channel_mult": [2, 4]}, r"channel_mult = \[2, 4\] has no counterpart"),
        ({"use_spatial_transformer": False}, "use_spatial_transformer = False has no counterpart"),
        ({"use_scale_shift_norm": True}, "use_scale_shift_norm = True has no counterpart"),
        ({"num_classes": 10}, "num_classes = 10 has no counterpart"),
    ],
)
def test_unet_settings_without_a_counterpart_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        compvis.layout_unet_config(SMALL_UNET | change)


def test_incomplete_or_unsupported_settings_are_named():
    with pytest.raises(ValueError, match="unet_config: channel_mult, context_dim missing"):
        kept = SMALL_UNET.keys() - {"channel_mult", "context_dim"}
        compvis.layout_unet_config({key: SMALL_UNET[key] for key in kept})
    with pytest.raises(ValueError, match="ddconfig: double_z = True"):
        compvis.vq_first_stage_config(SMALL_VQ["ddconfig"] | {"double_z": True}, 4, 16)
    with pytest.raises(ValueError, match="cond_stage_config: n_layer missing"):
        compvis.token_transformer_config({"n_embed": 8, "max_seq_len": 5})


# Files


def test_reading_safetensors_takes_one_part_without_the_loss(tmp_path):
    one, two, three = torch.ones(2), torch.zeros(3), torch.zeros(1)
    whole = {"first_stage_model.quant_conv.bias": one, "first_stage_model.loss.logvar": three,
             "model.diffusion_model.out.2.bias": two}  # fmt: skip
    save_file(whole, tmp_path / "whole.safetensors")
    assert_same(compvis.load_compvis_state(tmp_path / "whole.safetensors"), {"quant_conv.bias": one})
    assert_same(compvis.load_compvis_state(tmp_path / "whole.safetensors", "unet"), {"out.2.bias": two})
    save_file({"quant_conv.bias": one, "loss.perceptual_loss.lin0": two}, tmp_path / "alone.safetensors")
    assert_same(compvis.load_compvis_state(tmp_path / "alone.safetensors"), {"quant_conv.bias": one})


def test_reading_a_lightning_checkpoint_without_lightning(tmp_path, monkeypatch):
    """Such files name a callback class beside the weights; it is neither imported nor run."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    with monkeypatch.context() as patch:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patch.setitem(sys.modules, name, module)
        content = {
            "state_dict": {"quant_conv.bias": torch.ones(2), "loss.logvar": torch.zeros(1)},
            "callbacks": {module.ModelCheckpoint: {"best_model_score": torch.tensor(1.0)}},
            "hooks": [module.ModelCheckpoint()],
            "epoch": 3,
        }
        torch.save(content, tmp_path / "model.ckpt")
    assert "pytorch_lightning" not in sys.modules
    trusted = torch.serialization.get_safe_globals()
    state = compvis.load_compvis_state(tmp_path / "model.ckpt")
    assert_same(state, {"quant_conv.bias": torch.ones(2)})
    assert torch.serialization.get_safe_globals() == trusted  # nothing stays trusted afterwards


class Harmful:
    """Unpickling this would make a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_harmful_pickle_is_refused_and_not_run(tmp_path):
    content = {"state_dict": {"a": torch.ones(1)}, "x": Harmful(str(tmp_path / "proof"))}
    torch.save(content, tmp_path / "m.ckpt")
    with pytest.raises(ValueError, match=r"m\.ckpt: refused by(.|\n)*convert it once(.|\n)*save_file"):
        compvis.load_compvis_state(tmp_path / "m.ckpt")
    assert not (tmp_path / "proof").exists()


def test_damaged_missing_and_foreign_files_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.ckpt.*Download.*'vq-f8'.*vq-f8.zip.*model.ckpt"):
        compvis.load_compvis_state(tmp_path / "none.ckpt")
    for name in ("half.ckpt", "half.safetensors"):
        (tmp_path / name).write_bytes(b"\x10half a file")
        with pytest.raises(ValueError, match=name):
            compvis.load_compvis_state(tmp_path / name)
    torch.save([torch.ones(1)], tmp_path / "list.ckpt")
    with pytest.raises(ValueError, match="holds no state dict"):
        compvis.load_compvis_state(tmp_path / "list.ckpt")


def test_command_line_writes_a_folder_that_diffusers_reads(tmp_path, capsys):
    model, _, state = small_vq()
    torch.save({"state_dict": state}, tmp_path / "model.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(SMALL_VQ))
    folder = tmp_path / "converted"
    compvis.main(
        ["first-stage", str(tmp_path / "model.ckpt"), str(folder), "--config", str(tmp_path / "config.json")]
    )
    assert {path.name for path in folder.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert "M parameters" in capsys.readouterr().out
    assert_same(VQModel.from_pretrained(folder).state_dict(), model.state_dict())
