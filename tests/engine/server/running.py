"""A real server in this process: uvicorn on a loopback socket, and a tiny model that computes."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, Executor, StepResult, WallClock
from stallscope_engine.executors.torch_cpu import TorchExecutor
from stallscope_engine.models.configs import ModelConfig
from stallscope_engine.models.tokenizer import ByteTokenizer
from stallscope_engine.scheduler import Batch
from stallscope_engine.server.app import Server, Settings
from stallscope_engine.server.asked import limits_of
from stallscope_engine.server.async_engine import AsyncEngine
from stallscope_engine.server.serve import ServerProcess, listen
from stallscope_engine.server.tenants import ApiKeys
from stallscope_telemetry.records import RequestRecord, StepRecord

TINY = ModelConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=300,
    max_position_embeddings=4096,
)
CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=256, kv_blocks=128)
WAIT_S = 30.0

Json = dict[str, Any]


@dataclass
class Recorded:
    """A Recorder that keeps what it gets."""

    steps: list[StepRecord] = field(default_factory=list)
    requests: list[RequestRecord] = field(default_factory=list)

    def wants_keyframe(self, step: int) -> bool:
        return False

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def request(self, record: RequestRecord) -> None:
        self.requests.append(record)


@dataclass
class Held:
    """An executor whose steps wait until they are let go, or fail when they are told to."""

    inner: Executor
    free: threading.Event = field(default_factory=threading.Event)
    failures: int = 0

    def dispatch(self, batch: Batch) -> None:
        assert self.free.wait(WAIT_S)
        if self.failures:
            self.failures -= 1
            raise RuntimeError("the device is lost")
        self.inner.dispatch(batch)

    def collect(self, batch: Batch) -> StepResult:
        return self.inner.collect(batch)


@dataclass
class Running:
    """A server that runs, with its insides where a test must look at them."""

    url: str
    server: Server
    engine: Engine
    executor: Held
    recorded: Recorded
    client: httpx.Client

    def post(self, path: str = "/v1/completions", **body: object) -> httpx.Response:
        return self.client.post(path, json=body)

    def complete(self, **body: object) -> Json:
        answer = self.post(**{"prompt": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, **body})
        assert answer.status_code == 200, answer.text
        parsed: Json = answer.json()
        return parsed

    def events(self, path: str = "/v1/completions", **body: object) -> list[Json]:
        """The events of a streamed answer, which ends with ``[DONE]``."""
        answer = self.post(path, stream=True, **body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        return [json.loads(line) for line in lines]

    def metric(self, sample: str) -> float:
        """The value of a line of ``/metrics`` that begins with ``sample``."""
        lines = self.client.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(sample)).rpartition(" ")[2])

    def still_works(self) -> None:
        """All blocks come back, and a request is answered and recorded."""
        eventually(lambda: self.engine.scheduler.blocks.used_blocks == 0 and not self.server.engine.open_requests)
        before = len(self.recorded.requests)
        assert self.complete()["usage"]["completion_tokens"] == 4
        eventually(lambda: len(self.recorded.requests) > before)


def eventually(holds: Callable[[], bool]) -> None:
    """Waits until ``holds`` does."""
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


@contextmanager
def running(
    config: EngineConfig = CONFIG, settings: Settings | None = None, keys: ApiKeys | None = None
) -> Iterator[Running]:
    """A server from start to end; nothing of it is left afterwards."""
    recorded = Recorded()
    executor = Held(TorchExecutor(config, TINY, "float32"))
    executor.free.set()
    engine = Engine(config, executor, WallClock(), recorded)
    limits = limits_of("tiny", config, TINY.vocab_size, TINY.max_position_embeddings)
    server = Server(AsyncEngine(engine, "tiny"), ByteTokenizer(TINY), limits, settings or Settings(), keys)
    listener = listen("127.0.0.1", 0, has_keys=False)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    is_ready = threading.Event()
    process = ServerProcess(server, 1.0, is_ready.set, None)
    thread = threading.Thread(target=process.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        assert is_ready.wait(WAIT_S)
        with httpx.Client(base_url=url, timeout=WAIT_S) as client:
            yield Running(url, server, engine, executor, recorded, client)
    finally:
        executor.free.set()
        process.should_exit = True
        thread.join(WAIT_S)
        assert not thread.is_alive()
