"""The scales that a head reads: features of a frozen backbone, and of an expert, for the images of a split.

With a cache they are computed once for all images and kept in memory; without one, which is the way for hundreds of
thousands of large images, they are computed for every batch.
"""

from collections.abc import Callable, Sequence

import torch

from dive_lib import stage_groups
from dive_lib.checkpoint import fingerprint
from dive_lib.feature_cache import FeatureCache
from dive_lib.first_stage import device

AT_ONCE = 128  # images that a head reads together, of features that are known


class Scales:
    """Features of some images. images: with `load_images` and a length. group: a group of stages of a denoiser, the
    name of one stage, or "" for all stages as they are. cache: FeatureCache, or None to compute every batch anew.
    pixels: all images, where they are decoded already.

    expert: a backbone whose `joins` are joined. identity: what the images are (see `vermouth_data.identity`).
    standardise: cached channels get mean 0 and deviation 1 over all images and places, which small heads need; like:
    the Scales whose statistics are taken (those of the training images), by default its own.

    attention: cross-attention maps join the scales of a group (`stage_groups.scales`) where the backbone has any.
    prompt: (indices, their pixels) -> texts, the backbone's condition; None is the empty one. prompted: its identity.
    batch: images that one pass of the networks takes, so the most to `take` at once without a cache.
    """

    def __init__(self, backbone, images, *, t: int, group: str, identity: str, cache: FeatureCache | None = None,
                 pixels: torch.Tensor | None = None, expert=None, standardise: bool = False,
                 like: "Scales | None" = None, attention: bool = False, prompt: Callable | None = None,
                 prompted: str = "", batch: int = AT_ONCE):
        self.at_once = AT_ONCE if cache is not None else batch
        self.backbone, self.images, self.t, self.group, self.expert = backbone, images, t, group, expert
        self.prompt = prompt
        self.stages = stages_of(backbone, group)
        if attention and group in stage_groups.GROUPS:
            self.stages += tuple(backbone.cross_stages)
        self.joins = () if expert is None else tuple(expert.joins)[:count(backbone, group)]
        self.identity = fingerprint(backbone.identity, expert.identity if expert else "", identity, t, group,
                                    list(self.stages), prompted, len(images), standardise,
                                    like.identity if like else "")
        self.maps: tuple[list, list] | None = None
        if cache is not None:
            pixels = images.load_images(range(len(images))) if pixels is None else pixels
            condition = prompt(range(len(images)), pixels) if prompt else None
            own = cache.features(backbone, pixels, t, self.stages, condition=condition)
            adapted = cache.features(expert, pixels, 0, self.joins) if expert else {}
            self.maps = self._arrange(own, adapted)
        if standardise:
            if self.maps is None:
                raise ValueError("features are standardised from a cache only; set standardise to false")
            self.statistics = like.statistics if like else [[_statistics(m) for m in part] for part in self.maps]
            self.maps = tuple([(m - mean) / spread for m, (mean, spread) in zip(part, own)]
                              for part, own in zip(self.maps, self.statistics))

    def __len__(self) -> int:
        return len(self.images)

    def take(self, indices: Sequence[int] | torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(scales, expert's maps), each coarse to fine [(B, C, h, w)], of images `indices`."""
        if self.maps is not None:
            indices = torch.as_tensor(indices)
            return tuple([scale[indices].to(device()) for scale in part] for part in self.maps)
        pixels = self.images.load_images(indices).to(device())
        condition = self.prompt(indices, pixels) if self.prompt else None
        own = self.backbone.features(pixels, self.t, self.stages, condition)
        return self._arrange(own, self.expert.features(pixels, 0, self.joins) if self.expert else {})

    @property
    def channels(self) -> tuple[list[int], list[int]]:
        """Channels of the scales and of the expert's maps."""
        own, adapted = self.take([0])
        return [scale.shape[1] for scale in own], [scale.shape[1] for scale in adapted]

    def _arrange(self, own: dict, adapted: dict) -> tuple[list, list]:
        scales = stage_groups.scales(self.group, own, self.backbone.stages) if self.group in stage_groups.GROUPS else \
            list(own.values())
        return scales, [adapted[stage] for stage in self.joins]


def stages_of(backbone, group: str) -> tuple[str, ...]:
    """The stages that a group, a single stage or "" (all) stands for. Raises ValueError for what the backbone lacks."""
    if group in stage_groups.GROUPS:
        return stage_groups.stages_of(group, backbone.stages)
    if group and group not in backbone.stages:
        raise ValueError(f"{backbone.name}: no stage or group {group!r}; choose one of {', '.join(backbone.stages)}, "
                         f"{', '.join(stage_groups.GROUPS)}")
    return (group,) if group else tuple(backbone.stages)


def count(backbone, group: str) -> int:
    """The number of scales of a group."""
    if group in stage_groups.GROUPS:
        return len(stage_groups.channels(group, backbone))
    return len(stages_of(backbone, group))


def _statistics(maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return maps.mean((0, 2, 3), keepdim=True), maps.std((0, 2, 3), keepdim=True) + 1e-6
