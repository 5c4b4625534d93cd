"""Looking at processes of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
_PATIENCE_S = 60  # for what ought to come soon, on a machine that does much else


def eventually(holds: Callable[[], bool]) -> bool:
    """Whether it holds, sooner or later."""
    until = time.monotonic() + _PATIENCE_S
    while not holds() and time.monotonic() < until:
        time.sleep(0.01)
    return holds()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def session_of(pid: int) -> list[int]:
    """The processes of a session, by that which began it, as long as they live."""
    return [one for one, session in _sessions() if session == pid and is_alive(one)]


def _sessions() -> list[tuple[int, int]]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            found.append((int(status.parent.name), int(status.read_text().rpartition(")")[2].split()[3])))
        except OSError:
            continue
    return found
