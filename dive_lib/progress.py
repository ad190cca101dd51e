"""One line of live progress: how far, how fast, how long still.

    with Progress(total=400, label="layout LDM", start=resumed_step) as progress:
        for step in range(resumed_step, 400):
            ...
            progress.update(loss=loss)

* In a notebook the line lives in an updatable display, so an executed notebook keeps exactly one line, the last
  state.  That one has no seconds in it: executing twice gives the same bytes.
* In a terminal the line is rewritten at most twice per second; in a log file a new line comes every 30 seconds.
* `python -m dive_lib.run` passes the name of a small text file in `DIVE_PROGRESS`; the line is also written there,
  and the runner shows it while a notebook executes, so `dvc repro` is never silent.
* A process beside the one that shows its line writes its own into a file alone (`written_to`).
* Under pytest nothing is shown.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

REFRESH_SECONDS = 0.5
LOG_SECONDS = 30.0


_silenced = 0
_file: Path | None = None


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Nothing that begins in this block shows a line: for the parts of what already has one."""
    global _silenced
    _silenced += 1
    try:
        yield
    finally:
        _silenced -= 1


@contextlib.contextmanager
def written_to(file: Path) -> Iterator[None]:
    """Lines that begin in this block go to a small text file, the last one alone, and nowhere else."""
    global _silenced, _file
    before = _silenced, _file
    _silenced, _file = 0, file
    try:
        yield
    finally:
        _silenced, _file = before


class Progress:
    """Reporter of a loop over `total` items; use it as a context manager.

    total: number of items when all is done, those before `start` included.
    label: what is being done, a few words.
    unit:  name of the items in the plural.
    start: items done by an earlier, interrupted run; rate and time left count only what this process does.
    """

    def __init__(self, total: int, label: str, unit: str = "steps", start: int = 0):
        if total < 0 or not 0 <= start <= total:
            raise ValueError(f"{label}: start {start} must lie between 0 and total {total}")
        self.total, self.label, self.unit, self.start = total, label, unit, start
        self.done = start
        self.fields: dict[str, object] = {}
        self._sink = _choose_sink()
        self._began = self._shown = time.monotonic()

    def __enter__(self) -> "Progress":
        self._began = time.monotonic()
        self._shown = self._began - REFRESH_SECONDS
        self._sink.show(self.line())
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None and self.done >= self.total:
            self._sink.end(f"{self.label}: done, {self.done} {self.unit}")
        else:  # left early on purpose (early stopping) or by an error
            self._sink.end(f"{self.label}: stopped after {self.done} of {self.total} {self.unit}")

    def update(self, n: int = 1, **fields) -> None:
        """Count `n` more items; `fields` (for example `loss=0.12`) are shown behind the rate until replaced."""
        self.done += n
        self.fields.update(fields)
        now = time.monotonic()
        if now - self._shown >= REFRESH_SECONDS:
            self._shown = now
            self._sink.show(self.line(now))

    def rate(self, now: float | None = None) -> float:
        """Items per second done by this process (0 before the first one)."""
        elapsed = (now or time.monotonic()) - self._began
        return (self.done - self.start) / elapsed if elapsed > 0 else 0.0

    def line(self, now: float | None = None) -> str:
        """The live line, for example `layout LDM: 120/400 steps  30%  12.5/s  0:22 left  loss 0.1234`."""
        percent = 100 * self.done // self.total if self.total else 100
        parts = [f"{self.label}: {self.done}/{self.total} {self.unit}", f"{percent}%"]
        rate = self.rate(now)
        if rate > 0:
            speed = f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f} s each"
            parts += [speed, f"{duration(max(0, self.total - self.done) / rate)} left"]
        parts += [f"{name} {_short(value)}" for name, value in self.fields.items()]
        return "  ".join(parts)


def duration(seconds: float) -> str:
    """`90` -> `1:30`, `4000` -> `1:06:40`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class LiveLine:
    """Writes a changing line to a text stream: rewritten in place on a terminal, else one line per 30 seconds."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.tty = self.stream.isatty()
        self._width = 0
        self._logged = time.monotonic()

    def show(self, line: str) -> None:
        if self.tty:
            self._write("\r" + line.ljust(self._width))
            self._width = len(line)
        elif time.monotonic() - self._logged >= LOG_SECONDS:
            self._logged = time.monotonic()
            self._write(line + "\n")

    def end(self, line: str) -> None:
        """The last state; always written, and followed by a line end."""
        self._write(("\r" + line.ljust(self._width) if self.tty else line) + "\n")
        self._width = 0

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()


class _File:
    """A text file with the present line; the last one has a line end."""

    def __init__(self, file: Path):
        self._file: Path | None = file

    def show(self, line: str, last: bool = False) -> None:
        if self._file:
            try:
                self._file.write_text(line + "\n" * last, encoding="utf-8")
            except OSError:  # who reads it has gone; the work itself must not stop for that
                self._file = None

    def end(self, line: str) -> None:
        self.show(line, last=True)


class _Notebook:
    """One display of a Jupyter kernel, updated in place, and the runner's text file where there is one."""

    def __init__(self, display, file: str | None):
        self._display, self._handle = display, None
        self._file = _File(Path(file)) if file else None

    def show(self, line: str, last: bool = False) -> None:
        if self._file:
            self._file.show(line, last)
        bundle = {"text/plain": line}
        if self._handle is None:
            self._handle = self._display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def end(self, line: str) -> None:
        """The last state; the line end tells the runner so."""
        self.show(line, last=True)


class _Silent:
    def show(self, line: str) -> None:
        pass

    end = show


def _choose_sink():
    if _silenced or "PYTEST_CURRENT_TEST" in os.environ:
        return _Silent()
    if _file:
        return _File(_file)
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is not None and hasattr(shell, "kernel"):
        from IPython.display import display
        return _Notebook(display, os.environ.get("DIVE_PROGRESS"))
    return LiveLine()


def _short(value: object) -> str:
    """A float (or a tensor with one number) with four significant digits; anything else as it prints."""
    if isinstance(value, (int, str)):
        return str(value)
    try:
        return f"{float(value):.4g}"
    except (TypeError, ValueError):
        return str(value)
