"""Lanes of `make repro`: they name stages of the pipeline in an order that works, run at once, and end together."""

import os
import signal
import subprocess
import sys
from itertools import chain

import pytest
from ruamel.yaml import YAML

from dive_lib import lanes, parameters, paths

PROFILES = sorted(parameters.load_all())
WAIT = "import time; time.sleep(600)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def needed_by_stage(profile: str) -> dict[str, set[str]]:
    """The stages whose outputs, or files in them, each stage reads, from dvc.yaml."""
    stages = {name: stage["do"] for name, stage in
              YAML(typ="safe").load((paths.ROOT / "dvc.yaml").read_text())["stages"].items() if "do" in stage}

    def named(stage: dict, *kinds: str) -> set[str]:
        entries = chain.from_iterable(stage.get(kind, []) for kind in kinds)
        return {str(next(iter(entry)) if isinstance(entry, dict) else entry).replace("${item}", profile)
                for entry in entries}

    made = {path: name for name, stage in stages.items() for path in named(stage, "outs", "metrics", "plots")}
    return {name: {maker for path in named(stage, "deps") for out, maker in made.items()
                   if f"{path}/".startswith(f"{out}/") or f"{out}/".startswith(f"{path}/")}
            for name, stage in stages.items()}


def out_of_order(needed: dict[str, set[str]], rounds: list[list[str]]) -> list[tuple[str, set[str]]]:
    """Stages of lanes with what they need that is neither of an earlier round nor before them in their lane."""
    found, done = [], set()
    for one_round in rounds:
        for lane in one_round:
            before = set(done)
            for stage in lane.split():
                found += [(stage, needed[stage] - before)] if needed[stage] - before else []
                before.add(stage)
        done |= set(" ".join(one_round).split())
    return found


@pytest.mark.parametrize("profile", PROFILES)
def test_every_stage_of_a_lane_comes_after_what_it_needs_and_beside_nothing_of_it(profile):
    needed = needed_by_stage(profile)
    assert len(needed) == 20 and out_of_order(needed, parameters.lanes(profile)) == []


@pytest.mark.parametrize("rounds, stage, lacks", [
    ([["first_stage"]], "first_stage", {"data"}),
    ([["data first_stage", "layout_ldm"]], "layout_ldm", {"data", "first_stage"}),
    ([["data", "class_data dit classification"], ["first_stage", "classifiers"], ["model_evaluation"]],
     "model_evaluation", {"layout_ldm", "ablation"}),
])
def test_the_check_of_the_order_can_fail(rounds, stage, lacks):
    assert (stage, lacks) in out_of_order(needed_by_stage("mini"), rounds)


def test_a_file_in_an_output_is_of_its_stage():
    """few_shot reads runs/mini/classifiers/resnet, and classifiers writes the folder."""
    assert "classifiers" in needed_by_stage("mini")["few_shot"]


WELL = "  small: [[a b, c], [d]]"


@pytest.mark.parametrize("text, told", [
    ("  small: [[a, 3]]", "lanes.small must be a list of rounds"), ("  small: [a b]", "lanes.small must be"),
    ("  small: [[' ']]", "lanes.small must be"), ("  small: [[]]", "lanes.small must be"),
    ("  small: [3]", "lanes.small must be"), ("  small: 3", "lanes.small must be"),
    ("  small: [[a b], [b]]", "no stage twice"), ("  smal: []", "must name profiles, of which there are small, large"),
    ("  - small", "must name profiles"),
])
def test_malformed_lanes_are_refused(tmp_path, text, told):
    with pytest.raises(parameters.ParameterError, match=rf"params.yaml: lanes.*{told[5:] if told[0] == 'l' else told}"):
        parameters.lanes("small", lanes_file(tmp_path, text))


def test_lanes_of_a_profile(tmp_path):
    assert parameters.lanes("small", lanes_file(tmp_path, WELL)) == [["a b", "c"], ["d"]]
    assert parameters.lanes("large", lanes_file(tmp_path, WELL)) == []
    assert parameters.lanes("small", lanes_file(tmp_path, "")) == []
    with pytest.raises(parameters.ParameterError, match="no profile 'medium'"):
        parameters.lanes("medium", lanes_file(tmp_path, WELL))


def test_missing_downloads_are_told_before_any_stage_starts(capsys, monkeypatch, tmp_path):
    assert not parameters.missing_downloads("mini") and not parameters.missing_downloads("smoke")
    monkeypatch.setattr(parameters, "ROOT", tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vq-f8.ckpt").touch()
    assert lanes.main(["paper"]) == 1
    told = capsys.readouterr().err
    for name in ("downloads/coco", "checkpoints/swin_b-68c6b09e.pth", "checkpoints/dino-vitb16", "README.md"):
        assert name in told
    assert "vq-f8" not in told


def lanes_file(folder, text):
    (folder / "params.yaml").write_text(f"lanes:\n{text}\nsmall:\n  data: {{n: 1}}\nlarge:\n  data: {{n: 1}}\n")
    return folder / "params.yaml"


def test_a_lane_reproduces_its_stages_alone_and_waits_for_locks():
    line = lanes.command("data first_stage", "mini")
    assert line[1:] == ["-m", "dvc", "--wait-for-lock", "repro", "--single-item", "data@mini", "first_stage@mini"]


def test_rounds_come_one_after_another_with_all_cores_to_share(monkeypatch):
    seen, rounds = [], [["a b", "c"], ["d", "e", "f"]]
    monkeypatch.setattr(lanes, "together", lambda commands, cores: seen.append((list(commands), cores)))
    lanes.reproduce("mini", rounds, {"cores_used": 5})
    assert seen == [(["a b", "c"], 5), (["d", "e", "f"], 5)]
    del seen[:]
    lanes.reproduce("mini", rounds, {"cores_used": 2})
    assert seen == [(["a b", "c"], 2)], "three lanes on two cores would be slower than what dvc repro does"
    lanes.reproduce("mini", rounds, {"cores_used": 8, "accelerator": "a GPU"})
    assert len(seen) == 1


@pytest.mark.parametrize("profile", PROFILES)
def test_on_one_core_nothing_runs_ahead_of_what_it_needs(monkeypatch, profile):
    monkeypatch.setattr(lanes, "together", lambda commands, cores: pytest.fail(f"{list(commands)} ran"))
    rounds = parameters.lanes(profile)
    assert not rounds or len(rounds[0]) > 1
    lanes.reproduce(profile, rounds, {"cores_used": 1})


def test_commands_run_at_once_and_their_lines_are_shown(tmp_path, capfd):
    """Each waits for the file that the other one writes."""
    def code(own: str, other: str) -> str:
        return (f"import os, sys, time, pathlib; pathlib.Path(r'{tmp_path / own}').touch()\n"
                f"while not os.path.exists(r'{tmp_path / other}'): time.sleep(0.05)\n"
                f"print('{own}'); print('{own}!', file=sys.stderr)")

    lanes.together({"one": python(code("one", "two")), "two": python(code("two", "one"))}, 3)
    shown = capfd.readouterr()
    assert sorted(shown.out.splitlines()) == ["one", "two"] and sorted(shown.err.splitlines()) == ["one!", "two!"]


def test_a_lane_may_end_by_itself_before_it_is_interrupted(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(paths.ROOT))
    seen = tmp_path / "seen"
    good = ("import pathlib, time; from dive_lib import lanes\n"
            f"pathlib.Path(r'{seen}').touch()\nwhile not lanes.ending(): time.sleep(0.05)\nprint('recorded')")
    bad = f"import os, time\nwhile not os.path.exists(r'{seen}'): time.sleep(0.05)\nraise SystemExit(3)"
    with pytest.raises(lanes.LaneFailed, match="bad: stopped with status 3"):
        lanes.together({"good": python(good), "bad": python(bad)}, 2)
    assert capfd.readouterr().out.splitlines() == ["recorded"]


def test_a_lane_that_has_ended_leaves_its_cores_to_the_others(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(paths.ROOT))
    seen = tmp_path / "seen"
    short = f"import os, time\nwhile not os.path.exists(r'{seen}'): time.sleep(0.05)"
    long = ("import os, pathlib, time; from dive_lib import provenance; provenance._cores = lambda: 8\n"
            f"print(provenance.cores()); pathlib.Path(r'{seen}').touch()\n"
            "while provenance.cores() == 2: time.sleep(0.05)\nprint(provenance.cores())")
    lanes.together({"long": python(long), "short": python(short)}, 5)
    assert capfd.readouterr().out.splitlines() == ["2", "5"]


def test_when_one_fails_the_others_end(tmp_path, monkeypatch):
    """The good one ends by itself when it is interrupted, as DVC does; the deaf one has to be killed."""
    ids = [tmp_path / "good", tmp_path / "deaf"]
    good, deaf = (f"import os, pathlib, signal; {extra}; pathlib.Path(r'{file}').write_text(str(os.getpid())); {WAIT}"
                  for file, extra in zip(ids, ("0", "signal.signal(signal.SIGINT, signal.SIG_IGN)")))
    bad = (f"import os, time\nwhile not all(map(os.path.exists, {list(map(str, ids))})): time.sleep(0.05)\n"
           "time.sleep(1)\nraise SystemExit(7)")
    monkeypatch.setattr(lanes, "PATIENCE_SECONDS", 2.0)
    with pytest.raises(lanes.LaneFailed, match="bad: stopped with status 7; what is finished stays"):
        lanes.together({"good": python(good), "deaf": python(deaf), "bad": python(bad)}, 1)
    for file in ids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_lanes(number):
    script = ("import signal, sys; from dive_lib import lanes, parameters\n"
              "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
              "parameters.lanes = lambda profile: [['a', 'b']]\n"
              "lanes.provenance.machine = lambda: {'cores_used': 2}; lanes.PATIENCE_SECONDS = 1.0\n"
              "lanes.command = lambda lane, profile: [sys.executable, '-c', 'import os, sys, time; "
              "print(os.getpid(), flush=True); time.sleep(600)']\n"
              "sys.exit(lanes.main(['mini']))")
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               cwd=paths.ROOT)
    lane_ids = [int(process.stdout.readline()) for _ in range(2)]
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    for lane_id in lane_ids:
        with pytest.raises(ProcessLookupError):
            os.kill(lane_id, 0)


def test_a_signal_while_lanes_start_leaves_none_behind(monkeypatch):
    started, start = [], subprocess.Popen

    def start_and_interrupt(*given, **named):
        started.append(start(*given, **named))
        signal.raise_signal(signal.SIGINT)
        return started[-1]

    monkeypatch.setattr(lanes.subprocess, "Popen", start_and_interrupt)
    monkeypatch.setattr(lanes, "PATIENCE_SECONDS", 1.0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            lanes.together({"one": python(WAIT), "two": python(WAIT)}, 2)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(started) == 2 and all(process.poll() is not None for process in started)
