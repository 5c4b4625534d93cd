"""Where there is no room, in memory or on disk, senders are told to come again, and nothing is acknowledged."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import httpx
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from tests.live.collecting import Running, begun, collecting, eventually, request, segments, stored, trace_ids

EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


def refused_over_grpc(running: Running, body: bytes) -> tuple[grpc.StatusCode, int]:
    """The code, and the seconds after which to come again."""
    with grpc.insecure_channel(running.grpc) as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(EXPORT)(body)
    details = dict(refused.value.trailing_metadata())
    status, retry = Status.FromString(details["grpc-status-details-bin"]), RetryInfo()
    assert status.code == refused.value.code().value[0]
    assert status.details[0].Unpack(retry)
    return refused.value.code(), retry.retry_delay.seconds


def refused_over_http(answer: httpx.Response) -> tuple[int, int]:
    retry = RetryInfo()
    assert Status.FromString(answer.content).details[0].Unpack(retry)
    assert int(answer.headers["retry-after"]) == retry.retry_delay.seconds
    return answer.status_code, retry.retry_delay.seconds


def size_of(folder: Path) -> int:
    """Of all files; one that takes another's place meanwhile may be missed."""
    size = 0
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            size += path.stat().st_size
    return size


def test_more_bytes_than_may_wait_are_429_with_retry_after(tmp_path: Path) -> None:
    ids = random.Random(1)
    slow = [request(ids, 10, padding=9000) for _ in range(3)]
    late = request(ids, 10, padding=9000)
    with collecting(tmp_path, "--max-body", "100kB", "--max-pending", "290kB") as running, ExitStack() as open_ones:
        bodies = [message.SerializeToString() for message in slow]
        connections = [open_ones.enter_context(begun(running, body)) for body in bodies]

        def is_full() -> bool:
            return running.post(late.SerializeToString()).status_code == 429

        eventually(is_full)
        status, retry_s = refused_over_http(running.post(late.SerializeToString()))
        assert (status, retry_s >= 1) == (429, True)
        code, retry_s = refused_over_grpc(running, late.SerializeToString())
        assert (code, retry_s >= 1) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
        assert segments(tmp_path) == []
        for connection, body in zip(connections, bodies, strict=True):
            connection.sendall(body[-1:])
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        assert running.post(late.SerializeToString()).status_code == 200
        running.end(signal.SIGTERM)
    assert set(stored(tmp_path)[0]) == {one for message in (*slow, late) for one in trace_ids(message)}


def test_a_file_that_can_not_grow_is_503_until_it_can(tmp_path: Path) -> None:
    ids = random.Random(2)
    first, second, third = (request(ids, spans, padding=1000) for spans in (5, 40, 15))
    with collecting(tmp_path) as running:
        assert running.post(first.SerializeToString()).status_code == 200
        limit = segments(tmp_path)[0].stat().st_size + 100  # so that half a message can be written
        for most in (limit, 1000):  # of the segment that is open, and of one that is begun anew
            resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
            assert refused_over_http(running.post(second.SerializeToString()))[0] == 503
            assert refused_over_grpc(running, second.SerializeToString())[0] is grpc.StatusCode.UNAVAILABLE
            assert set(stored(tmp_path)[0]) == set(trace_ids(first))
        resource.prlimit(running.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        for message in (second, third):
            assert running.post(message.SerializeToString()).status_code == 200
        said = running.end(signal.SIGTERM)
    assert "received 60 spans in 3 requests (0 sent again); refused 4 requests" in said
    told = running.errors().splitlines()
    assert len(told) == 2  # not once a request
    assert "File too large" in told[0]
    assert "can be written again" in told[1]
    found, damage = stored(tmp_path)
    assert set(found) == {one for message in (first, second, third) for one in trace_ids(message)}
    assert damage == []


def test_a_sender_that_never_ends_is_told_and_holds_no_room(tmp_path: Path) -> None:
    message = request(random.Random(6), 10, padding=9000)
    shorter = "from stallscope.live import over_http, over_grpc; over_http.READ_S = over_grpc.READ_S = 0.5"
    options = ("--max-body", "100kB", "--max-pending", "200kB")
    with collecting(tmp_path, *options, before=shorter) as running:
        body = message.SerializeToString()
        with begun(running, body) as one, begun(running, body) as other:
            eventually(lambda: running.post(body).status_code == 429)
            for connection in (one, other):
                assert connection.recv(100).startswith(b"HTTP/1.1 408")
        assert running.post(body).status_code == 200
        with grpc.insecure_channel(running.grpc) as channel:
            never = channel.stream_unary(EXPORT).future(iter(threading.Event().wait, True))
            assert never.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        running.end(signal.SIGTERM)
    assert set(stored(tmp_path)[0]) == set(trace_ids(message))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode
    ):
        pytest.skip("file systems can't be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_503_and_keeps_what_was_acknowledged(small_disk: Path) -> None:
    ids = random.Random(3)
    acknowledged: set[str] = set()
    with collecting(small_disk) as running:
        for _ in range(30):
            message = request(ids, 50, padding=1000)
            answer = running.post(message.SerializeToString())
            if answer.status_code != 200:
                break
            acknowledged.update(trace_ids(message))
        assert refused_over_http(answer)[0] == 503
        assert set(stored(small_disk)[0]) == acknowledged
        assert running.post(request(ids).SerializeToString()).status_code in (200, 503)
        running.end(signal.SIGTERM)
    assert acknowledged <= set(stored(small_disk)[0])


def test_the_oldest_segments_make_room_and_the_budget_holds(tmp_path: Path) -> None:
    budget, ids = 1_000_000, random.Random(4)
    sent: list[list[str]] = []
    most = 0
    options = ("--disk-budget", "1MB", "--rotate-size", "100kB", "--max-body", "100kB")
    with collecting(tmp_path, *options) as running:
        for _ in range(60):
            message = request(ids, 10, padding=4000)  # what does not compress
            assert running.post(message.SerializeToString()).status_code == 200
            sent.append(trace_ids(message))
            most = max(most, size_of(tmp_path))
        said = running.end(signal.SIGTERM)
    assert budget // 2 < most <= budget
    assert "old files" in said
    assert "the disk budget is used up: removed" in running.errors()
    kept = set(stored(tmp_path)[0])
    latest = [one for message in sent[-12:] for one in message]
    assert set(latest) <= kept < {one for message in sent for one in message}


def test_a_smaller_budget_is_kept_from_the_start_on(tmp_path: Path) -> None:
    ids = random.Random(5)
    with collecting(tmp_path, "--rotate-size", "50kB") as running:
        for _ in range(20):
            assert running.post(request(ids, 10, padding=4000).SerializeToString()).status_code == 200
        running.end(signal.SIGTERM)
    (tmp_path / "of-somebody-else.binpb").write_bytes(b"")
    with collecting(tmp_path, "--rotate-size", "50kB", "--max-body", "50kB", "--disk-budget", "300kB") as running:
        assert sum(path.stat().st_size for path in segments(tmp_path)) <= 300_000
        running.end(signal.SIGTERM)
    assert (tmp_path / "of-somebody-else.binpb").exists()
