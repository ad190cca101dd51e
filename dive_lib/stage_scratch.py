"""What a stage keeps in the scratch folder until it has ended well.

Trainings and runs over images gather there, because DVC empties a stage's outputs before it starts the stage again.
What is finished must stay too, for a later cell may fail. `dive_lib.run` gives every execution of a notebook an id in
the environment variable `DIVE_STAGE`; `keep` writes down what belongs to it, and `forget` removes that after the last
cell and the reports. DVC copies and records the outputs only then, and would empty them if it were stopped in this: so
a stage of DVC is marked by `ended`, and the next one forgets it when it finds it recorded (`forget_recorded`). Without
the variable (JupyterLab, tests, benchmarks) only `discard` removes anything.

A record is `scratch/stages/<stage>/<hash of the path>.json` with the path, relative to the scratch folder, and the
execution's id. Of stages that keep the same path, the last removes it. An execution writes its id over that of an
earlier one of its stage, so of two at once none removes what the other took over.
"""

import contextlib
import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from dive_lib import paths
from dive_lib.files import read_json, write_json

VARIABLE = "DIVE_STAGE"
ENDED = ".ended.json"


def new_id(target: Path) -> str:
    """Id of one execution of the stage that writes the notebook `target`: the stage, "@", what no other one has."""
    return f"{target.parent.name}-{target.stem}-{_hash(target)}@{uuid.uuid4().hex}"


def current() -> str | None:
    """Id of the execution that this process belongs to; None where no stage is running."""
    return os.environ.get(VARIABLE) or None


def keep(path: Path | str) -> None:
    """Writes down that `path`, a file or folder that need not exist yet, belongs to the running stage, if there is one.

    Call it before `path` is used: from then on no other stage that ends removes it.
    """
    if stage_id := current():
        with _locked() as registry:
            write_json(registry / _stage(stage_id) / f"{_hash(path)}.json", {"path": _relative(path), "id": stage_id})


def discard(path: Path | str) -> None:
    """Removes `path`, unless a stage keeps it. A missing one is no error."""
    if os.path.lexists(path):
        with _locked() as registry:
            _remove(Path(path), list(registry.glob(f"*/{_hash(path)}.json")))


def forget(stage_id: str) -> None:
    """Removes what an execution kept, but for what other stages keep too, and its records."""
    with _locked() as registry:
        _forget(registry, stage_id)


def ended(stage_id: str, notebook: Path) -> None:
    """Marks an execution that has ended well and written its executed notebook, but is not recorded yet."""
    with _locked() as registry:
        write_json(registry / _stage(stage_id) / ENDED, {"notebook": _relative(notebook), "id": stage_id})


def forget_recorded(lock: Path) -> None:
    """Forgets the marked executions whose notebook stands with these bytes in `lock`, the file in which DVC records."""
    recorded = lock.read_text(encoding="utf-8") if lock.exists() else ""
    with _locked() as registry:  # for all: stages of two lanes may begin at once
        for marker in sorted(registry.glob(f"*/{ENDED}")):
            entry = read_json(marker)
            notebook = paths.scratch() / entry["notebook"]
            if notebook.exists() and hashlib.md5(notebook.read_bytes(), usedforsecurity=False).hexdigest() in recorded:
                _forget(registry, entry["id"], marker)


def _forget(registry: Path, stage_id: str, marker: Path | None = None) -> None:
    for record in sorted((registry / _stage(stage_id)).glob("[!.]*.json")):
        entry = read_json(record)
        if entry["id"] == stage_id:
            _remove(paths.scratch() / entry["path"], [r for r in registry.glob(f"*/{record.name}") if r != record])
            record.unlink()  # last: what a kill leaves is still written down
    if marker is not None:
        marker.unlink()
    with contextlib.suppress(OSError):  # it kept nothing, or another execution's record is left
        (registry / _stage(stage_id)).rmdir()


def _remove(path: Path, keepers: list[Path]) -> None:
    if path.is_dir() and not keepers:
        shutil.rmtree(path, ignore_errors=True)
    elif not keepers:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked() -> Iterator[Path]:
    """The folder of records, for one process at a time: none keeps what another one has just found without keepers."""
    registry = paths.scratch() / "stages"
    registry.mkdir(parents=True, exist_ok=True)
    with open(registry / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield registry


def _stage(stage_id: str) -> str:
    return stage_id.rpartition("@")[0] or stage_id


def _relative(path: Path | str) -> str:
    return os.path.relpath(path, paths.scratch())  # a checkout may be moved


def _hash(path: Path | str) -> str:
    return hashlib.sha256(_relative(path).encode()).hexdigest()[:16]
