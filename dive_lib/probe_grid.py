"""Time step x stage: every cell of a backbone's features probed at three granularities, and the best one reported.

    cells = probe_grid.measure(backbone, times, data, cache)       # on validation images and seen classes
    best = probe_grid.best(cells, "classification")                # a Cell
    row = probe_grid.report(backbone, best, data, cache)           # on test images and unseen classes
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dive_lib import probes
from dive_lib.classification_results import bootstrap_interval, evaluate_correct, paired_difference
from dive_lib.feature_cache import FeatureCache
from dive_lib.probe_data import ProbeData
from dive_lib.provenance import cores
from dive_lib.side_by_side import in_pieces, usable
from dive_lib.task_metrics import evaluate_segmentation

GRANULARITIES = {"classification": "accuracy", "retrieval": "mAP", "segmentation": "mIoU"}
PIXELS = 40  # labelled pixels of each training scene
RESAMPLES = 200  # bootstrap of every cell's interval
MAP_SIDE = 32  # larger maps are averaged to this before pixels are probed
RETRIEVAL_KEYS = ("mAP", "mAP_ci95", "mAP_200", "P_100", "chance", "queries", "gallery")


@dataclass(frozen=True)
class Cell:
    """value: in percent, on validation images; low, high: its 95 % interval over these images (retrieval: queries).
    strength: index of the ridge's strength that gave it."""

    granularity: str
    t: int
    stage: str
    value: float
    low: float
    high: float
    strength: int = 0

    def to_dict(self) -> dict:
        return asdict(self)


def measure(backbone, times: Sequence[int], data: ProbeData, cache: FeatureCache,
            granularities: Sequence[str] = tuple(GRANULARITIES)) -> list[Cell]:
    """All cells of a backbone on validation images; one without time steps has the row of the first alone."""
    times = list(times) if hasattr(backbone, "noise") else list(times)[:1]

    def cells(own: list[int]) -> list[list[Cell]]:  # several time steps, for which clean latents are computed once
        return [[cell for name in granularities for cell in _MEASURES[name](backbone, t, data, cache)] for t in own]

    count = min(usable(cores(), backbone.name), len(times))
    shares = [times[k::count] for k in range(count)]
    found = in_pieces(cells, shares, backbone.name, "time steps", workers=count)
    return [cell for k in range(len(times)) for cell in found[k % count][k // count]]


def best(cells: Sequence[Cell], granularity: str) -> Cell:
    """The cell with the largest validation value; of equal ones the first."""
    return max((cell for cell in cells if cell.granularity == granularity), key=lambda cell: cell.value)


def table(cells: Sequence[Cell], granularity: str, times: Sequence[int], stages: Sequence[str]) -> np.ndarray:
    """Values (T, S); a backbone without time steps fills all rows with its one."""
    values = {(cell.t, cell.stage): cell.value for cell in cells if cell.granularity == granularity}
    return np.array([[values[t if (t, stage) in values else times[0], stage] for stage in stages] for t in times])


def best_by_time(cells: Sequence[Cell], granularity: str, times: Sequence[int]) -> np.ndarray:
    """(3, T) value, low and high of the best stage at each time step; that it is the best one of several, chosen on the
    same images, is not in its interval. A backbone without time steps has the same everywhere."""
    own = [cell for cell in cells if cell.granularity == granularity]
    chosen = [max((cell for cell in own if cell.t == t), key=lambda cell: cell.value, default=None) for t in times]
    return np.array([(cell.value, cell.low, cell.high) for cell in (one or chosen[0] for one in chosen)]).T


def report(backbone, cell: Cell, data: ProbeData, cache: FeatureCache, *, resamples: int = 1000,
           seed: int = 0) -> dict:
    """A cell's row on test images: t, stage, its validation value, and the granularity's value with its interval over
    images. Classification also keeps which images were read rightly, for paired differences (`correct`)."""
    row = {"t": cell.t, "stage": cell.stage, "validation": round(cell.value, 4)}
    if cell.granularity == "classification":
        maps = _take(backbone, cell.t, [cell.stage], cache, data.side, data.photos["train"], data.photos["test"])
        correct, _ = probes.classify(maps[0][cell.stage], data.photos["train"].labels, maps[1][cell.stage],
                                     data.photos["test"].labels, len(data.classes), cell.strength)
        return row | evaluate_correct(correct, resamples=resamples, seed=seed) | {"correct": correct}
    if cell.granularity == "retrieval":
        parts = data.sketches["test"], data.gallery["test"], data.sketches["val"], data.gallery["val"]
        asked, found, *seen = (m[cell.stage] for m in _take(backbone, cell.t, [cell.stage], cache, 1, *parts))
        result = probes.retrieve(asked, parts[0].labels, found, parts[1].labels, tuple(seen),
                                 resamples=resamples, seed=seed)
        return row | {key: result[key] for key in RETRIEVAL_KEYS}
    train, test = data.scenes["train"], data.scenes["test"]
    maps = _take(backbone, cell.t, [cell.stage], cache, MAP_SIDE, train, test)
    counts, _ = probes.segmentation_counts(maps[0][cell.stage], probes.sample_pixels(train.labels, PIXELS),
                                           maps[1][cell.stage], test.labels, len(data.scene_classes), cell.strength)
    result = evaluate_segmentation(counts, {"all": data.named}, resamples=resamples, seed=seed)
    return row | {"mIoU": result["mIoU_all"], "mIoU_ci95": result["mIoU_all_ci95"],
                  "pixel_accuracy": result["pixel_accuracy"], "n_images": result["n_images"]}


def paired(row: dict, reference: dict, *, resamples: int = 1000, seed: int = 0) -> dict:
    """Difference of two classification rows on the same test images, with its interval."""
    return paired_difference(row["correct"], reference["correct"], resamples=resamples, seed=seed)


def _take(backbone, t: int, stages: Sequence[str], cache: FeatureCache, side: int, *parts) -> list[dict]:
    """Features of each part. side 1: averaged over the image, or as far as the backbone says (`pool_side`)."""
    side = backbone.pool_side if side == 1 and hasattr(backbone, "pool_side") else side
    return [cache.features(backbone, part.images, t if hasattr(backbone, "noise") else 0, stages, side=side,
                           label=f"{backbone.name}, t = {t}") for part in parts]


def _classification(backbone, t: int, data: ProbeData, cache: FeatureCache) -> list[Cell]:
    train, val = data.photos["train"], data.photos["val"]
    maps = _take(backbone, t, backbone.stages, cache, data.side, train, val)
    cells = []
    for stage in backbone.stages:
        correct, strength = probes.classify(maps[0][stage], train.labels, maps[1][stage], val.labels, len(data.classes))
        low, high = bootstrap_interval(100 * correct, resamples=RESAMPLES)
        cells.append(Cell("classification", t, stage, 100 * float(correct.mean()), low, high, strength))
    return cells


def _retrieval(backbone, t: int, data: ProbeData, cache: FeatureCache) -> list[Cell]:
    sketches, photos = data.sketches["val"], data.gallery["val"]
    asked, found = _take(backbone, t, backbone.stages, cache, 1, sketches, photos)
    labels, rng, cells = sketches.labels.numpy(), np.random.RandomState(0), []
    drawn = rng.randint(len(labels), size=(RESAMPLES, len(labels)))
    for stage in backbone.stages:
        precision = probes.quick_precisions(asked[stage], sketches.labels, found[stage], photos.labels)
        low, high = np.percentile([probes.class_mean(precision[rows], labels[rows]) for rows in drawn], (2.5, 97.5))
        cells.append(Cell("retrieval", t, stage, probes.class_mean(precision, labels), float(low), float(high)))
    return cells


def _segmentation(backbone, t: int, data: ProbeData, cache: FeatureCache) -> list[Cell]:
    train, val = data.scenes["train"], data.scenes["val"]
    maps, sample = _take(backbone, t, backbone.stages, cache, MAP_SIDE, train, val), \
        probes.sample_pixels(train.labels, PIXELS)
    cells = []
    for stage in backbone.stages:
        counts, strength = probes.segmentation_counts(maps[0][stage], sample, maps[1][stage], val.labels,
                                                      len(data.scene_classes), named=data.named)
        value, (low, high) = probes.mean_iou(counts, RESAMPLES, named=data.named)
        cells.append(Cell("segmentation", t, stage, value, low, high, strength))
    return cells


_MEASURES = {"classification": _classification, "retrieval": _retrieval, "segmentation": _segmentation}
