"""The composed scenes: reproducible, valid, and with the structure that they promise."""

import numpy as np
import pytest
import torch
from pycocotools import mask as rle

from dive_lib import dataset, glyphs, latents, parameters, paths
from dive_lib.coco import read_split
from dive_lib.files import read_json
from dive_lib.first_stage import FirstStage
from dive_lib.scenes import SIZE, SceneObject, caption, draw_layout, render, write_split


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return glyphs.load(glyphs.export(tmp_path_factory.mktemp("data")), "val")


def layouts(labels, count=400):
    return [draw_layout(labels, np.random.default_rng(k)) for k in range(count)]


def test_boxes_are_even_inside_and_legal(digits):
    for objects in layouts(digits[1]):
        assert 1 <= len(objects) <= 4
        for item in objects:
            x1, y1, x2, y2 = item.box_xyxy
            assert 0 <= x1 < x2 <= SIZE and 0 <= y1 < y2 <= SIZE and not any(v % 2 for v in item.box_xyxy)
            assert digits[1][item.glyph] == item.class_id


def test_layouts_have_structure_worth_a_prior(digits):
    drawn = layouts(digits[1])
    pairs = [(a.class_id % 2, b.class_id % 2) for o in drawn for a in o for b in o if a is not b]
    assert np.mean([a == b for a, b in pairs]) > 0.6, "classes of one parity keep together"
    height = {k: np.mean([i.box_xyxy[3] - i.box_xyxy[1] for o in drawn for i in o if i.class_id == k]) for k in (0, 9)}
    assert height[9] > height[0] + 5, "the class decides the size"
    bottoms = [np.ptp([i.box_xyxy[3] for i in o]) for o in drawn]
    assert max(bottoms) <= 6, "objects share a ground line"
    overlapping = [o for o in drawn if any(a.box_xyxy[2] > b.box_xyxy[0] for a, b in zip(o, o[1:]))]
    assert 0.05 < len(overlapping) / len(drawn) < 0.6, "some are partly covered"


def test_shares_decide_how_many_digits_and_how_many_overlap(digits):
    rng = np.random.default_rng(0)
    drawn = [draw_layout(digits[1], rng, shares=(0, 0, 1, 0), covered=0) for _ in range(50)]
    assert {len(objects) for objects in drawn} == {3}
    assert not any(a.box_xyxy[2] > b.box_xyxy[0] + 2 for o in drawn for a, b in zip(o, o[1:]))


def test_masks_are_the_visible_parts(digits):
    front_and_back = [SceneObject(8, "red", 0, (10, 10, 40, 50)), SceneObject(8, "blue", 1, (20, 10, 50, 50))]
    pixels, masks = render(front_and_back, digits[0], np.random.default_rng(0))
    assert pixels.shape == (SIZE, SIZE, 3) and pixels.dtype == np.uint8
    assert not (masks[0] & masks[1]).any() and masks[0].any() and masks[1].any()


def test_scene_depends_on_seed_split_and_index_only(digits, tmp_path):
    few = write_split(tmp_path / "a", "val", *digits, 3, seed=1)
    more = write_split(tmp_path / "b", "val", *digits, 5, seed=1)
    assert few["annotations"] == more["annotations"][:len(few["annotations"])]
    assert (tmp_path / "a/val/000002.png").read_bytes() == (tmp_path / "b/val/000002.png").read_bytes()
    other = write_split(tmp_path / "c", "val", *digits, 3, seed=2)
    assert other["annotations"] != few["annotations"]


def test_written_folder_is_valid_coco_with_masks_and_captions(digits, tmp_path):
    written = write_split(tmp_path, "val", *digits, 6, seed=0)
    split = read_split(tmp_path, "val", strict=True)
    assert len(split.images) == 6 and split.categories.names[3] == "three"
    for annotation in written["annotations"]:
        x, y, w, h = annotation["bbox"]
        mask = rle.decode(annotation["segmentation"]).astype(bool)
        assert mask.sum() > 0 and mask[y:y + h, x:x + w].sum() == mask.sum()
    captions = read_json(tmp_path / "annotations" / "captions_val.json")["annotations"]
    assert all(c["caption"].startswith("a") for c in captions)


def test_captions():
    objects = [SceneObject(3, "red", 0, (0, 0, 2, 2)), SceneObject(7, "orange", 0, (0, 0, 2, 2)),
               SceneObject(0, "blue", 0, (0, 0, 2, 2))]
    assert caption(objects) == "a red three, an orange seven and a blue zero"
    assert caption(objects[:1]) == "a red three"


def test_data_set_is_described_once_and_loaded_again(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "data", lambda: glyphs.export(tmp_path / "digits"))
    root = dataset.make_scenes(tmp_path / "scenes", {"train": 8, "val": 5, "test": 6}, covered=0.25, seed=0)
    names = {split: split for split in dataset.SPLITS}
    made = dataset.describe("x", root, names, image_size=64, bins=33, slots=8, strict=True, evaluation=4, ablation=2,
                            tuning=3, seed=0)
    again = dataset.load("x")
    assert again.subsets == made.subsets and again.grid == made.grid and len(again.test) == 6
    assert set(made.subsets["ablation"]) < set(made.subsets["evaluation"]) and len(made.subsets["tuning"]) == 3
    with pytest.raises(FileNotFoundError, match="01_data"):
        dataset.load("y")


def test_a_folder_of_the_users_is_watched_and_dvc_finds_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "data", lambda: glyphs.export(tmp_path / "digits"))
    settings = {"image_size": 64, "bins": 33, "slots": 8, "strict": True, "evaluation": 1, "ablation": 1, "tuning": 1,
                "seed": 0}
    root, names = tmp_path / "scenes", {split: split for split in dataset.SPLITS}
    found = []
    for seed in (0, 1):
        dataset.make_scenes(root, {"train": 2, "val": 2, "test": 2}, seed=seed)
        dataset.describe("x", root, names, **settings)
        found.append(read_json(paths.runs("x") / "dataset.json")["digests"])
    assert found[0].keys() == names.keys() and all(found[0][split] != found[1][split] for split in names)
    assert (paths.runs("x") / "data").is_dir()


def test_latents_of_another_split_are_never_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "data", lambda: glyphs.export(tmp_path / "digits"))
    root = dataset.make_scenes(tmp_path / "scenes", {split: 2 for split in dataset.SPLITS}, seed=0)
    data = dataset.describe("x", root, {split: split for split in dataset.SPLITS}, image_size=64, bins=33, slots=8,
                            strict=True, evaluation=1, ablation=1, tuning=1, seed=0)
    model = FirstStage(**parameters.named("architectures", "first_stage", "tiny"))
    one, other = (latents.cached_latents(model, part, tmp_path / "cache") for part in (data.val, data.test))
    assert not torch.equal(one, other)


def test_one_folder_for_validation_and_test_keeps_tuning_images_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "data", lambda: glyphs.export(tmp_path / "digits"))
    root = dataset.make_scenes(tmp_path / "scenes", {"train": 2, "val": 10, "test": 1}, covered=0.25, seed=0)
    made = dataset.describe("x", root, {"train": "train", "val": "val", "test": "val"}, image_size=64, bins=33, slots=8,
                            strict=False, evaluation=6, ablation=2, tuning=10, seed=0)
    assert len(made.subsets["tuning"]) == 4 and not set(made.subsets["tuning"]) & set(made.subsets["evaluation"])


def test_a_relative_root_means_the_repository_from_any_working_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "data", lambda: glyphs.export(tmp_path / "digits"))
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    dataset.make_scenes(tmp_path / "scenes", {"train": 2, "val": 2, "test": 2}, covered=0.25, seed=0)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    names = {split: split for split in dataset.SPLITS}
    dataset.describe("x", "scenes", names, image_size=64, bins=33, slots=8, strict=True, evaluation=1, ablation=1,
                     tuning=1, seed=0)
    assert read_json(paths.runs("x") / "dataset.json")["root"] == "scenes" and len(dataset.load("x").test) == 2
