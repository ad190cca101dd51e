"""Calls in forked copies: the same results in any number of processes, and errors that tell what happened."""

import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

from dive_lib import provenance
from dive_lib.image_runs import seconds_per_image
from dive_lib.progress import written_to
from dive_lib.side_by_side import cut, in_pieces, side_by_side, usable


def learn(seed: int) -> np.ndarray:
    """A few steps of a small network, with a backward pass."""
    torch.manual_seed(seed)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
    return model.weight.detach().numpy()


def test_networks_trained_in_copies_are_those_trained_here():
    calls, threads = [partial(learn, k) for k in range(4)], torch.get_num_threads()
    copies = side_by_side(calls, 2, "x")
    try:
        torch.set_num_threads(1)
        here = side_by_side(calls, 1, "x")
        again = side_by_side(calls, 3, "x")  # from a process that has trained
    finally:
        torch.set_num_threads(threads)
    assert all((a == b).all() and (b == c).all() for a, b, c in zip(copies, here, again))


def test_results_come_in_order_and_processes_are_copies():
    calls = [lambda k=k: (k, os.getpid()) for k in range(5)]
    results = side_by_side(calls, 2, "x")
    assert [k for k, _ in results] == list(range(5))
    assert len({pid for _, pid in results}) == 5 and os.getpid() not in {pid for _, pid in results}
    assert side_by_side(calls, 1, "x") == [(k, os.getpid()) for k in range(5)]
    assert side_by_side([], 2, "x") == []


def test_work_in_pieces_covers_all_in_order(monkeypatch, tmp_path):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # under which no progress is shown
    assert cut(7, 3) == [range(0, 3), range(3, 6), range(6, 7)] and cut(6, 3) == cut(7, 3)[:2] and cut(0, 3) == []
    for count in (1, 2):
        monkeypatch.setattr("dive_lib.side_by_side.cores", lambda: count)
        with written_to(tmp_path / "line"):
            assert in_pieces(list, cut(7, 3), "x") == [[0, 1, 2], [3, 4, 5], [6]]
        assert (tmp_path / "line").read_text() == "x: done, 7 images\n"


def test_each_process_has_one_thread():
    assert side_by_side([torch.get_num_threads] * 2, 2, "x") == [1, 1]


def test_an_error_is_told_with_its_traceback():
    def fail():
        raise ValueError("no such digit")

    with pytest.raises(RuntimeError, match="(?s)heads failed.*no such digit"):
        side_by_side([fail, lambda: 1], 2, "heads")


def test_a_killed_process_is_told():
    with pytest.raises(RuntimeError, match="heads: a process ended without an answer"):
        side_by_side([lambda: os.kill(os.getpid(), signal.SIGKILL)] * 2, 2, "heads")


def test_copies_end_with_a_killed_process():
    script = ("import os, time; from dive_lib.side_by_side import side_by_side\n"
              "side_by_side([lambda: (os.write(1, f'{os.getpid()} '.encode()), time.sleep(600))] * 2, 2, 'test')")
    script = f"import dive_lib.side_by_side as s; s.cores = lambda: 2; {script}"
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    said = b""
    while said.count(b" ") < 2:
        said += os.read(process.stdout.fileno(), 100)
    copies = [int(number) for number in said.split()]
    assert all(map(running, copies))
    process.kill()
    process.wait()
    patience = time.monotonic() + 20
    while any(map(running, copies)) and time.monotonic() < patience:
        time.sleep(0.1)
    assert not any(map(running, copies))


def running(pid: int) -> bool:
    """Whether a process is there and is no zombie, which waits for a container's first process to be reaped."""
    try:
        state = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_no_worker_is_refused():
    with pytest.raises(ValueError, match="at least one worker"):
        side_by_side([lambda: 1], 0, "heads")


def test_no_more_workers_than_cores(monkeypatch):
    """A lane of `make repro` has a share of them."""
    monkeypatch.setattr("dive_lib.side_by_side.cores", lambda: 1)
    assert usable(2, "heads") == 1 and side_by_side([os.getpid] * 2, 2, "heads") == [os.getpid()] * 2
    assert seconds_per_image([{"seconds": 3.0}], 2) == 3.0


def test_with_a_gpu_one_process_does_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert side_by_side([os.getpid, os.getpid], 2, "heads") == [os.getpid()] * 2
    assert usable(4, "heads") == 1 and seconds_per_image([{"seconds": 3.0}], 4) == 3.0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert os.getpid() not in side_by_side([os.getpid, os.getpid], 2, "heads")
    assert usable(4, "heads") == 4 and seconds_per_image([{"seconds": 3.0}], 4) == 0.75


@pytest.mark.parametrize("text, count", [("150000 100000", 1), ("300000 100000", 3), ("max 100000", 8), (None, 8)])
def test_a_container_s_share_of_processor_time_counts_as_cores(tmp_path, monkeypatch, text, count):
    limit = tmp_path / "cpu.max"
    if text:
        limit.write_text(text + "\n")
    monkeypatch.setattr(provenance, "CPU_MAX", str(limit))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.delenv("DIVE_CORES", raising=False)
    assert provenance.cores() == count
