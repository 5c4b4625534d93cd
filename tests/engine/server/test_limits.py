"""Clients that vanish, read slowly or come in crowds, and batches that fail: the engine and the others go on."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import httpx
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra: engine)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: engine)")

from stallscope_engine.config import EngineConfig
from stallscope_engine.server.app import Settings
from stallscope_engine.server.async_engine import MOST_FAILURES
from stallscope_telemetry.records import FinishReason
from tests.engine.server.running import CONFIG, Running, eventually, running

LONG = {"prompt": [5] * 40, "max_tokens": 2000, "ignore_eos": True}


@pytest.fixture
def live() -> Iterator[Running]:
    with running() as server:
        yield server


@contextmanager
def raw_client(live: Running, body: dict[str, object], receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A bare socket on which ``body`` was sent."""
    host, port = live.url.removeprefix("http://").split(":")
    with socket.socket() as client:
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(30)
        client.connect((host, int(port)))
        data = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        client.sendall(head.encode() + data)
        yield client


# --- clients that go away -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_blocks_within_a_step(live: Running, stream: bool) -> None:
    live.complete()
    with raw_client(live, LONG | {"stream": stream}):
        eventually(lambda: bool(live.engine.scheduler.running))
        live.executor.free.clear()
        eventually(lambda: live.engine.scheduler.blocks.used_blocks > 0)
    eventually(lambda: not live.server.engine.open_requests)
    steps = live.engine.steps
    live.executor.free.set()
    eventually(lambda: live.engine.scheduler.blocks.used_blocks == 0)
    assert live.engine.steps <= steps + 1
    eventually(lambda: live.recorded.requests[-1].info.prompt_tokens == 40)
    assert live.recorded.requests[-1].finish_reason is FinishReason.ABORT
    live.still_works()


def test_a_client_that_goes_away_while_it_waits_leaves_the_queue(live: Running) -> None:
    live.executor.free.clear()
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(live.complete, max_tokens=3) for _ in range(4)]
        eventually(lambda: live.server.engine.open_requests == 4)
        with raw_client(live, LONG):
            eventually(lambda: live.server.engine.open_requests == 5)
        eventually(lambda: live.server.engine.open_requests == 4)
        live.executor.free.set()
        assert [other.result()["usage"]["completion_tokens"] for other in others] == [3] * 4
    assert not any(record.info.prompt_tokens == 40 and record.scheduled_ns for record in live.recorded.requests)
    live.still_works()


def test_a_client_that_goes_away_before_its_body_is_there_costs_nothing(live: Running) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    live.still_works()
    assert len(live.recorded.requests) == 1


def test_many_cancellations_leave_nothing_behind(live: Running) -> None:
    def cancel(number: int) -> None:
        with live.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            for _, _ in zip(range(number % 5), answer.iter_raw(), strict=False):
                pass

    with ThreadPoolExecutor(8) as pool:
        assert len([*pool.map(cancel, range(40))]) == 40
    live.still_works()
    assert live.server.engine.open_requests == 0
    assert {record.finish_reason for record in live.recorded.requests[:-1]} == {FinishReason.ABORT}


def test_a_slow_reader_is_given_up_and_holds_nobody_up() -> None:
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=256, kv_blocks=256)
    with running(config, Settings(max_unread=50)) as live:
        slow = {"prompt": [5], "max_tokens": 3900, "ignore_eos": True, "stream": True, "return_token_ids": True}
        with raw_client(live, slow, receive_buffer=4096) as client:
            eventually(lambda: bool(live.engine.scheduler.running))
            live.complete()
            eventually(lambda: live.engine.scheduler.blocks.used_blocks == 0)
            assert 3 in {one.info.prompt_tokens for one in live.recorded.requests}  # nobody was held up
            received = b""
            while b"slow_reader" not in received:
                part = client.recv(65536)
                assert part
                received = received[-1000:] + part
        eventually(lambda: 1 in {one.info.prompt_tokens for one in live.recorded.requests})
        (given_up,) = (one for one in live.recorded.requests if one.info.prompt_tokens == 1)
        assert given_up.finish_reason is FinishReason.ABORT
        assert len(given_up.token_times_ns) < 3900
        live.still_works()


# --- crowds -------------------------------------------------------------------------------------------------------


def test_a_full_queue_says_when_to_come_back() -> None:
    with running(settings=Settings(max_queue=2)) as live:
        live.complete()
        live.executor.free.clear()
        most = CONFIG.max_num_seqs + 2
        with ThreadPoolExecutor(most) as pool:
            taken = [pool.submit(live.complete) for _ in range(most)]
            eventually(lambda: live.server.engine.open_requests == most)
            refused = live.post(prompt=[5])
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "queue_full"
            assert 1 <= int(refused.headers["Retry-After"]) <= 600
            rejected = 'vllm:admission_rejections_total{model_name="tiny",reason="max_num_queued_reqs"}'
            assert live.metric(rejected) == 1
            live.executor.free.set()
            assert len([one.result() for one in taken]) == most
        live.still_works()


def test_a_queue_of_none_still_lets_requests_run() -> None:
    with running(settings=Settings(max_queue=0)) as live:
        live.still_works()


# --- batches that fail --------------------------------------------------------------------------------------------


def test_a_batch_that_fails_ends_its_requests_and_no_others(live: Running) -> None:
    live.executor.free.clear()
    live.executor.failures = 1
    with ThreadPoolExecutor(5) as pool:
        asked = {"prompt": [5, 6], "max_tokens": 3, "ignore_eos": True}
        four = [pool.submit(live.post, **asked) for _ in range(CONFIG.max_num_seqs)]
        eventually(lambda: live.server.engine.open_requests == CONFIG.max_num_seqs)
        fifth = pool.submit(live.post, **asked)
        eventually(lambda: live.server.engine.open_requests == CONFIG.max_num_seqs + 1)
        live.executor.free.set()
        statuses = [one.result().status_code for one in four]
        assert fifth.result().status_code == 200
    assert 500 in statuses
    failed = next(one.result() for one in four if one.result().status_code == 500)
    assert failed.json()["error"]["code"] == "engine_error"
    assert live.client.get("/health").status_code == 200
    live.still_works()
    assert FinishReason.ERROR in {record.finish_reason for record in live.recorded.requests}


def test_a_batch_that_fails_in_the_middle_of_events_is_an_event(live: Running) -> None:
    with live.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        live.executor.failures = 1
        last = [line for line in lines if line][-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
    live.still_works()


def test_an_engine_that_keeps_failing_stops_and_says_so(live: Running) -> None:
    live.executor.failures = MOST_FAILURES
    statuses = [live.post(prompt=[5]).status_code for _ in range(MOST_FAILURES + 2)]
    assert statuses == [500] * (MOST_FAILURES - 1) + [500] + [503] * 2
    health = live.client.get("/health")
    assert health.status_code == 503
    assert "stopped" in health.json()["error"]["message"]


def test_requests_that_wait_when_the_engine_stops_are_answered(live: Running) -> None:
    live.executor.free.clear()
    live.executor.failures = MOST_FAILURES * 10
    answers: list[httpx.Response] = []
    clients = [threading.Thread(target=lambda: answers.append(live.post(prompt=[5]))) for _ in range(30)]
    for client in clients:
        client.start()
    eventually(lambda: live.server.engine.open_requests == 30)
    live.executor.free.set()
    for client in clients:
        client.join(30)
    assert len(answers) == 30
    assert {answer.status_code for answer in answers} == {500, 503}


def test_overlapped_steps_survive_a_failed_batch_and_the_prefix_cache_keeps_nothing_of_it() -> None:
    with running(replace(CONFIG, async_scheduling=True, prefix_caching=True)) as live:
        asked = {"prompt": [*range(5, 105)], "max_tokens": 6, "return_token_ids": True, "temperature": 0}
        live.executor.failures = 1
        assert live.post(**asked).status_code == 500
        with live.client.stream("POST", "/v1/completions", json=LONG | {"stream": True}) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            live.executor.failures = 1  # while a step before it is in flight
            assert json.loads([line for line in lines if line][-1].removeprefix("data: "))["error"]
        first = live.complete(**asked)["choices"][0]["token_ids"]
        again = live.complete(**asked)
        assert again["choices"][0]["token_ids"] == first
        assert live.recorded.requests[-1].cached_tokens == 96
        live.still_works()
