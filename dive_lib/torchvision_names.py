"""torchvision's names of published weights, turned into those of our networks.

vit, swin   into `classifiers.ClassTokenTransformer` and `classifiers.Swin`, which are transformers' networks: names
            are replaced, and the one matrix of queries, keys and values becomes three
in_order    into `classifiers.AlexNet` and `ResNet`, whose layers have other names but the same order

Compared with torchvision's source (torchvision/models/vision_transformer.py and swin_transformer.py of version 0.29):
both Swins number the positions within a window alike and merge patches in the same order, so nothing is permuted.
"""

import re
from collections.abc import Callable, Mapping, Sequence

import torch

Rules = Sequence[tuple[str, str | Callable[[re.Match], str]]]

VIT: Rules = (
    (r"^class_token$", "vit.embeddings.cls_token"),
    (r"^conv_proj\.", "vit.embeddings.patch_embeddings.projection."),
    (r"^encoder\.pos_embedding$", "vit.embeddings.position_embeddings"),
    (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"vit.layers.\1."),
    (r"^encoder\.ln\.", "vit.layernorm."),
    (r"^heads\.head\.", "classifier."),
    (r"\.ln_1\.", ".layernorm_before."),
    (r"\.ln_2\.", ".layernorm_after."),
    (r"\.self_attention\.in_proj_", ".attention.qkv_proj."),
    (r"\.self_attention\.out_proj\.", ".attention.o_proj."),
    (r"\.mlp\.(linear_1|0)\.", ".mlp.fc1."),  # the published files have the older names linear_1 and linear_2
    (r"\.mlp\.(linear_2|3)\.", ".mlp.fc2."),
)


def _stage(match: re.Match) -> str:
    """torchvision counts blocks and the merging after them in one list: 1 stage 0, 2 its merging, 3 stage 1, ..."""
    number = int(match[1])
    return f"swin.encoder.layers.{(number - 1) // 2}.{'blocks' if number % 2 else 'downsample'}."


SWIN: Rules = (
    (r"^features\.0\.0\.", "swin.embeddings.patch_embeddings.projection."),
    (r"^features\.0\.2\.", "swin.embeddings.norm."),
    (r"^features\.([1-9]\d*)\.", _stage),
    (r"^norm\.", "swin.layernorm."),
    (r"^head\.", "classifier."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.qkv\.", ".attention.qkv_proj."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"\.attn\.relative_position_bias_table$", ".attention.relative_position_bias.relative_position_bias_table"),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
)


def vit(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of torchvision's VisionTransformer under the names of `classifiers.ClassTokenTransformer`."""
    return _renamed(given, VIT)


def swin(given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of torchvision's SwinTransformer (the first version's) under the names of `classifiers.Swin`."""
    # The index of relative positions follows from the window; transformers does not keep it.
    return _renamed({name: tensor for name, tensor in given.items()
                     if not name.endswith(".relative_position_index")}, SWIN)


def _renamed(given: Mapping[str, torch.Tensor], rules: Rules) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in given.items():
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        if ".qkv_proj." in name:
            parts = zip("qkv", tensor.chunk(3))  # rows: of the queries, the keys, the values
            found |= {f"network.{name.replace('qkv_proj', f'{letter}_proj')}": part for letter, part in parts}
        else:
            found[f"network.{name}"] = tensor
    return found


def in_order(given: Mapping[str, torch.Tensor], own: Sequence[str]) -> dict[str, torch.Tensor]:
    """Weights under the names `own`: layers correspond in their order, tensors within a layer by name.

    Raises ValueError that gives both numbers of layers where they differ.
    """
    theirs, ours = _layers(given), list(dict.fromkeys(name.rpartition(".")[0] for name in own))
    if len(theirs) != len(ours):
        raise ValueError(f"{len(theirs)} layers, not {len(ours)}")
    return {f"{prefix}.{name}": tensor for prefix, layer in zip(ours, theirs) for name, tensor in layer.items()}


def _layers(given: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """[{"weight": tensor, ...}, ...]."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in given.items():
        prefix, _, name = key.rpartition(".")
        layers.setdefault(prefix, {})[name] = tensor
    return list(layers.values())
