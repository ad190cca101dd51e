"""Where things lie.  The only module that knows folder names; everything else asks it.

Each function returns an absolute path, so notebooks work from whichever folder they are started in.  Three environment
variables move what is written, for tests and for parameter sweeps that must not overwrite a profile's results:

| variable       | moves                         | default     |
|----------------|-------------------------------|-------------|
| `DIVE_RUNS`    | models, scenes, detections    | `runs/`     |
| `DIVE_REPORTS` | executed notebooks, metrics   | `reports/`  |
| `DIVE_SCRATCH` | resumable training states     | `scratch/`  |
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
"""Repository root: the folder that holds `dive_lib/`, `notebooks/` and `params.yaml`."""


def _base(variable: str, default: str) -> Path:
    value = os.environ.get(variable)
    # A relative override is taken from the repository root, because a kernel and the runner that starts it have
    # different working directories.
    return (ROOT / value).resolve() if value else ROOT / default


def runs(profile: str) -> Path:
    """Folder of a profile's large artefacts: `runs/<profile>` (scenes, weights, detections), pipeline outputs."""
    return _base("DIVE_RUNS", "runs") / profile


def reports(profile: str) -> Path:
    """Folder of a profile's small results: `reports/<profile>` (executed notebooks, figures, metrics, tables)."""
    return _base("DIVE_REPORTS", "reports") / profile


def metrics(profile: str, name: str) -> Path:
    """JSON file with one notebook's numbers: `reports/<profile>/metrics/<name>.json`, for example `detection`."""
    return reports(profile) / "metrics" / f"{name}.json"


def scratch() -> Path:
    """Folder of untracked state that may be deleted at any time (interrupted training, failed notebooks)."""
    return _base("DIVE_SCRATCH", "scratch")


def data() -> Path:
    """Folder of the raw input that `data.dvc` tracks."""
    return ROOT / "data"


def notebooks() -> Path:
    """Folder of the source notebooks; also the working directory in which they are executed."""
    return ROOT / "notebooks"


def shorten(path: str | os.PathLike) -> str:
    """`path` relative to the repository root if it lies inside, for messages and saved output."""
    path = Path(path).absolute()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
