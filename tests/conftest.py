"""Fixtures for all tests, and isolation: no test writes into `runs/`, `reports/` or `scratch/`.

Each test gets its own temporary folders through `DIVE_RUNS`, `DIVE_REPORTS` and `DIVE_SCRATCH`, so `paths.runs(...)`
and its neighbours point there.  A test of the committed results reads them from `paths.ROOT / "reports"`.
"""

import os
from pathlib import Path

import pytest

from dive_lib import paths

os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture(autouse=True)
def isolated_folders(tmp_path_factory, monkeypatch):
    """Redirect everything that the library writes."""
    base = tmp_path_factory.mktemp("dive")
    for name in ("runs", "reports", "scratch"):
        monkeypatch.setenv(f"DIVE_{name.upper()}", str(base / name))
    monkeypatch.delenv("DIVE_PROGRESS", raising=False)


@pytest.fixture(autouse=True)
def four_cores(monkeypatch):
    """Processes side by side are tested on any machine: as many as any test asks for."""
    monkeypatch.setattr("dive_lib.side_by_side.cores", lambda: 4)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of reference fixtures and sample data that is handed out beside the repository.

    It is looked for in `DIVE_SHARED`, then in `../shared`; without it the tests that need it are skipped.
    """
    folder = Path(os.environ.get("DIVE_SHARED", paths.ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip("the shared fixtures are not on this machine (set DIVE_SHARED to their folder)")
    return folder
