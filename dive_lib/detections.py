"""Detection runs: many images, image by image on disk, in shards, and as COCO results.

A run is described by one JSON-serialisable `spec`, so that any number of processes or machines can work on it:

    python -m dive_lib.detections FOLDER --shard 0/2
    python -m dive_lib.detections FOLDER --shard 1/2

Each image's result is one JSON file that appears in one atomic step; started again, a run does what is missing. A
result never depends on the shard or the batch that it was computed in. A folder belongs to one spec: results of
another spec are refused.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from dive_lib import checkpoint, first_stage, layout_ldm, layout_prior, paths
from dive_lib.coco import CocoLayouts, read_split, to_original
from dive_lib.files import read_json, write_json
from dive_lib.inversion import InversionConfig, Inverted, invert, monitor_pairs
from dive_lib.latents import LayoutTokens, load_images
from dive_lib.local_search import LocalSearch, SearchConfig, box_proposals
from dive_lib.objective import Objective, Pairs
from dive_lib.progress import Progress


def make_spec(*, data: str, split: str, image_ids: list[int], first_stage: str, layout_ldm: str,
              prior: list[str] = (), objective: dict | None = None, inversion: dict | None = None,
              search: dict | None = None, start: str = "none", batch: int = 40, train_split: str = "train") -> dict:
    """Describes a run. Paths are relative to the repository root.

    prior: no folder, one (the joint prior) or two (classes and boxes). objective: weight, reduction, loss.
    inversion, search: settings of InversionConfig and SearchConfig; with both, inversion starts at the search's
    result; with neither there is nothing to run. start: "none", or "truth" (the diagnosis of the objective).
    """
    if inversion is None and search is None:
        raise ValueError("a run needs inversion settings, search settings or both")
    if start not in ("none", "truth"):
        raise ValueError(f"start must be 'none' or 'truth', got {start!r}")
    InversionConfig(**(inversion or {}))
    SearchConfig(**(search or {}))
    weights = {str(folder): checkpoint.fingerprint(paths.ROOT / folder / "weights.safetensors")
               for folder in (first_stage, layout_ldm, *prior)}
    return {"data": str(data), "split": split, "train_split": train_split, "image_ids": list(image_ids),
            "first_stage": str(first_stage), "layout_ldm": str(layout_ldm), "prior": [str(p) for p in prior],
            "objective": objective or {}, "inversion": inversion, "search": search, "start": start, "batch": batch,
            "weights": weights}


def prepare(directory: Path | str, spec: dict) -> Path:
    """Makes a run's folder. What another spec left there is removed: a changed run never mixes with an old one."""
    directory = Path(directory)
    described = directory / "spec.json"
    if described.exists() and read_json(described) != spec:
        for result in directory.glob("*.json"):
            result.unlink(missing_ok=True)
    if not described.exists():
        write_json(described, spec)
    return directory


def run(directory: Path | str, spec: dict, *, workers: int = 1, label: str = "detection") -> list[dict]:
    """Runs a spec in `workers` processes on this machine and returns the results in the order of its image ids.

    Results gather in a scratch folder named after the spec, and are copied to `directory` when all are there: DVC
    empties `directory` before a stage starts, and a stopped run must not lose what it has. One worker is this process;
    several are processes that share the processor cores. Raises RuntimeError with a process's last words if one fails.
    """
    target, directory = Path(directory), paths.scratch() / "detection" / checkpoint.fingerprint(spec)
    prepare(directory, spec)
    done = _present(directory, spec)
    with Progress(len(spec["image_ids"]), label, unit="images", start=done) as progress:
        if done < progress.total and workers == 1:
            run_shard(directory, report=progress.update)
        elif done < progress.total:
            _run_processes(directory, spec, workers, progress)
    results = collect(directory)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target, ignore=shutil.ignore_patterns(".*"))
    shutil.rmtree(directory)
    return results


def _run_processes(directory: Path, spec: dict, workers: int, progress: Progress) -> None:
    threads = max(1, (os.cpu_count() or 1) // workers)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "DIVE_PROGRESS": ""}
    commands = [[sys.executable, "-m", "dive_lib.detections", str(directory), "--shard", f"{k}/{workers}"]
                for k in range(workers)]
    logs = [directory / f".shard-{k}.log" for k in range(workers)]
    processes = []
    try:
        for command, log in zip(commands, logs):
            with log.open("w") as stream:
                processes.append(subprocess.Popen(command, cwd=Path(__file__).parent.parent, env=environment,
                                                  stdout=subprocess.DEVNULL, stderr=stream))
        while any(p.poll() is None for p in processes) and not any(p.poll() for p in processes):
            time.sleep(0.2)  # images end batch by batch; between them, one worker's own line shows that work goes on
            lines = logs[0].read_text().splitlines()
            progress.update(_present(directory, spec) - progress.done, worker=lines[-1] if lines else "starts")
        for process, log in zip(processes, logs):
            if process.poll():
                raise RuntimeError(f"{progress.label} failed:\n{log.read_text()[-2000:]}")
        progress.update(_present(directory, spec) - progress.done)
    finally:
        for process in processes:
            process.terminate()
            process.wait()


def _present(directory: Path, spec: dict) -> int:
    return sum(_path(directory, image_id).exists() for image_id in spec["image_ids"])


def collect(directory: Path | str) -> list[dict]:
    """All results of a run. Raises FileNotFoundError that names how many images are missing."""
    spec = read_json(Path(directory) / "spec.json")
    missing = [i for i in spec["image_ids"] if not _path(directory, i).exists()]
    if missing:
        raise FileNotFoundError(f"{Path(directory).name}: {len(missing)} of {len(spec['image_ids'])} images have no "
                                f"result yet (first: {missing[0]}); run the missing shards")
    return [read_json(_path(directory, i)) for i in spec["image_ids"]]


def run_shard(directory: Path | str, shard: int = 0, shards: int = 1, report=lambda count: None) -> None:
    """Computes the missing results of every `shards`-th image, from the `shard`-th on; report: told of each."""
    directory = Path(directory)
    spec = read_json(directory / "spec.json")
    todo = [i for i in spec["image_ids"][shard::shards] if not _path(directory, i).exists()]
    if not todo:
        return
    runner = Runner(spec)
    for start in range(0, len(todo), spec["batch"]):
        ids = todo[start:start + spec["batch"]]
        for result in runner.detect(ids):
            write_json(_path(directory, result["image_id"]), result)
            report(1)


class Runner:
    """The frozen models and the data of a spec."""

    def __init__(self, spec: dict):
        self.spec = spec
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for folder, weights in spec["weights"].items():
            if checkpoint.fingerprint(paths.ROOT / folder / "weights.safetensors") != weights:
                raise ValueError(f"{folder}: the weights have changed since the run was described; describe it anew")
        self.first_stage = first_stage.load(paths.ROOT / spec["first_stage"]).to(device)
        self.ldm = layout_ldm.load(paths.ROOT / spec["layout_ldm"]).to(device)
        prior = [paths.ROOT / folder for folder in spec["prior"]]
        load_prior = layout_prior.load_decoupled if len(prior) == 2 else layout_prior.load
        prior = load_prior(*prior) if prior else None
        self.objective = Objective(self.ldm, prior.to(device) if prior else None, **spec["objective"])
        grid = self.ldm.grid
        train = read_split(paths.ROOT / spec["data"], spec["train_split"], check_images=False)
        split = read_split(paths.ROOT / spec["data"], spec["split"], categories=train.categories, check_images=False)
        self.layouts = CocoLayouts(split, grid.image_size, grid.slots)
        if spec["search"] is not None:
            self.search = SearchConfig(**spec["search"])
            tokens = LayoutTokens(CocoLayouts(train, grid.image_size, grid.slots), grid).tokens
            self.proposals = box_proposals(tokens, grid, self.search.proposals)
        self.config = self.search.monitor if spec["inversion"] is None else InversionConfig(**spec["inversion"])

    def latents(self, image_ids: list[int]) -> torch.Tensor:
        images = load_images(self.layouts, [self.layouts.index_of(i) for i in image_ids])
        with torch.no_grad():
            return self.first_stage.encode(images.to(self.first_stage.latent_mean.device))

    def truth(self, image_ids: list[int]) -> torch.Tensor:
        """(B, N, 5) tokens of the annotations."""
        generator = torch.Generator().manual_seed(0)
        draws = [self.layouts.draw(self.layouts.index_of(i), generator) for i in image_ids]
        return torch.stack([self.ldm.grid.encode(*draw) for draw in draws])

    def detect(self, image_ids: list[int]) -> list[dict]:
        """Inverts one batch and returns the JSON-serialisable results."""
        latents = self.latents(image_ids)
        began = time.perf_counter()
        start = self.truth(image_ids) if self.spec["start"] == "truth" else None
        searched: list[Inverted] = []
        if self.spec["search"] is not None:
            searched = LocalSearch(self.objective, latents, self.search, self.proposals).run()
            start = torch.stack([r.tokens for r in searched])
        results = searched
        if self.spec["inversion"] is not None:
            results = invert(self.objective, latents, self.config, start)
            for result, before in zip(results, searched):
                result.cost = result.cost + before.cost
        concluded = self.conclude(image_ids, results, latents)
        seconds = (time.perf_counter() - began) / len(image_ids)
        return [result | {"seconds": seconds} for result in concluded]

    def conclude(self, image_ids: list[int], results: list[Inverted],
                 latents: torch.Tensor | None = None) -> list[dict]:
        """Scores, decodes and describes layouts of images."""
        latents = self.latents(image_ids) if latents is None else latents
        pairs = monitor_pairs(self.objective, self.config)
        confidences, evaluations = removal_confidence(self.objective, latents, [r.tokens for r in results], pairs)
        return [self.describe(*row) for row in zip(image_ids, results, confidences, evaluations)]

    def describe(self, image_id, result, confidence, confidence_forward) -> dict:
        decoded = self.ldm.grid.decode(result.tokens)
        boxes = to_original(decoded.boxes_xyxy, self.layouts.original_size(self.layouts.index_of(image_id)),
                            self.ldm.grid.image_size)
        categories = self.layouts.categories.ids
        detections = [
            {"image_id": image_id, "category_id": categories[c], "bbox": [round(v, 3) for v in box], "score": score}
            for box, c, score in zip(boxes.tolist(), decoded.class_ids.tolist(), confidence[decoded.slots].tolist())]
        kept = set(decoded.slots.tolist())  # an object with a [none] may have been completed, and then is not dropped
        dropped = [d for d in self.ldm.grid.decode(result.nearest).dropped if d["slot"] not in kept]
        return {"image_id": image_id, "detections": detections, "dropped": dropped,
                "tokens": result.tokens.tolist(), "nearest": result.nearest.tolist(),
                "monitor": result.monitor if result.curve else None,
                "convergence_step": result.convergence_step, "states_visited": result.states_visited,
                "curve": result.curve, "improvements": result.improvements, "cost": result.cost.to_dict(),
                "confidence_forward": confidence_forward}


def removal_confidence(objective: Objective, latents: torch.Tensor, tokens: list[torch.Tensor],
                       pairs: Pairs) -> tuple[torch.Tensor, list[int]]:
    """How much the monitor's image loss rises when an object is removed: (B, N), zero for empty slots.

    Also returns each image's number of denoiser evaluations. The paper gives no rule for scores; the constant 1 is
    reported beside this one.
    """
    tokens = torch.stack(list(tokens)).to(latents.device)
    none = objective.ldm.grid.none_tokens.to(latents.device)
    confidence = torch.zeros(tokens.shape[:2])
    evaluations = []
    for b in range(len(tokens)):
        slots = (tokens[b] != none).all(-1).nonzero()[:, 0]
        evaluations.append((len(slots) + 1) * len(pairs) if len(slots) else 0)
        if len(slots) == 0:
            continue
        candidates = tokens[b].repeat(len(slots) + 1, 1, 1)
        candidates[torch.arange(len(slots)), slots] = none
        losses = objective.evaluate(latents[b].expand(len(candidates), -1, -1, -1), candidates, pairs, prior=False)
        confidence[b, slots.cpu()] = (losses[:-1] - losses[-1]).cpu()
    return confidence, evaluations


def _path(directory: Path | str, image_id: int) -> Path:
    return Path(directory) / f"{image_id:012d}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Computes one shard of a detection run.")
    parser.add_argument("directory", type=Path, help="folder with the run's spec.json")
    parser.add_argument("--shard", default="0/1", help="which share of the images: i/n")
    arguments = parser.parse_args()
    shard, shards = (int(part) for part in arguments.shard.split("/"))
    run_shard(arguments.directory, shard, shards)


if __name__ == "__main__":
    main()
