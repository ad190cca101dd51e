"""Average precision against known values and against pycocotools; bootstrap against explicit duplication."""

import contextlib
import copy
import io
import json
import time

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dive_lib import evaluation
from dive_lib.evaluation import (bootstrap_average_precision, coco_average_precision, mean_paired_bootstrap,
                                 paired_bootstrap)


def _truth(objects, images=(1,), classes=(1,)):
    """objects: (image, class, bbox[, crowd])."""
    return {"images": [{"id": i} for i in images], "categories": [{"id": c, "name": str(c)} for c in classes],
            "annotations": [{"id": n, "image_id": image, "category_id": category, "bbox": bbox,
                             "area": bbox[2] * bbox[3], "iscrowd": int(any(crowd))}
                            for n, (image, category, bbox, *crowd) in enumerate(objects)]}


def _found(*detections):
    return [{"image_id": image, "category_id": category, "bbox": bbox, "score": score}
            for image, category, bbox, score in detections]


A, B, FAR = [0, 0, 10, 10], [20, 20, 10, 10], [40, 40, 10, 10]


def _random(images, classes, seed, quality=3.0):
    """Objects with noisy detections: moved boxes, wrong classes, false and missed ones, distinct scores."""
    rng = np.random.RandomState(seed)
    objects, detections = [], []
    for image in range(1, images + 1):
        for _ in range(rng.randint(0, 5)):
            box = np.concatenate([rng.uniform(0, 40, 2), rng.uniform(5, 30, 2)])
            category = int(rng.randint(1, classes + 1))
            objects.append((image, category, box.tolist(), rng.rand() < 0.05))
            for _ in range(rng.choice([0, 1, 1, 1, 2])):
                guess = category if rng.rand() < 0.8 else int(rng.randint(1, classes + 1))
                moved = np.maximum(box + rng.normal(0, quality, 4), [0, 0, 1, 1])
                detections.append((image, guess, moved.tolist(), float(rng.rand())))
        if rng.rand() < 0.3:
            detections.append((image, int(rng.randint(1, classes + 1)), [1, 1, 9, 9], float(rng.rand())))
    return _truth(objects, range(1, images + 1), range(1, classes + 1)), _found(*detections)


def _reference(truth, detections, image_ids, class_agnostic=False):
    """pycocotools' own path: `loadRes`, `evaluate`, `accumulate`, `summarize`."""
    truth = copy.deepcopy(truth) | {"info": {}}
    for annotation in truth["annotations"]:
        annotation["id"] += 1  # an id of 0 would never match
    with contextlib.redirect_stdout(io.StringIO()):
        index = COCO()
        index.dataset = truth
        index.createIndex()
        evaluator = COCOeval(index, index.loadRes(copy.deepcopy(detections)), "bbox")
        evaluator.params.imgIds = list(image_ids)
        evaluator.params.useCats = int(not class_agnostic)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return [None if value == -1 else 100 * value for value in evaluator.stats[:6]]


def test_hand_made_precision():
    truth = _truth([(1, 1, A), (1, 1, B)])
    result = coco_average_precision(truth, _found((1, 1, A, 0.9), (1, 1, FAR, 0.8), (1, 1, B, 0.7)), [1])
    expected = 100 * (51 + 50 * 2 / 3) / 101  # precision 1 up to recall 0.5, then 2/3, at 101 points
    assert [result[k] for k in ("AP", "AP50", "AP75", "APS")] == pytest.approx([expected] * 4, abs=1e-9)
    assert result["APM"] is None and result["APL"] is None


def test_iou_decides_which_thresholds_count():
    result = coco_average_precision(_truth([(1, 1, A)]), _found((1, 1, [0, 0, 10, 8.2], 1.0)), [1])
    assert result["AP"] == pytest.approx(70) and result["AP50"] == pytest.approx(100)  # IoU 0.82
    result = coco_average_precision(_truth([(1, 1, A)]), _found((1, 1, [0, 0, 10, 7], 1.0)), [1])
    assert result["AP75"] == 0 and result["AP"] == pytest.approx(50)


def test_empty_detections_give_zeros_and_no_objects_give_none():
    assert coco_average_precision(_truth([(1, 1, A)]), [], [1]) == {
        "AP": 0.0, "AP50": 0.0, "AP75": 0.0, "APS": 0.0, "APM": None, "APL": None}
    empty = coco_average_precision(_truth([], images=(1, 2)), _found((1, 1, A, 0.5)), [1, 2])
    assert set(empty.values()) == {None}


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_equals_pycocotools(class_agnostic):
    truth, detections = _random(40, 4, seed=1)
    before = copy.deepcopy((truth, detections))
    result = coco_average_precision(truth, detections, range(1, 41), class_agnostic=class_agnostic)
    expected = _reference(truth, detections, range(1, 41), class_agnostic)
    assert list(result.values()) == pytest.approx(expected, abs=1e-9) and 5 < result["AP"] < 95
    assert (truth, detections) == before, "the caller's records must stay as they are"
    part = coco_average_precision(truth, detections, range(5, 20), class_agnostic=class_agnostic)
    assert list(part.values()) == pytest.approx(_reference(truth, detections, range(5, 20), class_agnostic))


def test_nothing_is_printed_and_a_path_works(tmp_path, capsys):
    truth, detections = _random(5, 2, seed=2)
    (tmp_path / "instances_val.json").write_text(json.dumps(truth))
    result = coco_average_precision(tmp_path / "instances_val.json", detections, range(1, 6))
    assert result == coco_average_precision(truth, detections, range(1, 6))
    assert capsys.readouterr().out == ""


def test_class_agnostic_counts_a_wrong_class():
    truth = _truth([(1, 1, A)], classes=(1, 2))
    wrong = _found((1, 2, A, 1.0))
    assert coco_average_precision(truth, wrong, [1])["AP"] == 0
    assert coco_average_precision(truth, wrong, [1], class_agnostic=True)["AP"] == pytest.approx(100)


def test_detections_in_a_crowd_cost_nothing():
    truth = _truth([(1, 1, A), (1, 1, [20, 20, 40, 40], True)])
    inside = _found((1, 1, [25, 25, 9, 9], 0.9), (1, 1, [40, 40, 9, 9], 0.8), (1, 1, A, 0.5))
    assert coco_average_precision(truth, inside, [1])["AP"] == pytest.approx(100)
    assert coco_average_precision(truth, inside[:2], [1])["AP"] == 0, "a crowd is no object to be found"
    plain = copy.deepcopy(truth)
    plain["annotations"][1]["iscrowd"] = 0
    assert coco_average_precision(plain, inside, [1])["AP"] < 50


def test_area_thresholds_replace_those_of_coco():
    truth = _truth([(1, 1, A), (1, 1, [20, 20, 20, 20])])
    found = _found((1, 1, A, 0.9))
    assert coco_average_precision(truth, found, [1])["APM"] is None
    result = coco_average_precision(truth, found, [1], area_thresholds=(150, 350))
    assert (result["APS"], result["APM"], result["APL"]) == (pytest.approx(100), None, 0)
    with pytest.raises(ValueError, match="area_thresholds"):
        coco_average_precision(truth, found, [1], area_thresholds=(350, 150))


def test_max_detections_keeps_the_best_of_each_image():
    truth, found = _truth([(1, 1, A)]), _found((1, 1, FAR, 0.9), (1, 1, A, 0.8))
    assert coco_average_precision(truth, found, [1], max_detections=1)["AP"] == 0
    assert coco_average_precision(truth, found, [1], max_detections=2)["AP"] == pytest.approx(50)


@pytest.mark.parametrize("detections, message", [
    (_found((1, 1, A, 0.5), (3, 1, A, 0.5)), r"detection number 1 \(image id 3\): no such image"),
    (_found((1, 0, A, 0.5)), r"detection number 0 \(image id 1\): unknown category id 0"),
    (_found((1, 1, [0, 0, float("nan"), 3], 0.5)), "must be finite"),
    (_found((1, 1, A, float("inf"))), "must be finite"),
    (_found((1, 1, [0, 0, -1, 3], 0.5)), "width and height >= 0"),
])
@pytest.mark.parametrize("function", [coco_average_precision, bootstrap_average_precision])
def test_bad_detections_are_refused(function, detections, message):
    with pytest.raises(ValueError, match=message):
        function(_truth([(1, 1, A)]), detections, [1])


def test_bad_image_ids_are_refused():
    with pytest.raises(ValueError, match="image id 8 is not in the ground truth"):
        coco_average_precision(_truth([]), [], [1, 8])
    with pytest.raises(ValueError, match="no image ids"):
        coco_average_precision(_truth([]), [], [])


def _evaluator(truth, detections, images, class_agnostic=False):
    ids = range(1, images + 1)
    return evaluation._matched(truth, detections, ids, evaluation.ALL_AREAS, 100, class_agnostic)


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_identity_resample_equals_pycocotools(class_agnostic):
    truth, detections = _random(60, 5, seed=3)
    evaluator = _evaluator(truth, detections, 60, class_agnostic)
    precision = evaluation._resampled_precision(evaluator, np.ones((1, 60)))
    expected = _reference(truth, detections, range(1, 61), class_agnostic)
    assert precision.shape == (1, 10)
    assert [precision.mean(), precision[0, 0], precision[0, 5]] == pytest.approx(expected[:3], abs=1e-9)


def test_weights_equal_explicit_duplication():
    truth, detections = _random(12, 3, seed=4)
    weights = evaluation._weights(12, 4, seed=0)
    assert (weights.sum(1) == 12).all() and (weights != weights[:1]).any()
    precision = evaluation._resampled_precision(_evaluator(truth, detections, 12), weights)
    for row, expected in zip(weights, precision, strict=True):
        copies = [(image, 100 * image + k) for image in range(1, 13) for k in range(int(row[image - 1]))]

        def repeat(entries):
            return [e | {"image_id": new} for old, new in copies for e in entries if e["image_id"] == old]

        annotations = [e | {"id": number} for number, e in enumerate(repeat(truth["annotations"]))]
        again = truth | {"images": [{"id": new} for _, new in copies], "annotations": annotations}
        result = _reference(again, repeat(detections), [new for _, new in copies])
        assert [expected.mean(), expected[0], expected[5]] == pytest.approx(result[:3], abs=1e-9)


def test_chunks_do_not_change_the_result(monkeypatch):
    truth, detections = _random(20, 2, seed=5)
    whole = bootstrap_average_precision(truth, detections, range(1, 21), resamples=30)
    monkeypatch.setattr(evaluation, "CHUNK", 1)
    assert bootstrap_average_precision(truth, detections, range(1, 21), resamples=30) == whole


def test_interval_is_seeded_and_holds_the_estimate():
    truth, detections = _random(60, 3, seed=6)
    point = coco_average_precision(truth, detections, range(1, 61))
    first = bootstrap_average_precision(truth, detections, range(1, 61), seed=1)
    assert set(first) == {"AP_ci95", "AP50_ci95"}
    for name in ("AP", "AP50"):
        low, high = first[f"{name}_ci95"]
        assert low < point[name] < high and high - low < 40
    assert first == bootstrap_average_precision(truth, detections, reversed(range(1, 61)), seed=1)
    assert first != bootstrap_average_precision(truth, detections, range(1, 61), seed=2)
    narrow = bootstrap_average_precision(truth, detections, range(1, 61), seed=1, confidence=0.5)
    assert first["AP_ci95"][0] < narrow["AP_ci50"][0] < narrow["AP_ci50"][1] < first["AP_ci95"][1]
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_average_precision(truth, detections, [1], confidence=95)


def test_bootstrap_of_nothing():
    missed = bootstrap_average_precision(_truth([(1, 1, A)]), [], [1])
    assert missed == {"AP_ci95": [0, 0], "AP50_ci95": [0, 0]}
    assert bootstrap_average_precision(_truth([]), [], [1]) == {"AP_ci95": None, "AP50_ci95": None}
    assert set(paired_bootstrap(_truth([]), [], [], [1]).values()) == {None}


def test_paired_bootstrap_uses_the_same_resamples():
    truth, good = _random(60, 3, seed=7, quality=1.0)
    bad = _random(60, 3, seed=7, quality=4.0)[1]
    ids = range(1, 61)
    result = paired_bootstrap(truth, good, bad, ids)
    point = [coco_average_precision(truth, d, ids) for d in (good, bad)]
    for name in ("AP", "AP50"):
        assert result[f"{name}_difference"] == pytest.approx(point[0][name] - point[1][name])
        low, high = result[f"{name}_difference_ci95"]
        assert low < result[f"{name}_difference_mean"] < high
    assert result["AP_difference_ci95"][0] > 0
    mirrored = paired_bootstrap(truth, bad, good, ids)
    assert mirrored["AP_difference_ci95"] == pytest.approx([-v for v in result["AP_difference_ci95"][::-1]])
    same = paired_bootstrap(truth, good, good, ids)
    assert same["AP_difference_ci95"] == [0, 0], "with other resamples for b this would not vanish"


def test_trajectories_share_the_resamples():
    truth, first = _random(60, 3, seed=7, quality=1.0)
    second, bad = (_random(60, 3, seed=7, quality=quality)[1] for quality in (2.0, 4.0))
    ids = range(1, 61)
    alone = paired_bootstrap(truth, first, bad, ids)
    assert mean_paired_bootstrap(truth, [(first, bad)] * 2, ids) == alone
    both = mean_paired_bootstrap(truth, [(first, bad), (bad, second)], ids)
    for key, expected in paired_bootstrap(truth, first, second, ids).items():
        assert np.allclose(both[key], np.array(expected) / 2), "bad cancels, resample by resample"


def test_bootstrap_is_fast():
    truth, detections = _random(150, 10, seed=8)
    start = time.process_time()
    bootstrap_average_precision(truth, detections, range(1, 151), resamples=500)
    assert time.process_time() - start < 10
