"""Few-shot classification: a U-head on frozen features, a linear probe, a network trained from scratch.

A trial draws the shots of every class from the training split and answers all images of another split. Settings are
compared on validation images; draws and test images give the interval of what is reported.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from dive_lib import classifiers, paths, text_heads
from dive_lib.checkpoint import fingerprint
from dive_lib.few_shot_data import FewShotSet, draw_shots
from dive_lib.first_stage import device
from dive_lib.progress import silent
from dive_lib.side_by_side import side_by_side
from dive_lib.task_bench import Bench, training
from dive_lib.train import TrainingConfig, train
from dive_lib.u_head import CLASSIFICATION


class FewShot:
    """Trials on one data set. head: settings of `text_heads.make` and of `task_bench.training`."""

    def __init__(self, bench: Bench, part: FewShotSet, head: Mapping):
        self.bench, self.part, self.head = bench, part, dict(head)
        self.text = bench.text(part.classes, part.templates)
        self._pooled: dict = {}

    def u_head(self, source: Mapping, shots: int, draw: int, split: str = "test", **changed) -> np.ndarray:
        """(n,) bool: which images of a split a head answers rightly. source: see `Bench.scales`; changed: of `head`."""
        settings = self.head | changed
        scales = self.bench.scales(self.part.train, source)
        chosen = draw_shots(self.part.train.labels, shots, draw)
        head = text_heads.make(scales, self.text.shape[1], settings, draw)
        text_heads.fit(self.bench, head, [(scales, chosen, self.part.train.labels[chosen])], self.text, CLASSIFICATION,
                       training(settings, len(chosen), draw), task="few_shot")
        images = getattr(self.part, split)
        embeddings = text_heads.embed(head, self.bench.scales(images, source, self.part.train))
        return (text_heads.answers(embeddings, self.text) == images.labels).numpy()

    def linear_probe(self, source: Mapping, shots: int, draw: int, split: str = "test") -> np.ndarray:
        """The same of logistic regression. source: {"backbone", "t", "group": one stage, "side", "strength"}."""
        chosen = draw_shots(self.part.train.labels, shots, draw)
        if self.bench.cache is None:  # every image costs a pass of the network: only the shots
            train_x = text_heads.pooled(self.bench.scales(self.part.train, source), source["side"], chosen)
        else:
            train_x = self._flat(source, "train")[chosen]
        test_x = self._flat(source, split)
        labels = getattr(self.part, split).labels.numpy()
        return text_heads.linear_probe(train_x, self.part.train.labels[chosen].numpy(), test_x,
                                       source["strength"]) == labels

    def from_scratch(self, network: Mapping, shots: int, draw: int, split: str = "test") -> np.ndarray:
        """The same of a network trained on the images alone. network: {"steps", "batch_size", "lr", "shift", and what
        `classifiers.make` takes}."""
        own = {key: value for key, value in network.items() if key not in ("steps", "batch_size", "lr", "shift")}
        chosen = draw_shots(self.part.train.labels, shots, draw)
        side = self.part.train.image_size
        torch.manual_seed(draw)
        model = classifiers.make(own, channels=3, classes=len(self.part.classes), image_size=side).to(device())
        images, labels = self.part.train.load_images(chosen).to(device()), self.part.train.labels[chosen]
        loss_of = classifiers.classifier_loss(lambda index: images[index], labels, network["batch_size"],
                                              shift=network["shift"])
        config = TrainingConfig(steps=network["steps"], lr=network["lr"], batch_size=network["batch_size"], ema=0.0,
                                seed=draw)
        with silent():
            train(model, loss_of, config, scratch=paths.scratch() / "few_shot", label="from scratch",
                  identity=fingerprint(images, labels, own, network["shift"]))
        classifiers.calibrate(model, lambda index: images[index], len(labels), batch=network["batch_size"])
        part = getattr(self.part, split)
        read = self.bench.reader(part)
        answers = classifiers.predict(model, lambda index: read(index).to(device()), len(part))
        return np.array(answers) == part.labels.numpy()

    def _flat(self, source: Mapping, split: str) -> np.ndarray:
        key = (source["backbone"], source["t"], source["group"], source["side"], split)
        if key not in self._pooled:
            scales = self.bench.scales(getattr(self.part, split), source, None if split == "train" else self.part.train)
            self._pooled[key] = text_heads.pooled(scales, source["side"])
        return self._pooled[key]


def tuned_on(sets: Mapping[str, FewShot]) -> FewShot:
    """The first set with validation images, on which settings are chosen. ValueError where no set has any."""
    for task in sets.values():
        if len(task.part.val):
            return task
    raise ValueError(f"few-shot sets {', '.join(sets)}: none has validation images, on which t, stages and the probe's "
                     "strength are chosen; add a set that has some, such as Pets")


def compare(trial: Callable, candidates: Sequence[Mapping], shots: int, draws: int, label: str,
            split: str = "val") -> list[dict]:
    """Candidates with their accuracy on validation images, in percent, best first. trial: a FewShot's u_head or
    linear_probe."""
    def accuracies(own: Sequence[Mapping]) -> list[dict]:
        return [{**candidate, "accuracy": round(float(np.mean(
            [100 * float(trial(candidate, shots, draw, split).mean()) for draw in range(draws)])), 4)}
            for candidate in own]

    groups: dict = {}  # what reads the same features follows each other in one process, which reads them once
    for candidate in candidates:
        groups.setdefault(tuple(candidate.get(key) for key in ("backbone", "t", "group", "side")), []).append(candidate)
    bench = trial.__self__.bench
    rows = side_by_side([partial(accuracies, own) for own in groups.values()], bench.workers, label,
                        unit="sets of features")
    # The sort is stable: the first of equals wins.
    return sorted((row for part in rows for row in part), key=lambda row: -row["accuracy"])


def repeat(trial: Callable, source: Mapping, shots: Sequence[int], draws: int, label: str, **changed) -> dict:
    """{shots: (draws, n) bool} on test images. trial: a FewShot's u_head, linear_probe or from_scratch."""
    task = trial.__self__
    if "backbone" in source and task.bench.cache is not None:  # read once, before processes take their copies
        task.bench.scales(task.part.test, source, task.part.train)
        for split in ("train", "test") if "side" in source else ():
            task._flat(source, split)
    rows = side_by_side([partial(trial, source, count, draw, **changed) for count in shots for draw in range(draws)],
                        task.bench.workers, label, unit="trials")
    return {count: np.stack(rows[k * draws:(k + 1) * draws]) for k, count in enumerate(shots)}
