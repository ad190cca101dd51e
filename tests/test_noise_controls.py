"""Controls of the fixed noise: what is linear in the latents, and what the latents themselves give."""

import pytest
import torch

from dive_lib import noise_controls
from dive_lib.feature_cache import FeatureCache
from tests.test_denoiser_features import layout
from tests.test_probes import probe_data


def parts(count=300, width=6):
    generator = torch.Generator().manual_seed(0)
    return {split: torch.randn(count, width, generator=generator) for split in ("train", "val")}


def test_a_linear_map_is_explained_whatever_its_scale_and_noise_is_not():
    x = parts()
    matrix = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    assert noise_controls.linear_share(x, {split: 7 + 1e-3 * own @ matrix for split, own in x.items()}) > 99.9
    generator = torch.Generator().manual_seed(2)
    noise = {split: torch.randn(300, 4, generator=generator) for split in x}
    assert noise_controls.linear_share(x, noise) < 5
    half = {split: own @ matrix / (own @ matrix).std(0) + noise[split] for split, own in x.items()}
    assert noise_controls.linear_share(x, half) == pytest.approx(50, abs=12)


def test_shares_and_rows_of_a_backbone(tmp_path):
    data, backbone = probe_data(), layout("ddpm")
    shares = noise_controls.linear_shares(backbone, [0, 999], data, FeatureCache(tmp_path))
    assert list(shares) == [0, 999] and all(0 <= share <= 100 for share in shares.values())
    rows = noise_controls.latent_rows(backbone, [8], data)
    assert list(rows) == ["all places", "averaged over the image", "random map to 8 numbers"]
    assert all(0 <= value <= 100 for value in rows.values())
    latents = noise_controls.clean_latents(backbone, data.photos["val"].images, batch=3)
    torch.testing.assert_close(latents, backbone.denoiser.encode(data.photos["val"].images).flatten(1))
