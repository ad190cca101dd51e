"""Detection quality: COCO average precision, and its bootstrap confidence intervals.

Matching and average precision are those of pycocotools. A bootstrap over images needs the matching only once,
since it happens within an image: a resample then is a set of weights, one per image, and
`_resampled_precision` is pycocotools' accumulation with weights, for all resamples at once.

Throughout: `ground_truth` is an instances file or its content, crowds included; `detections` is a list of
COCO results `{"image_id", "category_id", "bbox": [x, y, w, h], "score"}` in pixels of the original image;
`image_ids` are the images to evaluate, including those without any detection. Precision is in percent; None
stands for "no such object".
"""

import contextlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from dive_lib.files import read_json

GroundTruth = Mapping | str | Path
Detections = Sequence[Mapping]

LARGEST = 1e10  # pycocotools' upper limit of an area, px^2
ALL_AREAS = [[0, LARGEST]]
CHUNK = 2_000_000  # numbers per array of (resamples, IoU thresholds, detections), to bound the memory


def coco_average_precision(ground_truth: GroundTruth, detections: Detections, image_ids: Iterable[int],
                           area_thresholds: tuple[float, float] | None = None, max_detections: int = 100,
                           class_agnostic: bool = False) -> dict[str, float | None]:
    """COCO's AP (mean over IoU 0.50:0.05:0.95), AP50, AP75, APS, APM and APL, in percent.

    area_thresholds: (upper limit of small, lower limit of large) in px^2 of the original image, in place of
    COCO's 32^2 and 96^2, which leave a 64 x 64 image without large objects. max_detections: the best-scored
    ones of each image and class. class_agnostic: classes are ignored. Raises ValueError for an unknown image
    or category and for a box or score that is not finite.
    """
    small, large = area_thresholds or (32**2, 96**2)
    if not 0 < small <= large < LARGEST:
        raise ValueError(f"area_thresholds must rise from above 0, got {area_thresholds}")
    areas = [[0, LARGEST], [0, small], [small, large], [large, LARGEST]]
    evaluator = _matched(ground_truth, detections, image_ids, areas, max_detections, class_agnostic)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator.accumulate()
    precision = evaluator.eval["precision"][..., 0]  # (IoU, recall, class, area), -1 without objects
    parts = {"AP": precision[..., 0], "AP50": precision[0, ..., 0], "AP75": precision[5, ..., 0],
             "APS": precision[..., 1], "APM": precision[..., 2], "APL": precision[..., 3]}
    return {name: 100 * float(part[part > -1].mean()) if (part > -1).any() else None
            for name, part in parts.items()}


def bootstrap_average_precision(ground_truth: GroundTruth, detections: Detections,
                                image_ids: Iterable[int], *, resamples: int = 200, seed: int = 0,
                                confidence: float = 0.95, max_detections: int = 100,
                                class_agnostic: bool = False) -> dict[str, list[float] | None]:
    """Percentile confidence intervals of AP and AP50 when images are drawn anew, with replacement.

    Returns {"AP_ci95": [low, high], "AP50_ci95": [low, high]} in percent; the name follows `confidence`.
    Classes that a resample lacks do not count in it. Detections of exactly equal score are taken in the order
    of the images.
    """
    evaluator = _matched(ground_truth, detections, image_ids, ALL_AREAS, max_detections, class_agnostic)
    precision = _resampled_precision(evaluator, _weights(len(evaluator.params.imgIds), resamples, seed))
    suffix = _suffix(confidence)
    return {f"AP_{suffix}": _interval(precision.mean(1), confidence),
            f"AP50_{suffix}": _interval(precision[:, 0], confidence)}


def paired_bootstrap(ground_truth: GroundTruth, detections_a: Detections, detections_b: Detections,
                     image_ids: Iterable[int], *, resamples: int = 200, seed: int = 0,
                     confidence: float = 0.95, max_detections: int = 100,
                     class_agnostic: bool = False) -> dict[str, float | list[float] | None]:
    """AP(a) - AP(b) on the same resamples of the images, so that the difficulty of an image cancels.

    Returns, in percentage points, for AP and AP50 each: `AP_difference` (on all images once),
    `AP_difference_mean` (over the resamples) and `AP_difference_ci95` [low, high]. An interval that leaves
    out 0 speaks for a difference.
    """
    return mean_paired_bootstrap(ground_truth, [(detections_a, detections_b)], image_ids, resamples=resamples,
                                 seed=seed, confidence=confidence, max_detections=max_detections,
                                 class_agnostic=class_agnostic)


def mean_paired_bootstrap(ground_truth: GroundTruth, pairs: Sequence[tuple[Detections, Detections]],
                          image_ids: Iterable[int], *, resamples: int = 200, seed: int = 0,
                          confidence: float = 0.95, max_detections: int = 100,
                          class_agnostic: bool = False) -> dict[str, float | list[float] | None]:
    """The mean of AP(a) - AP(b) over pairs of runs on the same images, such as trajectories with other noises.

    Every resample draws the same images for all pairs, so the interval is over images, of what the pairs have in
    common; how far they lie apart is not in it. Returns what `paired_bootstrap` does.
    """
    image_ids = list(image_ids)

    def precision(detections: Detections) -> np.ndarray:
        evaluator = _matched(ground_truth, detections, image_ids, ALL_AREAS, max_detections, class_agnostic)
        weights = _weights(len(evaluator.params.imgIds), resamples, seed)
        return _resampled_precision(evaluator, np.vstack([np.ones_like(weights[:1]), weights]))

    difference = sum(precision(a) - precision(b) for a, b in pairs) / len(pairs)
    result = {}
    for name, values in (("AP", difference.mean(1)), ("AP50", difference[:, 0])):
        whole, drawn = values[0], values[1:][np.isfinite(values[1:])]
        result[f"{name}_difference"] = float(whole) if np.isfinite(whole) else None
        result[f"{name}_difference_mean"] = float(drawn.mean()) if len(drawn) else None
        result[f"{name}_difference_{_suffix(confidence)}"] = _interval(drawn, confidence)
    return result


def _content(ground_truth: GroundTruth) -> Mapping:
    return ground_truth if isinstance(ground_truth, Mapping) else read_json(ground_truth)


def _checked_ids(content: Mapping, image_ids: Iterable[int]) -> list[int]:
    """The image ids to evaluate, each once, in rising order."""
    ids = sorted({int(i) for i in image_ids})
    unknown = sorted(set(ids) - {image["id"] for image in content["images"]})
    if not ids or unknown:
        problem = f"image id {unknown[0]} is not in the ground truth" if unknown else "no image ids"
        raise ValueError(f"{problem}; name images of the split that the detections are for")
    return ids


def _checked(detections: Detections, content: Mapping) -> Detections:
    """The detections; refuses what pycocotools would skip in silence."""
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for number, detection in enumerate(detections):
        where = f"detection number {number} (image id {detection['image_id']})"
        if detection["image_id"] not in images:
            raise ValueError(f"{where}: no such image in the ground truth; use the split they are for")
        if detection["category_id"] not in categories:
            raise ValueError(f"{where}: unknown category id {detection['category_id']}; "
                             "write COCO's category ids, not class ids")
        box = detection["bbox"]
        if len(box) != 4 or not all(map(math.isfinite, [*box, detection["score"]])) or min(box[2:]) < 0:
            raise ValueError(f"{where}: bbox {list(box)} and score {detection['score']} must be finite, "
                             "with width and height >= 0")
    return detections


def _matched(ground_truth: GroundTruth, detections: Detections, image_ids: Iterable[int],
             areas: list[list[float]], max_detections: int, class_agnostic: bool) -> COCOeval:
    """pycocotools' evaluator after matching; nothing is printed and the caller's records stay as they are."""
    if max_detections < 1:
        raise ValueError(f"max_detections must be positive, got {max_detections}")
    content = _content(ground_truth)
    ids = _checked_ids(content, image_ids)
    wanted = set(ids)
    records = [a for a in content["annotations"] if a["image_id"] in wanted]
    found = [d for d in _checked(detections, content) if d["image_id"] in wanted]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluator = COCOeval(_index(content, ids, records), _index(content, ids, found), "bbox")
        evaluator.params.imgIds = ids
        evaluator.params.areaRng = areas
        evaluator.params.areaRngLbl = ["all", "small", "medium", "large"][:len(areas)]
        evaluator.params.maxDets = [max_detections]
        evaluator.params.useCats = int(not class_agnostic)
        evaluator.evaluate()
    return evaluator


def _index(content: Mapping, image_ids: list[int], records: list[Mapping]) -> COCO:
    """A COCO object of these annotations or detections.

    Records are numbered from 1: pycocotools marks "unmatched" by 0, so that an object of annotation id 0
    could never be found.
    """
    index = COCO()
    entries = []
    for number, record in enumerate(records, start=1):
        box = [float(v) for v in record["bbox"]]
        entry = {"id": number, "image_id": record["image_id"], "category_id": record["category_id"],
                 "bbox": box, "area": record.get("area", box[2] * box[3]),
                 "iscrowd": int(record.get("iscrowd", 0))}
        if "score" in record:  # a result: its area is that of its box, as in COCO.loadRes
            entry |= {"score": float(record["score"]), "area": box[2] * box[3], "iscrowd": 0}
        entries.append(entry)
    index.dataset = {"images": [{"id": i} for i in image_ids], "annotations": entries,
                     "categories": list(content["categories"])}
    index.createIndex()
    return index


def _weights(images: int, resamples: int, seed: int) -> np.ndarray:
    """(resamples, images) how often each image is drawn. NumPy guarantees RandomState's stream for ever."""
    if resamples < 1:
        raise ValueError(f"resamples must be positive, got {resamples}")
    drawn = np.random.RandomState(seed).randint(images, size=(resamples, images))
    return np.stack([np.bincount(row, minlength=images) for row in drawn]).astype(float)


def _resampled_precision(evaluator: COCOeval, weights: np.ndarray) -> np.ndarray:
    """AP in percent per resample and IoU threshold: weights (R, images) -> (R, T); NaN without any object.

    `COCOeval.accumulate` for the first area range, with image i counted weights[:, i] times: cumulative sums
    of true and false positives by falling score, precision made monotone, read at 101 recall points, mean
    over the classes that have objects.
    """
    params = evaluator.params
    images, thresholds, recalls = len(params.imgIds), len(params.iouThrs), params.recThrs
    total, classes = np.zeros((len(weights), thresholds)), np.zeros((len(weights), 1))
    stride = images * len(params.areaRng)
    for start in range(0, len(evaluator.evalImgs), stride):
        found = [(i, e) for i, e in enumerate(evaluator.evalImgs[start:start + images]) if e is not None]
        if not found:
            continue
        objects = weights[:, [i for i, _ in found]] @ np.array([np.sum(e["gtIgnore"] == 0) for _, e in found])
        present = objects > 0
        classes[present] += 1
        order = np.argsort(-np.concatenate([e["dtScores"] for _, e in found]), kind="mergesort")
        owner = np.repeat([i for i, _ in found], [len(e["dtScores"]) for _, e in found])[order]
        if len(owner) == 0:
            continue
        matched = np.concatenate([e["dtMatches"] for _, e in found], axis=1)[:, order] != 0
        counted = ~np.concatenate([e["dtIgnore"] for _, e in found], axis=1)[:, order].astype(bool)
        chunk = max(1, CHUNK // matched.size)
        rows = np.flatnonzero(present)
        for part in (rows[k:k + chunk] for k in range(0, len(rows), chunk)):
            weight = weights[part][:, None, owner]
            true = np.cumsum(weight * (matched & counted), axis=2)
            false = np.cumsum(weight * (~matched & counted), axis=2)
            precision = np.zeros((len(part), thresholds, len(owner) + 1))  # the last: recall never reached
            precision[..., :-1] = true / (false + true + np.spacing(1))
            precision = np.maximum.accumulate(precision[..., ::-1], axis=2)[..., ::-1]
            recall = true / objects[part, None, None]
            for row, k, t in ((row, k, t) for k, row in enumerate(part) for t in range(thresholds)):
                total[row, t] += precision[k, t, np.searchsorted(recall[k, t], recalls, side="left")].mean()
    with np.errstate(invalid="ignore"):
        return 100 * total / classes


def _interval(values: np.ndarray, confidence: float) -> list[float] | None:
    """[low, high] percentiles that hold the share `confidence` in the middle."""
    values = values[np.isfinite(values)]
    if len(values) == 0:
        return None
    tail = 50 * (1 - confidence)
    return [float(v) for v in np.percentile(values, [tail, 100 - tail])]


def _suffix(confidence: float) -> str:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return f"ci{100 * confidence:g}"
