"""How good generated images are: Frechet distance, inception score, precision and recall, on a network's features.

The usual measures (Heusel et al. 2017, Salimans et al. 2016, Kynkaanniemi et al. 2019) on the features of the network
that `inception.choose` gives: the Inception network, or the pipeline's own classifier in its place. Values of the one
are not comparable with those of the other, nor those of two classifiers.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import torch
from torch import nn


def frechet_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Between the Gaussians of two sets of features (n, d) and (m, d); 0 for equal sets."""
    means, covariances = zip(*((x.mean(0), np.cov(x, rowvar=False)) for x in (real, generated)))
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # The trace of the root of a product is that of the roots of a symmetric matrix with the same eigenvalues.
    mixed = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()
    distance = np.square(means[0] - means[1]).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * mixed
    return float(max(distance, 0.0))


def inception_score(probabilities: np.ndarray) -> float:
    """exp of the mean divergence of p(class | image) (n, K) from its mean: 1 to K."""
    p = probabilities.clip(1e-12)
    return float(np.exp((p * (np.log(p) - np.log(p.mean(0)))).sum(1).mean()))


def precision_recall(real: np.ndarray, generated: np.ndarray, nearest: int = 3) -> tuple[float, float]:
    """Shares of the generated images within the real ones' manifold, and of the real ones within the generated ones'.

    A manifold: balls around each image that reach its `nearest`-th neighbour. features (n, d) and (m, d).
    """
    if nearest >= min(len(real), len(generated)):
        raise ValueError(f"the {nearest}th neighbour needs more than {min(len(real), len(generated))} images")
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (real, generated))
    radii = [torch.cdist(x, x).kthvalue(nearest + 1, dim=1).values for x in (a, b)]  # the first neighbour is itself
    between = torch.cdist(a, b)
    precision = (between <= radii[0][:, None]).any(0).double().mean()
    recall = (between <= radii[1][None]).any(1).double().mean()
    return precision.item(), recall.item()


@torch.no_grad()
def read_images(classifier: nn.Module, images: torch.Tensor, batch: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Features before the last linear layer (n, d) and class probabilities (n, K) of images (n, C, S, S)."""
    classifier.eval()
    kept, last = [], [module for module in classifier.modules() if isinstance(module, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    try:
        for part in images.split(batch):
            classifier(part)
    finally:
        hook.remove()
    features = torch.cat(kept)
    probabilities = last(features).softmax(1)
    return features.double().cpu().numpy(), probabilities.double().cpu().numpy()


def quality(classifier: nn.Module, real: torch.Tensor, generated: torch.Tensor, nearest: int = 3) -> dict:
    """The four measures of generated images (m, C, S, S) against real ones (n, C, S, S)."""
    (a, _), (b, probabilities) = (read_images(classifier, images) for images in (real, generated))
    precision, recall = precision_recall(a, b, nearest)
    row = {"frechet_distance": frechet_distance(a, b), "inception_score": inception_score(probabilities),
           "precision": precision, "recall": recall}
    return {key: round(value, 4) for key, value in row.items()}


BETTER = {"frechet_distance": -1, "inception_score": 1, "precision": 1, "recall": 1}
"""1: more is better."""


def orders(rows: Mapping[str, Mapping], reading: str = "accuracy") -> dict[str, bool]:
    """Whether each measure puts the models (name -> values) in the same order as what DIVE reads off them.

    reading: key of the latter. Equal values are no order: nothing agrees with them. Measures that a model lacks are
    left out.
    """
    pairs = list(combinations(rows.values(), 2))
    return {key: all((a[reading] - b[reading]) * sign * (a[key] - b[key]) > 0 for a, b in pairs)
            for key, sign in BETTER.items() if all(key in row for row in rows.values())}
