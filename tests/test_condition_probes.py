"""Conditions and noise around one cell, and layouts as conditions."""

import numpy as np
import pytest
import torch

from dive_lib import class_models, condition_probes, dataset, image_encoder, layout_conditions, paths, probe_grid
from dive_lib.denoiser_features import DenoiserFeatures
from dive_lib.denoisers import DiTDenoiser, LayoutDenoiser
from dive_lib.feature_cache import FeatureCache
from dive_lib.feature_noise import Noise
from dive_lib.files import write_json
from dive_lib.first_stage import FirstStage
from dive_lib.layout_ldm import LayoutLDM
from dive_lib.probe_data import of_classes
from tests import class_world, tiny
from tests.test_denoiser_features import VQ, layout
from tests.test_probes import probe_data

SETTINGS = {"resamples": 20, "seed": 0}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A few scenes described as a profile's data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIVE_RUNS", str(tmp_path_factory.mktemp("runs")))
        root = dataset.make_scenes(paths.runs("smoke") / "data", {"train": 6, "val": 4, "test": 12}, seed=0)
        yield dataset.describe("smoke", root, {s: s for s in dataset.SPLITS}, image_size=64, bins=17, slots=4,
                               strict=True, evaluation=12, ablation=4, tuning=2, seed=0)


def test_noise_modes_walks_and_several_time_steps(tmp_path):
    data, cache = probe_data(), FeatureCache(tmp_path)
    made = condition_probes.noise_features(layout(), 300, "up1", data, cache, several=[100, 600], inversion_steps=2)
    assert list(made) == ["free noise", "ddpm: fixed noise", "ddim_inv: no noise", "DDIM inversion", "walk 600 to 300",
                          "2 time steps joined"]
    assert made["2 time steps joined"]["train"].shape == (12, 16)
    tables = [own["test"] for own in list(made.values())[:5]]
    assert not any(torch.equal(tables[0], other) for other in tables[1:])
    rows = condition_probes.classification_rows(made, {s: p.labels for s, p in data.photos.items()}, 2, **SETTINGS)
    first = rows["free noise"]
    assert first["difference"] == 0 and all(0 <= row["accuracy"] <= 100 for row in rows.values())


def test_groups_join_their_stages(tmp_path):
    made = condition_probes.group_features(layout(), 300, probe_data(), FeatureCache(tmp_path))
    assert {group: own["val"].shape[1] for group, own in made.items()} == {
        "mid+up": 40, "up": 24, "down": 24, "down+mid": 24, "down+mid+up": 64, "mid": 16}


def test_layouts_of_every_kind(scenes):
    ids = scenes.subsets["evaluation"][:3]
    found = scenes.grid.empty(3)
    true = layout_conditions.layouts("true", scenes, ids, found)
    assert layout_conditions.layouts("empty", scenes, ids, found) is None
    assert layout_conditions.layouts("dive", scenes, ids, found) is found
    constant = layout_conditions.layouts("constant", scenes, ids, found)
    assert constant.shape == true.shape == (3, 4, 5) and torch.equal(constant[0], constant[2])
    objects = [len(scenes.test.class_ids(scenes.test.index_of(i))) for i in ids]
    assert [(layout[:, 0] < 10).sum().item() for layout in true] == objects
    with pytest.raises(ValueError, match="condition 'random' is unknown; choose one of empty"):
        layout_conditions.layouts("random", scenes, ids, found)


def test_label_maps_are_the_scenes_masks(scenes):
    ids = scenes.subsets["evaluation"][:4]
    maps = layout_conditions.label_maps(scenes, ids)
    assert maps.shape == (4, 64, 64)
    for image_id, own in zip(ids, maps):
        classes = set((1 + scenes.test.class_ids(scenes.test.index_of(image_id))).tolist())
        assert set(own.unique().tolist()) == classes | {0}


@pytest.mark.parametrize("segmentation", [[[8, 4, 24, 4, 24, 20, 8, 20]], {"size": [64, 64], "counts": "runs"}])
def test_polygons_and_plain_run_lengths_are_read(scenes, monkeypatch, segmentation):
    expected = torch.zeros(64, 64, dtype=torch.long)
    expected[4:20, 8:24] = 3
    if isinstance(segmentation, dict):  # column by column: first those outside the box
        columns = (expected.T.flatten() > 0).int()
        counts = torch.unique_consecutive(columns, return_counts=True)[1]
        segmentation = segmentation | {"counts": counts.tolist()}
    (image_id,) = ids = scenes.subsets["evaluation"][:1]
    entry = {"image_id": image_id, "category_id": 3, "iscrowd": 0, "area": 256, "segmentation": segmentation}
    monkeypatch.setattr(type(scenes), "annotations", lambda self, split: {"annotations": [entry]})
    assert torch.equal(layout_conditions.label_maps(scenes, ids)[0], expected)


def test_inverted_layouts_come_from_a_detection_run(tmp_path):
    write_json(tmp_path / "spec.json", {"image_ids": [3, 5], "batch": 2})
    for image_id in (3, 5):
        write_json(tmp_path / f"{image_id:012d}.json", {"image_id": image_id, "tokens": [[image_id] * 5] * 4})
    ids, found = layout_conditions.inverted(tmp_path, 1)
    assert ids == [3] and found.tolist() == [[[3] * 5] * 4]


def test_rows_of_layout_conditions(scenes, tmp_path):
    torch.manual_seed(0)
    ldm = LayoutLDM(scenes.grid, tiny.VOCABULARY, tiny.ENCODER, tiny.UNET, position_attention=True)
    backbone = DenoiserFeatures(LayoutDenoiser(ldm, FirstStage(VQ, 4)))
    ids = scenes.subsets["evaluation"]
    rows = condition_probes.layout_rows(backbone, 300, "up1", scenes, ids, scenes.grid.empty(len(ids)),
                                        FeatureCache(tmp_path), **SETTINGS)
    assert list(rows) == [f"{kind}{more}" for kind in layout_conditions.KINDS for more in ("", " + attention")]
    assert [row["leaks"] for row in rows.values()] == [False] * 6 + [True] * 2
    assert rows["empty"] == rows["dive"], "DIVE found nothing here: the same condition, the same numbers"
    assert all(np.isfinite(row["mIoU"]) for row in rows.values())


def test_a_class_models_own_images_under_each_condition(tmp_path, monkeypatch):
    world = class_world.make(tmp_path, monkeypatch)
    numbers = of_classes(world, 1, side=2, seed=0)
    assert numbers.summary() == {"photos_train": 6, "photos_val": 12, "photos_test": 12}
    assert numbers.photos["train"].labels.tolist() == list(range(6)) and numbers.classes == class_world.CLASSES
    model = DiTDenoiser(class_models.load(tmp_path / "runs" / "dit"), image_encoder.load())
    backbone = DenoiserFeatures(model, Noise("ddim_inv"))
    made = condition_probes.label_features(backbone, 100, "block1", numbers, FeatureCache(tmp_path / "cache"))
    shapes = {kind: own["test"].shape for kind, own in made.items()}
    assert shapes == dict.fromkeys(("none", "constant", "true class"), (12, 16 * 4))
    first = numbers.photos["test"].labels == 0  # of which the true class is the constant one
    same = (made["true class"]["test"] == made["constant"]["test"]).all(1)
    assert torch.equal(same, first) and not torch.equal(made["none"]["test"][first], made["constant"]["test"][first])
    cells = probe_grid.measure(backbone, [0, 100], numbers, FeatureCache(tmp_path / "cache"), ("classification",))
    assert [(c.t, c.stage) for c in cells] == [(t, s) for t in (0, 100) for s in backbone.stages]
