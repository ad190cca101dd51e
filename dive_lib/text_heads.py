"""Heads over frozen features, trained by similarity to class texts: few-shot classification and sketch retrieval.

A U-head reads all scales. A baseline on the same footing reads one vector, the means of all scales, through a
bottleneck (width to a quarter, then to the text space), as the baselines of the published code for retrieval (those
for few-shot classification end in a linear classifier). A linear probe is
scikit-learn's logistic regression on one stage.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from dive_lib.checkpoint import fingerprint
from dive_lib.first_stage import device
from dive_lib.task_bench import Bench
from dive_lib.task_features import Scales
from dive_lib.train import TrainingConfig
from dive_lib.u_head import WIDTHS, UHead, similarity_logits, text_loss

FINEST = 256  # published width of the finest scale


class AdapterHead(nn.Module):
    """The head of the published baselines of retrieval: mean over all places of every scale, C -> C/4 -> text space, no
    bias. The normalisation before it is ours: scales of different networks differ in size."""

    def __init__(self, channels: Sequence[int], embedding: int):
        super().__init__()
        width = sum(channels)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(nn.Linear(width, max(1, width // 4), bias=False), nn.ReLU(),
                                    nn.Linear(max(1, width // 4), embedding, bias=False))

    def forward(self, scales: Sequence[torch.Tensor], expert: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        pooled = torch.cat([scale.mean((2, 3)) for scale in scales], 1)
        return self.layers(self.norm(pooled))


def make(scales: Scales, embedding: int, settings: dict, seed: int) -> nn.Module:
    """settings: {"fusion": a fusion of UHead or "adapter", "width": of the narrowest fused scale (published: 256),
    "side": of the pooled map, "heads", "normalise"}. embedding: width of the text space."""
    own, expert = scales.channels
    torch.manual_seed(seed)
    if settings["fusion"] == "adapter":
        return AdapterHead(own, embedding).to(device())
    # The published widths, all scaled alike; the simple fusion has one, twice the narrowest.
    published = (2 * FINEST,) if settings["fusion"] == "add" else WIDTHS[settings["fusion"]]
    widths = [width * settings["width"] // FINEST for width in published[:len(own)]]
    return UHead(own, embedding, fusion=settings["fusion"], expert=expert, heads=settings["heads"],
                 side=settings["side"], normalise=settings["normalise"], widths=widths).to(device())


def fit(bench: Bench, head: nn.Module, parts: Sequence[tuple[Scales, Sequence[int], torch.Tensor]],
        text: torch.Tensor, loss: dict, config: TrainingConfig, *, task: str) -> nn.Module:
    """Trains a head in place. parts: (scales, indices, their labels (n,)) of each kind of image, of which every batch
    has equally many, drawn with replacement; published: passes through shuffled lists, and for TU-Berlin six sketches
    to 54 photos. text (K, d) of the classes. loss: scale and temperature (`u_head.RETRIEVAL` and others). task: see
    `Bench.train_head`."""
    targets = text.to(device())
    share = max(1, config.batch_size // len(parts))

    def loss_of(model: nn.Module, step: int, generator: torch.Generator) -> torch.Tensor:
        total = 0.0
        for scales, indices, labels in parts:
            chosen = torch.randint(len(indices), (share,), generator=generator)
            own, expert = scales.take(torch.as_tensor(indices)[chosen])
            total = total + text_loss(model(own, expert), targets, labels[chosen].to(device()), **loss)
        return total / len(parts)

    identity = fingerprint([scales.identity for scales, _, _ in parts], [list(map(int, i)) for _, i, _ in parts],
                           *[labels for _, _, labels in parts], text, loss)
    return bench.train_head(head, loss_of, config, task=task, identity=identity)


@torch.no_grad()
def embed(head: nn.Module, scales: Scales, indices: Sequence[int] | None = None) -> torch.Tensor:
    """(n, d) unit vectors of images, on the CPU."""
    indices = torch.arange(len(scales)) if indices is None else torch.as_tensor(indices)
    return torch.cat([F.normalize(head.eval()(*scales.take(part)), dim=1).cpu()
                      for part in indices.split(scales.at_once)])


def answers(embeddings: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """(n,) the class whose text is nearest."""
    return similarity_logits(embeddings, text).argmax(1)


def pooled(scales: Scales, side: int, indices: Sequence[int] | None = None) -> np.ndarray:
    """(n, D) what a linear probe reads: maps averaged to side x side, flattened. indices: of the images, or all."""
    indices = torch.arange(len(scales)) if indices is None else torch.as_tensor(indices)
    rows = [torch.cat([F.adaptive_avg_pool2d(scale, side).flatten(1) for scale in scales.take(part)[0]], 1).cpu()
            for part in indices.split(scales.at_once)]
    return torch.cat(rows).numpy()


def linear_probe(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray, strength: float) -> np.ndarray:
    """Answers of logistic regression on standardised features. strength: scikit-learn's C."""
    mean, spread = train_x.mean(0), train_x.std(0) + 1e-6
    model = LogisticRegression(C=strength, max_iter=300).fit((train_x - mean) / spread, train_y)
    return model.predict((test_x - mean) / spread)
