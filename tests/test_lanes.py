"""Lanes of `make repro`: they name stages of the pipeline in an order that works, run at once, and end together."""

import os
import signal
import subprocess
import sys
import time
from itertools import chain

import pytest
from ruamel.yaml import YAML

from dive_lib import lanes, parameters, paths

PROFILES = sorted(parameters.load_all())
WAIT = "import time; time.sleep(600)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def needed_by_stage(profile: str) -> dict[str, set[str]]:
    """The stages whose outputs each stage reads, from dvc.yaml."""
    stages = {name: stage["do"] for name, stage in
              YAML(typ="safe").load((paths.ROOT / "dvc.yaml").read_text())["stages"].items() if "do" in stage}

    def named(stage: dict, *kinds: str) -> set[str]:
        entries = chain.from_iterable(stage.get(kind, []) for kind in kinds)
        return {str(next(iter(entry)) if isinstance(entry, dict) else entry).replace("${item}", profile)
                for entry in entries}

    made = {path: name for name, stage in stages.items() for path in named(stage, "outs", "metrics", "plots")}
    return {name: {made[path] for path in named(stage, "deps") if path in made} for name, stage in stages.items()}


@pytest.mark.parametrize("profile", PROFILES)
def test_every_stage_of_a_lane_comes_after_what_it_needs_and_beside_nothing_of_it(profile):
    needed, done = needed_by_stage(profile), set()
    assert needed["layout_ldm"] >= {"data", "first_stage"} and len(needed) == 19
    for one_round in parameters.lanes(profile):
        for lane in one_round:
            before = set(done)
            for stage in lane.split():
                assert needed[stage] <= before, f"{stage}@{profile} needs {needed[stage] - before}"
                before.add(stage)
        done |= set(" ".join(one_round).split())
        assert len(" ".join(one_round).split()) == len(set(" ".join(one_round).split()))


def test_the_check_of_the_order_can_fail():
    assert not needed_by_stage("mini")["detection"] <= {"data", "first_stage", "layout_ldm"}


def test_malformed_lanes_are_refused(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("lanes:\n  small: [[layout_ldm, 3]]\nsmall:\n  data: {n: 1}\nlarge:\n  data: {n: 1}\n")
    with pytest.raises(parameters.ParameterError, match="params.yaml: lanes.small must be lists"):
        parameters.lanes("small", file)
    assert parameters.lanes("large", file) == []
    with pytest.raises(parameters.ParameterError, match="no profile 'medium'"):
        parameters.lanes("medium", file)


def test_a_lane_reproduces_its_stages_alone_and_waits_for_locks():
    line = lanes.command("data first_stage", "mini")
    assert line[1:] == ["-m", "dvc", "--wait-for-lock", "repro", "--single-item", "data@mini", "first_stage@mini"]


def test_rounds_come_one_after_another_and_lanes_share_the_cores(monkeypatch):
    seen = []
    monkeypatch.setattr(lanes, "together", lambda commands, cores: seen.append((list(commands), cores)))
    lanes.reproduce("mini", [["a b", "c"], ["d", "e", "f"]], 5)
    assert seen == [(["a b", "c"], 2), (["d", "e", "f"], 1)]
    del seen[:]
    lanes.reproduce("mini", [["a b", "c"], ["d", "e", "f"]], 2)
    assert seen == [(["a b", "c"], 1)], "three lanes on two cores would be slower than what dvc repro does"


def test_commands_run_at_once_and_their_lines_are_shown(tmp_path, capfd):
    """Each waits for the file that the other one writes."""
    def code(own: str, other: str) -> str:
        return (f"import os, time, pathlib; pathlib.Path(r'{tmp_path / own}').touch()\n"
                f"while not os.path.exists(r'{tmp_path / other}'): time.sleep(0.05)\n"
                f"print('{own}', os.environ['OMP_NUM_THREADS'])")

    lanes.together({"one": python(code("one", "two")), "two": python(code("two", "one"))}, 3)
    assert sorted(capfd.readouterr().err.splitlines()) == ["one 3", "two 3"]


def test_when_one_fails_the_others_end():
    began = time.monotonic()
    with pytest.raises(lanes.LaneFailed, match="bad: stopped with status 7; .* the same command continues"):
        lanes.together({"good": python(WAIT), "bad": python("raise SystemExit(7)")}, 1)
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_lanes(number):
    script = ("import signal, sys; from dive_lib import lanes, parameters\n"
              "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
              "parameters.lanes = lambda profile: [['a', 'b']]\n"
              "lanes.PATIENCE_SECONDS = 0.2\n"
              "lanes.provenance.machine = lambda: {'cores': 2}\n"
              "lanes.command = lambda lane, profile: [sys.executable, '-c', 'import os, sys, time; "
              "print(os.getpid(), flush=True); time.sleep(600)']\n"
              "sys.exit(lanes.main(['mini']))")
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, cwd=paths.ROOT)
    lane_ids = [int(process.stderr.readline()) for _ in range(2)]
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    for lane_id in lane_ids:
        with pytest.raises(ProcessLookupError):
            os.kill(lane_id, 0)
