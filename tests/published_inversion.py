"""Runs of the published classification loop, recorded by the original program (`fixtures/dive_classification`)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dive_lib.dit import DiT, load_published
from dive_lib.inversion import cumulative_order
from dive_lib.inversion_config import InversionConfig
from dive_lib.objective import Pairs

TRACES = ("l2_lr0.05", "cosine_lr0.05", "continuous")


@dataclass
class Published:
    """model: the small DiT. latents (3, 4, 8, 8). pairs: 50. errors (3, 10, 50): of all classes on all pairs."""

    model: DiT
    latents: torch.Tensor
    pairs: Pairs
    errors: torch.Tensor


@dataclass
class Recording:
    """One trace file: `fields[name][i]` is the array of image i, `config` the settings of the same loop here."""

    config: InversionConfig
    loops: int
    fields: dict[str, list[torch.Tensor]]

    @property
    def start(self) -> torch.Tensor:
        """(3, 1, 1, d) initial embeddings."""
        return torch.stack(self.fields["init"])[:, None, None]

    @property
    def order(self) -> torch.Tensor:
        """(loops, 50) order of the pairs; the published program sets its seed anew for every image."""
        first, *others = self.fields["permutation"]
        assert all(torch.equal(first, other) for other in others)
        return cumulative_order(first)

    @property
    def published_cost(self) -> int:
        """Forward-equivalents of one image: every pair forward, backward and in the monitor, in every loop."""
        return self.loops * 3 * len(self.config.timesteps)


def read_published(folder: Path) -> Published:
    inputs = read_arrays(folder / "inputs.npz")
    pairs = Pairs(inputs["timesteps"], inputs["noises"], torch.empty(len(inputs["timesteps"]), 0))
    return Published(load_published(folder / "transformer"), inputs["x0"], pairs,
                     read_arrays(folder / "enumeration.npz")["errors"])


def read_recording(folder: Path, name: str) -> Recording:
    arrays = read_arrays(folder / f"trace_{name}.npz")
    fields = {key.rpartition("_")[0]: [arrays[f"{key.rpartition('_')[0]}_{i}"] for i in range(3)]
              for key in arrays if key.endswith("_0")}
    loops, accumulation = int(arrays["cfg_loops"]), int(arrays["cfg_accum"])
    batch = int(arrays["cfg_bs"]) * accumulation
    per_loop = len(fields["permutation"][0][0]) // batch
    discrete = bool(arrays["cfg_discrete"])
    config = InversionConfig(
        steps=loops * per_loop, batch=batch, accumulation=accumulation, lr=float(arrays["cfg_lr"]), t_interval=20,
        fixed_pairs=True, in_vocabulary=discrete, metric=str(arrays["cfg_metric"]), exclude_none=True, monitor_pairs=0,
        monitor_every=per_loop, monitor_start=False, monitor_nearest=discrete, memo_states=0)
    return Recording(config, loops, fields)


def read_arrays(path: Path) -> dict:
    with np.load(path) as arrays:
        return {name: torch.from_numpy(arrays[name]) if arrays[name].dtype.kind != "U" else str(arrays[name])
                for name in arrays.files}
