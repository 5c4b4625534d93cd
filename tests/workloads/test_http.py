"""The driver's HTTP against raw bytes on a real socket: what is whole, what is cut, what is no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from stallscope.workloads.http import Disconnected, HttpClient, Unreachable

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
SIZED = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 5\r\n\r\n"


async def answers(*written: bytes, path: str = "/x") -> tuple[list[tuple[int, bytes]], list[bytes], int]:
    """One request for each answer; (status and body of each, requests as they were read, connections made)."""
    left = list(written)
    read: list[bytes] = []
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        try:
            while left:
                head = await reader.readuntil(b"\r\n\r\n")
                read.append(head + await reader.readexactly(4))
                answer = left.pop(0)
                for start in range(0, len(answer), 7):  # pieces that respect nothing
                    writer.write(answer[start : start + 7])
                    await writer.drain()
                if not answer.endswith((b"\r\n\r\n", b"whole")):
                    break
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    http = HttpClient(f"http://127.0.0.1:{port}/v1")
    got = []
    try:
        for _ in written:
            async with http.post(path, {"X-Who": "me"}, b"body") as response:
                got.append((response.status, b"".join([piece async for piece in response.pieces()])))
    finally:
        http.close()
        server.close()
    return got, read, connections


def run(*written: bytes) -> list[tuple[int, bytes]]:
    return asyncio.run(answers(*written))[0]


@pytest.mark.parametrize(
    ("written", "status", "body"),
    [
        (CHUNKED + b"3\r\nabc\r\nA;x=1\r\n0123456789\r\n0\r\n\r\n", 200, b"abc0123456789"),
        (CHUNKED + b"3\r\nabc\r\n0\r\nTrailer: 1\r\n\r\n", 200, b"abc"),
        (CHUNKED + b"4\r\n\r\n\r\n\r\n0\r\n\r\n", 200, b"\r\n\r\n"),
        (SIZED + b"whole", 400, b"whole"),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", 200, b"until the end"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + SIZED + b"whole", 400, b"whole"),
        (b"HTTP/1.0 503\r\nContent-Length: 0\r\n\r\n", 503, b""),
    ],
)
def test_a_whole_answer_is_read_however_it_is_framed(written: bytes, status: int, body: bytes) -> None:
    assert run(written) == [(status, body)]


@pytest.mark.parametrize(
    "written",
    [
        b"",
        b"HTTP/1.1 200",
        b"SSH-2.0-OpenSSH_9.7\r\n\r\n",
        b"HTTP/1.1 fine OK\r\n\r\n",
        CHUNKED + b"3\r\nab",
        CHUNKED + b"3\r\nabc\r\n",
        CHUNKED + b"-3\r\nabc\r\n",
        CHUNKED + b"ffffffffff\r\nabc\r\n",
        CHUNKED + b"what\r\nabc\r\n",
        SIZED + b"cut",
        b"HTTP/1.1 200 OK\r\nContent-Length: five\r\n\r\nfive!",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000,
    ],
)
def test_an_answer_that_is_cut_or_no_http_is_a_disconnection(written: bytes) -> None:
    with pytest.raises(Disconnected, match=r"^[^\n]+$"):
        run(written)


def test_a_request_has_its_path_headers_and_body() -> None:
    _, (request,), _ = asyncio.run(answers(SIZED + b"whole", path="/v1/completions"))
    head, _, body = request.partition(b"\r\n\r\n")
    first, host, *lines = head.decode().split("\r\n")
    assert first == "POST /v1/completions HTTP/1.1"
    assert host.startswith("Host: 127.0.0.1:")
    assert lines == ["Content-Length: 4", "X-Who: me"]
    assert body == b"body"


@pytest.mark.parametrize(
    ("written", "connections"),
    [
        ([SIZED + b"whole", CHUNKED + b"0\r\n\r\n", SIZED + b"whole"], 1),
        ([b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n", SIZED + b"whole"], 2),
        ([b"HTTP/1.1 200 OK\r\n\r\nuntil the end", SIZED + b"whole"], 2),
    ],
)
def test_a_connection_is_used_again_where_the_server_keeps_it(written: Sequence[bytes], connections: int) -> None:
    got, _, made = asyncio.run(answers(*written))
    assert (len(got), made) == (len(written), connections)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://no-such-host.invalid", "https://127.0.0.1:1"])
def test_an_address_without_a_server_is_unreachable(url: str) -> None:
    async def ask() -> None:
        async with HttpClient(url).post("/", {}, b""):
            pass

    with pytest.raises(Unreachable):
        asyncio.run(ask())
