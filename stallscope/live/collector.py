"""``stallscope collect``: the process around the receivers, from the first socket to the last fsync.

Flow of the end: SIGINT or SIGTERM -> no new requests -> those under way are written and acknowledged -> the open
segment stays for the next start. A second signal ends at once; what was acknowledged is on disk then, too.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from stallscope.errors import UsageError
from stallscope.live.intake import Counts, Intake, Listener
from stallscope.live.metrics import tell
from stallscope.live.over_grpc import GrpcServer
from stallscope.live.over_http import CLOSE_S, HttpServer
from stallscope.live.store import Limits, Store
from stallscope.watch.otlp import Push
from stallscope.watch.scores import Scores

_BACKLOG = 2048


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen; port 0 takes a free one."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Collected:
    """What came of it. ``removed`` segments made room, with so many bytes."""

    counts: Counts
    removed: int
    removed_bytes: int
    stored_bytes: int


def collect(
    folder: Path,
    limits: Limits,
    most_held_bytes: int,
    *,
    http: Address | None,
    grpc: Address | None,
    ready: Callable[[Address | None, Address | None], None],
    listeners: Sequence[Listener] = (),
    scores: Scores | None = None,
    metrics_to: str | None = None,
) -> Collected:
    """Receives until a signal ends it. ``ready`` hears where, once senders may come.

    ``scores``: of who watches the spans, for /metrics; ``metrics_to``: an OTLP/HTTP endpoint that they are pushed to.

    Raises UsageError where the folder can't be used, or an address.
    """
    store = Store(folder, limits)
    try:
        intake = Intake(store, most_held_bytes, listeners)
        counts = asyncio.run(_serve(store, intake, http, grpc, ready, scores or Scores(), metrics_to))
        return Collected(counts, store.closed.removed, store.closed.removed_bytes, store.bytes)
    finally:
        store.close()


async def _serve(
    store: Store,
    intake: Intake,
    http: Address | None,
    grpc: Address | None,
    ready: Callable[[Address | None, Address | None], None],
    scores: Scores,
    metrics_to: str | None,
) -> Counts:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, _stop_or_exit, stop, sign)
    most_body_bytes = store.limits.message_bytes
    listener = _listen(http) if http is not None else None
    over_grpc = _grpc_server(intake, grpc, most_body_bytes) if grpc is not None else None
    over_http = HttpServer(intake, most_body_bytes, scores)
    push = Push(scores, metrics_to, before=partial(tell, scores, intake.counts)) if metrics_to is not None else None
    async with _pushing(push), asyncio.TaskGroup() as tasks:
        writing = tasks.create_task(intake.run())
        serving = tasks.create_task(over_http.serve([listener])) if listener is not None else None
        if over_grpc is not None:
            await over_grpc.start()
        ready(
            Address(http.host, listener.getsockname()[1]) if http is not None and listener is not None else None,
            Address(grpc.host, over_grpc.port) if grpc is not None and over_grpc is not None else None,
        )
        await stop.wait()
        over_http.should_exit = True
        if over_grpc is not None:
            await over_grpc.stop(CLOSE_S)
        if serving is not None:
            await serving
        intake.end()
        await writing
    return intake.counts


@asynccontextmanager
async def _pushing(push: Push | None) -> AsyncIterator[None]:
    """Pushes metrics from a thread meanwhile; the last ones once all is written."""
    if push is None:
        yield
        return
    running = asyncio.create_task(asyncio.to_thread(push.run))
    try:
        yield
    finally:
        push.end()
        await running


def _stop_or_exit(stop: asyncio.Event, sign: int) -> None:
    if stop.is_set():
        os._exit(128 + sign)
    stop.set()


def _listen(address: Address) -> socket.socket:
    try:
        family = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        raise UsageError(f"can't listen on {address}: {getattr(error, 'strerror', None) or error}") from None


def _grpc_server(intake: Intake, address: Address, most_body_bytes: int) -> GrpcServer:
    _listen(address).close()  # it says why not in one line; gRPC's library writes to stderr by itself
    try:
        return GrpcServer(intake, str(address), most_body_bytes)
    except RuntimeError:
        raise UsageError(f"can't listen on {address}: it is taken, or no address of this machine") from None
