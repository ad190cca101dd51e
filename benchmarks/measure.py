"""What the benchmarks share: medians of seconds, peak memory, counted FLOPs, the chip's matrix-product rate, results.

A result is one JSON file with the machine it was measured on, and the same rows as a markdown table beside it.
"""

import argparse
import contextlib
import io
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dive_lib import paths, provenance
from dive_lib.files import write_json, write_text

RESULTS = paths.ROOT / "benchmarks" / "results"


def seconds(step: Callable[[], object], *, repeats: int, warmup: int = 1, device: str = "cpu") -> float:
    """Median seconds of one call. On an accelerator by CUDA events, so that queued work is counted in full."""
    for _ in range(warmup):
        step()
    if device != "cuda":
        return statistics.median(_wall(step) for _ in range(repeats))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    torch.cuda.synchronize()
    for start, end in events:
        start.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1000


def _wall(step: Callable[[], object]) -> float:
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def reset_peak(device: str) -> None:
    """Forgets earlier peaks, so that `peak_gib` is that of what follows."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float | None:
    """Largest memory allocated on the accelerator since `reset_peak`; None on a processor, which keeps no count."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None


def quiet() -> contextlib.AbstractContextManager:
    """Hides the progress lines of the many short runs of a benchmark."""
    return contextlib.redirect_stderr(io.StringIO())


def flops(step: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions of one call, forward and backward.

    The step's tensors should lie on the meta device: nothing is computed, and the count depends on no kernel.
    Attention is counted as its two matrix products, which fused kernels do as well.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step()
    return counter.get_total_flops()


def matrix_rate(side: int, dtype: torch.dtype, device: str, repeats: int = 10) -> float:
    """TFLOP/s of the product of two random square matrices: what the chip gives to a large, simple problem."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * side**3 / seconds(lambda: torch.mm(a, b, out=out), repeats=repeats, warmup=3, device=device) / 1e12


def given(arguments: list[str] | None) -> list[str]:
    """What a benchmark was called with, but for the folder of its result: `arguments`, or None for those of the
    command line."""
    folder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    folder.add_argument("--out")
    return folder.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))[1]


def save(name: str, settings: dict, rows: list[dict], *, arguments: list[str], folder: Path | None = None,
         show: bool = True, **facts) -> dict:
    """Writes benchmarks/results/<name>.json and .md, shows the table and returns the content. arguments: `given`.
    facts: further keys; "reduced": whether the models were smaller than the papers'; "note": a sentence on the page."""
    result = {"benchmark": name, "arguments": arguments, "commit": provenance.commit(),
              "machine": provenance.machine(), "torch": torch.__version__, "threads": torch.get_num_threads(), **facts,
              "settings": settings, "rows": rows}
    write_json((folder or RESULTS) / f"{name}.json", result)
    write_text((folder or RESULTS) / f"{name}.md", page(result))
    if show:
        print(markdown(rows))
    return result


def page(result: dict) -> str:
    """A result as a markdown page: what it was measured on, how it is repeated, its rows."""
    machine = result["machine"]
    where = machine.get("accelerator") or f"{machine['processor']}, {machine['cores']} cores"
    calls = [call["arguments"] for call in result.get("earlier", [])] + [result["arguments"]]
    commands = "\n    ".join(shlex.join(["python", "-m", f"benchmarks.{result['benchmark']}", *call]) for call in calls)
    size = "**Of models of reduced size; it says nothing about the full ones.** " if result.get("reduced") else ""
    note = f"{result['note']} " if "note" in result else ""
    return (f"# {result['benchmark']}\n\n{size}Measured on {where}, PyTorch {result['torch']}; all settings are in "
            f"`{result['benchmark']}.json`. {note}Repeat it with\n\n    {commands}\n\n"
            f"{markdown(result['rows'])}\n")


def markdown(rows: list[dict], columns: list[str] | None = None) -> str:
    """Rows as a markdown table; floats with four significant digits, what is missing as a dash."""
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_shown(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def _shown(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    if isinstance(value, (list, tuple)):
        return " ... ".join(_shown(item) for item in value)
    return str(value).replace("|", "/")
