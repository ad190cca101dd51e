"""Layout-conditional generation as Table VI judges it: images of two layout LDMs for the layouts of a split.

Both models draw images for the same layouts from the same noises. The network that reads the images is the profile's
number classifier, so they are brought into its format first.
"""

import torch

from dive_lib import paths, stage_scratch
from dive_lib.checkpoint import fingerprint, load_tensors, save_tensors
from dive_lib.dataset import Dataset
from dive_lib.first_stage import FirstStage
from dive_lib.latents import LayoutTokens, load_images
from dive_lib.layout_ldm import LayoutLDM
from dive_lib.side_by_side import cut, in_pieces


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
    folder, device = paths.scratch() / "layout_samples" / identity, model.vocabulary.class_table.device
    stage_scratch.keep(folder)
    files = {own: folder / f"{own.start // batch:05d}.safetensors" for own in cut(len(tokens), batch)}

    @torch.no_grad()
    def write(own: range) -> None:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + own.start // batch)
        latents = model.sample(tokens[own.start:own.stop].to(device), generator, steps=steps)
        images = first_stage.decode(latents).clamp(-1, 1).cpu()
        save_tensors(files[own], {"images": ((images + 1) * 127.5).round().to(torch.uint8)})

    in_pieces(write, [own for own, file in files.items() if not file.exists()], label)
    return torch.cat([load_tensors(file)[0]["images"] for file in files.values()]).float() / 127.5 - 1
