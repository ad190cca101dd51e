"""Run one notebook for every combination of parameter values and gather its numbers in one tidy table.

    python -m dive_lib.sweep notebooks/05_detection.ipynb mini --set steps=50,100,200 --set seed=0,1

executes the notebook six times and writes `reports/mini/sweeps/detection.csv`: a row per combination, first the swept
parameters, then every number that the notebook wrote to `reports/<profile>/metrics/<group>.json`
(`paths.metrics(profile, group)`), nested names joined by dots (`dive.AP50`).  `--metrics NAME` reads another file of
that folder, `--out FILE` writes the table elsewhere.

Values are separated by commas; a value that contains one is written as a YAML list, as in `--set sizes="[[1,2],[3]]"`.
Types are checked for all combinations before the first one starts.

Nothing that the profile's own run wrote is touched.  A combination has its own folder
`runs/<profile>/sweeps/<notebook>/<name=value,...>/`: in it `reports/<profile>/` with the executed notebook and the
metrics, and `runs/<profile>/`, where the notebook finds what earlier stages made (links to the profile's folders) and
writes its own.  The notebook sees both through `dive_lib.paths`.

A combination is skipped if it is done with the same notebook, library, parameters and upstream metrics; so a sweep
that was stopped goes on where it was, and one with a value more runs that value only.  The table is rewritten each
time.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from dive_lib import parameters, paths, run
from dive_lib.files import read_json, write_csv, write_json

LONGEST_LIST = 8
"""Lists up to this long (confidence intervals) get a column per item; longer ones are curves and left out."""


def sweep(notebook: str | Path, profile: str, grid: dict[str, list[str]], metrics: str | None = None,
          out: str | Path | None = None) -> Path:
    """Run `notebook` for the product of `grid` (`{"steps": ["50", "100"]}`) and return the path of the table.

    Raises `parameters.ParameterError` before the first run if any combination is wrong, `run.NotebookFailed` at the
    first one that fails; the rows of those before it are in the table.
    """
    notebook = Path(notebook).absolute()
    metrics = metrics or parameters.group_name(notebook)
    out = Path(out) if out else paths.reports(profile) / "sweeps" / f"{parameters.group_name(notebook)}.csv"
    points = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    resolved = [parameters.resolve(notebook, profile, point) for point in points]
    for name, values in grid.items():
        if len(set(values)) < len(values):
            raise parameters.ParameterError(f"--set {name}: a value is given twice")
    state = source_state(notebook, profile)
    upstream = paths.runs(profile)
    rows = []
    for number, (point, values) in enumerate(zip(points, resolved), start=1):
        label = ",".join(f"{name}={value}" for name, value in point.items()) or "defaults"
        # A list as value can make the name longer than a file system takes.
        short = len(label) < 120 and "/" not in label
        folder = upstream / "sweeps" / notebook.stem / (label if short else hash_of(label))
        key = hash_of([state, values])
        done = folder / "done.json"
        if done.is_file() and read_json(done)["key"] == key:
            print(f"{notebook.stem} ({profile}) {number}/{len(points)}: {label} is done", file=sys.stderr)
        else:
            print(f"{notebook.stem} ({profile}) {number}/{len(points)}: {label}", file=sys.stderr, flush=True)
            with own_folders(folder, profile, [notebook]):
                run.run(notebook, profile, point)
                found = read_json(paths.metrics(profile, metrics))
            write_json(done, {"key": key, "metrics": flatten(found)})
        typed = {name: _reach(values, name) for name in point}
        rows.append({**typed, **read_json(done)["metrics"]})
        write_csv(out, rows)
    return out


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """`{"dive": {"AP": 0.4, "ci": [0.3, 0.5]}}` -> `{"dive.AP": 0.4, "dive.ci.0": 0.3, "dive.ci.1": 0.5}`."""
    if isinstance(tree, list) and len(tree) > LONGEST_LIST:
        return {}
    if isinstance(tree, (dict, list)):
        children = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: value for key, child in children
                for name, value in flatten(child, f"{prefix}.{key}" if prefix else str(key)).items()}
    return {prefix: tree}


def source_state(notebook: Path, profile: str) -> str:
    """Hash of what a combination's result depends on besides its own parameters.

    The notebook, the library, `params.yaml` (for named settings and earlier stages) and the other stages' metrics.
    """
    digest = hashlib.sha256()
    for path in [notebook, parameters.PARAMS, *sorted((paths.ROOT / "dive_lib").glob("*.py"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in sorted((paths.reports(profile) / "metrics").glob("*.json")):
        if path.stem != parameters.group_name(notebook):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def outputs(notebook: Path) -> set[str]:
    """What a notebook's stage in dvc.yaml writes into runs/<profile>, such as "detection/dive"; its group at least."""
    found, start = {parameters.group_name(notebook)}, "runs/${item}/"
    for stage in YAML(typ="safe").load(paths.ROOT / "dvc.yaml")["stages"].values():
        stage = stage.get("do", stage)
        if f"notebooks/{notebook.name}" in stage["cmd"].split():
            names = [name for entry in stage["outs"] for name in (entry if isinstance(entry, dict) else [entry])]
            found |= {name.removeprefix(start) for name in names if name.startswith(start)}
    return found


@contextlib.contextmanager
def own_folders(folder: Path, profile: str, notebooks: Iterable[Path]) -> Iterator[None]:
    """Make `paths.runs` and `paths.reports` point into `folder`, with links to what other stages than those of
    `notebooks` wrote.

    Files are replaced atomically, so writing a linked file replaces the link; a linked folder is the profile's own.
    """
    upstream, reports = paths.runs(profile), paths.reports(profile)
    groups = {f"{parameters.group_name(notebook)}.json" for notebook in notebooks}
    own = set().union(*map(outputs, notebooks))
    shared = {name.split("/")[0] for name in own if "/" in name}
    _link(upstream.glob("*"), folder / "runs" / profile, leave={*own, *shared, "sweeps", "benchmarks"})
    for name in shared:
        leave = {out.removeprefix(f"{name}/") for out in own}
        _link((upstream / name).glob("*"), folder / "runs" / profile / name, leave)
    _link(reports.glob("*.[cj]s*"), folder / "reports" / profile, leave={"timings.json"})
    _link((reports / "metrics").glob("*.json"), folder / "reports" / profile / "metrics", leave=groups)
    before = {name: os.environ.get(name) for name in ("DIVE_RUNS", "DIVE_REPORTS")}
    os.environ.update(DIVE_RUNS=str(folder / "runs"), DIVE_REPORTS=str(folder / "reports"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _link(entries: Iterable[Path], into: Path, leave: set[str]) -> None:
    if into.is_symlink():  # of another stage's folder, into which this one writes
        into.unlink()
    into.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        link = into / entry.name
        if entry.name not in leave and not link.exists():
            link.unlink(missing_ok=True)  # a link whose target has gone
            link.symlink_to(entry, target_is_directory=entry.is_dir())


def split_values(text: str) -> list[str]:
    """`"50,100"` -> `["50", "100"]`; commas inside brackets, braces or quotes do not separate."""
    values, depth, quote, start = [], 0, "", 0
    for place, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'":
            quote = character
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif character == "," and depth == 0:
            values.append(text[start:place])
            start = place + 1
    return [value.strip() for value in [*values, text[start:]]]


def _reach(values: dict, name: str) -> Any:
    for part in name.split("."):
        values = values[part]
    return json.dumps(values) if isinstance(values, (list, dict)) else values


def hash_of(obj: Any) -> str:
    """Short hash of what JSON can hold."""
    return hashlib.sha256(json.dumps(obj, sort_keys=True).encode()).hexdigest()[:32]


def grid_of(settings: Iterable[str]) -> dict[str, list[str]]:
    """`["steps=50,100", "seed=0"]` -> `{"steps": ["50", "100"], "seed": ["0"]}`."""
    return {name: split_values(text) for name, text in parameters.assignments(settings).items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dive_lib.sweep", description=__doc__.partition("\n")[0])
    parser.add_argument("notebook", help="source notebook, for example notebooks/05_detection.ipynb")
    parser.add_argument("profile", help="a profile of params.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=V1,V2", dest="settings", required=True,
                        help="values of one parameter (repeatable: all combinations are run)")
    parser.add_argument("--metrics", metavar="NAME", help="file in reports/<profile>/metrics/ (default: the group)")
    parser.add_argument("--out", metavar="FILE", help="the table (default: reports/<profile>/sweeps/<group>.csv)")
    chosen = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, run.stop_on_sigterm)
    try:
        table = sweep(chosen.notebook, chosen.profile, grid_of(chosen.settings), chosen.metrics, chosen.out)
    except (parameters.ParameterError, run.NotebookFailed, FileNotFoundError) as error:
        print(f"\n{error}" if isinstance(error, run.NotebookFailed) else f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    print(f"{paths.shorten(table)} written", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
