"""Vermouth's groups of U-Net stages (`place_in_unet`; Figure 5): which blocks become the scales of a head.

A group turns block outputs into maps, coarse to fine. Channels of Stable Diffusion 1.5, with sizes at 512 px:

| group       | scales                                  | how                                                        |
|-------------|-----------------------------------------|------------------------------------------------------------|
| mid+up      | 1280@8, 1280@16, 1280@32, 960@64        | mid, up0, up1; the last two up outputs (640 + 320) joined  |
| up          | 1280@8, 1280@16, 640@32, 320@64         | all but the last halved bilinearly                         |
| down        | 1280@8, 1280@16, 640@32, 320@64         | all but the last doubled bilinearly                        |
| down+mid    | 1280@8, 1280@16, 640@32, 320@64         | as down, mid in the place of the last down output          |
| down+mid+up | 1280@8, 1920@16, 1600@32, 960@64        | equal sizes joined; at the coarsest the mean of three maps |
| mid         | 1280@8                                  | a single scale                                             |

With cross-attention maps (77 channels): 1280, 1357, 1357, 960 for mid+up: they join every scale but the coarsest, and
the finest only where its side is at most 16. A U-Net with L levels gets the same rules, and so L scales; where the
coarsest maps of down+mid+up differ in width, those as wide as mid are averaged and the others joined. A transformer's
blocks have one size: the first half counts as down, the block after it as mid, the rest as up, one scale for each.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from dive_lib.denoiser_features import CROSS

GROUPS = ("mid+up", "up", "down", "down+mid", "down+mid+up", "mid")
MOST_ATTENTION_SIDE = 16  # published: max_attn_size


def stages_of(group: str, stages: Sequence[str]) -> tuple[str, ...]:
    """The stages of a backbone that a group needs. stages: `backbone.stages`.

    Raises ValueError for an unknown group and for a backbone without blocks of these kinds.
    """
    if group not in GROUPS:
        raise ValueError(f"no group of stages {group!r}; choose one of {', '.join(GROUPS)}")
    kinds = _kinds(stages)
    wanted = group.split("+")
    chosen = tuple(stage for stage in stages if kinds.get(stage) in wanted)
    if group == "down+mid" and kinds[stages[0]] == "down" and "mid" in stages:  # mid replaces the last down output
        last = [stage for stage in chosen if kinds[stage] == "down"][-1]
        chosen = tuple(stage for stage in chosen if stage != last)
    if not chosen:
        raise ValueError(f"the group {group} needs a denoiser's blocks, but the stages are {', '.join(stages)}")
    return chosen


def scales(group: str, features: Mapping[str, torch.Tensor], stages: Sequence[str]) -> list[torch.Tensor]:
    """The group's maps [(B, C, h, w)], coarse to fine.

    features: at least the stages of `stages_of`; cross-attention maps among them join as described above.
    """
    own = {stage: features[stage] for stage in stages_of(group, stages)}
    maps = _transformer(own) if "mid" not in stages else _GATHER[group](own)
    cross = [features[stage] for stage in features if stage.startswith(CROSS)]
    for k in range(1, len(maps)):
        side = maps[k].shape[-1]
        fitting = [m for m in cross if m.shape[-1] == side and (k < len(maps) - 1 or side <= MOST_ATTENTION_SIDE)]
        maps[k] = torch.cat([maps[k], *fitting], 1)
    return maps


def channels(group: str, backbone, side: int = 64, *, attention: bool = False) -> list[int]:
    """Channels of the scales, coarse to fine, without running the network. side: of the latents in pixels."""
    stages = stages_of(group, backbone.stages)
    shapes = _sides(backbone.stages, side)
    names = stages + (tuple(backbone.cross_stages) if attention else ())
    shapes |= {CROSS + stage: at for stage, at in _attention_sides(backbone.stages, side).items()}
    empty = {stage: torch.empty(0, backbone.channels[stage], shapes[stage], shapes[stage]) for stage in names}
    return [scale.shape[1] for scale in scales(group, empty, backbone.stages)]


def _kinds(stages: Sequence[str]) -> dict[str, str]:
    blocks = [stage for stage in stages if stage.startswith("block")]
    if blocks:
        half = len(blocks) // 2
        return {stage: "down" if k < half else "mid" if k == half else "up" for k, stage in enumerate(blocks)}
    return {stage: stage.rstrip("0123456789") for stage in stages}


def _sides(stages: Sequence[str], side: int) -> dict[str, int]:
    """Side of every stage's map of a U-Net whose input has `side` pixels; of a transformer, `side` itself."""
    levels = sum(stage.startswith("down") for stage in stages)
    if not levels:
        return dict.fromkeys(stages, side)
    sides = {f"down{k}": side // 2 ** min(k + 1, levels - 1) for k in range(levels)}
    return sides | {"mid": side // 2 ** (levels - 1)} | {
        f"up{k}": side // 2 ** max(levels - 2 - k, 0) for k in range(levels)}


def _attention_sides(stages: Sequence[str], side: int) -> dict[str, int]:
    """Side of the cross-attention maps of each up block: that before its upsampler."""
    ups = [stage for stage in stages if stage.startswith("up")]
    return {stage: side // 2 ** (len(ups) - 1 - k) for k, stage in enumerate(ups)}


def _resize(features: torch.Tensor, factor: float) -> torch.Tensor:
    if not len(features):  # only the shape is asked for
        return features.new_empty(0, features.shape[1], *(int(n * factor) for n in features.shape[2:]))
    return F.interpolate(features, scale_factor=factor, mode="bilinear", align_corners=False)


def _transformer(own: dict) -> list[torch.Tensor]:
    return list(own.values())


def _mid(own: dict) -> list[torch.Tensor]:
    return [own["mid"]]


def _mid_up(own: dict) -> list[torch.Tensor]:
    ups = list(own.values())[1:]
    return [own["mid"], *ups[:-2], torch.cat(ups[-2:], 1)]


def _up(own: dict) -> list[torch.Tensor]:
    *ups, last = own.values()
    return [_resize(m, 0.5) for m in ups] + [last]


def _down(own: dict) -> list[torch.Tensor]:
    *downs, last = own.values()
    return [last] + [_resize(m, 2) for m in reversed(downs)]


def _everything(own: dict) -> list[torch.Tensor]:
    by_side: dict[int, list[torch.Tensor]] = {}
    for stage in (*(s for s in own if not s.startswith("down")), *(s for s in own if s.startswith("down"))):
        by_side.setdefault(own[stage].shape[-1], []).append(own[stage])
    coarsest, *finer = (by_side[side] for side in sorted(by_side))
    width = own["mid"].shape[1]
    alike = torch.stack([m for m in coarsest if m.shape[1] == width]).mean(0)
    first = torch.cat([alike, *(m for m in coarsest if m.shape[1] != width)], 1)
    return [first] + [torch.cat(maps, 1) for maps in finer]


_GATHER = {"mid+up": _mid_up, "up": _up, "down": _down, "down+mid": _down, "down+mid+up": _everything, "mid": _mid}
