"""The bytes of a file without its compression, a bounded piece at a time."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

# Compressed bytes at a time: a bomb makes at most 32 thousand times as many of them.
_COMPRESSED_BYTES = 1 << 10


class _Decompressor(Protocol):
    """What zlib's and zstandard's decompression objects have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def plain_bytes(chunks: Iterable[bytes], broken: Callable[[str], None]) -> Iterator[bytes]:
    """The chunks of a file without their compression, which its first bytes show; calls ``broken`` where it ends early
    or is damaged, after all that came before."""
    chunks = iter(chunks)
    head = next(chunks, b"")
    while len(head) < len(_ZSTD_MAGIC) and (more := next(chunks, b"")):
        head += more
    compressed = _decompressor(head)
    whole = _chain(head, chunks)
    return whole if compressed is None else _inflate(whole, *compressed, broken)


def _chain(head: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    yield head
    yield from rest


_GZIP_MAGIC, _ZSTD_MAGIC = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"


def _decompressor(head: bytes) -> tuple[Callable[[], _Decompressor], type[Exception]] | None:
    """How to undo the compression that the first bytes of a file show, and what that raises; None for plain bytes."""
    if head.startswith(_GZIP_MAGIC):
        return (lambda: zlib.decompressobj(wbits=31)), zlib.error
    if head.startswith(_ZSTD_MAGIC):
        import zstandard

        return (lambda: zstandard.ZstdDecompressor().decompressobj()), zstandard.ZstdError
    return None


def _inflate(
    chunks: Iterable[bytes], start: Callable[[], _Decompressor], error: type[Exception], broken: Callable[[str], None]
) -> Iterator[bytes]:
    """Decompresses one or several members or frames."""
    stream = start()
    for chunk in chunks:
        for low in range(0, len(chunk), _COMPRESSED_BYTES):
            rest = chunk[low : low + _COMPRESSED_BYTES]
            while rest:
                if stream.eof:
                    stream = start()
                try:
                    plain = stream.decompress(rest)
                except error as reason:
                    broken(f"compressed data is damaged ({reason})")
                    return
                rest = stream.unused_data if stream.eof else b""
                if plain:
                    yield plain
    if not stream.eof:
        broken("compressed data ends early")
