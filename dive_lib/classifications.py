"""Classification runs: many images by one method, image by image on disk (`image_runs`).

Methods, on the same (t, noise) pairs, one for each of evenly spaced timesteps, unless `invert` draws fresh ones:

enumerate   the Diffusion Classifier: every class on every pair, or on `pairs` evenly spread ones
eliminate   its adaptive variant: keep, pairs (`diffusion_classifier.Elimination`)
invert      DIVE, Algorithm 1: the settings of `InversionConfig`; lr_std in place of lr is the rate in standard
            deviations of the vocabulary, on which a good rate depends (published: about a half)
shortlist   a few classes by one gradient, then elimination: rank_pairs, size, keep, pairs; read: whether the
            gradient is read by a fitted `gradient_shortlist.LossReading` (`learn_reading`), and trust: for how many
            pairs its prediction counts in the elimination

    python -m dive_lib.classifications FOLDER --shard 0/2
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dive_lib import checkpoint, class_models, image_encoder, image_runs, paths
from dive_lib.class_data import ClassData
from dive_lib.class_images import ClassImages, read_split
from dive_lib.diffusion_classifier import (Classified, Elimination, class_errors, eliminate, evenly_spread,
                                           shared_pairs)
from dive_lib.execution import Execution
from dive_lib.first_stage import device
from dive_lib.gradient_shortlist import LossReading, class_gradients, classify_by_shortlist, fit_reading, load_reading
from dive_lib.inversion import fixed_pairs, invert, published_pairs
from dive_lib.inversion_config import InversionConfig
from dive_lib.inversion_result import Inverted, Step
from dive_lib.objective import Cost, Objective, Pairs

METHODS = {"enumerate": {"pairs"}, "eliminate": {"keep", "pairs"},
           "shortlist": {"read", "trust", "rank_pairs", "size", "keep", "pairs"}}
"""Settings of each method; "enumerate" has a default for its own, "invert" takes those of InversionConfig."""
FITTED = ("model_weights", "encoder_weights", "pairs", "seed")
"""What a reading must share with the run that uses it."""
NOISES = {"independent": fixed_pairs, "antithetic": fixed_pairs, "shared": shared_pairs, "published": published_pairs}
"""Pairs by the value of `noise`, "independent" where there is none; all but the published are drawn from the seed.
"antithetic" sets `InversionConfig.antithetic`, and so holds for a monitor of its own pairs as well."""


def make_spec(data: ClassData, split: str, image_ids: list[str], model: Path | str, method: dict, *, pairs: dict,
              classes: list[int] = (), reading: Path | str = "", batch: int = 50, seed: int = 0,
              execution: dict | None = None) -> dict:
    """Describes a run. model: folder of a class-conditional model. method: {"method": name, settings ...}. pairs:
    t_low, t_high and t_interval of the timesteps, and noise, a key of NOISES, where it is not drawn from the seed; a
    method may have a `noise` of its own.
    classes: the only ones that are possible, for which images of others make no sense; all by default. reading: folder
    of `learn_reading`, for a shortlist that is read. execution: settings of Execution. Raises ValueError for settings
    that do not fit together."""
    pairs = pairs | {key: value for key, value in method.items() if key == "noise"}
    settings = {key: value for key, value in method.items() if key not in ("method", "noise")}
    name, (timesteps, _) = method.get("method"), _split_pairs(pairs)
    if {"lr", "lr_std"} <= settings.keys():
        raise ValueError(f"classification {method}: lr and lr_std are two rates; give one of them")
    if name == "invert":
        try:
            InversionConfig(**{key: settings[key] for key in settings if key != "lr_std"}, **timesteps, seed=seed)
        except TypeError as error:  # of a setting that InversionConfig does not have, or that is the pairs'
            raise ValueError(f"classification {method}: {error}") from error
    elif name not in METHODS or set(settings) != METHODS[name] and (name != "enumerate" or settings):
        known = "; ".join(f"{key}: {', '.join(sorted(values)) or 'no settings'}" for key, values in METHODS.items())
        raise ValueError(f"unknown classification {method}; choose invert with settings of InversionConfig, or {known}")
    if settings.get("trust") and not settings["read"]:
        raise ValueError(f"classification {method}: only the prediction of a reading can be trusted; set trust to 0")
    if settings.get("read") and not reading:
        raise ValueError(f"classification {method}: a shortlist that is read needs the folder of `learn_reading`")
    known = {} if not settings.get("read") else {
        "reading": paths.shorten(reading), "reading_weights": checkpoint.weights_fingerprint(reading)}
    images = data.digests.get(split) or _files(getattr(data, split), image_ids)
    return {"root": paths.shorten(data.root), "folder": data.names[split], "image_size": data.test.image_size,
            "channels": data.test.channels, "images": images, "encoder": data.encoder,
            "encoder_weights": image_encoder.fingerprint(data.encoder), "model": paths.shorten(model),
            "model_weights": checkpoint.weights_fingerprint(model), **known, "method": name,
            "settings": settings, "pairs": pairs, "classes": list(classes), "seed": seed, "batch": batch,
            "image_ids": list(image_ids), "execution": asdict(Execution(**(execution or {})))}


def method_of(spec: dict) -> dict:
    """The method of a run, as `make_spec` takes it, for a run of another model. A rate is in standard deviations of the
    vocabulary then: tables of different scale (DiT's entries start at 0.02, LDM's at 1) need different rates."""
    settings = dict(spec["settings"])
    if "lr" in settings:
        settings["lr_std"] = settings.pop("lr") / class_models.load(paths.ROOT / spec["model"]).vocabulary.std
    return {"method": spec["method"], **settings}


def learn_reading(directory: Path | str, spec: dict, results: list[dict], rank_pairs: int, strength: float) -> Cost:
    """Fits a `LossReading` and writes it; returns what that took, with the enumeration of its images.

    spec, results: of an "enumerate" run, best on training images; their labels are not looked at. rank_pairs: number of
    pairs on which gradients are taken, as in the methods that will use it. strength: of ridge's penalty.
    """
    runner = Runner(spec)
    ids = [result["image_id"] for result in results]
    batches = [ids[k:k + spec["batch"]] for k in range(0, len(ids), spec["batch"])]
    pairs = runner.spread(rank_pairs)
    gradients = torch.cat([class_gradients(runner.objective, runner.latents(part), pairs) for part in batches])
    reading = fit_reading(gradients, torch.tensor([result["errors"] for result in results]), strength)
    checkpoint.save_model(directory, reading, {
        "pairs": rank_pairs, "width": gradients.shape[2], "classes": len(runner.classes), "images": len(ids),
        "strength": strength, "fitted": {key: spec[key] for key in FITTED}})
    passes = rank_pairs * len(ids)
    return sum((Cost.from_dict(result["cost"]) for result in results), Cost(forward=passes, backward=passes))


def run(directory: Path | str, spec: dict, *, workers: int = 1, label: str = "classification") -> list[dict]:
    """All results of a spec, in the order of its images; see `image_runs.run`."""
    return image_runs.run(directory, spec, Runner, workers=workers, label=label)


class Runner:
    """The frozen model and the images of a spec."""

    def __init__(self, spec: dict):
        self.spec = spec
        if checkpoint.weights_fingerprint(spec["model"]) != spec["model_weights"] or \
                image_encoder.fingerprint(spec["encoder"]) != spec["encoder_weights"]:
            raise ValueError(f"{spec['model']} or {spec['encoder'] or 'pixels'}: the weights have changed since the "
                             "run was described; describe it anew")
        self.images = read_split(paths.ROOT / spec["root"], spec["folder"], image_size=spec["image_size"],
                                 channels=spec["channels"])
        self.encoder = image_encoder.load(spec["encoder"]).to(device())
        model = class_models.load(paths.ROOT / spec["model"]).to(device())
        self.classes = spec["classes"] or list(range(len(model.grid.classes)))
        objective = Objective(class_models.with_classes(model, spec["classes"]) if spec["classes"] else model)
        self.objective = Execution(**spec["execution"]).prepare(objective)
        settings = dict(spec["settings"]) if spec["method"] == "invert" else {"fixed_pairs": True}
        if "lr_std" in settings:
            settings["lr"] = settings.pop("lr_std") * model.vocabulary.std
        timesteps, draw = _split_pairs(spec["pairs"])
        self.config = InversionConfig(**settings, **timesteps, seed=spec["seed"])
        self.pairs = draw(self.objective, self.config)
        self.reading = self._load_reading() if "reading" in spec else None

    def latents(self, image_ids: list[str]) -> torch.Tensor:
        """(B, C, h, w) what the model diffuses."""
        images = self.images.load_images([self.images.index_of(i) for i in image_ids])
        with torch.no_grad():
            return self.encoder.encode(images.to(device()))

    def results(self, image_ids: list[str]) -> list[dict]:
        """Classifies one batch and returns the JSON-serialisable results."""
        latents = self.latents(image_ids)
        began = time.perf_counter()
        described = getattr(self, self.spec["method"])(latents)
        seconds = (time.perf_counter() - began) / len(image_ids)
        rows = []
        for image_id, row in zip(image_ids, described):
            label = int(self.images.labels[self.images.index_of(image_id)])
            prediction = self.classes[row.pop("prediction")]
            rows.append({"image_id": image_id, "label": label, "prediction": prediction,
                         "correct": prediction == label, **row, "seconds": seconds})
        return rows

    def enumerate(self, latents: torch.Tensor) -> list[dict]:
        """Also the errors of all classes, and the answers on fewer pairs."""
        pairs = self.spread(self.spec["settings"].get("pairs", len(self.pairs)))
        errors = class_errors(self.objective, latents, pairs).double().cpu()
        least = 2 if pairs.opposite else 1
        counts = {max(1, len(pairs) // part // least) * least for part in (20, 10, 5, 4, 3, 2)}
        counts = sorted({count for count in counts if count < len(pairs)} | {len(pairs)})
        subsets = {count: evenly_spread(count, len(pairs), pairs.opposite) for count in counts}
        rows = []
        for image in errors:
            mean = image.mean(1)
            answers = [[count, self.classes[int(image[:, subset].mean(1).argmin())]]
                       for count, subset in subsets.items()]
            rows.append({"prediction": int(mean.argmin()), "errors": mean.tolist(), "by_pairs": answers,
                         "cost": Cost(forward=image.numel()).to_dict()})
        return rows

    def eliminate(self, latents: torch.Tensor) -> list[dict]:
        return _described(eliminate(self.objective, latents, self.pairs, Elimination(**self.spec["settings"])))

    def shortlist(self, latents: torch.Tensor) -> list[dict]:
        settings = self.spec["settings"]
        rank, size, trust = settings["rank_pairs"], settings["size"], settings["trust"]
        elimination = Elimination(settings["keep"], settings["pairs"])
        return _described(classify_by_shortlist(self.objective, latents, self.spread(rank), self.pairs,
                                                min(size, len(self.classes)), elimination, self.reading, trust))

    def spread(self, count: int) -> Pairs:
        """So many of the pairs, evenly spread."""
        index = evenly_spread(count, len(self.pairs), self.pairs.opposite)
        return self.pairs[torch.tensor(index, device=self.pairs.t.device)]

    @property
    def given(self) -> Pairs | None:
        """The pairs that `invert` is given; None where it draws fresh noises."""
        return self.pairs if self.config.fixed_pairs else None

    def _load_reading(self) -> LossReading:
        folder, rank = paths.ROOT / self.spec["reading"], self.spec["settings"]["rank_pairs"]
        fitted = checkpoint.load_config(folder)
        if checkpoint.weights_fingerprint(folder) != self.spec["reading_weights"] or fitted["pairs"] != rank or \
                any(fitted["fitted"][key] != self.spec[key] for key in FITTED):
            raise ValueError(f"{self.spec['reading']}: fitted for another model, or for other pairs than the {rank} of "
                             "this run; fit it anew")
        return load_reading(folder, fitted).restricted(self.classes).to(device())

    def invert(self, latents: torch.Tensor) -> list[dict]:
        rows = []
        for result in invert(self.objective, latents, self.config, label="DIVE", pairs=self.given):
            result = result if self.config.memoise else self._without_reuse(result)
            rows.append({"prediction": int(result.tokens), "monitor": result.monitor,
                         "convergence_step": result.convergence_step,
                         "states_visited": result.states_visited if self.config.monitor_nearest else None,
                         "curve": result.curve, "improvements": [[step, value, self.classes[tokens[0][0]]]
                                                                 for step, value, tokens, _ in result.improvements],
                         "cost": result.cost.to_dict()})
        return rows

    def _without_reuse(self, result: Inverted) -> Inverted:
        """With the cost of a program that evaluates its monitor anew each time, as the published one does."""
        monitor = self.config.monitor_pairs or len(self.pairs)
        for number, point in enumerate(result.curve, start=1):
            point[2] = 2 * min(point[0], self.config.steps) * self.config.batch + number * monitor
        steps = result.curve[-1][0]
        cost = Cost(forward=steps * self.config.batch + len(result.curve) * monitor, backward=steps * self.config.batch)
        return replace(result, cost=cost)

    def paths(self, image_ids: list[str]) -> list[dict]:
        """How DIVE moves through the vocabulary: of each image the embeddings (steps, d) and nearest classes."""
        steps: list[Step] = []
        invert(self.objective, self.latents(image_ids), replace(self.config, patience=0), pairs=self.given,
               trace=steps.append)
        moved = torch.stack([step.embeddings[:, 0, 0].cpu() for step in steps], dim=1)
        tokens = torch.stack([step.tokens[:, 0, 0].cpu() for step in steps], dim=1)
        return [{"image_id": image_id, "embeddings": moved[k], "classes": [self.classes[t] for t in tokens[k].tolist()]}
                for k, image_id in enumerate(image_ids)]


def _split_pairs(pairs: dict) -> tuple[dict, Callable[[Objective, InversionConfig], Pairs]]:
    """The pairs' settings in InversionConfig, and what draws them. Raises ValueError for an unknown noise."""
    noise = pairs.get("noise", "independent")
    if noise not in NOISES:
        raise ValueError(f"noise of the pairs is {noise!r}; choose one of {', '.join(NOISES)}")
    timesteps = {key: value for key, value in pairs.items() if key != "noise"}
    return timesteps | {"antithetic": noise == "antithetic"}, NOISES[noise]


def _files(images: ClassImages, image_ids: list[str]) -> str:
    """A fingerprint of the names and bytes of some images."""
    names = [images.names[images.index_of(image_id)] for image_id in image_ids]
    return checkpoint.fingerprint(names, *[images.folder / name for name in names])


def _described(results: list[Classified]) -> list[dict]:
    return [{"prediction": result.prediction, "cost": result.cost.to_dict()} for result in results]


if __name__ == "__main__":
    image_runs.command(Runner)
