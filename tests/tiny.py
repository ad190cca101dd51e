"""Randomly initialised models of a few thousand parameters, for tests of the methods rather than of the numbers."""

import torch

from dive_lib.checkpoint import freeze
from dive_lib.dit import DiT
from dive_lib.layout import LayoutGrid
from dive_lib.layout_ldm import LayoutLDM
from dive_lib.layout_prior import LayoutPrior
from dive_lib.objective import Objective

GRID = LayoutGrid(("zero", "one", "two"), image_size=64, bins=17, slots=3)
VOCABULARY = {"width": 8, "shared_coordinates": False, "init": "sinusoid", "std": 0.3}
UNET = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "block_out_channels": [8, 16], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * 2, "up_block_types": ["CrossAttnUpBlock2D"] * 2,
        "attention_head_dim": 2, "norm_num_groups": 4}
TRANSFORMER = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_attention_heads": 2,
               "attention_head_dim": 8}
ENCODER = {"layers": 1, "heads": 2, "head_width": 4, "object_tokens": True, "width": 16}


def layout_ldm(position_attention: bool = True, seed: int = 0) -> LayoutLDM:
    torch.manual_seed(seed)
    encoder = ENCODER if position_attention else {"layers": 1, "heads": 2, "head_width": 4}
    return freeze(LayoutLDM(GRID, VOCABULARY, encoder, UNET, position_attention=position_attention))


def layout_prior(ldm: LayoutLDM, fields: str = "all") -> LayoutPrior:
    torch.manual_seed(1)
    return freeze(LayoutPrior(GRID, VOCABULARY, width=16, layers=1, heads=2, head_width=4, fields=fields)
                  .adopt(ldm.vocabulary))


def dit(classes: int = 4, seed: int = 0) -> DiT:
    """A DiT that is past its first step: as initialised, it predicts zero whatever the class."""
    torch.manual_seed(seed)
    model = DiT(classes, TRANSFORMER, std=0.5)
    with torch.no_grad():
        for parameter in model.transformer.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return freeze(model)


def objective(prior: bool = True, **settings) -> Objective:
    ldm = layout_ldm()
    return Objective(ldm, layout_prior(ldm) if prior else None, **settings)


def latents(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(5))


def layouts() -> torch.Tensor:
    """(3, 3, 5) layouts with two, one and no objects."""
    boxes = torch.tensor([[4.0, 8, 28, 40], [32, 12, 60, 60]])
    return torch.stack([GRID.encode(boxes, torch.tensor([0, 2])), GRID.encode(boxes[1:], torch.tensor([1])),
                        GRID.empty(1)[0]])
