"""What a TRACE names, as streams of bytes: files, folders, globs, standard input, URLs and tracing backends.

The only place that knows: every command that reads a trace reads all of these. ``remote`` has URLs, ``backends`` what
answers questions for traces; ``files`` undoes compression.
"""

from __future__ import annotations

import glob
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stallscope.errors import UsageError

SUFFIXES = tuple(
    kind + compression for kind in (".jsonl", ".json", ".binpb", ".pb", ".bin") for compression in ("", ".gz", ".zst")
)
CHUNK_BYTES = 1 << 18
STDIN = "-"

Note = Callable[[str, str], None]  # kind and text of what a reader should know

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]+):/+", re.IGNORECASE)
_USER = re.compile(r"(?<=//)[^/?#@]*@")


@dataclass(frozen=True, slots=True)
class Source:
    """A stream of bytes. ``chunks`` opens and reads it; ``size`` in bytes, None where nobody knows.

    ``chunks`` raises OSError or UsageError where it can't be read.
    """

    name: str
    size: int | None
    chunks: Callable[[Note], Iterator[bytes]]


class Readable(Protocol):
    """A file of bytes."""

    def read(self, size: int, /) -> bytes: ...


def address(trace: str | Path) -> str:
    """What names a trace, as it was written: a ``Path`` makes one slash of the two in a URL."""
    text = str(trace)
    found = _SCHEME.match(text)
    return text if found is None else f"{found[1].lower()}://{text[found.end() :]}"


def shown(trace: str | Path) -> str:
    """The same as it may be printed: without the password of a URL."""
    where = address(trace)
    return "stdin" if where == STDIN else _USER.sub("", where)


def recent_sources(folder: Path, changed_since: float) -> list[Source]:
    """The files of a folder that were written to since a time (s since the epoch): what is in the others is older.
    Raises UsageError where there is none."""
    found = [one for one in _within(folder) if one.stat().st_mtime >= changed_since] if folder.is_dir() else []
    if not found:
        raise UsageError(f"{folder}: no trace file in it was written to lately; is `stallscope collect` running?")
    return [_file(one) for one in found]


def find_sources(trace: str | Path) -> list[Source]:
    """All that ``trace`` names, files in the order of their names. Raises UsageError where there is none."""
    where = address(trace)
    if where == STDIN:
        return [Source(shown(where), None, lambda _: pieces(sys.stdin.buffer))]
    found = _SCHEME.match(where)
    if found is None:
        return _local(where)
    scheme = found[1]
    if scheme == "file":
        return _local(f"/{where[found.end() :]}")
    if "+" in scheme:
        from stallscope.trace.otlp.backends import backend_source

        return [backend_source(where)]
    from stallscope.trace.otlp.remote import remote_sources

    return remote_sources(where)


def pieces(stream: Readable) -> Iterator[bytes]:
    """The stream a bounded piece at a time."""
    while chunk := stream.read(CHUNK_BYTES):
        yield chunk


def is_trace_name(name: str) -> bool:
    """Whether a file of a folder is taken for a trace."""
    return name.endswith(SUFFIXES)


def no_trace_in(where: str) -> UsageError:
    """The error of a folder without any."""
    names = ", ".join(suffix for suffix in SUFFIXES if suffix.count(".") == 1)
    return UsageError(f"{where}: no trace file in this folder; expected names that end in {names}, or in these + .gz")


# --- local files --------------------------------------------------------------------------------------------------


def _local(where: str) -> list[Source]:
    path = Path(where)
    if not path.exists():
        return _matching(where)
    if path.is_dir():
        files = _within(path)
        if not files:
            raise no_trace_in(where)
        return [_file(one) for one in files]
    if path.is_file() and path.stat().st_size == 0:
        raise UsageError(f"{path}: the file is empty; record again, or wait until the exporter has written")
    return [_file(path)]


def _matching(where: str) -> list[Source]:
    """The files that match a glob, and those within folders that do."""
    if not glob.has_magic(where):
        raise UsageError(f"{where}: no such file or folder; give a trace file or a folder of them")
    matches = [Path(one) for one in glob.glob(where, recursive=True)]
    files = {file for one in matches for file in (_within(one) if one.is_dir() else [one])}
    if not files:
        raise UsageError(f"{where}: no file matches; give a trace file, or a folder of them")
    return [_file(one) for one in sorted(files)]


def _within(folder: Path) -> Iterable[Path]:
    return sorted(file for file in folder.rglob("*") if is_trace_name(file.name) and file.is_file())


def _file(path: Path) -> Source:
    def chunks(_: Note) -> Iterator[bytes]:
        with path.open("rb") as stream:
            yield from pieces(stream)

    # A pipe, such as a shell's <(...), has no size to go by.
    return Source(str(path), path.stat().st_size if path.is_file() else None, chunks)
