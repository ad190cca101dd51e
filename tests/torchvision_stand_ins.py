"""Small networks that compute what torchvision's do, under its names of weights: for the loaders of `paper`.

Written from the papers and the names, another way than transformers' networks, which they are compared with.
"""

from collections import OrderedDict

import torch
from torch import nn

SIDE = 224


class VitBlock(nn.Module):
    """Under the names of the published files, which are older than torchvision's present ones."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(OrderedDict(linear_1=nn.Linear(width, 4 * width), gelu=nn.GELU(),
                                             linear_2=nn.Linear(4 * width, width)))

    def forward(self, x):
        y = self.ln_1(x)
        x = x + self.self_attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Vit(nn.Module):
    def __init__(self, classes: int, patch: int, width: int, layers: int, heads: int):
        super().__init__()
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.conv_proj = nn.Conv2d(3, width, patch, patch)
        self.encoder = nn.Module()
        self.encoder.pos_embedding = nn.Parameter(torch.zeros(1, (SIDE // patch) ** 2 + 1, width))
        self.encoder.layers = nn.Sequential(OrderedDict(
            (f"encoder_layer_{k}", VitBlock(width, heads)) for k in range(layers)))
        self.encoder.ln = nn.LayerNorm(width, eps=1e-6)
        self.heads = nn.Sequential(OrderedDict(head=nn.Linear(width, classes)))

    def forward(self, images):
        patches = self.conv_proj(images).flatten(2).mT
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), patches], 1) + self.encoder.pos_embedding
        return self.heads(self.encoder.ln(self.encoder.layers(tokens))[:, 0])


class SwinAttention(nn.Module):
    """Maps (B, H, H, C); windows do not look beyond the image's edge after a shift."""

    def __init__(self, width: int, heads: int, window: int, shift: int):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        rows, columns = (axis.flatten() for axis in torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij"))
        down, right = (axis[:, None] - axis + window - 1 for axis in (rows, columns))
        self.register_buffer("relative_position_index", (down * (2 * window - 1) + right).flatten())

    def windows(self, x):
        """(B, H, H, C) -> (B, windows, places, C)."""
        number = x.shape[1] // self.window
        return x.unflatten(2, (number, self.window)).unflatten(1, (number, self.window)).transpose(2, 3).flatten(
            3, 4).flatten(1, 2)

    def forward(self, x):
        side, number = x.shape[1], x.shape[1] // self.window
        shift = self.shift if side > self.window else 0
        place = torch.arange(side)
        region = (place >= side - self.window).long() + (place >= side - shift).long() if shift else place * 0
        region = self.windows((3 * region[:, None] + region)[None, :, :, None])[..., 0]  # (1, windows, places)
        apart = (region[..., :, None] != region[..., None, :])[:, :, None]
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(2, 3) for part in
                   self.qkv(self.windows(x.roll((-shift, -shift), (1, 2)))).chunk(3, -1))
        bias = self.relative_position_bias_table[self.relative_position_index]
        scores = q @ k.mT / q.shape[-1] ** 0.5 + bias.unflatten(0, (self.window ** 2, -1)).permute(2, 0, 1)
        mixed = scores.masked_fill(apart, float("-inf")).softmax(-1) @ v
        mixed = self.proj(mixed.transpose(2, 3).flatten(3))  # (B, windows, places, C)
        mixed = mixed.unflatten(2, (self.window, -1)).unflatten(1, (number, -1)).transpose(2, 3)
        return mixed.flatten(3, 4).flatten(1, 2).roll((shift, shift), (1, 2))


class SwinBlock(nn.Module):
    def __init__(self, width: int, heads: int, window: int, shift: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = SwinAttention(width, heads, window, shift)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0), nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Merging(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.reduction, self.norm = nn.Linear(4 * width, 2 * width, bias=False), nn.LayerNorm(4 * width)

    def forward(self, x):
        parts = [x[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class Channels(nn.Module):
    """(B, C, H, W) -> (B, H, W, C)."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class Swin(nn.Module):
    def __init__(self, classes: int, patch: int, width: int, depths, heads, window: int):
        super().__init__()
        parts = [nn.Sequential(nn.Conv2d(3, width, patch, patch), Channels(), nn.LayerNorm(width))]
        for stage, (depth, number) in enumerate(zip(depths, heads)):
            parts += [Merging(width * 2 ** (stage - 1))] if stage else []
            parts.append(nn.Sequential(*[SwinBlock(width * 2 ** stage, number, window, k % 2 * (window // 2))
                                         for k in range(depth)]))
        last = width * 2 ** (len(depths) - 1)
        self.features, self.norm, self.head = nn.Sequential(*parts), nn.LayerNorm(last), nn.Linear(last, classes)

    def forward(self, images):
        return self.head(self.norm(self.features(images)).mean((1, 2)))


def drawn(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with weights that are all drawn, so that none can be lost or mixed up unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.4 + (0.2 if tensor.dim() == 1 else -0.2))
    return network.eval()
