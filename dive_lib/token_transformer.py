"""The token transformer: layout encoder of the latent diffusion model and body of the layout prior.

It is the pre-norm encoder of x_transformers in the form in which CompVis's latent-diffusion uses it, so that
published weights fit (`dive_lib.compvis.convert_token_transformer`):

    h = tokens + positions
    h = h + attention(norm(h))       inner width heads * head_width, whatever `width` is
    h = h + feedforward(norm(h))     Linear, GELU, Linear
    out = norm(h)

Sixteen layers of width 512 (the encoder of the COCO layout model) have 50.41 million
parameters, positions apart.
"""

import torch
import torch.nn.functional as F
from torch import nn

from dive_lib.sequence_linear import use_sequence_linear


class Attention(nn.Module):
    """Multi-head self-attention with its own pre-normalisation: (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int, heads: int, head_width: int, dropout: float = 0.0):
        super().__init__()
        inner = heads * head_width
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, head_width)
            for project in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """Two linear maps around a GELU, with their own pre-normalisation: (B, L, width) -> (B, L, width)."""

    def __init__(self, width: int, factor: int, dropout: float = 0.0):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, width * factor)
        self.contract = nn.Linear(width * factor, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.contract(F.gelu(self.expand(self.norm(x)))))


class Layer(nn.Module):
    """One encoder layer: attention, then feed-forward, each added to its input."""

    def __init__(self, width: int, heads: int, head_width: int, feedforward: int, dropout: float):
        super().__init__()
        self.attention = Attention(width, heads, head_width, dropout)
        self.feedforward = FeedForward(width, feedforward, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(x)
        return x + self.feedforward(x)


class TokenTransformer(nn.Module):
    """Pre-norm transformer encoder over a sequence of token embeddings.

    width        channels of a token
    layers       number of encoder layers
    heads        attention heads; head_width channels each (the product need not equal `width`)
    length       longest sequence: an int gives learnable absolute positions, None gives none
    feedforward  widening factor of the feed-forward part
    dropout      applied to the output of each attention and feed-forward part while training
    final_norm   LayerNorm on the output (CompVis: yes)
    position_std of the drawn positions
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int = 8,
        head_width: int = 64,
        length: int | None = None,
        feedforward: int = 4,
        dropout: float = 0.0,
        final_norm: bool = True,
        position_std: float = 0.02,
    ):
        super().__init__()
        self.width, self.length = width, length
        self.register_parameter("positions", None)
        if length is not None:
            self.positions = nn.Parameter(torch.randn(length, width) * position_std)
        self.layers = nn.ModuleList(
            Layer(width, heads, head_width, feedforward, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width) if final_norm else nn.Identity()
        use_sequence_linear(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, width) -> (B, L, width), L at most `length`.

        Raises ValueError when the sequence is longer than the table of positions or has another width."""
        if x.ndim != 3 or x.shape[-1] != self.width:
            raise ValueError(f"expected token embeddings (B, L, {self.width}), got {tuple(x.shape)}")
        if self.positions is not None:
            if x.shape[1] > self.length:
                raise ValueError(
                    f"{x.shape[1]} tokens, but the model has {self.length} positions: "
                    "build it with a larger `length`"
                )
            x = x + self.positions[: x.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)
