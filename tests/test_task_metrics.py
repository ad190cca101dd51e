"""Metrics of Vermouth's tasks against written-out examples and maintained libraries."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix

from dive_lib.task_metrics import class_iou, evaluate_draws, evaluate_retrieval, evaluate_segmentation
from dive_lib.task_metrics import interpolated_precision, overlaps, two_way_interval


def published(relevant, top=None):
    """The VOC-style measure written out as the sketch-retrieval codes do."""
    tp, total = np.array(relevant), sum(relevant)
    if top is not None:
        tp, total = tp[:top], min(top, total)
    true, false = np.cumsum(tp), np.cumsum(~tp)
    recall, precision = true / total, true / (true + false)
    recall, precision = np.concatenate([[0], recall, [1]]), np.concatenate([[0], precision, [0]])
    for k in range(len(precision) - 2, -1, -1):
        precision[k] = max(precision[k], precision[k + 1])
    return sum(step * precision[k + 1] for k, step in enumerate(np.diff(recall)))


@pytest.mark.parametrize("top", [None, 10])
def test_interpolated_precision_is_the_published_one(top):
    rng = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        relevant = rng.random(60) < share
        if relevant[:top].any():
            assert interpolated_precision(relevant, top or 0) == pytest.approx(published(relevant, top))


def test_interpolated_precision_by_hand():
    assert interpolated_precision(np.array([False, True, True, False])) == pytest.approx(2 / 3)
    assert interpolated_precision(np.array([True, False, False, True])) == pytest.approx((1 + 0.5) / 2)
    assert interpolated_precision(np.array([False, False])) == 0.0


def test_retrieval_is_a_mean_over_classes_of_unit_vectors():
    gallery = torch.tensor([[1.0, 0], [0, 1], [0, 9]])
    queries = torch.tensor([[5.0, 0.1], [0.1, 5], [5.0, 0.1], [5.0, 0.2]])
    row = evaluate_retrieval(queries, torch.tensor([0, 1, 1, 1]), gallery, torch.tensor([0, 1, 1]), resamples=20)
    wrong = 100 * interpolated_precision(np.array([False, True, True]))
    assert row["mAP"] == pytest.approx((100 + (100 + 2 * wrong) / 3) / 2, abs=1e-3)
    assert row["queries"] == 4 and row["by_class"][0] == 100 and np.mean(row["by_query"]) == pytest.approx(row["mAP"])
    assert row["mAP_ci95"][0] <= row["mAP"] <= row["mAP_ci95"][1]
    with pytest.raises(ValueError, match="class 2 has queries"):
        evaluate_retrieval(queries, torch.tensor([0, 1, 1, 2]), gallery, torch.tensor([0, 1, 1]))


def test_plain_precision_is_scikit_learns_and_chance_is_met_by_noise():
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(n, 8, generator=generator) for n in (300, 200))
    labels, found = torch.arange(300) % 5, torch.arange(200) % 5
    row = evaluate_retrieval(queries, labels, gallery, found, resamples=5)
    scores = (torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(gallery, dim=1).T).numpy()
    plain = [average_precision_score(found.numpy() == label, own) for own, label in zip(scores, labels.numpy())]
    assert row["AP_plain"] == pytest.approx(100 * np.mean(plain), abs=1e-3)
    assert row["mAP"] == pytest.approx(row["chance"], abs=1.5) and row["P_100"] == pytest.approx(20, abs=1.5)


def test_draws_and_images_both_widen_the_interval():
    table = np.zeros((4, 100))
    table[:2] = 1
    low, high = two_way_interval(table, resamples=300)
    assert low < 0.3 and high > 0.7
    row = evaluate_draws(table.astype(bool), np.zeros((4, 100), bool), resamples=50)
    assert row["accuracy"] == row["difference"] == 50 and row["by_seed"] == [100, 100, 0, 0] and row["n_images"] == 100


def test_overlaps_agree_with_the_confusion_matrix():
    generator = torch.Generator().manual_seed(1)
    predicted, labels = (torch.randint(0, 4, (3, 6, 6), generator=generator) for _ in range(2))
    labels[0, 0] = -1
    counts = overlaps(predicted, labels, 5).numpy().sum(0)
    valid = labels >= 0
    matrix = confusion_matrix(labels[valid], predicted[valid], labels=range(5))
    assert (counts == np.stack([matrix.diagonal(), matrix.sum(0), matrix.sum(1)])).all()
    iou = class_iou(counts)
    union = matrix[0].sum() + matrix[:, 0].sum() - matrix[0, 0]
    assert np.isnan(iou[4]) and iou[0] == pytest.approx(100 * matrix[0, 0] / union)


def test_segmentation_row():
    labels = torch.tensor([[[0, 1], [2, 2]]]).repeat(4, 1, 1)
    predicted = torch.tensor([[[0, 1], [2, 0]]]).repeat(4, 1, 1)
    counts = overlaps(predicted, labels, 4)
    row = evaluate_segmentation(counts, {"seen": [1, 3], "unseen": [2], "background": [0]}, resamples=10)
    assert row["mIoU_seen"] == 100 and row["mIoU_unseen"] == 50 and row["ratio"] == 0.5 and row["mIoU_background"] == 50
    assert row["pixel_accuracy"] == 75 and row["by_class"][3] is None and row["ratio_ci95"] == [0.5, 0.5]
