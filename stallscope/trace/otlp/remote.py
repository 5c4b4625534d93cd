"""URLs as streams of bytes, read as they come: ``http`` and ``https`` by httpx, any other by fsspec, where installed.

fsspec (https://filesystem-spec.readthedocs.io) has a library for each kind of store: s3fs, gcsfs, adlfs, ...; it takes
credentials from where these look for them.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import httpx

from stallscope.errors import UsageError
from stallscope.trace.otlp.sources import CHUNK_BYTES, Note, Source, is_trace_name, no_trace_in, pieces, shown

TIMEOUT_S = 30.0

_Answer = TypeVar("_Answer")


def remote_sources(url: str) -> list[Source]:
    """The file, folder or glob that a URL names. Raises UsageError where there is none, or nothing reads such URLs."""
    return [_download(url)] if url.startswith(("http://", "https://")) else _stored(url)


def _download(url: str) -> Source:
    def chunks(_: Note) -> Iterator[bytes]:
        try:
            # As it is stored: what is compressed shows it by its first bytes.
            headers = {"Accept-Encoding": "identity"}
            with httpx.stream("GET", url, headers=headers, timeout=TIMEOUT_S, follow_redirects=True) as answer:
                if not answer.is_success:
                    said = f"{answer.status_code} {answer.reason_phrase}"
                    raise UsageError(f"{shown(url)}: answered {said}; check the URL and its rights")
                yield from answer.iter_bytes(CHUNK_BYTES)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UsageError(f"{shown(url)}: cannot be read ({_reason(error)}); check the URL") from error

    return Source(shown(url), None, chunks)


def _stored(url: str) -> list[Source]:
    store, path = _store(url)
    files = _asking(url, lambda: _files(store, path))
    if not files:
        if glob.has_magic(path):
            raise UsageError(f"{shown(url)}: no file matches; give a trace file, or a folder of them")
        raise no_trace_in(shown(url))
    return [_file(store, name, size, url) for name, size in files]


def _store(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it."""
    scheme = url.partition(":")[0]
    try:
        import fsspec
    except ImportError:
        raise UsageError(f"{shown(url)}: {scheme}:// needs fsspec; pip install 'stallscope[remote]'") from None
    if scheme not in fsspec.available_protocols():
        raise UsageError(f"{shown(url)}: nothing reads {scheme}://; fsspec knows s3, gs, abfs and others")
    try:
        return fsspec.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        raise UsageError(f"{shown(url)}: {scheme}:// needs another package ({_reason(error)})") from error


def _files(store: Any, path: str) -> list[tuple[str, int | None]]:
    """Names and sizes, in order."""
    if glob.has_magic(path):
        found = store.glob(path, detail=True)
        return sorted((name, one.get("size")) for name, one in found.items() if one.get("type") != "directory")
    told = store.info(path)
    if told.get("type") != "directory":
        return [(path, told.get("size"))]
    found = store.find(path, detail=True)
    return sorted((name, one.get("size")) for name, one in found.items() if is_trace_name(name))


def _file(store: Any, name: str, size: int | None, url: str) -> Source:
    full = f"{url.partition(':')[0]}://{name.lstrip('/')}"

    def chunks(_: Note) -> Iterator[bytes]:
        stream = _asking(full, lambda: store.open(name, "rb"))
        with stream:
            while chunk := _asking(full, lambda: next(pieces(stream), b"")):
                yield chunk

    return Source(shown(full), size, chunks)


def _asking(url: str, ask: Callable[[], _Answer]) -> _Answer:
    """What a store answers. Raises UsageError for whatever it raises: each has errors of its own."""
    try:
        return ask()
    except ImportError as error:
        raise UsageError(f"{shown(url)}: needs another package ({_reason(error)})") from error
    except FileNotFoundError as error:
        raise UsageError(f"{shown(url)}: no such file or folder; give a trace file or a folder of them") from error
    except Exception as error:
        raise UsageError(f"{shown(url)}: cannot be read ({_reason(error)}); check the URL and its rights") from error


def _reason(error: Exception) -> str:
    """In one line."""
    return " ".join(f"{error}".split()) or type(error).__name__
