"""A streamed POST over HTTP/1.1 with as little work a token as can be: a driver's time must not look like a server's.

httpx takes 0.35 ms of a core a token, this a quarter of that (15 requests of 50 tokens a second). A connection carries
one request at a time and is used again, as clients do; there is no limit on them, since a queue in here would look like
one in the server.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

_CONNECT_S = 10.0
_KEEP_ALIVE_S = 2.0  # shorter than any server's, or a connection that it closes just then would look like a lost answer
_MOST_BYTES = 1 << 22  # of a chunk, or of a refusal


class Unreachable(Exception):
    """No connection."""


class Disconnected(Exception):
    """The answer is not whole, or is no HTTP."""


@dataclass(eq=False, slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since: float = 0.0  # time.monotonic()


class Response:
    """Status and headers (names in lower case); ``pieces`` gives the body as it comes."""

    def __init__(self, status: int, headers: Mapping[str, str], reader: asyncio.StreamReader) -> None:
        self.status = status
        self.headers = headers
        self.is_whole = False  # the body was read to its end, and the connection is at the next answer's begin
        self._reader = reader

    async def pieces(self) -> AsyncIterator[bytes]:
        """Raises Disconnected where the body ends early."""
        try:
            if "chunked" in self.headers.get("transfer-encoding", "").lower():
                while piece := await self._chunk():
                    yield piece
                self.is_whole = True
            elif "content-length" in self.headers:
                left = int(self.headers["content-length"])
                while left > 0:
                    piece = await self._reader.read(min(left, _MOST_BYTES))
                    if not piece:
                        raise Disconnected(f"{left} bytes of the answer are missing")
                    left -= len(piece)
                    yield piece
                self.is_whole = True
            else:
                while piece := await self._reader.read(_MOST_BYTES):
                    yield piece
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError) as error:
            raise Disconnected(_reason(error)) from error

    async def _chunk(self) -> bytes:
        """The next chunk, empty at the end: https://www.rfc-editor.org/rfc/rfc9112#name-chunked-transfer-coding"""
        line = await self._reader.readuntil(b"\r\n")
        size = int(line.partition(b";")[0], 16)
        if not 0 <= size <= _MOST_BYTES:
            raise Disconnected(f"a chunk of {size} bytes")
        if size == 0:
            while await self._reader.readuntil(b"\r\n") != b"\r\n":
                pass  # trailers
            return b""
        return (await self._reader.readexactly(size + 2))[:-2]


class HttpClient:
    """Connections to the host of one URL."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._netloc = parts.netloc.rpartition("@")[2]
        self._idle: list[_Connection] = []

    @asynccontextmanager
    async def post(self, path: str, headers: Mapping[str, str], body: bytes) -> AsyncIterator[Response]:
        """Sends ``body`` and waits for the head of the answer. Raises Unreachable or Disconnected."""
        connection = self._take_idle() or await self._connect()
        try:
            response = await self._exchange(connection, path, headers, body)
            yield response
        except BaseException:
            connection.writer.transport.abort()  # the server is to notice at once
            raise
        if response.is_whole and response.headers.get("connection", "").lower() != "close":
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        else:
            connection.writer.transport.abort()

    def close(self) -> None:
        for connection in self._idle:
            connection.writer.close()
        self._idle.clear()

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if time.monotonic() - connection.idle_since < _KEEP_ALIVE_S and not connection.reader.at_eof():
                return connection
            connection.writer.close()
        return None

    async def _connect(self) -> _Connection:
        try:
            async with asyncio.timeout(_CONNECT_S):
                return _Connection(*await asyncio.open_connection(self._host, self._port, ssl=self._tls))
        except (OSError, UnicodeError) as error:  # a TimeoutError is an OSError
            raise Unreachable(_reason(error)) from error

    async def _exchange(self, connection: _Connection, path: str, headers: Mapping[str, str], body: bytes) -> Response:
        lines = [f"POST {path} HTTP/1.1", f"Host: {self._netloc}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        try:
            connection.writer.write("\r\n".join([*lines, "", ""]).encode("ascii") + body)
            status, answered = await _read_head(connection.reader)
            while status < 200:  # 100 Continue and its like come before the answer
                status, answered = await _read_head(connection.reader)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, ValueError) as error:
            raise Disconnected(_reason(error)) from error
        return Response(status, answered, connection.reader)


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    version, status, *_ = first.split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError("no HTTP answer")
    pairs = (line.partition(":") for line in lines if line)
    return int(status), {name.strip().lower(): value.strip() for name, _, value in pairs}


def _reason(error: Exception) -> str:
    if isinstance(error, asyncio.IncompleteReadError):
        return "the connection ended early"
    return str(error) or type(error).__name__
