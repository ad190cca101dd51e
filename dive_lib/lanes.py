"""Stages that do not need each other, side by side: the first step of `make repro`, before `dvc repro` does the rest.

    python -m dive_lib.lanes mini

A second core makes the training of a small model a third faster; two trainings side by side, each on a core of its own,
gain nearly all of it. `params.yaml` names the stages (`lanes`): the rounds of a profile come one after another, and the
lanes of a round run at the same time, each as a `dvc repro` of its own. DVC's locks keep them apart.

How many threads a training has decides how its sums are rounded. So a stage that ran here has slightly other numbers
than under `dvc repro` with all cores; the same command on the same machine gives the same ones.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence

from dive_lib import parameters, provenance

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 10.0


class LaneFailed(RuntimeError):
    """A command did not end well; the message names it and its status."""


def command(lane: str, profile: str) -> list[str]:
    """`dvc repro` of the stages of a lane, whose names have spaces between them: of these alone, in their order."""
    return [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item",
            *(f"{stage}@{profile}" for stage in lane.split())]


def reproduce(profile: str, rounds: Sequence[Sequence[str]], cores: int) -> None:
    """Runs the rounds; one with more lanes than there are cores is left to the `dvc repro` that follows.

    Raises LaneFailed at the first failure, when all other lanes have been stopped.
    """
    for lanes in rounds:
        if len(lanes) <= cores:
            together({lane: command(lane, profile) for lane in lanes}, cores // len(lanes))


def together(commands: Mapping[str, Sequence[str]], cores: int) -> None:
    """Runs commands at the same time, with so many cores each, and shows their lines as they come.

    When one fails, or when this is interrupted, all end. Raises LaneFailed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(cores)}
    running = {name: subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
               for name, line in commands.items()}
    forwarding = [threading.Thread(target=_forward, args=(process,), daemon=True) for process in running.values()]
    for thread in forwarding:
        thread.start()
    try:
        while running:
            time.sleep(POLL_SECONDS)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                if status := running.pop(name).returncode:
                    raise LaneFailed(f"{name}: stopped with status {status}; what is finished stays, and the same "
                                     "command continues")
    except KeyboardInterrupt:  # the terminal told the commands, too: DVC releases its locks
        for process in running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_SECONDS)
        raise
    finally:
        for process in running.values():
            process.terminate()
            process.wait()
        for thread in forwarding:
            thread.join(PATIENCE_SECONDS)


def _forward(process: subprocess.Popen) -> None:
    for line in process.stdout:  # whole lines, so those of different lanes do not mix
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dive_lib.lanes", description=__doc__.partition("\n")[0])
    parser.add_argument("profile", help="a profile of params.yaml")
    profile = parser.parse_args(arguments).profile
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # unwinds, which ends the lanes
    try:
        reproduce(profile, parameters.lanes(profile), provenance.machine()["cores"])
    except (parameters.ParameterError, LaneFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
