"""Layout-conditional generation as Table VI judges it: images of two layout LDMs for the layouts of a split.

Both models draw images for the same layouts from the same noises. The network that reads the images is the profile's
number classifier, so they are brought into its format first.
"""

from functools import partial

import torch

from dive_lib import paths, stage_scratch
from dive_lib.checkpoint import fingerprint, load_tensors, save_tensors
from dive_lib.dataset import Dataset
from dive_lib.first_stage import FirstStage
from dive_lib.latents import LayoutTokens, load_images
from dive_lib.layout_ldm import LayoutLDM
from dive_lib.provenance import cores
from dive_lib.side_by_side import side_by_side


def layouts_and_images(data: Dataset, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, N, 5) and images (n, 3, S, S) in [-1, 1] of up to `count` scenes, evenly spaced over a split."""
    layouts = getattr(data, split)
    chosen = torch.linspace(0, len(layouts) - 1, min(count, len(layouts))).long()
    return LayoutTokens(layouts, data.grid).tokens[chosen], load_images(layouts, chosen)


def draw(model: LayoutLDM, first_stage: FirstStage, tokens: torch.Tensor, *, steps: int, seed: int, batch: int = 100,
         label: str = "samples") -> torch.Tensor:
    """Images (n, 3, S, S) in [-1, 1] for layouts (n, N, 5), by DDIM without guidance, in 256 levels like real ones.

    The noises depend on seed and batch alone, so two models start from the same ones. Batches are kept in the scratch
    folder until the stage has ended well: a stopped call continues with those that are missing.
    """
    identity = fingerprint(*model.state_dict().values(), *first_stage.state_dict().values(), tokens, model.config,
                           {"steps": steps, "seed": seed, "batch": batch})
    folder, parts = paths.scratch() / "layout_samples" / identity, tokens.split(batch)
    stage_scratch.keep(folder)

    files = [folder / f"{number:05d}.safetensors" for number in range(len(parts))]

    @torch.no_grad()
    def write(number: int) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        latents = model.sample(parts[number].to(model.vocabulary.class_table.device), generator, steps=steps)
        images = first_stage.decode(latents).clamp(-1, 1).cpu()
        save_tensors(files[number], {"images": ((images + 1) * 127.5).round().to(torch.uint8)})

    missing = [number for number, file in enumerate(files) if not file.exists()]
    side_by_side([partial(write, number) for number in missing], cores(), label, "images",
                 sizes=[len(parts[number]) for number in missing])
    return torch.cat([load_tensors(file)[0]["images"] for file in files]).float() / 127.5 - 1
