"""What the jobs of these tests do, in processes of their own, which must be able to import it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from stallscope.asking import Asked, Stages
from stallscope.diagnosis import Diagnosis
from stallscope.errors import InconclusiveError, UsageError
from stallscope.fleet import plan
from stallscope_dash.answers import diagnosed

FOREVER_S = 600


def product(first: int, second: int, stages: Stages) -> int:
    return first * second


def half_done(until: Path, stages: Stages) -> str:
    """Half of its second stage is done until there is a file."""
    with stages("reading") as advance:
        advance(1.0)
    with stages("counting") as advance:
        advance(0.5)
        while not until.exists():
            time.sleep(0.01)
    return "counted"


def appended(path: Path, stages: Stages) -> int:
    """How many times it has been run, by a line a time in a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    return len(path.read_text().splitlines())


def refused(text: str, stages: Stages) -> None:
    raise UsageError(text)


def not_known(stages: Stages) -> None:
    raise InconclusiveError("it can't be told")


def broken(stages: Stages) -> None:
    raise ZeroDivisionError("a mistake of ours")


def killed(stages: Stages) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def endless(pids: Path, deaf: bool, stages: Stages) -> None:
    """Works without an end, with a process of its own; ``deaf`` to what asks it to end. Both processes' ids go into a
    file."""
    if deaf:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    other = subprocess.Popen([sys.executable, "-c", f"import time; time.sleep({FOREVER_S})"])
    _tell(pids, os.getpid(), other.pid)
    with stages("working"):
        while True:
            sum(range(1000))


def diagnosed_hourly(dataset: Path, pid: Path, stages: Stages) -> Diagnosis:
    """A dataset's diagnosis, of which every hour has enough requests to be a portion; the process's id is in a file."""
    plan.ENOUGH_REQUESTS = 300
    _tell(pid, os.getpid())
    return diagnosed(dataset, Asked(replay=False), False, stages)


def _tell(file: Path, *pids: int) -> None:
    """Writes them, all at once."""
    written = file.with_suffix(".part")
    written.write_text(" ".join(map(str, pids)))
    written.rename(file)
