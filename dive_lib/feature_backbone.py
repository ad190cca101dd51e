"""What every frozen network offers whose features are probed: one interface, one check of the stages asked for."""

import functools
from collections.abc import Sequence

import torch
from torch import nn

from dive_lib.checkpoint import architecture, fingerprint


class FeatureBackbone:
    """name: in tables. stages: its block outputs in the order in which they run, channels: {stage: channels}.

    cross_stages: names of its cross-attention maps. network: what has the weights. A backbone with time steps also
    has `noise`; one whose average over an image says nothing has `pool_side`; an expert of a head has `joins`.
    """

    name: str
    stages: tuple[str, ...]
    channels: dict[str, int]
    cross_stages: tuple[str, ...] = ()
    network: nn.Module

    @functools.cached_property
    def weights(self) -> str:
        """Hash of the architecture and all weights."""
        return fingerprint(architecture(self.network), *self.network.state_dict().values())

    @property
    def identity(self) -> dict:
        """Everything about the backbone that determines its features, as plain values."""
        return {"backbone": self.name, "weights": self.weights}

    def features(self, images: torch.Tensor, t: int | Sequence[int] = 0, stages: Sequence[str] | None = None,
                 condition=None) -> dict[str, torch.Tensor]:
        """{stage: (B, C, h, w) float32} for images (B, 3, H, W) in [-1, 1], without gradient.

        t: a time step, or several, and condition: ignored by a backbone without them. stages: by default all block
        outputs. Raises ValueError for an unknown stage.
        """
        raise NotImplementedError

    def asked(self, stages: Sequence[str] | None) -> tuple[str, ...]:
        """The stages of a call of `features`; None are all block outputs. Raises ValueError for unknown ones."""
        stages, known = self.stages if stages is None else tuple(stages), (*self.stages, *self.cross_stages)
        unknown = [stage for stage in stages if stage not in known]
        if unknown or not stages:
            raise ValueError(f"{self.name}: no stage {', '.join(unknown) or 'asked for'}; choose of {', '.join(known)}")
        return stages
