"""Why a probe reads more under one fixed noise the larger t is: a hypothesis in parts, and its controls.

Where all images get one noise, the network's input at a large t is this noise and a little of the image. To first
order the features are then a constant plus a linear map of the clean latent z:

    f(sqrt(abar) z + sqrt(1 - abar) eps) = f(sqrt(1 - abar) eps) + sqrt(abar) J z + ...,

and a probe, which standardises, loses nothing by the factor. So it would read the latent itself, through a map that
has learned nothing. Then

-  features are the more linear in z, the larger t is (`linear_share`);
-  random linear maps of z serve as well as the network's features at a large t (`latent_rows`);
-  the time step alone does not do it: without noise (mode "ddim_inv" of `feature_noise`) there is no such rise.

What keeps places apart in features that are averaged over the image? If it is that the noise, and so J, is another one
at every place, a fixed noise that is the same everywhere (mode "uniform") shows no rise; else the network tells places
apart by itself, as by its borders.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from dive_lib import probes
from dive_lib.feature_cache import FeatureCache, reduced
from dive_lib.first_stage import device
from dive_lib.probe_data import ProbeData

LATENT_SIDE = 16  # larger latents are averaged to this, so that a ridge on all places stays small
STRENGTH = 1e-3  # of the ridge from latents to features, as a share of the number of images
DRAWS = 3  # of the random maps


@torch.no_grad()
def clean_latents(backbone, images: torch.Tensor, batch: int = 64) -> torch.Tensor:
    """(n, d) latents without noise of images (n, 3, H, W) in [-1, 1], all places of at most LATENT_SIDE x
    LATENT_SIDE."""
    parts = [reduced(backbone.denoiser.encode(part.to(device())).float(), LATENT_SIDE).cpu()
             for part in images.split(batch)]
    return torch.cat(parts).flatten(1)


def linear_share(latents: Mapping[str, torch.Tensor], features: Mapping[str, torch.Tensor]) -> float:
    """Percent of the features' variance on validation images that a linear map of the latents, fitted on training
    images, explains: mean over the features (n, d) of 1 - squared error / variance, at least 0.

    Both are {"train": ..., "val": ...}.
    """
    def standardised(parts: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        train = parts["train"].flatten(1).double()
        mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
        return [(parts[split].flatten(1).double() - mean) / std for split in ("train", "val")]

    (x, x_val), (y, y_val) = standardised(latents), standardised(features)
    weights = torch.linalg.solve(x.T @ x + STRENGTH * len(x) * torch.eye(x.shape[1], dtype=x.dtype), x.T @ y)
    error, spread = ((y_val - x_val @ weights) ** 2).mean(0), y_val.var(0, unbiased=False).clamp(min=1e-12)
    return 100 * float((1 - error / spread).clamp(min=0).mean())


def linear_shares(backbone, times: Sequence[int], data: ProbeData, cache: FeatureCache) -> dict[int, float]:
    """{t: `linear_share` of the averaged maps, mean over the stages} of the photos."""
    latents = {split: clean_latents(backbone, data.photos[split].images) for split in ("train", "val")}
    shares = {}
    for t in times:
        maps = {split: cache.features(backbone, data.photos[split].images, t, side=data.side, label=f"t = {t}")
                for split in latents}
        shares[t] = round(float(np.mean([linear_share(latents, {split: maps[split][stage] for split in maps})
                                         for stage in backbone.stages])), 4)
    return shares


def latent_rows(backbone, widths: Sequence[int], data: ProbeData) -> dict[str, float]:
    """Accuracy of the probe on validation images, in percent, on the clean latents: on all of them, averaged over the
    image, and on random linear maps of them to so many numbers (mean of DRAWS)."""
    splits = {split: clean_latents(backbone, data.photos[split].images) for split in ("train", "val")}

    def accuracy(parts: Mapping[str, torch.Tensor]) -> float:
        correct, _ = probes.classify(parts["train"], data.photos["train"].labels, parts["val"],
                                     data.photos["val"].labels, len(data.classes))
        return 100 * float(correct.mean())

    channels = backbone.denoiser.encode(data.photos["val"].images[:1].to(device())).shape[1]
    rows = {"all places": accuracy(splits), "averaged over the image": accuracy(
        {split: own.unflatten(1, (channels, -1)).mean(2) for split, own in splits.items()})}
    for width in widths:
        found = []
        for draw in range(DRAWS):
            matrix = torch.randn(splits["val"].shape[1], width, generator=torch.Generator().manual_seed(draw))
            found.append(accuracy({split: own @ matrix for split, own in splits.items()}))
        rows[f"random map to {width} numbers"] = float(np.mean(found))
    return {name: round(value, 4) for name, value in rows.items()}
