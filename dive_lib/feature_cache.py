"""Features on disk, keyed by everything that determines them.

A file holds one stage of one set of images: <folder>/<hash>.safetensors, whose JSON header is the description that
was hashed: backbone, weights, noise mode, time steps, condition, images, pooling, device and versions. A file is used
only if its whole description is the one asked for, so features of another configuration are never met; what is
missing is computed, all missing stages in one pass.
"""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

from dive_lib.checkpoint import fingerprint, load_tensors, save_tensors
from dive_lib.first_stage import device
from dive_lib.paths import shorten
from dive_lib.side_by_side import cut, in_pieces

VERSIONS = ("torch", "diffusers", "transformers")
BATCHES = 4  # in one process, of those that work side by side
FORMAT = 1  # raise it when the code of the features changes what they are


class FeatureCache:
    """folder: where files go. batch: images per pass; features do not depend on it beyond rounding."""

    def __init__(self, folder: Path | str, batch: int = 64):
        self.folder, self.batch = Path(folder), batch

    def features(self, backbone, images: torch.Tensor, t: int | Sequence[int] = 0,
                 stages: Sequence[str] | None = None, *, condition=None, side: int | None = None,
                 label: str = "features") -> dict[str, torch.Tensor]:
        """{stage: (n, C, h, w)} on the CPU for images (n, 3, H, W) in [-1, 1].

        backbone: `DenoiserFeatures` or one of `comparison_backbones`. condition: as the backbone takes it, one row
        or text for every image, or None. side: maps larger than this are reduced to it by averaging; 1 pools all.
        """
        stages = backbone.stages if stages is None else tuple(stages)
        if condition is not None and len(condition) != len(images):
            raise ValueError(f"{len(condition)} conditions for {len(images)} images; give one for each")
        described = self._describe(backbone, images, t, condition, side)
        found = {stage: self._read(described | {"stage": stage}) for stage in stages}
        missing = [stage for stage in stages if found[stage] is None]
        if missing:
            computed = self._compute(backbone, images, t, missing, condition, side, label)
            for stage in missing:
                own = described | {"stage": stage}
                save_tensors(self.path(own), {"features": computed[stage]}, own)
            found |= computed
        return found

    def path(self, described: dict) -> Path:
        """The file of a description."""
        return self.folder / f"{fingerprint(described)}.safetensors"

    def _describe(self, backbone, images, t, condition, side) -> dict:
        times = [t] if isinstance(t, int) else list(t)
        given = condition if condition is None or isinstance(condition, torch.Tensor) else list(condition)
        return {"format": FORMAT, "backbone": backbone.identity, "t": times, "side": side,
                "images": [list(images.shape), fingerprint(images)],
                "condition": None if given is None else fingerprint(given),
                "device": device(), "versions": {name: version(name) for name in VERSIONS}}

    def _read(self, described: dict) -> torch.Tensor | None:
        path = self.path(described)
        if not path.exists():
            return None
        try:
            tensors, stored = load_tensors(path)
        except Exception as error:  # safetensors raises errors of several types for damaged files
            raise ValueError(f"{shorten(path)}: damaged ({error}); delete it, it will be computed again") from error
        return tensors["features"] if stored == described else None

    def _compute(self, backbone, images, t, stages, condition, side, label) -> dict[str, torch.Tensor]:
        def computed(own: range) -> dict[str, torch.Tensor]:
            """Of some batches, for one after the other would start a process each."""
            batches = [slice(start, start + self.batch) for start in own[::self.batch]]
            maps = [backbone.features(images[batch].to(device()), t, stages,
                                      None if condition is None else condition[batch]) for batch in batches]
            return {stage: torch.cat([reduced(m[stage], side).cpu() for m in maps]) for stage in stages}

        parts = in_pieces(computed, cut(len(images), BATCHES * self.batch), label)
        # Laid out as they come from a file: what reads maps with another order of axes sums them in another order.
        return {stage: torch.cat([part[stage] for part in parts]).contiguous() for stage in stages}


def reduced(features: torch.Tensor, side: int | None) -> torch.Tensor:
    """Maps (B, C, h, w) averaged to at most side x side; None leaves them."""
    if side is None or features.shape[-1] <= side:
        return features
    return F.adaptive_avg_pool2d(features, side)
