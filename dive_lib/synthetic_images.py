"""Images drawn from a DiT, written as an image folder: what a classifier learns the model's knowledge from."""

import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dive_lib.checkpoint import fingerprint
from dive_lib.class_images import write_image
from dive_lib.dit import DiT
from dive_lib.files import read_json, write_json
from dive_lib.side_by_side import cut, in_pieces


def draw_split(root: Path | str, split: str, model: DiT, encoder: nn.Module, per_class: int, *, steps: int, seed: int,
               batch: int = 500) -> Path:
    """Draws `per_class` images of every class by DDIM, without guidance, and returns the split's folder.

    The draws depend on seed, batch and per_class. A stopped call continues with the batches that are not complete;
    images of another model, its classes renamed, or another setting are replaced.
    """
    folder = Path(root) / split
    described = {"model": fingerprint(*model.state_dict().values()), "classes": model.grid.classes,
                 "per_class": per_class, "steps": steps, "seed": seed, "batch": batch}
    marker = folder / ".synthetic.json"
    if not (marker.exists() and read_json(marker) == described):
        shutil.rmtree(folder, ignore_errors=True)
        write_json(marker, described)
    classes = model.grid.classes
    labels = torch.arange(len(classes)).repeat(per_class)  # image k of all classes, then image k + 1
    device = model.vocabulary.class_table.device
    files = [folder / classes[c] / f"{k // len(classes):05d}.png" for k, c in enumerate(labels.tolist())]

    def write(own: range) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + own.start // batch)
        latents = model.sample(model.grid.encode(labels[own.start:own.stop]).to(device), generator, steps=steps)
        for file, image in zip(files[own.start:own.stop], encoder.decode(latents).clamp(-1, 1).cpu()):
            pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0)
            write_image(file, np.squeeze(pixels.numpy()))

    missing = [own for own in cut(len(files), batch) if not all(files[k].exists() for k in own)]
    in_pieces(write, missing, f"{split} images")
    return folder
