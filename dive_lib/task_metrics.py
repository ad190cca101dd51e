"""Metrics of Vermouth's tasks: retrieval (mAP, precision), segmentation (mIoU), and intervals over draws and images.

Average precision is the one published for zero-shot sketch retrieval (VOC-style: precision made monotone before it is
summed over recall); the plain one of scikit-learn stands beside it. Values are in percent.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from dive_lib.classification_results import bootstrap_interval

PRECISION_AT = 100
MAP_AT = 200


def interpolated_precision(relevant: np.ndarray, top: int = 0) -> float:
    """VOC-style average precision in [0, 1] of a ranked list; relevant (n,) bool, best first.

    top: only so many are looked at, and no more than so many can be found (0: all). 0 for a list without a hit.
    """
    total = int(relevant.sum())
    if top:
        total, relevant = min(top, total), relevant[:top]
    hits = np.cumsum(relevant)
    if not total or not hits[-1]:
        return 0.0
    precision = hits / np.arange(1, len(relevant) + 1)
    monotone = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or a larger one
    return float(monotone[relevant].sum() / total)


def evaluate_retrieval(queries: torch.Tensor, query_labels: torch.Tensor, gallery: torch.Tensor,
                       gallery_labels: torch.Tensor, *, resamples: int = 1000, seed: int = 0) -> dict:
    """Retrieval by Euclidean distance between L2-normalised features (q, d) and (g, d): a row of numbers in percent.

    mAP, mAP_200 (published measure), AP_plain (scikit-learn's), P_100: each the mean over classes of the mean over
    their queries. chance: `retrieval_chance`. by_class: mAP of each label. by_query, P_100_by_query: of each query,
    weighted, so that their plain mean is mAP or P_100.
    """
    scores = (F.normalize(queries.float(), dim=1) @ F.normalize(gallery.float(), dim=1).T).numpy()
    labels, found = query_labels.numpy(), gallery_labels.numpy()
    missing = sorted(set(labels.tolist()) - set(found.tolist()))
    if missing:
        raise ValueError(f"class {missing[0]} has queries but no image in the gallery")
    values: dict[str, list[float]] = {"mAP": [], "mAP_200": [], "AP_plain": [], "P_100": []}
    for row, label in zip(scores, labels):
        order = np.argsort(-row, kind="stable")  # the distance of unit vectors falls as their product rises
        relevant = found[order] == label
        values["mAP"].append(100 * interpolated_precision(relevant))
        values["mAP_200"].append(100 * interpolated_precision(relevant, MAP_AT))
        values["AP_plain"].append(100 * float(average_precision_score(found == label, row)))
        values["P_100"].append(100 * float(relevant[:PRECISION_AT].mean()))
    weights = _class_weights(labels)
    result = {name: round(float(np.mean(weights * own)), 4) for name, own in values.items()}
    by_query = weights * values["mAP"]
    interval = bootstrap_interval(by_query, resamples=resamples, seed=seed)
    by_class = {int(c): round(float(np.mean(np.array(values["mAP"])[labels == c])), 4) for c in np.unique(labels)}
    return result | {"mAP_ci95": [round(bound, 4) for bound in interval], "by_class": by_class,
                     "by_query": by_query.tolist(), "P_100_by_query": (weights * values["P_100"]).tolist(),
                     "chance": round(retrieval_chance(query_labels, gallery_labels), 4),
                     "queries": len(labels), "gallery": len(found)}


def _class_weights(labels: np.ndarray) -> np.ndarray:
    """Weights (q,) with which a plain mean over queries is the mean over classes of their means."""
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return len(labels) / (len(classes) * counts[inverse])


def retrieval_chance(query_labels: torch.Tensor, gallery_labels: torch.Tensor, orders: int = 100) -> float:
    """Mean mAP of random orders of the gallery, in percent; a little above the share of relevant images, as precision
    is made monotone."""
    labels, found = query_labels.numpy(), gallery_labels.numpy()
    rng = np.random.RandomState(0)
    by_class = {label: np.mean([interpolated_precision((found == label)[rng.permutation(len(found))])
                                for _ in range(orders)]) for label in np.unique(labels)}
    return 100 * float(np.mean(_class_weights(labels) * np.array([by_class[label] for label in labels])))


def two_way_interval(values: Sequence[Sequence[float]], *, resamples: int = 1000, seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean of values (draws, images) when draws and images are drawn anew."""
    table = np.asarray(values, dtype=float)
    rng = np.random.RandomState(seed)  # NumPy guarantees RandomState's stream for ever
    draws, images = table.shape
    means = [table[rng.randint(draws, size=draws)][:, rng.randint(images, size=images)].mean()
             for _ in range(resamples)]
    return [float(bound) for bound in np.percentile(means, (2.5, 97.5))]


def evaluate_draws(correct: Sequence[Sequence[bool]], reference: Sequence[Sequence[bool]] | None = None, *,
                   resamples: int = 1000, seed: int = 0) -> dict:
    """Accuracy over all images and all draws of the training images, in percent; correct (draws, images).

    reference: of another method on the same draws and images, for the paired difference with its interval.
    """
    table = 100 * np.asarray(correct, dtype=float)
    row = {"accuracy": round(float(table.mean()), 4), "by_seed": [round(float(m), 4) for m in table.mean(1)],
           "accuracy_ci95": [round(b, 4) for b in two_way_interval(table, resamples=resamples, seed=seed)],
           "n_images": table.shape[1]}
    if reference is not None:
        difference = table - 100 * np.asarray(reference, dtype=float)
        row |= {"difference": round(float(difference.mean()), 4),
                "difference_ci95": [round(b, 4) for b in two_way_interval(difference, resamples=resamples, seed=seed)]}
    return row


def overlaps(predicted: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """(n, 3, K) int64 for maps (n, H, W): pixels of each class that both have, that the prediction has, that the label
    has. Pixels with a negative label are left out."""
    rows = []
    for answer, truth in zip(predicted, labels):
        valid = truth >= 0
        answer, truth = answer[valid], truth[valid]
        rows.append(torch.stack([torch.bincount(part, minlength=classes)
                                 for part in (truth[answer == truth], answer, truth)]))
    return torch.stack(rows)


def class_iou(counts: np.ndarray) -> np.ndarray:
    """(..., K) intersection over union in percent from counts (..., 3, K); NaN for a class without labelled pixels."""
    both, predicted, true = counts[..., 0, :], counts[..., 1, :], counts[..., 2, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(true > 0, 100 * both / (predicted + true - both), np.nan)


def evaluate_segmentation(counts: torch.Tensor, groups: dict[str, Sequence[int]], *, resamples: int = 1000,
                          seed: int = 0) -> dict:
    """mIoU of groups of classes in percent, each with its interval over images; counts (n, 3, K) of `overlaps`.

    groups: for example {"seen": class indices, "unseen": ...}. Classes that no label has are left out. With both of
    these groups also `ratio`, that of unseen to seen. pixel_accuracy: share of labelled pixels.
    """
    table = counts.numpy()
    rng = np.random.RandomState(seed)
    drawn = [class_iou(table[rng.randint(len(table), size=len(table))].sum(0)) for _ in range(resamples)]
    iou = class_iou(table.sum(0))
    total = table.sum(0)
    row = {"pixel_accuracy": round(100 * float(total[0].sum() / total[2].sum()), 4), "n_images": len(table),
           "by_class": [None if np.isnan(value) else round(float(value), 4) for value in iou]}
    means = {}
    for name, own in groups.items():
        own = list(own)
        if not len(own) or np.isnan(iou[own]).all():
            continue
        means[name] = np.array([_mean(values[own]) for values in drawn])
        row |= {f"mIoU_{name}": round(_mean(iou[own]), 4), f"mIoU_{name}_ci95": _bounds(means[name])}
    if {"seen", "unseen"} <= set(means) and row["mIoU_seen"] > 0:
        row |= {"ratio": round(row["mIoU_unseen"] / row["mIoU_seen"], 4),
                "ratio_ci95": _bounds(means["unseen"] / np.maximum(means["seen"], 1e-9))}
    return row


def _mean(values: np.ndarray) -> float:
    present = values[~np.isnan(values)]
    return float(present.mean()) if len(present) else 0.0


def _bounds(values: np.ndarray) -> list[float]:
    return [round(float(bound), 4) for bound in np.percentile(values, (2.5, 97.5))]
