"""Atomic writing: equal content gives equal bytes, a failed write changes nothing, wrong content is named."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from dive_lib import files


def test_json_round_trip_and_scalars(tmp_path):
    path = files.write_json(tmp_path / "new" / "a.json", {"b": np.float64(0.1), "a": [np.int64(2), torch.tensor(3)],
                                                          "c": np.arange(2), 1: None})
    assert files.read_json(path) == {"b": 0.1, "a": [2, 3], "c": [0, 1], "1": None}
    assert list(files.read_json(path)) == ["b", "a", "c", "1"]
    assert path.read_bytes().endswith(b"}\n")


def test_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path):
    path = files.write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError, match="half way"):
        with files.atomic_path(path) as temporary:
            temporary.write_text("ne")
            assert path.read_text() == "old"
            raise RuntimeError("half way")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_temporary_name_keeps_the_suffix_and_is_hidden(tmp_path):
    with files.atomic_path(tmp_path / "figure.png") as temporary:
        assert temporary.suffix == ".png" and temporary.name.startswith(".") and ".tmp" in temporary.name
        temporary.write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="figure.png"):
        with files.atomic_path(tmp_path / "figure.png"):
            pass
    assert (tmp_path / "figure.png").read_bytes() == b"x"


@pytest.mark.parametrize("value, error", [
    ({"x": [1.0, float("nan")]}, ValueError),
    ({"x": [0, object()]}, TypeError),
])
def test_unwritable_json_names_file_and_place(tmp_path, value, error):
    path = files.write_json(tmp_path / "a.json", 1)
    with pytest.raises(error, match=r"a\.json.*x\.1"):
        files.write_json(path, value)
    assert files.read_json(path) == 1


def test_paths_do_not_enter_json(tmp_path):
    with pytest.raises(TypeError, match="path"):
        files.write_json(tmp_path / "a.json", {"from": tmp_path})


def test_missing_and_damaged_json_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.json.*dvc repro"):
        files.read_json(tmp_path / "gone.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="half.json.*delete it"):
        files.read_json(tmp_path / "half.json")


def test_merge_is_deep_sorted_and_independent_of_order(tmp_path):
    one, two = {"b": {"x": 1, "y": 1}, "a": 1}, {"b": {"y": 2}, "c": [1]}
    files.merge_json(tmp_path / "1.json", one)
    assert files.merge_json(tmp_path / "1.json", two) == {"a": 1, "b": {"x": 1, "y": 2}, "c": [1]}
    files.merge_json(tmp_path / "2.json", {"c": [1], "b": {"y": 2, "x": 1}})
    files.merge_json(tmp_path / "2.json", {"a": 1})
    assert (tmp_path / "1.json").read_bytes() == (tmp_path / "2.json").read_bytes()


def _merge_ten(path, number):
    for index in range(10):
        files.merge_json(path, {f"{number}-{index}": index})


def test_processes_that_merge_at_once_lose_nothing(tmp_path):
    path = tmp_path / "timings.json"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_merge_ten, args=(path, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert len(files.read_json(path)) == 40


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    """Killed at random moments while it rewrites a file again and again, the process leaves one valid state."""
    path = tmp_path / "state.json"
    script = ("import sys, itertools; from dive_lib import files\n"
              "for n in itertools.count(): files.write_json(sys.argv[1], {'n': n, 'again': [n] * 20000})")
    for pause in (0.0, 0.02, 0.05):
        worker = subprocess.Popen([sys.executable, "-c", script, str(path)])
        deadline = time.monotonic() + 20
        while not path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(pause)
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        state = json.loads(path.read_text())
        assert set(state["again"]) == {state["n"]}


def test_csv_round_trip(tmp_path):
    rows = [{"step": 1, "loss": 0.1 + 0.2, "note": None}, {"step": 2, "loss": float("nan"), "note": "a,b"}]
    path = files.write_csv(tmp_path / "a.csv", rows)
    assert files.read_csv(path) == [{"step": "1", "loss": "0.30000000000000004", "note": ""},
                                    {"step": "2", "loss": "", "note": "a,b"}]
    again = files.write_csv(tmp_path / "b.csv", pd.read_csv(path))
    assert again.read_bytes() == path.read_bytes()
    assert b"\r" not in path.read_bytes()


def test_csv_columns(tmp_path):
    path = files.write_csv(tmp_path / "a.csv", [{"b": 1}, {"a": 2}], columns=["a", "b"])
    assert path.read_text() == "a,b\n,1\n2,\n"
    with pytest.raises(ValueError, match=r"a\.csv: row 1.*'c'"):
        files.write_csv(path, [{"a": 1}, {"c": 2}], columns=["a"])
    assert files.write_csv(tmp_path / "empty.csv", [], columns=["a"]).read_text() == "a\n"
