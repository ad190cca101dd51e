"""DIVE's Table V at this size: one search on each device at hand, in each precision, with seconds and accuracy.

    python -m benchmarks.devices                     # trained models of runs/mini, 100 images and 20 scenes
    python -m benchmarks.devices --tasks classification --images 40

Published, on an RTX 3090 and an A100: detection in 90 and 50 minutes at AP 10.3 and 10.6, classification in 240 and 80
seconds at 76.6 and 77.2. Here classification is Table IV's `dive_exact`, and detection the profile's straight-through
search: on the processor with one thread and with all, and on every CUDA device; in float32, in TF32 where the device
has it, and with networks in bfloat16 (`dive_lib.execution`). A device that is absent is no row.

Images are of the validation split, detection's of its subset `tuning`. `same_answers` is the percentage of images whose
answer, a class or a whole layout, is that of the first row: float32 on one thread of the processor, if it takes part.
Seconds are those of the search and of detection's scores, after a first step that is not counted, and not of encoding
the images.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from benchmarks import inversion_cost, measure
from dive_lib import class_data, classification_results, classifications, dataset, detections, parameters, paths
from dive_lib import detection_results, provenance


class Movable:
    """A runner whose search can be moved to a device. Images are encoded where they always are, in float32."""

    device = "cpu"

    def move(self, device: str) -> None:
        self.device = device
        self.objective.ldm.to(device)
        if self.objective.prior is not None:
            self.objective.prior.to(device)

    def latents(self, image_ids: list) -> torch.Tensor:
        with computing("float32", None):
            return super().latents(image_ids).to(self.device)


class Classification(Movable, classifications.Runner):
    """Of `classifications`."""

    def move(self, device: str) -> None:
        super().move(device)
        self.pairs = self.pairs.to(device)


class Detection(Movable, detections.Runner):
    """Of `detections`."""


@dataclass
class Task:
    """spec, runner: frozen models, search and images. evaluate: results -> accuracy or AP, interval, cost. answer: key
    of a result by which devices are compared."""

    spec: dict
    runner: type[Classification | Detection]
    evaluate: Callable[[list[dict]], dict]
    answer: str


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--tasks", nargs="+", default=["classification", "detection"],
                        choices=("classification", "detection"))
    parser.add_argument("--images", type=int, default=100, help="validation images of classification")
    parser.add_argument("--scenes", type=int, default=20, help="validation images of detection")
    parser.add_argument("--no-processor", action="store_true", help="accelerators only")
    parser.add_argument("--out", type=Path, default=None, help="folder for the result; benchmarks/results by default")
    options = parser.parse_args(arguments)
    rows, settings = [], {"profile": options.profile, "split": "val"}
    for name in options.tasks:
        task = (classification(options.profile, options.images) if name == "classification" else
                detection(options.profile, options.scenes))
        rows += [{"task": name} | row for row in device_rows(task, not options.no_processor)]
        settings[name] = {"images": len(task.spec["image_ids"]), "images_at_once": task.spec["batch"],
                          "inversion": task.spec.get("inversion", task.spec.get("settings"))}
    return measure.save("devices", settings, rows, arguments=measure.given(arguments), folder=options.out)


def classification(profile: str, images: int) -> Task:
    """DIVE with exact reuse on so many validation images, spread evenly over the classes."""
    group, data = parameters.load(profile)["classification"], class_data.load(profile)
    methods = parameters.named("class_searches", "methods", group["methods"])
    ids = classification_results.spread(data.ids("val"), images)
    spec = classifications.make_spec(data, "val", ids, paths.runs(profile) / "dit", methods["rows"]["dive_exact"],
                                     pairs=methods["pairs"], batch=group["batch"], seed=group["seed"],
                                     execution=group["execution"])
    return Task(spec, Classification, classification_results.evaluate_run, "prediction")


def detection(profile: str, images: int) -> Task:
    """The profile's straight-through search on the first images of the tuning subset."""
    settings = parameters.load(profile)["detection"]
    search = parameters.named("searches", "straight_through", settings["search"])
    inversion = search | {"steps": settings["steps"], "seed": settings["seed"]}
    spec = inversion_cost.describe(profile, settings, inversion, images)
    truth, ids = dataset.load(profile).annotations("val"), spec["image_ids"]
    return Task(spec, Detection, lambda results: detection_results.evaluate_run(truth, results, ids), "tokens")


def places(processor: bool = True) -> Iterator[tuple[str, int | None]]:
    """(device, threads): the processor with one thread and with all, then every CUDA device, whose threads are None."""
    yield from (("cpu", threads) for threads in sorted({1, provenance.machine()["cores"]}) if processor)
    yield from ((f"cuda:{number}", None) for number in range(torch.cuda.device_count()))


def precisions(device: str) -> tuple[str, ...]:
    """What a device computes in; a processor without instructions for bfloat16 does so slowly."""
    if device == "cpu":
        return "float32", "bfloat16"
    ampere = torch.cuda.get_device_capability(device) >= (8, 0)  # the first with either
    return ("float32", "tf32", "bfloat16") if ampere else ("float32",)


@contextmanager
def computing(precision: str, threads: int | None) -> Iterator[None]:
    """TF32 on or off (for convolutions it is on by default) and so many threads; afterwards all is as before."""
    before = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    tf32 = precision == "tf32"
    try:
        torch.set_num_threads(threads or before[0])
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.set_float32_matmul_precision(before[1])
        torch.backends.cudnn.allow_tf32 = before[2]


def device_rows(task: Task, processor: bool) -> list[dict]:
    """A row for each device, number of threads and precision. The first one's answers are those of `same_answers`."""
    rows, reference = [], None
    for device, threads in places(processor):
        name = provenance.processor_name() if device == "cpu" else torch.cuda.get_device_name(device)
        for precision in precisions(device):
            half = {"bf16": precision == "bfloat16", "compile": False}
            runner = task.runner(task.spec | {"execution": task.spec["execution"] | half})
            runner.move(device)
            with computing(precision, threads), measure.quiet():
                results = searched(runner)
            reference = reference or results
            rows.append({"device": name, "threads": threads, "precision": precision} |
                        described(results, reference, task))
            print(measure.markdown(rows[-1:]), flush=True)
    return rows


def searched(runner: Classification | Detection) -> list[dict]:
    """The results of all images, after one step of the first batch: by then kernels are chosen, memory is taken."""
    config, size, ids = runner.config, runner.spec["batch"], runner.spec["image_ids"]
    runner.config = replace(config, steps=1)
    runner.results(ids[:size])
    runner.config = config
    parts = [ids[start:start + size] for start in range(0, len(ids), size)]
    return [result for part in parts for result in runner.results(part)]


def described(results: list[dict], reference: list[dict], task: Task) -> dict:
    """The measured columns of a row. reference: results of the same images, in the same order."""
    evaluated, count = task.evaluate(results), len(results)
    same = sum(a[task.answer] == b[task.answer] for a, b in zip(results, reference, strict=True))
    quality = {key: evaluated[key] for key in ("accuracy", "accuracy_ci95", "AP", "AP_ci95") if key in evaluated}
    return {"images": count, "seconds_per_image": sum(r["seconds"] for r in results) / count, **quality,
            "forward_equivalents": evaluated["forward_equivalents"],
            "mean_monitor": sum(r["monitor"] for r in results) / count, "same_answers": 100 * same / count}


if __name__ == "__main__":
    main()
