"""The folder that a collector writes: one open segment, to which messages are added durably, and closed ones.

What ``append`` returned from is on disk: the process may be killed, and the power go. Segments are begun anew by size
and age; a start goes on with the one that was open, less what a crash tore off.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from stallscope.errors import UsageError
from stallscope.live.closed import ClosedSegments
from stallscope.live.segments import (
    begun,
    cut_torn_end,
    framed,
    is_compressed,
    messages_in,
    new_path,
    number_of,
    remove_parts,
    segments_in,
    sync_folder,
)

log = logging.getLogger(__name__)

_LOCK = ".collect.lock"


@dataclass(frozen=True, slots=True)
class Limits:
    """``rotate_bytes``, ``rotate_s``: when a segment is closed. ``message_bytes``: the most that a message has.
    ``disk_bytes``: for all segments, at least three times ``segment_bytes``."""

    rotate_bytes: int
    rotate_s: float
    disk_bytes: int
    message_bytes: int

    @property
    def segment_bytes(self) -> int:
        """The most that a segment may have, and that one ``append`` may bring."""
        return max(self.rotate_bytes, self.message_bytes)

    @property
    def closed_bytes(self) -> int:
        """What closed segments may have together, beside the open one and a copy that is being compressed."""
        return self.disk_bytes - 2 * self.segment_bytes


class Store:
    """A folder of segments, for one process and one thread at a time.

    Raises UsageError where the folder can't be used, or another collector uses it.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder = folder
        self.limits = limits
        try:
            _make(folder)
            self._lock = _lock(folder)
            remove_parts(folder)
            paths = segments_in(folder)
            self._number = number_of(paths[-1]) if paths else 0
            self._open = self._reopened(paths.pop()) if paths and not is_compressed(paths[-1]) else None
            self.closed = ClosedSegments(paths, limits.closed_bytes)
        except OSError as error:
            raise UsageError(
                f"{folder}: cannot be written ({error.strerror}); check the path and its rights"
            ) from error

    def append(self, messages: Sequence[bytes]) -> None:
        """Adds messages; they are durable once it returns. Raises OSError where none of them was added."""
        data = framed(messages)
        if self._open is not None and self._open.size and self._open.size + len(data) > self.limits.rotate_bytes:
            self.rotate()
        self.rotate_if_old()
        if self._open is None:
            self._open = self._begin()
        try:
            self._open.append(data)
        except OSError:
            # After a failed fsync nobody knows what of the file will reach the disk: nothing more is added to it.
            self.rotate()
            raise

    def rotate(self) -> None:
        """Closes the open segment, if there is one; the next message begins another."""
        if self._open is None:
            return
        closing, self._open = self._open, None
        closing.close()
        if closing.size:
            self.closed.add(closing.path)
        else:
            closing.path.unlink(missing_ok=True)

    def rotate_if_old(self) -> None:
        """Closes a segment that has been open for long enough."""
        if self._open is not None and self._open.size and self._open.age() >= self.limits.rotate_s:
            self.rotate()

    def latest_messages(self, count: int) -> Iterator[bytes]:
        """The messages of the latest segments, so many of these, in the order in which they were written."""
        for path in segments_in(self.folder)[-count:]:
            yield from messages_in(path)

    @property
    def bytes(self) -> int:
        """Of all segments."""
        return self.closed.bytes + (self._open.size if self._open is not None else 0)

    def close(self) -> None:
        """Leaves the open segment for the next start to go on with."""
        if self._open is not None:
            self._open.close()
            if not self._open.size:
                self._open.path.unlink(missing_ok=True)
        self.closed.close()
        os.close(self._lock)

    def _begin(self) -> _OpenSegment:
        self._number += 1
        path = new_path(self.folder, self._number)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o640)
        try:
            sync_folder(self.folder)
        except OSError:
            os.close(handle)
            path.unlink()
            raise
        return _OpenSegment(path, handle)

    def _reopened(self, path: Path) -> _OpenSegment:
        if torn := cut_torn_end(path):
            log.warning("%s: cut off %d bytes of what was not acknowledged", path, torn)
        handle = os.open(path, os.O_WRONLY | os.O_APPEND)
        # A killed process may have written more than it synced: senders that send that again are told that it is safe.
        os.fsync(handle)
        sync_folder(self.folder)
        return _OpenSegment(path, handle, path.stat().st_size)


@dataclass(slots=True)
class _OpenSegment:
    """The segment that is written; ``size`` is what is durable of it."""

    path: Path
    handle: int
    size: int = 0
    _begun: float = field(init=False)

    def __post_init__(self) -> None:
        self._begun = begun(self.path)

    def age(self) -> float:
        """Seconds since it was begun."""
        return time.time() - self._begun

    def append(self, data: bytes) -> None:
        """Writes and syncs. Raises OSError, and has tried then to be as before."""
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self.handle, rest) :]
            os.fdatasync(self.handle)
        except OSError:
            with suppress(OSError):
                os.ftruncate(self.handle, self.size)
            raise
        self.size += len(data)

    def close(self) -> None:
        os.close(self.handle)


def _make(folder: Path) -> None:
    """Makes a folder, and those it lies in, as durable as what will be in it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def _lock(folder: Path) -> int:
    """Keeps other collectors away from the folder as long as it is open."""
    handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o640)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise UsageError(f"{folder}: another collector writes into this folder; end it, or name another one") from None
    return handle
