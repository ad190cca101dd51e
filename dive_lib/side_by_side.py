"""Independent calls side by side, each on one core.

A small network gains little from a second core, whose threads wait for each other after every operation; two such
networks, each on a core of its own, gain nearly all of it. The calls run in forked copies of this process, so they
start at once, with all that is loaded, and may be closures over models and images that were read before; what they
return is sent back: numbers, arrays, tensors, and what pickle takes of them.
"""

import contextlib
import multiprocessing
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits

from dive_lib.progress import Progress, silent
from dive_lib.provenance import cores


def usable(workers: int, label: str) -> int:
    """`workers`, but no more than this process may use cores; 1 in a copy, and on a machine with a GPU: copies of a
    process cannot use it, and one process fills it. 1 on macOS, whose libraries do not survive a fork. Raises
    ValueError for less than 1.
    """
    if workers < 1:
        raise ValueError(f"{label}: at least one worker is needed, got {workers}")
    alone = multiprocessing.current_process().daemon or torch.cuda.is_available() or sys.platform == "darwin"
    return 1 if alone else min(workers, cores())


def side_by_side(calls: Sequence[Callable[[], Any]], workers: int, label: str, unit: str = "trainings",
                 sizes: Sequence[int] | None = None) -> list:
    """The results of all calls, in their order, `workers` at a time.

    One worker is this process; several are copies of it, whose results are the same. There may be fewer than asked for
    (`usable`). sizes: how many units each call counts, one by default. Raises RuntimeError with a call's traceback.
    """
    workers = min(usable(workers, label), max(1, len(calls)))
    results: list = [None] * len(calls)
    sizes = [1] * len(calls) if sizes is None else sizes
    with Progress(sum(sizes), label, unit=unit) as progress:
        if workers == 1:
            for k, call in enumerate(calls):
                with silent():
                    results[k] = call()
                progress.update(sizes[k])
            return results
        with contextlib.closing(copies(calls, workers, label)) as answers:
            for k, results[k] in answers:
                progress.update(sizes[k])
    return results


def cut(count: int, size: int) -> list[range]:
    """0 ... count - 1 in pieces of `size`, of which the last may be smaller."""
    return [range(count)[start:start + size] for start in range(0, count, size)]


def in_pieces(work: Callable[[Any], Any], pieces: Sequence[Sized], label: str, unit: str = "images",
              workers: int | None = None) -> list:
    """work(piece) of all pieces, in their order, by `side_by_side`; a piece counts `len(piece)` units.

    workers: at a time, by default as many as this process may use cores.
    """
    return side_by_side([partial(work, piece) for piece in pieces], cores() if workers is None else workers, label,
                        unit, sizes=[len(piece) for piece in pieces])


def copies(calls: Sequence[Callable[[], Any]], workers: int, label: str,
           every: float | None = None) -> Iterator[tuple[int | None, Any]]:
    """(number, result) of each call as it ends, `workers` at a time; (None, None) after `every` seconds without one.

    All copies end when this is closed (`contextlib.closing`), or with this process.
    """
    waiting, running = list(enumerate(calls)), {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                k, call = waiting.pop(0)
                process, answer = _start(call)
                running[answer] = k, process
            ended = wait(list(running), every)
            for answer in ended:
                k, process = running[answer]
                result = _received(answer, label)
                process.join()
                del running[answer]
                yield k, result
            if not ended:
                yield None, None
    finally:
        for _, process in running.values():
            process.terminate()
            process.join()


def _start(call: Callable[[], Any]) -> tuple[multiprocessing.Process, Connection]:
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_run, args=(call, there), daemon=True)
    with warnings.catch_warnings():  # newer Pythons warn of threads, such as a notebook's; the copy starts none of them
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    there.close()
    return process, here


def _run(call: Callable[[], Any], answer: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["DIVE_CORES"] = "1"
    torch.set_num_threads(1)
    try:
        with silent(), threadpool_limits(1):
            result = True, _packed(call())
    except BaseException:
        result = False, traceback.format_exc()
    answer.send(result)
    answer.close()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _received(answer: Connection, label: str) -> Any:
    try:
        well, result = answer.recv()
    except EOFError:
        raise RuntimeError(f"{label}: a process ended without an answer; it was killed, perhaps for lack of memory"
                           ) from None
    finally:
        answer.close()
    if not well:
        raise RuntimeError(f"{label} failed:\n{result}")
    return _unpacked(result)


class _Tensor(NamedTuple):
    """PyTorch would send a tensor as shared memory, which is gone when the sender has ended."""

    array: np.ndarray


def _packed(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return _Tensor(result.detach().cpu().numpy())
    return _mapped(_packed, result)


def _unpacked(result: Any) -> Any:
    return torch.from_numpy(result.array) if isinstance(result, _Tensor) else _mapped(_unpacked, result)


def _mapped(function: Callable[[Any], Any], result: Any) -> Any:
    if isinstance(result, dict):
        return {key: function(value) for key, value in result.items()}
    return type(result)(map(function, result)) if type(result) in (list, tuple) else result
