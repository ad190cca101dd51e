"""What a result was made from: parameters, versions, device and data, for the last cell of every notebook.

Only facts that do not change when the same command runs again on the same machine are shown, so executed notebooks
keep their bytes; the commit and the seconds go to `reports/<profile>/timings.json` instead.  No host names, no
absolute paths.
"""

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from dive_lib import parameters, paths

SOURCES = ("dive_lib", "notebooks", "params.yaml", "requirements.lock", "data.dvc")
"""What decides the results; edits elsewhere do not make a commit dirty."""
CPU_MAX = "/sys/fs/cgroup/cpu.max"
"""Microseconds of processor time in each period of so many, on Linux."""


def provenance(notebook: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about a run of `notebook` (`"05_detection"`); its parameters are picked from `values` (`globals()`).

    Seeds are parameters like the others and are listed with them.
    """
    import torch

    declared = parameters.declared(paths.notebooks() / f"{notebook}.ipynb")
    return {
        "notebook": notebook,
        "parameters": {name: values[name] for name in declared},
        "python": platform.python_version(),
        **{name: metadata.version(name).split("+")[0] for name in ("torch", "diffusers", "numpy", "scikit-learn")},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
        "data": data_hash(),
    }


def show(notebook: str, values: Mapping[str, Any]) -> None:
    """Print `provenance(notebook, values)`; a notebook ends with `provenance.show("05_detection", globals())`."""
    for name, value in provenance(notebook, values).items():
        if isinstance(value, dict):
            print(f"{name}:")
            for key, item in value.items():
                print(f"  {key}: {item!r}")
        else:
            print(f"{name}: {value}")


def data_hash() -> str:
    """DVC's hash of the raw input as `data.dvc` records it, or `unknown` where that file is missing."""
    pointer = paths.ROOT / "data.dvc"
    found = re.search(r"md5:\s*([0-9a-f]{32}(\.dir)?)", pointer.read_text()) if pointer.is_file() else None
    return found.group(1) if found else "unknown"


def commit() -> str:
    """Hash of the checked-out commit, with `-dirty` if a source of results differs; `unknown` outside Git."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=all", "--", *SOURCES)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed else "")


def machine() -> dict[str, Any]:
    """The hardware on which seconds were measured: processor, its cores, how many of them this process could use, and
    the accelerator if PyTorch sees one."""
    facts = {"processor": processor_name(), "cores": _cores(), "cores_used": cores()}
    if os.path.exists("/proc/driver/nvidia"):  # loading PyTorch takes seconds: only where it may find something
        import torch
        if torch.cuda.is_available():
            facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def cores() -> int:
    """How many cores this process may use: those of the system, or its `share` of them."""
    own = share()
    return min(_cores(), int(own)) if own.isdecimal() and int(own) else _cores()


def share() -> str:
    """`DIVE_CORES`, a number of cores, or what stands in the file that it names, which may change."""
    own = os.environ.get("DIVE_CORES", "")
    with contextlib.suppress(OSError):  # no such file
        with open(own, encoding="utf-8") as handle:
            return handle.read().strip()
    return own


def _cores() -> int:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # a container's share in processor time; "max" is no limit
        with open(CPU_MAX, encoding="utf-8") as handle:
            quota, period = map(int, handle.read().split())
        count = min(count, max(1, quota // period))
    return count


def processor_name() -> str:
    """Model name of the processor, or the architecture where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            names = re.search(r"^model name\s*:\s*(.+)$", handle.read(), re.MULTILINE)
    except OSError:
        names = None
    return names.group(1) if names else platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    return subprocess.run(("git", "--no-optional-locks", *arguments), cwd=paths.ROOT, check=True, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.strip()
