"""A folder of class images and an untrained DiT that stand for the repository, for tests of classification runs."""

import numpy as np
import torch
from PIL import Image

from dive_lib import class_data, paths
from dive_lib.checkpoint import save_model
from dive_lib.dit import DiT

CLASSES = ("a", "b", "c", "d", "e", "f")
TRANSFORMER = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "patch_size": 4, "num_layers": 2,
               "num_attention_heads": 2, "attention_head_dim": 8}
PAIRS = {"t_low": 0, "t_high": 600, "t_interval": 100}
DIVE = {"method": "invert", "steps": 8, "batch": 2, "lr": 0.3, "init": "random", "fixed_pairs": True, "metric": "l2",
        "exclude_none": True, "monitor_pairs": 0, "monitor_every": 3, "monitor_start": False, "memo_states": 0}


def make(root, monkeypatch, per_class=2) -> class_data.ClassData:
    """Six classes of 8 x 8 noise images in three splits, and a model at runs/dit."""
    monkeypatch.setattr(paths, "ROOT", root)
    rng = np.random.default_rng(0)
    for split in class_data.SPLITS:
        for name in CLASSES:
            (root / "images" / split / name).mkdir(parents=True)
            for k in range(per_class):
                image = Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8))
                image.save(root / "images" / split / name / f"{k}.png")
    save_dit(root / "runs" / "dit")
    return class_data.describe("smoke", root / "images", dict(zip(class_data.SPLITS, class_data.SPLITS)), image_size=8,
                               channels=1, per_class={split: per_class for split in class_data.SPLITS}, encoder="")


def save_dit(folder, seed=0) -> None:
    """A DiT past its first step: as initialised, it predicts zero whatever the class."""
    torch.manual_seed(seed)
    model = DiT(CLASSES, TRANSFORMER, std=0.5)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    save_model(folder, model, model.config)
