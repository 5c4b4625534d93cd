"""Segments, the files that a collector writes: messages of OTLP in the order in which they came, each after its length.

A message (``bodies.Batch.message``) comes after 4 bytes of length, big-endian, as the OpenTelemetry Collector's file
exporter writes them, so that a folder of segments is a trace. A closed segment is compressed as a whole and keeps its
name: it takes the plain one's place at once, and whoever reads the folder meanwhile finds either.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, cast

import orjson
import zstandard
from google.protobuf.message import DecodeError
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

# Level 3 with a window of 8 MiB: what spans repeat stood some thousand steps back.
_ZSTD = zstandard.ZstdCompressionParameters.from_level(3, window_log=23, write_checksum=True)
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"  # as a length it would be 682 MB
_NAME = re.compile(r"spans-(\d{8,})-(\d{8}T\d{6}Z)\.binpb")
_TIME = "%Y%m%dT%H%M%SZ"
_LENGTH = struct.Struct(">I")
_PART = ".part"  # of a file that is not whole yet: no reader takes it for a trace


def new_path(folder: Path, number: int) -> Path:
    """Of a segment that begins now."""
    return folder / f"spans-{number:08}-{datetime.now(UTC).strftime(_TIME)}.binpb"


def number_of(path: Path) -> int:
    """A segment's place in the order in which they were begun, from 1."""
    return int(_match(path)[1])


def begun(path: Path) -> float:
    """When a segment was begun, seconds since the epoch."""
    return datetime.strptime(_match(path)[2], _TIME).replace(tzinfo=UTC).timestamp()


def _match(path: Path) -> re.Match[str]:
    found = _NAME.fullmatch(path.name)
    if found is None:
        raise ValueError(f"{path} is no segment")
    return found


def segments_in(folder: Path) -> list[Path]:
    """The segments of a folder, oldest first."""
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=number_of)


def remove_parts(folder: Path) -> None:
    """Removes what a killed process left of a compression."""
    for path in folder.glob(f"spans-*{_PART}"):
        path.unlink()


def framed(messages: Iterable[bytes]) -> bytes:
    """Messages as they stand in a segment."""
    return b"".join(part for message in messages for part in (_LENGTH.pack(len(message)), message))


def framed_size(message: bytes) -> int:
    return _LENGTH.size + len(message)


def messages_in(path: Path) -> Iterator[bytes]:
    """The messages of a segment, plain or compressed, up to one that is not whole."""
    with path.open("rb") as file:
        if not file.peek(len(_ZSTD_MAGIC)).startswith(_ZSTD_MAGIC):
            yield from _messages(file)
            return
        with zstandard.ZstdDecompressor().stream_reader(file) as stream:
            yield from _messages(BufferedReader(cast("BinaryIO", stream)))  # type: ignore[type-var]


def _messages(stream: BinaryIO | BufferedReader) -> Iterator[bytes]:
    while len(head := stream.read(_LENGTH.size)) == _LENGTH.size:
        (length,) = _LENGTH.unpack(head)
        message = stream.read(length)
        if len(message) < length or not length:
            return
        yield message


def is_compressed(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_ZSTD_MAGIC)) == _ZSTD_MAGIC


def cut_torn_end(path: Path) -> int:
    """Cuts off a plain segment what a crash left of writing, all after the last sound message; returns the bytes cut.

    Nothing of that was acknowledged: the fsync before an acknowledgement would have made it whole.
    """
    size = path.stat().st_size
    sound_end = end = 0
    for message in messages_in(path):
        end += framed_size(message)
        if _is_sound(message):
            sound_end = end
    if sound_end < size:
        os.truncate(path, sound_end)
    return size - sound_end


def _is_sound(message: bytes) -> bool:
    try:
        if message.startswith(b"{"):
            orjson.loads(message)
        else:
            TracesData.FromString(message)
    except (DecodeError, orjson.JSONDecodeError):
        return False
    return True


def compress(path: Path) -> Path:
    """A compressed copy of a segment, durable, that is to take its place. Raises OSError; leaves nothing then."""
    part = path.with_name(path.name + _PART)
    try:
        with path.open("rb") as plain, part.open("wb") as file:
            zstandard.ZstdCompressor(compression_params=_ZSTD).copy_stream(plain, file, size=path.stat().st_size)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        part.unlink(missing_ok=True)
        raise
    return part


def sync_folder(folder: Path) -> None:
    """Makes names in a folder as durable as the files."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
