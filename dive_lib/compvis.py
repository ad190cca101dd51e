"""Published CompVis latent-diffusion weights, under the names of diffusers and of this library.

Three networks are converted: the VQ first stage (to `diffusers.VQModel`), the layout-conditional UNet (to
`diffusers.UNet2DConditionModel`) and the token transformer (to `dive_lib`'s `TokenTransformer`).  For each,
`*_config` turns CompVis's configuration into constructor arguments and `convert_*` the state dict:

    config = vq_first_stage_config(**VQ_F8)
    model = diffusers.VQModel(**config)
    model.load_state_dict(convert_vq_first_stage(load_compvis_state("vq-f8/model.ckpt"), config))

A conversion is a *table* of (CompVis module, our module) pairs; a tensor moves with the longest module name
that fits.  The result must have exactly the names and shapes of the target: KeyError names tensors left over
or missing, ValueError one of another shape.  The command line writes a folder for `VQModel.from_pretrained`:

    python -m dive_lib.compvis first-stage vq-f8/model.ckpt weights/vq-f8
"""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, VQModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dive_lib.files import atomic_path, read_json, write_json
from dive_lib.token_transformer import TokenTransformer

State = dict[str, Tensor]
Table = dict[str, str]  # CompVis module name -> our module name

# The public first stage "vq-f8" of CompVis latent-diffusion (f = 8, 16384 codes of 4 channels).
VQ_F8 = {
    "ddconfig": {
        "double_z": False, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128,
        "ch_mult": [1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [32], "dropout": 0.0,
    },
    "embed_dim": 4, "n_embed": 16384,
}  # fmt: skip
VQ_F8_SOURCE = "https://ommer-lab.com/files/latent-diffusion/vq-f8.zip"

PARTS = {  # where a whole latent-diffusion checkpoint keeps each network
    "first_stage": "first_stage_model.",
    "unet": "model.diffusion_model.",
    "token_transformer": "cond_stage_model.transformer.",
}
HEAD_WIDTH = 64  # of the token transformer; CompVis's configurations cannot change it

# Names inside a block, CompVis -> ours.
VQ_RESNET = {"nin_shortcut": "conv_shortcut"} | {name: name for name in ("norm1", "conv1", "norm2", "conv2")}
VQ_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
UNET_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
ATTENTION = {"0": "norm", "1.to_q": "query", "1.to_k": "key", "1.to_v": "value", "1.to_out": "out"}
FEEDFORWARD = {"0": "norm", "1.net.0.0": "expand", "1.net.2": "contract"}

FIXED = {  # settings of which only this value has a counterpart in diffusers
    "double_z": False, "attn_type": "vanilla", "use_linear_attn": False, "resamp_with_conv": True, "dims": 2,
    "give_pre_end": False, "tanh_out": False, "use_spatial_transformer": True, "conv_resample": True,
    "num_classes": None, "n_embed": None, "use_scale_shift_norm": False, "resblock_updown": False,
    "num_heads_upsample": -1, "use_linear_in_transformer": False, "disable_self_attentions": None,
}  # fmt: skip


def vq_first_stage_config(ddconfig: Mapping, embed_dim: int, n_embed: int) -> dict:
    """Constructor arguments of `diffusers.VQModel` for a CompVis `VQModel` configuration.

    ddconfig describes encoder and decoder (see `VQ_F8`); a code has embed_dim channels, n_embed codes exist.
    Raises ValueError, naming the setting, for one that is missing or that diffusers' model cannot express."""
    required = "ch ch_mult num_res_blocks attn_resolutions resolution z_channels in_channels out_ch".split()
    _check_settings("ddconfig", ddconfig, required, widths="ch_mult")
    widths = [ddconfig["ch"] * factor for factor in ddconfig["ch_mult"]]
    sizes = [ddconfig["resolution"] // 2**level for level in range(len(widths))]
    kinds = ["Attn" if size in ddconfig["attn_resolutions"] else "" for size in sizes]
    return {
        "in_channels": ddconfig["in_channels"], "out_channels": ddconfig["out_ch"],
        "block_out_channels": tuple(widths), "layers_per_block": ddconfig["num_res_blocks"],
        "down_block_types": tuple(f"{kind}DownEncoderBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpDecoderBlock2D" for kind in reversed(kinds)),
        "latent_channels": ddconfig["z_channels"], "sample_size": ddconfig["resolution"],
        "num_vq_embeddings": n_embed, "vq_embed_dim": embed_dim,
        "scaling_factor": 1.0,  # CompVis's VQ models diffuse the latents as they are
    }  # fmt: skip


def vq_first_stage_table(config: Mapping) -> Table:
    """(CompVis module -> module of `diffusers.VQModel`) for the arguments of `vq_first_stage_config`."""
    table: Table = {name: name for name in ("quantize.embedding", "quant_conv", "post_quant_conv")}
    for side in ("encoder", "decoder"):
        table |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{side}.norm_out"] = f"{side}.conv_norm_out"
        for index in (0, 1):
            _add(table, f"{side}.mid.block_{index + 1}", f"{side}.mid_block.resnets.{index}", VQ_RESNET)
        _add(table, f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0", VQ_ATTENTION)

    def add_level(theirs: str, ours: str, kind: str, resnets: int) -> None:
        for index in range(resnets):
            _add(table, f"{theirs}.block.{index}", f"{ours}.resnets.{index}", VQ_RESNET)
            if kind.startswith("Attn"):
                _add(table, f"{theirs}.attn.{index}", f"{ours}.attentions.{index}", VQ_ATTENTION)
        table[f"{theirs}.downsample.conv"] = f"{ours}.downsamplers.0.conv"
        table[f"{theirs}.upsample.conv"] = f"{ours}.upsamplers.0.conv"

    # CompVis numbers the levels of both halves from the full resolution, diffusers in order of execution.
    for level, kind in enumerate(config["down_block_types"]):
        add_level(f"encoder.down.{level}", f"encoder.down_blocks.{level}", kind, config["layers_per_block"])
    for level, kind in enumerate(reversed(config["up_block_types"])):
        ours = f"decoder.up_blocks.{len(config['up_block_types']) - 1 - level}"
        add_level(f"decoder.up.{level}", ours, kind, config["layers_per_block"] + 1)
    return table


def convert_vq_first_stage(state: Mapping[str, Tensor], config: Mapping) -> State:
    """State dict of `diffusers.VQModel(**config)` from a CompVis VQ first stage or a whole checkpoint."""
    with torch.device("meta"):
        target = VQModel(**config)
    return _convert(_part(state, "first_stage"), vq_first_stage_table(config), target, "VQ first stage")


def layout_unet_config(unet_config: Mapping) -> dict:
    """Constructor arguments of `diffusers.UNet2DConditionModel` for a CompVis `UNetModel` configuration.

    `attention_resolutions` are downsampling *factors* (1, 2, 4: three levels).  `num_head_channels` is the
    width of a head; diffusers' `attention_head_dim` is, in spite of its name, the *number* of heads, so each
    level gets its own: channels / num_head_channels.
    Raises ValueError, naming the setting, for one that is missing or that diffusers' model cannot express."""
    required = ("image_size in_channels out_channels model_channels channel_mult num_res_blocks "
                "attention_resolutions use_spatial_transformer context_dim").split()  # fmt: skip
    _check_settings("unet_config", unet_config, required, widths="channel_mult")
    widths = [unet_config["model_channels"] * factor for factor in unet_config["channel_mult"]]
    factors = unet_config["attention_resolutions"]
    kinds = ["CrossAttn" if 2**level in factors else "" for level in range(len(widths))]
    return {
        "sample_size": unet_config["image_size"], "block_out_channels": tuple(widths),
        "in_channels": unet_config["in_channels"], "out_channels": unet_config["out_channels"],
        "down_block_types": tuple(f"{kind}DownBlock2D" for kind in kinds),
        "up_block_types": tuple(f"{kind}UpBlock2D" for kind in reversed(kinds)),
        "layers_per_block": unet_config["num_res_blocks"],
        "attention_head_dim": tuple(_heads(unet_config, width) for width in widths),
        "transformer_layers_per_block": unet_config.get("transformer_depth", 1),
        "cross_attention_dim": unet_config["context_dim"], "dropout": unet_config.get("dropout", 0.0),
    }  # fmt: skip


def layout_unet_table(config: Mapping) -> Table:
    """(CompVis module -> module of `UNet2DConditionModel`) for the arguments of `layout_unet_config`."""
    table: Table = {
        "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
        "middle_block.1": "mid_block.attentions.0",
    }  # fmt: skip
    _add(table, "middle_block.0", "mid_block.resnets.0", UNET_RESNET)
    _add(table, "middle_block.2", "mid_block.resnets.1", UNET_RESNET)
    last = len(config["block_out_channels"]) - 1

    def add_layer(theirs: str, ours: str, index: int, attends: bool) -> None:
        _add(table, f"{theirs}.0", f"{ours}.resnets.{index}", UNET_RESNET)
        if attends:  # the names inside a spatial transformer are the same on both sides
            table[f"{theirs}.1"] = f"{ours}.attentions.{index}"

    block = 1  # CompVis counts the blocks of a half through all levels; input block 0 is `conv_in`
    for level, kind in enumerate(config["down_block_types"]):
        for index in range(config["layers_per_block"]):
            add_layer(f"input_blocks.{block}", f"down_blocks.{level}", index, kind.startswith("CrossAttn"))
            block += 1
        if level < last:  # the downsampling is a block of its own ...
            table[f"input_blocks.{block}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            block += 1
    block = 0
    for level, kind in enumerate(config["up_block_types"]):
        attends = kind.startswith("CrossAttn")
        for index in range(config["layers_per_block"] + 1):
            add_layer(f"output_blocks.{block}", f"up_blocks.{level}", index, attends)
            block += 1
        if level < last:  # ... the upsampling the last part of the level's last block
            upsampling = f"output_blocks.{block - 1}.{2 if attends else 1}.conv"
            table[upsampling] = f"up_blocks.{level}.upsamplers.0.conv"
    return table


def convert_layout_unet(state: Mapping[str, Tensor], config: Mapping) -> State:
    """State dict of `UNet2DConditionModel(**config)` from a CompVis UNet or whole checkpoint (not EMA)."""
    with torch.device("meta"):
        target = UNet2DConditionModel(**config)
    return _convert(_part(state, "unet"), layout_unet_table(config), target, "layout UNet")


def token_transformer_config(cond_stage: Mapping) -> dict:
    """Constructor arguments of `TokenTransformer` for a CompVis `BERTEmbedder` configuration."""
    _check_settings("cond_stage_config", cond_stage, ("n_embed", "n_layer", "max_seq_len"))
    width, layers, length = (cond_stage[key] for key in ("n_embed", "n_layer", "max_seq_len"))
    return {"width": width, "layers": layers, "head_width": HEAD_WIDTH, "length": length}


def token_transformer_table(layers: int) -> Table:
    """(CompVis module -> module of `TokenTransformer`); CompVis's layers are ours cut in halves."""
    table: Table = {"norm": "norm", "pos_emb.emb.weight": "positions"}
    for index in range(layers):
        _add(table, f"attn_layers.layers.{2 * index}", f"layers.{index}.attention", ATTENTION)
        _add(table, f"attn_layers.layers.{2 * index + 1}", f"layers.{index}.feedforward", FEEDFORWARD)
    return table


def convert_token_transformer(state: Mapping[str, Tensor]) -> tuple[State, Tensor]:
    """(state dict of `TokenTransformer`, token table (vocabulary size, width)) from CompVis's layout encoder.

    The output head `to_logits` is dropped: the UNet is conditioned on the embeddings."""
    state = {k: v for k, v in _part(state, "token_transformer").items() if not k.startswith("to_logits.")}
    needed = ("token_emb.weight", "pos_emb.emb.weight", "attn_layers.layers.0.1.to_q.weight")
    if absent := [name for name in needed if name not in state]:
        raise KeyError(f"token transformer: the checkpoint lacks {_some(absent)}; is it a layout model's?")
    tokens, positions, query = (state[name] for name in needed)
    layers = len({name.split(".")[2] for name in state if name.startswith("attn_layers.")}) // 2
    with torch.device("meta"):
        target = TokenTransformer(tokens.shape[1], layers, len(query) // HEAD_WIDTH, length=len(positions))
    del state["token_emb.weight"]
    return _convert(state, token_transformer_table(layers), target, "token transformer"), tokens


def load_compvis_state(path: str | Path, part: str = "first_stage") -> State:
    """Tensors of one network (a key of `PARTS`) from a CompVis checkpoint, `.safetensors` or `.ckpt`.

    The file may hold that network alone or a whole model; tensors of the training loss are left out.  A
    `.ckpt` file is a pickle: only PyTorch's restricted reader sees it, which runs no code from it.
    FileNotFoundError, and ValueError for a file that is damaged or refused, say what to do."""
    path = Path(path)
    if not path.is_file():
        where = f"CompVis latent-diffusion's first-stage model 'vq-f8' ({VQ_F8_SOURCE})"
        raise FileNotFoundError(f"{path}: no such file.  Download {where} and put its model.ckpt there")
    if path.suffix != ".safetensors":
        return _part(_read_pickle(path), part)
    try:
        return _part(load_file(path), part)
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); download or convert it again") from error


class _Inert:
    """Stands in for a class of the training framework that a checkpoint mentions beside its weights."""


def _read_pickle(path: Path) -> State:
    """The tensors of a `.ckpt` file.  Lightning's checkpoints also name its callback classes, which are bound
    to `_Inert`; all else outside PyTorch's own list of safe types is refused."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        inert = [(_Inert, name) for name in names if name.startswith("pytorch_lightning.")]
        with torch.serialization.safe_globals(inert):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a refused file and the many ways of being damaged raise different types
        raise ValueError(
            f"{path}: refused by PyTorch's restricted reader, and no other is used: a pickle can run code.  "
            "If the file is whole and you trust it, convert it once, in a throw-away environment, by\n"
            '  python -c "import sys, torch; from safetensors.torch import save_file; '
            "s = torch.load(sys.argv[1], map_location='cpu', weights_only=False)['state_dict']; "
            'save_file({k: v.clone() for k, v in s.items()}, sys.argv[2])" model.ckpt model.safetensors\n'
            f"and give model.safetensors.  The reader said: {error}"
        ) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds no state dict; give the model's own checkpoint")
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def rename(name: str, table: Mapping[str, str]) -> str | None:
    """A tensor's name after moving its module, the longest that the table knows; None when it knows none."""
    module = name
    while module and module not in table:
        module = module.rpartition(".")[0]
    return table[module] + name[len(module) :] if module else None


def _add(table: Table, theirs: str, ours: str, parts: Table) -> None:
    table.update({f"{theirs}.{their_part}": f"{ours}.{our_part}" for their_part, our_part in parts.items()})


def _convert(state: Mapping[str, Tensor], table: Table, target: nn.Module, what: str) -> State:
    """Rename, then demand exactly the tensors of `target`, in its order and with its shapes."""
    expected = target.state_dict()
    theirs = {rename(name, table): name for name in state}
    if left := [name for name in state if rename(name, table) not in expected]:
        raise KeyError(f"{what}: the checkpoint has tensors that the configuration has not: {_some(left)}")
    if absent := [name for name in expected if name not in theirs]:
        raise KeyError(f"{what}: the checkpoint lacks tensors that the configuration has: {_some(absent)}")
    converted = {}
    for name, goal in expected.items():
        tensor = state[theirs[name]]
        if goal.ndim == 2 and tensor.shape[2:] == (1, 1):  # projections: a 1x1 convolution is a matrix
            tensor = tensor[:, :, 0, 0]
        if tensor.shape != goal.shape:
            shapes = f"shape {tuple(tensor.shape)}, the configuration asks for {tuple(goal.shape)}"
            raise ValueError(f"{what}: {theirs[name]} has {shapes}; give the checkpoint's own configuration")
        converted[name] = tensor.contiguous()
    return converted


def _part(state: Mapping[str, Tensor], part: str) -> State:
    """One network of a whole checkpoint, its prefix removed; without the prefix, the state is the network."""
    prefix = PARTS[part]
    inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name: tensor for name, tensor in (inside or state).items() if not name.startswith("loss.")}


def _heads(unet_config: Mapping, width: int) -> int:
    """Number of attention heads of a level with `width` channels (CompVis: -1 means not given)."""
    heads, head_width = (unet_config.get(key, -1) for key in ("num_heads", "num_head_channels"))
    if (heads == -1) == (head_width == -1):
        raise ValueError("unet_config: give either num_heads or num_head_channels, the other -1 or absent")
    if width % (heads if head_width == -1 else head_width):
        raise ValueError(f"unet_config: {width} channels cannot be split evenly into attention heads")
    return heads if head_width == -1 else width // head_width


def _check_settings(where: str, config: Mapping, required: Iterable[str], widths: str | None = None) -> None:
    """Refuse a configuration that is incomplete or asks for a network without a counterpart."""
    if absent := [key for key in required if key not in config]:
        raise ValueError(f"{where}: {_some(absent)} missing; copy the section of the model's configuration")
    refused = [key for key, value in FIXED.items() if widths and config.get(key, value) != value]
    if widths and config[widths][0] != 1:  # CompVis's first convolution has the base width, not the level's
        refused.append(widths)
    for key in refused:
        raise ValueError(f"{where}: {key} = {config[key]!r} has no counterpart in diffusers' model")


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dive_lib.compvis")
    parser.add_argument("part", choices=["first-stage"])
    parser.add_argument("source", type=Path, help="CompVis checkpoint, .ckpt or .safetensors")
    parser.add_argument("folder", type=Path, help="for diffusion_pytorch_model.safetensors and config.json")
    parser.add_argument("--config", type=Path, help="JSON: ddconfig, embed_dim, n_embed (default: vq-f8's)")
    options = parser.parse_args(arguments)
    config = vq_first_stage_config(**(read_json(options.config) if options.config else VQ_F8))
    state = convert_vq_first_stage(load_compvis_state(options.source), config)
    with atomic_path(options.folder / "diffusion_pytorch_model.safetensors") as path:
        save_file(state, path, metadata={"format": "pt"})
    write_json(options.folder / "config.json", {"_class_name": "VQModel", **config})
    print(f"{options.folder}: {sum(tensor.numel() for tensor in state.values()) / 1e6:.2f}M parameters")


if __name__ == "__main__":
    main()
