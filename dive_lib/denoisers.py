"""The denoisers trained here as backbones of features: the layout LDM and the class-conditional DiT.

An untrained copy of each is the control of every probe: the same architecture with freshly drawn weights. The layout
LDM's copy keeps the trained first stage, so that only what the denoiser learned differs.
"""

import torch
import torch.nn.functional as F

from dive_lib.denoiser_features import Denoiser
from dive_lib.dit import DiT
from dive_lib.first_stage import FirstStage
from dive_lib.layout_ldm import LayoutLDM

UNTRAINED_STD = 0.05  # of what DiT initialises to zero; see untrained_dit


def unet_blocks(unet) -> dict[str, torch.nn.Module]:
    """The blocks of a diffusers UNet2DConditionModel by stage, in the order in which they run."""
    down = {f"down{k}": block for k, block in enumerate(unet.down_blocks)}
    return down | {"mid": unet.mid_block} | {f"up{k}": block for k, block in enumerate(unet.up_blocks)}


def unet_channels(unet) -> dict[str, int]:
    """Channels of the blocks' outputs by stage."""
    widths = list(unet.config.block_out_channels)
    up = {f"up{k}": width for k, width in enumerate(reversed(widths))}
    return {f"down{k}": width for k, width in enumerate(widths)} | {"mid": widths[-1]} | up


def unet_attentions(unet) -> dict[str, list[torch.nn.Module]]:
    """Cross-attention modules of the up blocks that have them, by stage."""
    found = {f"up{k}": [module for name, module in block.named_modules() if name.endswith("attn2")]
             for k, block in enumerate(unet.up_blocks)}
    return {stage: modules for stage, modules in found.items() if modules}


class LayoutDenoiser(Denoiser):
    """The layout LDM on the latents of its first stage. Conditions: layout tokens (B, slots, 5); empty: all [none]."""

    def __init__(self, ldm: LayoutLDM, first_stage: FirstStage, name: str = "layout LDM"):
        super().__init__()
        self.ldm, self.first_stage, self.name = ldm, first_stage, name
        self.blocks, self.channels = unet_blocks(ldm.unet), unet_channels(ldm.unet)
        self.attentions, self.schedule = unet_attentions(ldm.unet), ldm.schedule
        self.tokens = ldm.context(ldm.vocabulary(ldm.grid.empty(1).to(ldm.vocabulary.class_table.device))).shape[1]

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.first_stage.encode(images)

    def context(self, condition: torch.Tensor | None, batch: int) -> torch.Tensor:
        tokens = self.ldm.grid.empty(batch) if condition is None else condition
        if tuple(tokens.shape) != (batch, self.ldm.grid.slots, 5):
            raise ValueError(f"{self.name}: {batch} layouts of {self.ldm.grid.slots} objects have tokens "
                             f"({batch}, {self.ldm.grid.slots}, 5), got {tuple(tokens.shape)}")
        return self.ldm.context(self.ldm.vocabulary(tokens.to(self.ldm.vocabulary.class_table.device)))

    def predict_noise(self, z: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.ldm.predict_noise(z, t, context)


class DiTDenoiser(Denoiser):
    """A DiT; its stages are its transformer blocks. Conditions: labels (B,); empty: the null class.

    A DiT on pixels has its own size and channels: images are made grey where it has one channel (mean of the three)
    and reduced to its size by area, since that is what it was trained on. One on latents gets the image as it is,
    through its encoder.
    """

    def __init__(self, dit: DiT, encoder: torch.nn.Module, name: str = "DiT"):
        super().__init__()
        self.dit, self.encoder, self.name = dit, encoder, name
        blocks = dit.transformer.transformer_blocks
        self.blocks = {f"block{k}": block for k, block in enumerate(blocks)}
        self.channels = {stage: dit.vocabulary.width for stage in self.blocks}
        self.schedule = dit.schedule

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        channels, side, _ = self.dit.latent_shape
        return self.encoder.encode(in_format_of(images, channels, side) if channels < 4 else images)  # < 4: pixels

    def context(self, condition: torch.Tensor | None, batch: int) -> torch.Tensor:
        table = self.dit.vocabulary.class_table
        labels = self.dit.grid.none_tokens.expand(batch) if condition is None else condition
        if tuple(labels.shape) != (batch,):
            raise ValueError(f"{self.name}: {batch} images need labels ({batch},), got {tuple(labels.shape)}")
        return table[self.dit.grid.encode(labels).flatten().to(table.device)]

    def predict_noise(self, z: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return self.dit.predict_noise(z, t, context)

    def as_map(self, output: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        side = latents.shape[-1] // self.dit.transformer.config.patch_size
        return output.mT.unflatten(2, (side, side))


def in_format_of(images: torch.Tensor, channels: int, side: int) -> torch.Tensor:
    """Images (n, C, S, S) as a small network takes them, (n, channels, side, side): grey (mean of the colours) where
    they have more channels, reduced by area. Images that fit are given back as they are."""
    images = images if images.shape[1] == channels else images.mean(1, keepdim=True)
    return images if images.shape[-1] == side else F.interpolate(images, (side, side), mode="area")


def untrained_layout_ldm(ldm: LayoutLDM, seed: int = 0) -> LayoutLDM:
    """The same architecture with drawn weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LayoutLDM(**ldm.config).to(ldm.vocabulary.class_table.device)


def untrained_dit(dit: DiT, seed: int = 0) -> DiT:
    """The same architecture with drawn weights. DiT's modulation starts at zero, and its blocks as the identity, which
    would make all stages the same; it is drawn too, with the standard deviation UNTRAINED_STD."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        copy = DiT(**dit.config)
        with torch.no_grad():
            for block in copy.transformer.transformer_blocks:
                block.norm1.linear.weight.normal_(std=UNTRAINED_STD)
                block.norm1.linear.bias.normal_(std=UNTRAINED_STD)
    return copy.to(dit.vocabulary.class_table.device)
