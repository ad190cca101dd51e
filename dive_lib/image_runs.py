"""Runs over many images: one result for each on disk, in shards, processes or machines.

A run is described by one JSON-serialisable `spec` with the entries `image_ids` and `batch`; what is computed is up to
a runner, a class that takes the spec and has `results(image_ids)`. A module with such a class is a command:

    python -m MODULE FOLDER --shard 0/2
    python -m MODULE FOLDER --shard 1/2

Each image's result is one JSON file that appears in one atomic step; started again, a run does what is missing. A
folder belongs to one spec: results of another spec are removed.
"""

import argparse
import contextlib
import gc
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from dive_lib import checkpoint, paths, stage_scratch
from dive_lib.files import read_json, write_json
from dive_lib.progress import Progress, silent, written_to
from dive_lib.side_by_side import copies, usable


class Runner(Protocol):
    """Computes the results of a batch: JSON-serialisable, each with its "image_id", independent of the batch up
    to rounding."""

    def __init__(self, spec: dict): ...

    def results(self, image_ids: list) -> list[dict]: ...


def prepare(directory: Path | str, spec: dict) -> Path:
    """Makes a run's folder. What another spec left there is removed: a changed run never mixes with an old one."""
    directory = Path(directory)
    described = directory / "spec.json"
    if described.exists() and read_json(described) != spec:
        for result in directory.glob("*.json"):
            if result != described:
                result.unlink(missing_ok=True)
        described.unlink()  # last: without it a result that a kill left would be taken for one of the new spec
    if not described.exists():
        write_json(described, spec)
    return directory


def run(directory: Path | str, spec: dict, runner: type[Runner], *, workers: int = 1,
        label: str = "images") -> list[dict]:
    """Runs a spec in `workers` processes on this machine and returns the results in the order of its image ids.

    Results gather in a scratch folder named after the spec, and are copied to `directory` when all are there: DVC
    empties `directory` before a stage starts, and a stopped stage of several runs must not lose what it has. The
    scratch folder goes when the stage has ended well (`stage_scratch`); outside a stage it stays until `forget`. One
    worker is this process; several are copies of it, one core each (`side_by_side`), and there may be fewer than asked
    for (`usable`). Results do not depend on that. Raises RuntimeError with a copy's traceback if one fails.
    """
    workers = usable(workers, label)
    stage_scratch.keep(_scratch(spec))
    target, directory = Path(directory), prepare(_scratch(spec), spec)
    done = _present(directory, spec)
    with Progress(len(spec["image_ids"]), label, unit="images", start=done) as progress:
        if done < progress.total and workers == 1:
            with silent():
                run_shard(directory, runner, report=progress.update)
        elif done < progress.total:
            _run_copies(directory, spec, runner, workers, progress)
    results = collect(directory)
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target, ignore=shutil.ignore_patterns(".*"))
    return results


def forget(*specs: dict) -> None:
    """Removes the scratch copies of runs that no stage keeps; run again, they would be computed anew."""
    for spec in specs:
        stage_scratch.discard(_scratch(spec))


def collect(directory: Path | str) -> list[dict]:
    """All results of a run. Raises FileNotFoundError that names how many images are missing."""
    spec = read_json(Path(directory) / "spec.json")
    missing = [i for i in spec["image_ids"] if not _path(directory, i).exists()]
    if missing:
        raise FileNotFoundError(f"{Path(directory).name}: {len(missing)} of {len(spec['image_ids'])} images have no "
                                f"result yet (first: {missing[0]}); run the missing shards")
    return [read_json(_path(directory, i)) for i in spec["image_ids"]]


def run_shard(directory: Path | str, runner: type[Runner], shard: int = 0, shards: int = 1,
              report: Callable[[int], None] = lambda count: None) -> None:
    """Computes the missing results of every `shards`-th batch, from the `shard`-th on; report: told of each image.

    Which images share a batch decides rounding. So batches are those of a run in one piece and one process, and one of
    which some results are missing is computed whole: a run ends with the same bytes however it was split and stopped.
    """
    directory = Path(directory)
    spec = read_json(directory / "spec.json")
    ids, size = spec["image_ids"], spec["batch"]
    own = [ids[start:start + size] for start in range(0, len(ids), size)][shard::shards]
    if all(_path(directory, i).exists() for part in own for i in part):
        return
    prepared = runner(spec)
    for part in own:
        missing = {i for i in part if not _path(directory, i).exists()}  # asked now: another machine may have done it
        for result in prepared.results(part) if missing else ():
            if result["image_id"] in missing:
                write_json(_path(directory, result["image_id"]), result)
                report(1)
    del prepared
    gc.collect()  # a network whose forward method was replaced is a cycle: its weights leave the GPU here


def command(runner: type[Runner]) -> None:
    """The command line of a module with a runner."""
    parser = argparse.ArgumentParser(description="Computes one shard of a run.")
    parser.add_argument("directory", type=Path, help="folder with the run's spec.json")
    parser.add_argument("--shard", default="0/1", help="which share of the batches: i/n")
    arguments = parser.parse_args()
    shard, _, shards = arguments.shard.partition("/")
    if not (shard.isdecimal() and shards.isdecimal() and int(shard) < int(shards)):
        parser.error(f"--shard {arguments.shard}: expected i/n with 0 <= i < n, such as 0/8 to 7/8")
    run_shard(arguments.directory, runner, int(shard), int(shards))


def seconds_per_image(results: list[dict], workers: int) -> float:
    """Wall seconds per image of `workers` processes side by side, or of as many as this one may have (`usable`)."""
    return round(sum(r["seconds"] for r in results) / len(results) / usable(workers, "seconds"), 4)


def _run_copies(directory: Path, spec: dict, runner: type[Runner], workers: int, progress: Progress) -> None:
    lines = [directory / f".shard-{k}.txt" for k in range(workers)]

    def shard(k: int) -> None:
        with written_to(lines[k]):
            run_shard(directory, runner, k, workers)

    with contextlib.closing(copies([partial(shard, k) for k in range(workers)], workers, progress.label,
                                   every=0.2)) as answers:
        for _ in answers:  # images end batch by batch; between them, one worker's own line shows that work goes on
            line = lines[0].read_text() if lines[0].exists() else "starts"
            progress.update(_present(directory, spec) - progress.done, worker=line)


def _scratch(spec: dict) -> Path:
    return paths.scratch() / "image_runs" / checkpoint.fingerprint(spec)


def _present(directory: Path, spec: dict) -> int:
    return sum(_path(directory, image_id).exists() for image_id in spec["image_ids"])


def _path(directory: Path | str, image_id: int | str) -> Path:
    name = f"{image_id:012d}" if isinstance(image_id, int) else image_id
    return Path(directory) / f"{name}.json"
