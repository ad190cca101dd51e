"""Zero-shot retrieval of photos by sketches: one head embeds both; classes of training are not those of the test."""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from dive_lib import text_heads
from dive_lib.files import rounded
from dive_lib.side_by_side import side_by_side
from dive_lib.sketch_data import SketchSet, WholeImages
from dive_lib.task_bench import Bench, training
from dive_lib.task_metrics import evaluate_retrieval, two_way_interval
from dive_lib.u_head import RETRIEVAL


class SketchRetrieval:
    """Trials on one data set. head: settings of `text_heads.make` and of `task_bench.training`."""

    def __init__(self, bench: Bench, part: SketchSet, head: Mapping):
        self.bench, self.part, self.head = bench, part, dict(head)
        self.text = bench.text(part.train.classes)

    def train(self, source: Mapping, seed: int, *, without: Sequence[str] = (), **changed) -> torch.nn.Module:
        """A head trained on the seen classes except `without`; every batch is half sketches, half photos."""
        settings = self.head | changed
        pieces = []
        for images in (self.part.train.sketches, self.part.train.photos):
            chosen = [i for i, label in enumerate(images.labels.tolist())
                      if self.part.train.classes[label] not in without]
            pieces.append((self.bench.scales(images, source), chosen, images.labels[chosen]))
        head = text_heads.make(pieces[0][0], self.text.shape[1], settings, seed)
        images = sum(len(chosen) for _, chosen, _ in pieces)
        return text_heads.fit(self.bench, head, pieces, self.text, RETRIEVAL, training(settings, images, seed),
                              task="sketch_retrieval")

    def embed(self, head: torch.nn.Module, source: Mapping, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors (q, d) of the sketches and (g, d) of the photos of a split."""
        part, train = getattr(self.part, split), self.part.train
        return (text_heads.embed(head, self.bench.scales(part.sketches, source, train.sketches)),
                text_heads.embed(head, self.bench.scales(part.photos, source, train.photos)))

    def frozen(self, source: Mapping, split: str, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Features without a head, averaged to side x side: what the backbone brings along."""
        part, train = getattr(self.part, split), self.part.train
        return tuple(torch.from_numpy(text_heads.pooled(self.bench.scales(images, source, like), side))
                     for images, like in ((part.sketches, train.sketches), (part.photos, train.photos)))

    def pixels(self, split: str, side: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw pixels, reduced to side x side, as vectors."""
        part = getattr(self.part, split)
        return tuple(self._small(images, side).flatten(1) for images in (part.sketches, part.photos))

    def _small(self, images: WholeImages, side: int) -> torch.Tensor:
        """(n, 3, side, side) images reduced by area, in batches."""
        read = self.bench.reader(images)
        return torch.cat([F.interpolate(read(part), (side, side), mode="area")
                          for part in torch.arange(len(images)).split(self.bench.model["batch"])])

    def evaluate(self, vectors: tuple[torch.Tensor, torch.Tensor], split: str, seed: int = 0) -> dict:
        """The row of numbers of `task_metrics.evaluate_retrieval`."""
        part = getattr(self.part, split)
        return evaluate_retrieval(vectors[0], part.sketches.labels, vectors[1], part.photos.labels, seed=seed)

    def trial(self, source: Mapping, seed: int, split: str, *, without: Sequence[str] = (), **changed) -> dict:
        """The row of numbers of a head that is trained for it."""
        head = self.train(source, seed, without=without, **changed)
        return self.evaluate(self.embed(head, source, split), split)


def compare(tasks: Sequence[SketchRetrieval], candidates: Sequence[Mapping], seeds: int) -> list[dict]:
    """Candidates (sources) with their mAP, in percent, on the held-out seen classes, which the head that is asked has
    not been trained on; best first."""
    def mean(candidate: Mapping) -> float:
        values = [task.trial(candidate, seed, "val", without=task.part.held_out)["mAP"]
                  for task in tasks for seed in range(seeds)]
        return round(sum(values) / len(values), 4)

    means = side_by_side([partial(mean, candidate) for candidate in candidates], tasks[0].bench.workers,
                         "heads on held-out classes", unit="settings")
    rows = [{**candidate, "mAP": value} for candidate, value in zip(candidates, means)]
    return sorted(rows, key=lambda row: -row["mAP"])  # stable: the first of equals wins


def ablate(task: SketchRetrieval, changes: Mapping[str, tuple[Mapping, Mapping]], seeds: int) -> dict[str, dict]:
    """{title: mean row on the test classes, with its difference to the first} of changes {title: (source, changes of
    the head)}."""
    calls = [partial(task.trial, source, seed, "test", **changed) for source, changed in changes.values()
             for seed in range(seeds)]
    rows = side_by_side(calls, task.bench.workers, "heads of the ablation")
    return {title: mean_rows(rows[k * seeds:(k + 1) * seeds], rows[:seeds]) for k, title in enumerate(changes)}


def mean_rows(rows: Sequence[Mapping], reference: Sequence[Mapping] | None = None) -> dict:
    """The mean of the rows of several heads; intervals are over heads and queries. `by_seed` holds every mAP.

    reference: rows of the same queries, for the paired difference of mAP with its interval: heads of equal number are
    drawn together, and what has no heads (one row) is beside each of the others'.
    """
    keys = ("mAP", "mAP_200", "AP_plain", "P_100")
    queries = {"mAP": _table(rows, "by_query"), "P_100": _table(rows, "P_100_by_query")}
    by_class = {name: round(sum(row["by_class"][name] for row in rows) / len(rows), 4) for name in rows[0]["by_class"]}
    kept = {key: value for key, value in rows[0].items() if not key.endswith("by_query")}
    mean = {**kept, **{key: round(sum(row[key] for row in rows) / len(rows), 4) for key in keys},
            **{f"{key}_ci95": rounded(two_way_interval(values)) for key, values in queries.items()},
            "by_class": by_class, "by_seed": [row["mAP"] for row in rows]}
    if reference is not None:
        beside = _table(reference, "by_query")
        if 1 < len(beside) != len(rows) > 1:
            raise ValueError(f"{len(rows)} heads beside {len(beside)} cannot be paired; train as many of both")
        values = queries["mAP"] - beside
        mean |= {"difference": round(float(values.mean()), 4), "difference_ci95": rounded(two_way_interval(values))}
    return mean


def _table(rows: Sequence[Mapping], key: str) -> np.ndarray:
    return np.array([row[key] for row in rows])
