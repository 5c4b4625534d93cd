"""Diagnoses kept as files beside their traces: named by what was read and what was asked, so never of another trace."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import orjson

from stallscope import __version__
from stallscope.diagnosis.model import SCHEMA_VERSION, Diagnosis
from stallscope.errors import UsageError
from stallscope.reports.json import to_json

log = logging.getLogger(__name__)

_CHUNK = 1 << 20


class Saved:
    """Where the diagnosis of a trace is kept: beside the trace or, where one is written, beside the report.

    ``asked``: all that the diagnosis depends on but the trace, and ``others``: files that were read with it.
    """

    def __init__(self, trace: Path, asked: str, report: Path | None = None, others: Sequence[Path] = ()) -> None:
        self._trace = trace
        self._asked = asked
        self._others = others
        self._folders = [one.parent for one in (report, trace) if one is not None]

    def load(self) -> tuple[Diagnosis, Path] | None:
        """What was kept earlier, and where; None where there is nothing that fits."""
        # Reading the trace to name the file takes time: only where there may be one. A stream is read but once.
        if not self._trace.exists() or not any(self._kept(folder) for folder in self._folders):
            return None
        for path in (folder / self._name() for folder in self._folders):
            if not path.is_file():
                continue
            try:
                return Diagnosis.from_dict(orjson.loads(path.read_bytes())), path
            except (OSError, ValueError) as error:
                log.warning("%s: not readable as a diagnosis (%s); the trace is diagnosed anew", path, error)
        return None

    def check(self) -> None:
        """Says before any work that a diagnosis can't be kept. Raises UsageError."""
        if not self._trace.exists():
            raise UsageError(f"{self._trace}: --save names a diagnosis by the bytes of a file or folder; leave it out")
        if not os.access(self._folders[0], os.W_OK):
            raise UsageError(
                f"{self._folders[0]}: nothing can be kept there; give -o in a folder that may be written to"
            )

    def keep(self, diagnosis: Diagnosis) -> Path:
        """Writes it to the first folder. Raises UsageError where that can't be written."""
        path = self._folders[0] / self._name()
        try:
            path.write_text(to_json(diagnosis), encoding="utf-8")
        except OSError as error:
            message = f"{path}: cannot be written ({error.strerror}); give -o in a folder where the report may be kept"
            raise UsageError(message) from error
        return path

    def _kept(self, folder: Path) -> bool:
        start, end = f"{self._trace.name}.diagnosis-", ".json"
        return folder.is_dir() and any(
            one.name.startswith(start) and one.name.endswith(end) for one in folder.iterdir()
        )

    def _name(self) -> str:
        digest = hashlib.blake2b(f"{__version__} {SCHEMA_VERSION} {self._asked}".encode(), digest_size=8)
        for file in (file for path in (self._trace, *self._others) for file in _files(path)):
            digest.update(f"\0{file.name} {file.stat().st_size}\0".encode())
            with file.open("rb") as content:
                while chunk := content.read(_CHUNK):
                    digest.update(chunk)
        return f"{self._trace.name}.diagnosis-{digest.hexdigest()}.json"


def _files(path: Path) -> Iterable[Path]:
    """A file, or the files of a folder in order; none where it does not exist, which is for its reader to say."""
    if path.is_dir():
        return sorted(one for one in path.rglob("*") if one.is_file())
    return [path] if path.is_file() else []
