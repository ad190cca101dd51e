"""Layout-conditional generation as Table VI judges it: another layout LDM beside the pipeline's, and images of both.

Both models draw images for the same layouts from the same noises. The network that reads the images is the profile's
number classifier, so they are brought into its format first.
"""

import torch
import torch.nn.functional as F

from dive_lib import paths, stage_scratch
from dive_lib.checkpoint import fingerprint, load_tensors, save_tensors
from dive_lib.dataset import Dataset
from dive_lib.first_stage import FirstStage, device
from dive_lib.latents import LayoutTokens, cached_latents, load_images
from dive_lib.layout_ldm import LayoutLDM, layout_ldm_loss
from dive_lib.progress import Progress
from dive_lib.train import TrainingConfig, train


def obtain(data: Dataset, first_stage: FirstStage, architecture: dict, config: TrainingConfig, *, dropout: dict,
           focus: dict, kind: str = "l2", label: str = "layout LDM") -> tuple[LayoutLDM, list[float]]:
    """Trains a layout LDM on the training split and returns it with the loss of every step.

    architecture: keyword arguments of LayoutLDM without the grid. dropout, focus, kind: of `layout_ldm_loss`. A stopped
    training continues. Raises ValueError where architecture and latents do not fit.
    """
    torch.manual_seed(config.seed)
    model = LayoutLDM(data.grid, **architecture)
    latents = cached_latents(first_stage, data.train, paths.scratch() / "latents", label="training latents")
    if latents.shape[1:] != model.latent_shape:
        raise ValueError(f"the layout LDM diffuses {model.latent_shape}, the first stage's latents are "
                         f"{tuple(latents.shape[1:])}; change in_channels and sample_size of the architecture")
    layouts = LayoutTokens(data.train, data.grid)
    loss_of = layout_ldm_loss(latents, layouts, config.batch_size, dropout=dropout, focus=focus, kind=kind)
    losses = train(model.to(device()), loss_of, config, scratch=paths.scratch() / "layout_ldm", label=label,
                   identity=fingerprint(latents, layouts.tokens, model.config, dropout, focus, kind))
    return model, losses


def layouts_and_images(data: Dataset, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, N, 5) and images (n, 3, S, S) in [-1, 1] of up to `count` scenes, evenly spaced over a split."""
    layouts = getattr(data, split)
    chosen = torch.linspace(0, len(layouts) - 1, min(count, len(layouts))).long()
    return LayoutTokens(layouts, data.grid).tokens[chosen], load_images(layouts, chosen)


@torch.no_grad()
def draw(model: LayoutLDM, first_stage: FirstStage, tokens: torch.Tensor, *, steps: int, seed: int, batch: int = 100,
         label: str = "samples") -> torch.Tensor:
    """Images (n, 3, S, S) in [-1, 1] for layouts (n, N, 5), by DDIM without guidance, in 256 levels like real ones.

    The noises depend on seed and batch alone, so two models start from the same ones. Batches are kept in the scratch
    folder until the stage has ended well: a stopped call continues with those that are missing.
    """
    identity = fingerprint(*model.state_dict().values(), *first_stage.state_dict().values(), tokens, model.config,
                           {"steps": steps, "seed": seed, "batch": batch})
    folder, parts = paths.scratch() / "layout_samples" / identity, []
    stage_scratch.keep(folder)
    with Progress(len(tokens), label, unit="images") as progress:
        for number, part in enumerate(tokens.split(batch)):
            path = folder / f"{number:05d}.safetensors"
            if not path.exists():
                generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
                latents = model.sample(part.to(model.vocabulary.class_table.device), generator, steps=steps)
                images = first_stage.decode(latents).clamp(-1, 1).cpu()
                save_tensors(path, {"images": ((images + 1) * 127.5).round().to(torch.uint8)})
            parts.append(load_tensors(path)[0]["images"])
            progress.update(len(part))
    return torch.cat(parts).float() / 127.5 - 1


def in_format_of(images: torch.Tensor, channels: int, side: int) -> torch.Tensor:
    """Colour images (n, 3, S, S) as (n, channels, side, side): grey where channels is 1, reduced by area.

    What `backbones.GreyResNetFeatures` does for the numbers' residual network.
    """
    images = images.mean(1, keepdim=True) if channels == 1 else images
    return F.interpolate(images, (side, side), mode="area")
