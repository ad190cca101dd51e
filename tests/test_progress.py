"""The live line: what it says, and that its last state has no seconds in it."""

import io

import pytest

from dive_lib import progress
from dive_lib.progress import LiveLine, Progress, duration


class Recorder:
    def __init__(self):
        self.lines, self.last = [], None

    def show(self, line):
        self.lines.append(line)

    def end(self, line):
        self.last = line


class Clock:
    """Stands in for `time.monotonic`; moves only when told."""

    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(progress, "_choose_sink", lambda: recorder)
    return recorder


def test_rate_and_time_left(clock, recorder):
    with Progress(100, "training") as bar:
        for _ in range(25):
            clock.now += 2
            bar.update(loss=0.123456)
        line = recorder.lines[-1]
    assert line == "training: 25/100 steps  25%  2.0 s each  2:30 left  loss 0.1235"


def test_resumed_run_counts_its_own_steps_only(clock, recorder):
    with Progress(1000, "training", start=900) as bar:
        clock.now += 10
        bar.update(20)
        assert bar.rate() == pytest.approx(2.0)
        assert "920/1000 steps  92%  2.0/s  0:40 left" in bar.line()


def test_last_state_has_no_seconds(clock, recorder):
    with Progress(3, "search", unit="images") as bar:
        for _ in range(3):
            clock.now += 1.37
            bar.update(loss=1.0)
    assert recorder.last == "search: done, 3 images"


def test_a_loop_left_early_says_so(recorder):
    with pytest.raises(ValueError):
        with Progress(10, "search") as bar:
            bar.update(4)
            raise ValueError
    assert recorder.last == "search: stopped after 4 of 10 steps"


def test_updates_are_throttled(clock, recorder):
    with Progress(1000, "x") as bar:
        for _ in range(1000):
            clock.now += 0.01
            bar.update()
    assert 15 <= len(recorder.lines) <= 22  # ten seconds at most twice per second, and the line at the start


def test_nothing_is_shown_under_pytest(capfd):
    with Progress(2, "x") as bar:
        bar.update(2)
    assert capfd.readouterr() == ("", "")


def test_terminal_line_is_rewritten_and_log_line_is_rare(clock):
    stream = io.StringIO()
    stream.isatty = lambda: True
    line = LiveLine(stream)
    line.show("a long line")
    line.show("short")
    line.end("done")
    assert stream.getvalue() == "\ra long line\rshort      \rdone \n"

    log = io.StringIO()
    line = LiveLine(log)
    for _ in range(100):
        clock.now += 1
        line.show("now")
    line.end("done")
    assert log.getvalue() == "now\n" * 3 + "done\n"


def test_notebook_display_and_runner_file(monkeypatch, tmp_path):
    """In a kernel there is one display, updated in place, and the runner's file ends with a line end when done."""
    shown = []

    class Handle:
        def update(self, bundle, raw):
            shown[-1] = bundle

    def display(bundle, raw, display_id):
        shown.append(bundle)
        return Handle()

    live = tmp_path / "live.txt"
    monkeypatch.setattr(progress, "_choose_sink", lambda: progress._Notebook(display, str(live)))
    with Progress(2, "x") as bar:
        assert live.read_text() == "x: 0/2 steps  0%"
        bar.update(2)
    assert shown == [{"text/plain": "x: done, 2 steps"}]
    assert live.read_text() == "x: done, 2 steps\n"


def test_duration_and_bad_start():
    assert [duration(seconds) for seconds in (5, 90, 4000)] == ["0:05", "1:30", "1:06:40"]
    with pytest.raises(ValueError, match="start 5"):
        Progress(3, "x", start=5)


def test_fields(recorder):
    bar = Progress(3, "x")
    bar.update(loss=1 / 3, step=123456, split="val")
    assert bar.line().endswith("loss 0.3333  step 123456  split val")


def test_parts_of_what_has_a_line_can_be_silent(monkeypatch, capsys):
    monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
    with progress.silent(), Progress(1, "inner") as bar:
        bar.update()
    with Progress(1, "outer") as bar:
        bar.update()
    shown = capsys.readouterr().err
    assert "outer: done" in shown and "inner" not in shown


def test_a_line_for_a_file_is_written_nowhere_else(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    with progress.silent(), progress.written_to(tmp_path / "line.txt"), Progress(2, "training") as bar:
        assert (tmp_path / "line.txt").read_text().startswith("training: 0/2 steps")
        bar.update(2)
    assert (tmp_path / "line.txt").read_text() == "training: done, 2 steps\n"
    assert progress._silenced == 0 and capsys.readouterr().err == ""
