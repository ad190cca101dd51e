"""Position-aware cross-attention: a pixel looks at an object the more, the more it lies in the object's box.

To the content logit q(p) . k(object) comes a position logit

    b(p, object) = sum over c in {x1, y1, x2, y2} of  g_c(p) . e_c(object),

linear in the object's coordinate embeddings e_c, with one learned vector g_c(p) per pixel and coordinate. The
vectors start such that b is a soft indicator of the box. A small model learns faster with it what the coordinates mean
(`python -m benchmarks.architecture_ablation`); the published model has no such term.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dive_lib.vocabulary import LayoutVocabulary


class PositionAttention(nn.Module):
    """Attention processor for diffusers; the context's last 4 d channels are the object's coordinate embeddings.

    side: height and width of the feature map. channels: of the feature map.
    """

    def __init__(self, vocabulary: LayoutVocabulary, side: int, channels: int, softness: float = 3.0):
        super().__init__()
        self.grid_query = nn.Parameter(soft_box_vectors(vocabulary, side, softness))
        self.grid_value = nn.Parameter(torch.randn(1, side * side, channels) * 0.02)

    def forward(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        boxes = encoder_hidden_states[..., -self.grid_query.shape[1]:]  # (B, L, 4 d)
        bias = boxes @ self.grid_query.T.to(boxes.dtype)  # (B, L, pixels)
        heads = attn.heads
        query, key, value = (
            project(states).unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, heads, pixels or L, head width)
            for project, states in ((attn.to_q, hidden_states), (attn.to_k, encoder_hidden_states),
                                    (attn.to_v, encoder_hidden_states)))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.mT[:, None])
        mixed = mixed.transpose(1, 2).flatten(2)
        return attn.to_out[0](mixed) + self.grid_value


def use_position_attention(unet: nn.Module, vocabulary: LayoutVocabulary) -> None:
    """Replaces every cross-attention processor of a diffusers UNet (attn2) by a PositionAttention."""
    sides = {}
    levels = len(unet.config.block_out_channels)
    for name in unet.attn_processors:
        place, index = name.split(".")[0], name.split(".")[1]
        level = {"down_blocks": int(index) if index.isdigit() else 0, "mid_block": levels - 1,
                 "up_blocks": levels - 1 - int(index) if index.isdigit() else 0}[place]
        sides[name] = unet.config.sample_size // 2**level
    processors = dict(unet.attn_processors)
    for name in processors:
        if ".attn2." in name:
            attention = unet.get_submodule(name.removesuffix(".processor"))
            processors[name] = PositionAttention(vocabulary, sides[name], attention.to_out[0].out_features)
    unet.set_attn_processor(processors)


@torch.no_grad()
def soft_box_vectors(vocabulary: LayoutVocabulary, side: int, softness: float, ridge: float = 1e-3) -> torch.Tensor:
    """(side^2, 4 d) vectors g: ridge regression of g_c(p) . table_c[k] onto the soft box edge log s(k, p).

    For x1, s is a logistic function of (pixel centre - coordinate) / softness in image pixels, and accordingly for
    the other edges, so that their sum is a soft indicator of the box. [none] gets -0.5: an object without a box
    attracts every pixel a little, and so receives a gradient when inversion starts from [none].
    """
    grid = vocabulary.grid
    centres = (torch.arange(side) + 0.5) * grid.image_size / side
    coordinates = torch.arange(grid.bins) * grid.pixels_per_bin
    inside = (centres[:, None] - coordinates[None]) / softness  # (side, bins), positive right of the edge
    vectors = []
    for field in range(1, 5):
        sign = 1 if field <= 2 else -1
        target = F.pad(F.logsigmoid(sign * inside).clamp(min=-4), (0, 1), value=-0.5)  # (side, bins + 1)
        table = vocabulary.table(field)
        scale = table.square().mean() * len(table)
        gram = table.T @ table + ridge * scale * torch.eye(table.shape[1])
        line = torch.linalg.solve(gram, table.T @ target.T).T  # (side, d)
        along_x = field in (1, 3)
        vectors.append(line.repeat(side, 1) if along_x else line.repeat_interleave(side, 0))
    return torch.cat(vectors, dim=1)
