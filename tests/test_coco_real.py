"""Real folders in COCO's layout load unmodified with the right counts, and go through the whole pipeline."""

import json
from pathlib import Path

import pytest
import torch

from dive_lib import paths, run
from dive_lib.coco import CocoLayouts, DatasetError, read_split, to_original
from dive_lib.evaluation import coco_average_precision
from dive_lib.files import read_json

CASES = {
    ("coco_mini", "train2017"): {"images": 80, "objects": 731, "crowd_excluded": 8, "overfull_images": 5},
    ("coco_mini", "val2017"): {"images": 79, "objects": 619, "crowd_excluded": 5, "overfull_images": 1},
    ("bccd", "train2017"): {"images": 205, "objects": 2804, "crowd_excluded": 0, "degenerate_dropped": 1},
    ("bccd", "val2017"): {"images": 87, "objects": 1137, "crowd_excluded": 0, "degenerate_dropped": 1},
    ("bccd", "test2017"): {"images": 72, "objects": 945, "crowd_excluded": 0, "degenerate_dropped": 0},
}


@pytest.fixture(scope="module")
def data(shared) -> Path:
    if not (shared / "data").is_dir():
        pytest.skip("the shared sample data are not on this machine")
    return shared / "data"


@pytest.mark.parametrize("name, split", CASES)
def test_loads_with_the_right_counts(data, name, split):
    read = read_split(data / name, split)
    layouts = CocoLayouts(read, 256, 25)
    summary = layouts.summary()
    assert summary == summary | CASES[name, split]
    assert summary["clipped"] == 0 and summary["images_without_objects"] == 0
    assert sum(len(layouts.class_ids(i)) for i in range(len(layouts))) == summary["objects"]
    assert len(read.categories) == (80 if name == "coco_mini" else 3)


def test_strict_names_the_degenerate_box_as_published(data):
    with pytest.raises(DatasetError, match=r"_train2017\.json: annotation id 2288: has a degenerate"):
        read_split(data / "bccd", "train2017", strict=True, check_images=False)
    read_split(data / "coco_mini", "train2017", strict=True, check_images=False)


@pytest.mark.parametrize("name", ["coco_mini", "bccd"])
def test_a_few_images_and_draws(data, name):
    train = read_split(data / name, "train2017", max_images=4)
    val = read_split(data / name, "val2017", max_images=4, categories=train.categories)
    generator = torch.Generator().manual_seed(0)
    for split in (train, val):
        layouts = CocoLayouts(split, 64, 10)
        for i in range(len(layouts)):
            image = layouts.load_image(i)
            assert image.shape == (3, 64, 64) and -1 <= image.min() < image.max() <= 1
            boxes, classes = layouts.draw(i, generator)
            assert len(boxes) == len(classes) <= 10
            assert boxes.min() >= 0 and boxes.max() <= 64 and (boxes[:, :2] < boxes[:, 2:]).all()
            assert 0 <= classes.min() and classes.max() < len(split.categories)


@pytest.mark.parametrize("name", ["coco_mini", "bccd"])
def test_perfect_detections_reach_full_precision(data, name):
    split = read_split(data / name, "val2017", max_images=30, check_images=False)
    layouts = CocoLayouts(split, 256, 100)
    detections = []
    for i in range(len(layouts)):
        boxes = to_original(layouts.boxes_xyxy(i), layouts.original_size(i), 256).tolist()
        detections += [{"image_id": layouts.image_id(i), "category_id": split.categories.ids[c], "bbox": box,
                        "score": 1.0} for c, box in zip(layouts.class_ids(i), boxes, strict=True)]
    truth = json.loads(split.annotation_file.read_text())
    result = coco_average_precision(truth, detections, [image.id for image in split.images])
    assert result["AP"] > 99.9, "scaling to the model's square and back must not cost precision"


@pytest.mark.parametrize("name, splits", [("coco_mini", ["train2017", "val2017", "val2017"]),
                                          ("bccd", ["train2017", "val2017", "test2017"])])
def test_trains_a_few_steps_and_is_evaluated(data, name, splits):
    """The notebooks of the pipeline, as they are, on a real folder: its path and splits are given, and fewer steps."""
    codebook = {"quantize_from": 3, "restart_every": 2, "restart_until": 5}
    settings = {"01_data": {"root": str(data / name), "splits": json.dumps(splits)},
                "02_first_stage": {"steps": "6", "codebook": json.dumps(codebook)},
                "03_layout_ldm": {"steps": "6"},
                "04_layout_prior": {"steps": "6", "decoupled_steps": "2"}, "05_detection": {"steps": "5"}}
    for notebook, overrides in settings.items():
        run.run(paths.ROOT / "notebooks" / f"{notebook}.ipynb", "smoke", overrides)
    described = read_json(paths.runs("smoke") / "dataset.json")
    if splits[1] == splits[2]:  # then ids mean the same images
        assert not set(described["subsets"]["tuning"]) & set(described["subsets"]["evaluation"])
    truth = read_json(data / name / "annotations" / f"instances_{splits[2]}.json")
    known = {category["id"] for category in truth["categories"]}
    for method in ("dive", "dive_best_search"):
        row = read_json(paths.metrics("smoke", "detection"))[method]
        assert row["n_images"] == 6 and 0 <= row["AP"] <= row["AP50"] <= 100 and row["forward_equivalents"] > 0
        records = read_json(paths.runs("smoke") / "detection" / f"{method}_coco_results.json")
        assert {record["category_id"] for record in records} <= known
