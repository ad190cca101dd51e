"""Linear probes: how much of a class, a match or a pixel's label can be read linearly off frozen features.

Least squares with a ridge from standardised features to one-hot labels: a closed form, so a probe of hundreds of
cells (time step x stage) takes seconds and gives the same numbers every time. Its one setting, the strength of the
ridge, is chosen with the cell on validation images. The three granularities:

classification   features averaged over the image -> class; accuracy.
retrieval        no training: sketches ask for photos of their class by the cosine of averaged features, each domain
                 standardised by its own images of seen classes; mAP.
segmentation     the map at a pixel (bilinear) -> the pixel's class; mIoU.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from dive_lib.task_metrics import evaluate_retrieval, evaluate_segmentation, interpolated_precision, overlaps

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)  # of the ridge, as shares of the number of samples


@dataclass
class RidgeProbe:
    """mean, std (d,): of the training features. weights (S, d, K), bias (K,): one map for each of S strengths."""

    mean: torch.Tensor
    std: torch.Tensor
    weights: torch.Tensor
    bias: torch.Tensor

    def scores(self, features: torch.Tensor, strength: int) -> torch.Tensor:
        """(n, K) for features (n, d)."""
        return ((features - self.mean) / self.std) @ self.weights[strength] + self.bias


def fit(features: torch.Tensor, labels: torch.Tensor, classes: int,
        strengths: Sequence[float] = STRENGTHS) -> RidgeProbe:
    """features (n, d), labels (n,) below `classes`. Raises ValueError for features and labels of different images."""
    if len(features) != len(labels) or not len(labels):
        raise ValueError(f"{len(features)} features and {len(labels)} labels cannot be of the same images")
    x = features.double()
    mean, std = x.mean(0), x.std(0, unbiased=False).clamp(min=1e-6)
    x = (x - mean) / std
    target = F.one_hot(labels.long(), classes).double()
    bias = target.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    projected = vectors.T @ (x.T @ (target - bias))
    weights = [vectors @ (projected / (values.clamp(min=0) + strength * len(x))[:, None]) for strength in strengths]
    return RidgeProbe(mean.float(), std.float(), torch.stack(weights).float(), bias.float())


def pooled(features: torch.Tensor) -> torch.Tensor:
    """Maps (n, C, h, w), averaged before to the few places that a probe takes, as vectors (n, C h w)."""
    return features.flatten(1)


def classify(train: torch.Tensor, labels: torch.Tensor, test: torch.Tensor, truth: torch.Tensor, classes: int,
             strength: int | None = None) -> tuple[np.ndarray, int]:
    """Whether each test image is read rightly (n,) bool, and the strength that was used.

    train, test: maps or pooled features. strength: an index, or None for the best one on these images, which must
    then be validation images.
    """
    probe = fit(pooled(train), labels, classes)
    tried = range(len(STRENGTHS)) if strength is None else (strength,)
    correct = {k: (probe.scores(pooled(test), k).argmax(1) == truth).numpy() for k in tried}
    best = max(correct, key=lambda k: (correct[k].mean(), k))
    return correct[best], best


def retrieve(sketches: torch.Tensor, sketch_labels: torch.Tensor, photos: torch.Tensor, photo_labels: torch.Tensor,
             seen: tuple[torch.Tensor, torch.Tensor], *, resamples: int = 1, seed: int = 0) -> dict:
    """The row of `evaluate_retrieval`: sketches ask, photos answer. seen: (sketches, photos) whose mean and standard
    deviation each domain is standardised by."""
    asked, found = (_standardised(pooled(own), pooled(reference))
                    for own, reference in ((sketches, seen[0]), (photos, seen[1])))
    return evaluate_retrieval(asked, sketch_labels, found, photo_labels, resamples=resamples, seed=seed)


def quick_precisions(sketches: torch.Tensor, sketch_labels: torch.Tensor, photos: torch.Tensor,
                     photo_labels: torch.Tensor) -> np.ndarray:
    """(q,) every query's average precision in percent as in `retrieve`, each domain standardised by the images at hand:
    for the many cells of a heat map. Their `class_mean` is the mAP."""
    asked, found = (F.normalize(_standardised(pooled(own), pooled(own)), dim=1) for own in (sketches, photos))
    order = (asked @ found.T).argsort(dim=1, descending=True, stable=True)
    relevant = (photo_labels[order] == sketch_labels[:, None]).numpy()
    return 100 * np.array([interpolated_precision(row) for row in relevant])


def class_mean(values: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the means of values (q,) with labels (q,)."""
    return float(np.mean([values[labels == c].mean() for c in np.unique(labels)]))


def _standardised(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    return (features - reference.mean(0)) / reference.std(0, unbiased=False).clamp(min=1e-6)


@dataclass
class PixelSample:
    """Some labelled pixels of some images: places (n, P, 2) in [-1, 1] (x, y) and labels (n, P), negative: none."""

    places: torch.Tensor
    labels: torch.Tensor


def sample_pixels(labels: torch.Tensor, count: int, seed: int = 0) -> PixelSample:
    """`count` pixels of every label map (n, H, W), spread over the classes of its image, so that a background that
    fills the image does not fill the sample."""
    rng = np.random.RandomState(seed)  # NumPy guarantees RandomState's stream for ever
    places, chosen = [], []
    for own in labels.numpy():
        flat = own.reshape(-1)
        present = [np.flatnonzero(flat == c) for c in np.unique(flat[flat >= 0])]
        picked = np.concatenate([rng.choice(present[k % len(present)], 1) for k in range(count)]) if present else \
            np.zeros(count, dtype=int)
        rows, columns = np.divmod(picked, own.shape[1])
        places.append(np.stack([(2 * columns + 1) / own.shape[1] - 1, (2 * rows + 1) / own.shape[0] - 1], 1))
        chosen.append(flat[picked])
    return PixelSample(torch.from_numpy(np.stack(places)).float(), torch.from_numpy(np.stack(chosen)).long())


def at_pixels(features: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Maps (n, C, h, w) at places (n, P, 2), bilinear: (n P, C)."""
    values = F.grid_sample(features, places[:, None], mode="bilinear", padding_mode="border", align_corners=False)
    return values[:, :, 0].permute(0, 2, 1).flatten(0, 1)


def fit_pixels(features: torch.Tensor, sample: PixelSample, classes: int) -> RidgeProbe:
    """The probe of maps (n, C, h, w) at sampled pixels."""
    x, y = at_pixels(features, sample.places), sample.labels.flatten()
    return fit(x[y >= 0], y[y >= 0], classes)


def segment(probe: RidgeProbe, features: torch.Tensor, strength: int, side: int, batch: int = 64) -> torch.Tensor:
    """(n, side, side) class of every pixel. The probe is linear, so its scores are enlarged instead of the features."""
    answers = []
    for part in features.split(batch):
        scores = probe.scores(part.permute(0, 2, 3, 1), strength).permute(0, 3, 1, 2)
        answers.append(F.interpolate(scores, (side, side), mode="bilinear", align_corners=False).argmax(1))
    return torch.cat(answers)


def segmentation_counts(train: torch.Tensor, sample: PixelSample, test: torch.Tensor, truth: torch.Tensor,
                        classes: int, strength: int | None = None, *,
                        named: Sequence[int] | None = None) -> tuple[torch.Tensor, int]:
    """Counts (n, 3, K) of `overlaps` of test images with label maps truth (n, S, S), and the strength, as `classify`.

    named: the classes whose mean chooses the strength; all by default."""
    probe = fit_pixels(train, sample, classes)
    # Two of the strengths: there are many more pixels than channels.
    tried = (1, 3) if strength is None else (strength,)
    counts = {k: overlaps(segment(probe, test, k, truth.shape[-1]), truth, classes) for k in tried}
    best = max(counts, key=lambda k: (mean_iou(counts[k], named=named), k))
    return counts[best], best


def mean_iou(counts: torch.Tensor, resamples: int = 1, *,
             named: Sequence[int] | None = None) -> tuple[float, list[float]]:
    """mIoU in percent over those of the `named` classes (all by default) that occur, and its interval over images."""
    row = evaluate_segmentation(counts, {"all": range(counts.shape[2]) if named is None else named},
                                resamples=resamples)
    return row["mIoU_all"], row["mIoU_all_ci95"]


def neighbours(features: torch.Tensor, labels: Sequence[int], kinds: Sequence[bool]) -> dict[str, float]:
    """Of how many images the nearest other one (standardised features (n, d), Euclidean) is of the same kind, of the
    same class, and of the same class among images of the other kind; each beside what chance gives. In percent.

    labels (n,): classes. kinds (n,): sketch or photo; both must occur.
    """
    x, y, kind = _standardised(features, features), torch.as_tensor(labels), torch.as_tensor(kinds)
    itself, other = torch.eye(len(x), dtype=torch.bool), kind[:, None] != kind
    same = y[:, None] == y
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    rows = {"same kind": (~other, ~itself), "same class": (same, ~itself), "same class, other kind": (same, other)}
    found = {}
    for name, (alike, allowed) in rows.items():
        nearest = distances.masked_fill(~allowed, float("inf")).argmin(1, keepdim=True)
        found[name] = round(100 * float(alike.gather(1, nearest).float().mean()), 4)
        found[f"{name}, chance"] = round(100 * float(((alike & allowed).sum(1) / allowed.sum(1)).mean()), 4)
    return found
