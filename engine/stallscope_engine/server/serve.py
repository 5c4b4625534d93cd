"""The process around the server: a socket, the engine's life, and an end that lets running requests finish.

Flow of the end: SIGTERM or SIGINT -> no new requests (503) -> running ones finish, or are ended after
``drain_timeout_s`` -> connections close -> the engine's thread stops -> whoever called ``serve`` closes telemetry.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import FrameType

import uvicorn

from stallscope_engine.server.app import Server

log = logging.getLogger(__name__)

SEND_BUFFER = 256 * 2**10  # bytes that the kernel keeps of an answer nobody reads
CLOSE_S = 5.0  # for the last bytes of answers to be read
_POLL_S = 0.02


def listen(host: str, port: int, *, has_keys: bool) -> socket.socket:
    """A socket that listens on ``host``. Raises ValueError, in one line, where it may not or can't.

    Without API keys everybody who can reach the server may use it, so it must not leave this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ValueError(f"host {host!r}: {error}") from None
    if not has_keys and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ValueError(f"host {host!r} can be reached from elsewhere: give --api-keys FILE, or --host 127.0.0.1")
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ValueError(f"can't listen on {host}:{port}: {error.strerror}") from None
    return listener


def serve(
    server: Server,
    listener: socket.socket,
    drain_timeout_s: float,
    ready: Callable[[], None],
    reload: Callable[[], None] | None = None,
) -> None:
    """Serves until a signal ends it; returns when all is delivered and the engine has stopped.

    ``ready`` is called once connections are taken, ``reload`` at each SIGHUP.
    """
    ServerProcess(server, drain_timeout_s, ready, reload).run(sockets=[listener])


class ServerProcess(uvicorn.Server):
    """uvicorn, but the first signal drains and the second ends at once."""

    def __init__(
        self, server: Server, drain_timeout_s: float, ready: Callable[[], None], reload: Callable[[], None] | None
    ) -> None:
        server.app.router.lifespan_context = self._lifespan
        config = uvicorn.Config(
            server.app,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(CLOSE_S),
        )
        super().__init__(config)
        self._server = server
        self._drain_timeout_s = drain_timeout_s
        self._ready = ready
        self._reload = reload
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain_task: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def _lifespan(self, _: object) -> AsyncIterator[None]:
        self._loop = asyncio.get_running_loop()
        if self._reload is not None:
            self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        self._server.engine.start()
        yield
        self._server.engine.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal's handler, as uvicorn installs it."""
        if self._server.is_draining:
            os._exit(128 + sig)
        self._server.is_draining = True
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain_task = asyncio.create_task(self._drain())

    async def _drain(self) -> None:
        engine = self._server.engine
        log.warning("shutting down within %g s; still to finish: %d", self._drain_timeout_s, engine.open_requests)
        deadline = asyncio.get_running_loop().time() + self._drain_timeout_s
        while engine.open_requests and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_POLL_S)
        engine.abort_all()
        self.should_exit = True
