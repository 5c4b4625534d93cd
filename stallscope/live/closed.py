"""Segments that nothing is added to any more: compressed in the background, the oldest removed for want of room."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from stallscope.live.segments import compress, is_compressed, sync_folder

log = logging.getLogger(__name__)


class ClosedSegments:
    """Those of one folder, oldest first; together they stay within ``most_bytes``.

    ``removed`` and ``removed_bytes`` count what was removed to that end. For one thread; has one of its own.
    """

    def __init__(self, paths: Iterable[Path], most_bytes: int) -> None:
        self.removed = 0
        self.removed_bytes = 0
        self._most_bytes = most_bytes
        self._sizes: dict[Path, int] = {}
        self._lock = Lock()  # a segment that is removed must not come back, compressed
        self._background = ThreadPoolExecutor(1, "stallscope-compress")
        for path in paths:
            self._add(path)
        self._keep_to_budget()

    @property
    def bytes(self) -> int:
        with self._lock:
            return sum(self._sizes.values())

    def add(self, path: Path) -> None:
        """Takes a segment that was just closed; older ones may have to go."""
        self._add(path)
        self._keep_to_budget()

    def close(self) -> None:
        """Waits for the compression under way; what is left is compressed after the next start."""
        self._background.shutdown(cancel_futures=True)

    def _add(self, path: Path) -> None:
        with self._lock:
            self._sizes[path] = path.stat().st_size
        if not is_compressed(path):
            self._background.submit(self._compress, path)

    def _keep_to_budget(self) -> None:
        with self._lock:
            while self._sizes and sum(self._sizes.values()) > self._most_bytes:
                path = next(iter(self._sizes))
                size = self._sizes.pop(path)
                try:
                    path.unlink(missing_ok=True)
                except OSError as error:
                    log.warning("%s is to make room and can't be removed: %s", path, error.strerror)
                    continue
                self.removed += 1
                self.removed_bytes += size
                log.warning("the disk budget is used up: removed %s (%.1f MB), the oldest", path, size / 1e6)

    def _compress(self, path: Path) -> None:
        """On the thread in the background."""
        try:
            part = compress(path)
            with self._lock:
                if path in self._sizes:
                    self._sizes[path] = part.stat().st_size
                    part.replace(path)
                else:
                    part.unlink()
            sync_folder(path.parent)
        except OSError as error:
            log.warning("%s stays as it is, without compression: %s", path, error.strerror)
