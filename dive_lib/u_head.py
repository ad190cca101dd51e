"""Vermouth's U-head: scales of a frozen denoiser, and of an adapted expert, fused into a vector of the text space.

From the finest scale to the coarsest: 1 x 1 convolution, group norm, SiLU; average-pooled to the next scale's size and
joined with it; at the end an attention pooling as CLIP's (published code: src/model/modules.py SimpleFuse,
SBIR/sbir_model.py). The answer is the class whose text embedding has the largest cosine similarity. `u_head_scheme`
draws it, and what stands around it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

WIDTHS = {"pico": (256, 256, 256, 256), "tiny": (1024, 768, 512, 256), "small": (1024, 768, 512, 256)}
ADD_WIDTH = 512
FINE = 2  # scales whose second part has a 3 x 3 convolution (fusion "small")
FUSIONS = (*WIDTHS, "add")
SCALE = 4.6052  # ln 100, which the published retrieval code multiplies by without taking its exponential
RETRIEVAL = {"scale": SCALE, "temperature": 0.2}
CLASSIFICATION = {"scale": 1.0, "temperature": 0.2}
SEGMENTATION = {"scale": 1.0, "temperature": 0.02}
PUBLISHED_NAMES = ("low_res_conv", "mid_res_conv", "high_res_conv", "highest_res_conv")  # coarse to fine


class Adapter(nn.Sequential):
    """Bottleneck on a frozen expert's map: C -> C/4 -> C, no bias, no residual."""

    def __init__(self, channels: int, reduction: int = 4):
        super().__init__(nn.Conv2d(channels, channels // reduction, 1, bias=False), nn.ReLU(),
                         nn.Conv2d(channels // reduction, channels, 1, bias=False))


class FuseBlock(nn.Module):
    """1 x 1 convolution, group norm, SiLU. second: side of the kernel of another such part, which is added before one
    more SiLU (fusion "small"); 0 for none."""

    def __init__(self, before: int, width: int, *, second: int = 0, groups: int = 32):
        super().__init__()
        self.stage1 = self._part(before, width, 1, groups)
        self.stage2 = self._part(width, width, second, groups) if second else None

    @staticmethod
    def _part(before: int, width: int, side: int, groups: int) -> nn.Sequential:
        convolution = nn.Conv2d(before, width, side, padding=side // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight)
        return nn.Sequential(convolution, nn.GroupNorm(min(groups, width), width), nn.SiLU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stage1(x)
        return x if self.stage2 is None else F.silu(x + self.stage2(x))


class HighToLow(nn.Module):
    """Maps, coarse to fine, fused into the coarsest: [(B, C_k, h_k, w_k)] -> (B, widths[0], h_0, w_0). second: blocks
    have a second part, of 3 x 3 convolutions on the two finest scales."""

    def __init__(self, channels: Sequence[int], widths: Sequence[int], *, second: bool = False):
        super().__init__()
        finer = [*widths[1:], 0]  # what arrives from the next finer scale
        sides = [(3 if k >= len(widths) - FINE else 1) if second else 0 for k in range(len(widths))]
        self.blocks = nn.ModuleList(FuseBlock(c + f, w, second=side)
                                    for c, f, w, side in zip(channels, finer, widths, sides))

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        x = None
        for block, own in zip(reversed(self.blocks), reversed(maps)):
            if x is not None:
                own = torch.cat([own, F.adaptive_avg_pool2d(x, own.shape[2:])], 1)
            x = block(own)
        return x


class Added(nn.Module):
    """The simple fusion: 1 x 1 convolutions to one width, resized to `side` x `side`, averaged."""

    def __init__(self, channels: Sequence[int], width: int, side: int):
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(c, width, 1, bias=False) for c in channels)
        self.side = side

    def forward(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        size = (self.side, self.side)
        resized = [F.interpolate(convolution(own), size, mode="bilinear", antialias=True)
                   for convolution, own in zip(self.convolutions, maps)]
        return torch.stack(resized).mean(0)


class AttentionPool(nn.Module):
    """CLIP's pooling: the mean token asks all places. (B, C, side, side) -> (B, width)."""

    def __init__(self, channels: int, width: int, *, heads: int = 8, side: int = 4):
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(side * side + 1, channels) / channels**0.5)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, channels) for _ in range(3))
        self.c_proj = nn.Linear(channels, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.positional_embedding
        query, key, value = (project(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project, y in (
            (self.q_proj, x[:, :1]), (self.k_proj, x), (self.v_proj, x)))
        pooled = F.scaled_dot_product_attention(query, key, value)  # (B, heads, 1, C / heads)
        return self.c_proj(pooled.transpose(1, 2).flatten(1))


class UHead(nn.Module):
    """diffusion: channels of the denoiser's scales, coarse to fine (`stage_groups.channels`). embedding: width of the
    text space. fusion: one of FUSIONS. expert: channels of the expert's maps, which join the finest scales.
    side: of the map that is pooled. normalise: maps are scaled to unit length over channels before they are joined
    (published for classification, not for retrieval). widths: of the fused scales, by default those of `fusion`.
    """

    def __init__(self, diffusion: Sequence[int], embedding: int, *, fusion: str = "tiny", expert: Sequence[int] = (),
                 heads: int = 8, side: int = 4, normalise: bool = False, widths: Sequence[int] | None = None):
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"fusion {fusion!r} is unknown; choose one of {', '.join(FUSIONS)}")
        if len(expert) > len(diffusion):
            raise ValueError(f"an expert of {len(expert)} maps cannot join {len(diffusion)} scales")
        if widths is None and fusion != "add" and len(diffusion) > len(WIDTHS[fusion]):
            raise ValueError(f"fusion {fusion!r} has widths for {len(WIDTHS[fusion])} scales, got {len(diffusion)}; "
                             "give widths")
        self.config = {"diffusion": list(diffusion), "embedding": embedding, "fusion": fusion, "expert": list(expert),
                       "heads": heads, "side": side, "normalise": normalise,
                       "widths": None if widths is None else list(widths)}
        self.side, self.normalise = side, normalise
        self.adapters = nn.ModuleList(Adapter(c) for c in expert)
        skipped = len(diffusion) - len(expert)
        joined = [c + (expert[k - skipped] if k >= skipped else 0) for k, c in enumerate(diffusion)]
        if fusion == "add":
            width = (widths or (ADD_WIDTH,))[0]
            self.fuse = Added(joined, width, side)
        else:
            own = list(widths or WIDTHS[fusion][:len(joined)])
            width, self.fuse = own[0], HighToLow(joined, own, second=fusion == "small")
        self.pool = AttentionPool(width, embedding, heads=heads, side=side)

    def join(self, diffusion: Sequence[torch.Tensor], expert: Sequence[torch.Tensor] = ()) -> list[torch.Tensor]:
        """The denoiser's scales, each with the adapted expert's map of the same place: coarse to fine."""
        if len(expert) != len(self.adapters):
            raise ValueError(f"the head was built for {len(self.adapters)} maps of an expert, got {len(expert)}")
        maps, skipped = list(diffusion), len(diffusion) - len(expert)
        for k, (adapter, own) in enumerate(zip(self.adapters, expert), start=skipped):
            adapted = adapter(own)
            if adapted.shape[2:] != maps[k].shape[2:]:
                adapted = F.interpolate(adapted, maps[k].shape[2:], mode="bilinear", antialias=True)
            pair = [maps[k], adapted]
            maps[k] = torch.cat([F.normalize(m, dim=1) for m in pair] if self.normalise else pair, 1)
        return maps

    def forward(self, diffusion: Sequence[torch.Tensor], expert: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Scales [(B, C, h, w)], coarse to fine, and the expert's maps -> embeddings (B, width of the text space)."""
        fused = self.fuse(self.join(diffusion, expert))
        if fused.shape[2:] != (self.side, self.side):
            fused = F.adaptive_avg_pool2d(fused, self.side)
        return self.pool(fused)


def similarity_logits(embeddings: torch.Tensor, text: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """Cosine similarity of embeddings (..., d) to class texts (K, d), times `scale`: (..., K)."""
    return F.normalize(embeddings, dim=-1) @ F.normalize(text, dim=-1).T * scale


def text_loss(embeddings: torch.Tensor, text: torch.Tensor, labels: torch.Tensor, *, scale: float,
              temperature: float) -> torch.Tensor:
    """Cross entropy of the similarities divided by the temperature; a scalar. Labels (...,) as embeddings (..., d).

    scale, temperature: RETRIEVAL, CLASSIFICATION or SEGMENTATION, as published.
    """
    logits = similarity_logits(embeddings, text, scale=scale) / temperature
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten())


def from_published(state: dict[str, torch.Tensor], fusion: str) -> dict[str, torch.Tensor]:
    """Our names for the published ones of a head with four scales. fusion: "add" takes `add.*` and `add_pool.*`."""
    ours = {}
    part, pool = ("add", "add_pool") if fusion == "add" else ("fuse", "pool")
    inner = "convolutions" if fusion == "add" else "blocks"
    for name, tensor in state.items():
        head, _, rest = name.partition(".")
        if head == "adapters":
            index, _, layer = rest.partition(".adapter.")
            ours[f"adapters.{index}.{layer}"] = tensor
        elif head == pool:
            ours[f"pool.{rest}"] = tensor
        elif head == part:
            place, _, rest = rest.partition(".")
            ours[f"fuse.{inner}.{PUBLISHED_NAMES.index(place)}.{rest}"] = tensor
    return ours
