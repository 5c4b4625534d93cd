"""What it costs to acknowledge only what is on disk: the collector beside a receiver that only parses.

    python benchmarks/collect.py                      # 1, 8 and 64 senders over HTTP, and over gRPC
    python benchmarks/collect.py --senders 8 --passes 5 --folder /mnt/disk

Senders send requests of 100 step spans of about 1 KB, each when its last one was acknowledged; none is sent twice. The
collector (``stallscope.live``) and the same HTTP or gRPC server with nothing behind it but protobuf's parser take
turns, each a process of its own beside the senders'; shown are medians of the passes. "share" is the collector's
rate as a share of the parser's. Latency is from sending a request to its acknowledgement. An fsync is one commit of
all requests that came during the one before; "a fsync" says how many these were. Figures depend on the disk of
``--folder``.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import uvicorn
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from rich.console import Console
from rich.progress import track
from rich.table import Table
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from stallscope.live.bodies import PROTOBUF
from stallscope.live.collector import Address, collect
from stallscope.live.over_grpc import SERVICE
from stallscope.live.store import Limits

SENDERS = (1, 8, 64)
COLUMNS = ("over", "senders", "spans/s", "parsed/s", "share", "p50 ms", "p99 ms", "parsed p50", "fsyncs/s", "a fsync")
SPANS = 100
WARM_UP_S = 0.5
LIMITS = Limits(rotate_bytes=64_000_000, rotate_s=3600.0, disk_bytes=4_000_000_000, message_bytes=20 << 20)
HELD_BYTES = 128_000_000
LOCAL = "127.0.0.1"
EXPORT = f"/{SERVICE}/Export"
MARK = bytes(range(200, 216))  # where each request gets an id of its own

Send = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True)
class Pass:
    """Of one receiver: requests acknowledged a second, their latencies (s), and how many shared an fsync."""

    requests_per_s: float
    latencies: np.ndarray
    requests_per_fsync: float


# --- what is sent -------------------------------------------------------------------------------------------------


def template() -> bytes:
    """A request, with ``MARK`` as the first span's trace id."""
    ids = random.Random(0)
    message = ExportTraceServiceRequest()
    scope = message.resource_spans.add().scope_spans.add()
    for number in range(SPANS):
        trace_id = MARK if not number else ids.randbytes(16)
        span = scope.spans.add(trace_id=trace_id, span_id=ids.randbytes(8), name="engine.step", kind=1)
        span.start_time_unix_nano = 1_790_000_000_000_000_000 + number * 20_000_000
        span.end_time_unix_nano = span.start_time_unix_nano + 19_000_000
        for name in range(20):
            value = span.attributes.add(key=f"stallscope.attribute_{name}").value
            if name % 10:
                value.int_value = ids.randrange(1 << 20)
            else:
                for _ in range(16):
                    value.array_value.values.add(int_value=ids.randrange(1 << 14))
    return message.SerializeToString()


def requests() -> Iterator[bytes]:
    body = template()
    ids = random.Random(time.time_ns())
    while True:
        yield body.replace(MARK, ids.randbytes(16), 1)


async def http_sender(port: int) -> Send:
    """A connection of its own, and as little work as possible a request: the receiver is what is measured."""
    reader, writer = await asyncio.open_connection(LOCAL, port)
    head = f"POST /v1/traces HTTP/1.1\r\nHost: {LOCAL}\r\nContent-Type: {PROTOBUF}\r\nContent-Length: "

    async def send(body: bytes) -> None:
        writer.write(f"{head}{len(body)}\r\n\r\n".encode() + body)
        answer = await reader.readuntil(b"\r\n\r\n")
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.decode())
        if found := re.search(rb"content-length: (\d+)", answer):
            await reader.readexactly(int(found[1]))

    return send


async def grpc_sender(port: int) -> Send:
    options = [("grpc.use_local_subchannel_pool", 1)]  # a connection of its own
    export = grpc.aio.insecure_channel(f"{LOCAL}:{port}", options=options).unary_unary(EXPORT)

    async def send(body: bytes) -> None:
        await export(body)

    return send


async def drive(connect: Callable[[int], Awaitable[Send]], port: int, senders: int, seconds: float) -> list[float]:
    """The latencies of what was acknowledged between the warm-up and the end."""
    bodies = requests()
    start = time.perf_counter() + WARM_UP_S
    latencies: list[float] = []

    async def one() -> None:
        send = await connect(port)
        while (sent := time.perf_counter()) < start + seconds:
            await send(next(bodies))
            if sent >= start:
                latencies.append(time.perf_counter() - sent)

    await asyncio.gather(*(one() for _ in range(senders)))
    return latencies


# --- receivers ----------------------------------------------------------------------------------------------------


def serve_collector(over: str, folder: Path) -> None:
    """Says its port, then, at the end, how many requests and commits there were."""
    here = Address(LOCAL, 0)

    def ready(http: Address | None, rpc: Address | None) -> None:
        print((http or rpc).port, flush=True)  # type: ignore[union-attr]

    done = collect(
        folder, LIMITS, HELD_BYTES, http=here if over == "HTTP" else None, grpc=here if over == "gRPC" else None,
        ready=ready,
    )  # fmt: skip
    print(json.dumps([done.counts.requests, done.counts.commits]))


def serve_parser(over: str) -> None:
    """The same servers; what they receive is parsed, and that is all."""
    asyncio.run(_parse_http() if over == "HTTP" else _parse_grpc())


async def _parse_http() -> None:
    async def post(request: Request) -> Response:
        TracesData.FromString(await request.body())
        return Response(b"", media_type=PROTOBUF)

    app = Starlette(routes=[Route("/v1/traces", post, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, LOCAL, 0, log_config=None, access_log=False, server_header=False))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)
    await serving


async def _parse_grpc() -> None:
    async def export(message: bytes, _: object) -> bytes:
        TracesData.FromString(message)
        return b""

    server = grpc.aio.server()
    handlers = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    port = server.add_insecure_port(f"{LOCAL}:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@contextmanager
def receiver(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen([sys.executable, __file__, "--serve", *arguments], stdout=subprocess.PIPE, text=True)
    try:
        yield process, int(process.stdout.readline())  # type: ignore[union-attr]
    finally:
        process.kill()
        process.wait()


# --- passes -------------------------------------------------------------------------------------------------------


def measure(kind: str, over: str, senders: int, seconds: float, folder: Path) -> Pass:
    with receiver(kind, over, str(folder)) as (process, port):
        latencies = asyncio.run(drive(http_sender if over == "HTTP" else grpc_sender, port, senders, seconds))
        requests_per_fsync = math.nan
        if kind == "collector":
            process.send_signal(signal.SIGTERM)
            received, commits = json.loads(process.communicate()[0])
            requests_per_fsync = received / commits
    return Pass(len(latencies) / seconds, np.array(latencies), requests_per_fsync)


def show(rows: list[tuple[str, int, list[Pass], list[Pass]]], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "over" else "right")
    for over, senders, collected, parsed in rows:
        rate, parse_rate = (statistics.median(one.requests_per_s for one in passes) for passes in (collected, parsed))
        share = statistics.median(
            mine.requests_per_s / its.requests_per_s for mine, its in zip(collected, parsed, strict=True)
        )
        p50, p99 = (
            1e3 * statistics.median(float(np.percentile(one.latencies, at)) for one in collected) for at in (50, 99)
        )
        parse_p50 = 1e3 * statistics.median(float(np.median(one.latencies)) for one in parsed)
        shared = statistics.median(one.requests_per_fsync for one in collected)
        table.add_row(
            over, str(senders), f"{rate * SPANS:,.0f}", f"{parse_rate * SPANS:,.0f}", f"{share:.0%}", f"{p50:.1f}",
            f"{p99:.1f}", f"{parse_p50:.1f}", f"{rate / shared:,.0f}", f"{shared:.1f}",
        )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--senders", type=int, nargs="+", default=SENDERS)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each pass of each receiver")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to be measured; by default the one for temporary files"
    )
    parser.add_argument("--serve", nargs=3, metavar=("KIND", "OVER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        kind, over, folder = arguments.serve
        serve_collector(over, Path(folder)) if kind == "collector" else serve_parser(over)
        return
    rows = []
    numbers = count()
    cases = [(over, senders) for over in ("HTTP", "gRPC") for senders in arguments.senders]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        for over, senders in track(cases, "sending", console=Console(stderr=True)):
            passes: dict[str, list[Pass]] = {"collector": [], "parser": []}
            for _ in range(arguments.passes):
                for kind, found in passes.items():
                    folder = Path(name) / str(next(numbers))
                    found.append(measure(kind, over, senders, arguments.seconds, folder))
            rows.append((over, senders, passes["collector"], passes["parser"]))
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(f"requests of {SPANS} spans, {len(template()):,} bytes")
    show(rows, console)


if __name__ == "__main__":
    main()
