"""Stages that do not need each other, side by side: the first step of `make repro`, before `dvc repro` does the rest.
What a profile expects to be downloaded and is not there is told before any of them starts.

    python -m dive_lib.lanes mini

Two trainings of small models, each on a core of its own, are done sooner than one after the other on both cores
(`benchmarks/training_cost.py`). `params.yaml` names the stages (`lanes`): the rounds of a profile come one after
another, and the lanes of a round run at the same time, each as a `dvc repro` of its own. DVC's locks let them share the
repository, as long as none writes what another one reads. With one core or a GPU, which one stage fills, nothing runs
here and everything in the `dvc repro` that follows. A lane that has ended leaves its cores to the others.

Results do not depend on it: no stage's numbers depend on how many cores it has.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dive_lib import parameters, provenance
from dive_lib.files import write_text

STARTER = "DIVE_LANES"  # environment: the process whose lanes these are; a notebook stops when it is gone
POLL_SECONDS = 0.5
PATIENCE_SECONDS = 20.0


class LaneFailed(RuntimeError):
    """A command did not end well; the message names it and its status."""


def command(lane: str, profile: str) -> list[str]:
    """`dvc repro` of the stages of a lane, whose names have spaces between them: of these alone, in their order."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item",
            *(f"{stage}@{profile}" for stage in lane.split())]


def reproduce(profile: str, rounds: Sequence[Sequence[str]], machine: Mapping) -> None:
    """Runs the rounds. From the first one with more lanes than there are cores on, all is left to the `dvc repro` that
    follows.

    machine: of `provenance.machine`. Raises LaneFailed at the first failure, when all other lanes have ended.
    """
    for lanes in rounds:
        if len(lanes) > machine["cores_used"] or "accelerator" in machine:
            return  # a later round may need what this one makes
        together({lane: command(lane, profile) for lane in lanes}, machine["cores_used"])


def together(commands: Mapping[str, Sequence[str]], cores: int) -> None:
    """Runs commands at the same time, which share so many cores, and shows their lines as they come.

    When one fails, or when this is interrupted, all end. Raises LaneFailed.
    """
    with contextlib.ExitStack() as started:
        share = Path(started.enter_context(tempfile.TemporaryDirectory())) / "cores"
        write_text(share, str(cores // len(commands)))
        with _signals_wait():  # one between a start and its entry here would leave a lane behind
            running = {name: started.enter_context(_started(line, share)) for name, line in commands.items()}
        while running:
            time.sleep(POLL_SECONDS)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if status := running.pop(name).returncode:
                    raise LaneFailed(f"{name}: stopped with status {status}; what is finished stays")
                write_text(share, str(cores // max(1, len(running))))


def ending() -> bool:
    """Whether the lanes that this process belongs to are about to end before they are done."""
    return STARTER in os.environ and provenance.share() == "0"


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """A signal to end that arrives in this block acts when the block is over."""
    late: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: late.append(number))
              for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in late[:1]:
            signal.raise_signal(number)


@contextlib.contextmanager
def _started(line: Sequence[str], share: Path) -> Iterator[subprocess.Popen]:
    """A command in a process group of its own, which is interrupted as a terminal would do when the block ends.

    share: file with the number of its cores.
    """
    environment = os.environ | {"DIVE_CORES": str(share), STARTER: str(os.getpid())}
    process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               start_new_session=True)
    threads = [threading.Thread(target=_forward, args=pipes, daemon=True)
               for pipes in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))]
    for thread in threads:
        thread.start()
    try:
        yield process
    finally:
        if process.poll() is None:  # its stage ends by itself (`ending`): a signal could reach DVC as it records one
            write_text(share, "0")
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_SECONDS)
        for number in (signal.SIGINT, signal.SIGKILL):  # DVC waits for its stage, which ends, and releases its locks
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                if process.poll() is None:
                    os.killpg(process.pid, number)
                    process.wait(PATIENCE_SECONDS)
        for thread in threads:
            thread.join(PATIENCE_SECONDS)


def _forward(lines, stream) -> None:
    for line in lines:  # whole lines, so those of different lanes do not mix
        with contextlib.suppress(OSError):  # who reads them has gone; the lane must not wait for that
            stream.write(line)
            stream.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dive_lib.lanes", description=__doc__.partition("\n")[0])
    parser.add_argument("profile", help="a profile of params.yaml")
    profile = parser.parse_args(arguments).profile
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwinds, which ends the lanes
    try:
        if missing := parameters.missing_downloads(profile):
            print(f"error: missing {', '.join(missing)}; README.md says where to get them (At the papers' sizes). One "
                  "part of the pipeline, such as `make detect`, needs only its own", file=sys.stderr)
            return 1
        if rounds := parameters.lanes(profile):
            reproduce(profile, rounds, provenance.machine())
    except (parameters.ParameterError, LaneFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
