"""One writer of a dataset at a time: who comes second waits, and who dies leaves no lock behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stallscope.errors import UsageError

PATIENCE_S = 60.0
_LOOK_S = 0.05


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Holds the system's lock of a folder that is there. Raises UsageError where another writer holds it too long, or
    where the folder can't be opened."""
    import fcntl

    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            held = os.open(folder, os.O_RDONLY)
        except OSError as error:
            raise UsageError(f"{folder}: cannot be opened ({error.strerror}); check the path and its rights") from error
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # In the meantime another may have put a new folder in its place.
            if folder.exists() and os.path.samestat(os.fstat(held), folder.stat()):
                break
        except BlockingIOError:
            pass
        os.close(held)
        if time.monotonic() >= until:
            raise UsageError(f"{folder}: another process has been writing to it for {PATIENCE_S:g} s; try again later")
        time.sleep(_LOOK_S)
    try:
        yield
    finally:
        os.close(held)
