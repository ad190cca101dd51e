"""What models train on: latents of a split, computed once and kept on disk, and its layouts as tokens."""

from pathlib import Path

import torch

from dive_lib import paths
from dive_lib.checkpoint import fingerprint, load_tensors, save_tensors
from dive_lib.coco import CocoLayouts
from dive_lib.decoding import stacked
from dive_lib.first_stage import FirstStage
from dive_lib.layout import LayoutGrid, shuffle_slots
from dive_lib.side_by_side import cut, in_pieces


def cached_latents(first_stage: FirstStage, layouts: CocoLayouts, directory: Path, *, batch: int = 64,
                   shard: int = 1024, label: str = "latents") -> torch.Tensor:
    """(n, 4, h, w) standardised latents of all images of a split, in its order.

    Written in shards of `shard` images under a name made of the first stage's weights and the images' ids, files and
    sizes, so that a stopped run continues and another first stage, split, folder or shard never meets an old cache.
    """
    images = [(image.id, paths.shorten(image.path), image.path.stat().st_size) for image in layouts.split.images]
    identity = fingerprint(*first_stage.state_dict().values(), layouts.image_size, images)
    files = {own: Path(directory) / f"{identity}-{own.start:07d}-{own.stop:07d}.safetensors"
             for own in cut(len(layouts), shard)}

    def write(own: range) -> None:
        save_tensors(files[own], {"latents": _encode(first_stage, layouts, own, batch)})

    in_pieces(write, [own for own, file in files.items() if not file.exists()], label)
    return torch.cat([load_tensors(file)[0]["latents"] for file in files.values()])


def load_images(layouts: CocoLayouts, indices) -> torch.Tensor:
    """(B, 3, S, S) images in [-1, 1]."""
    return stacked(layouts.load_image, indices)


@torch.no_grad()
def _encode(first_stage, layouts, indices, batch):
    device = first_stage.latent_mean.device
    parts = [first_stage.encode(load_images(layouts, indices[k:k + batch]).to(device)).cpu()
             for k in range(0, len(indices), batch)]
    return torch.cat(parts)


class LayoutTokens:
    """The layouts of a split as tokens. Objects come in a new order at every draw.

    Images with more objects than slots give another random subset of them at every draw.
    """

    def __init__(self, layouts: CocoLayouts, grid: LayoutGrid):
        self.layouts, self.grid = layouts, grid
        first = torch.Generator().manual_seed(0)
        self.tokens = torch.stack([grid.encode(*layouts.draw(i, first)) for i in range(len(layouts))])
        self.overfull = {i for i in range(len(layouts)) if len(layouts.class_ids(i)) > grid.slots}

    def __len__(self) -> int:
        return len(self.tokens)

    def draw(self, indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """(B, N, 5) tokens of images indices (B,), slots shuffled."""
        tokens = self.tokens[indices].clone()
        for row, index in enumerate(indices.tolist()):
            if index in self.overfull:
                tokens[row] = self.grid.encode(*self.layouts.draw(index, generator))
        return shuffle_slots(tokens, generator)
