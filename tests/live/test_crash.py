"""kill -9 in the midst of load: what was acknowledged is there, once."""

from __future__ import annotations

import random
import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import grpc
import httpx

from tests.live.collecting import PROTOBUF, Running, collecting, request, segments, stored, trace_ids

KILLS = 4
SENDERS = 6
ENOUGH = 40  # requests acknowledged before a kill
EXPORT = "/opentelemetry.proto.collector.trace.v1.TraceService/Export"


@dataclass
class Sender:
    """Sends requests one after the other, and each again until it is acknowledged, as OpenTelemetry's exporters do."""

    number: int
    sent: set[str] = field(default_factory=set)
    acknowledged: set[str] = field(default_factory=set)
    requests: int = 0
    _unanswered: bytes = b""
    _unanswered_ids: tuple[str, ...] = ()

    def run(self, running: Running, stop: threading.Event) -> None:
        channel = grpc.insecure_channel(running.grpc)
        with httpx.Client() as client, channel, suppress(httpx.TransportError, grpc.RpcError):
            while not stop.is_set():
                if not self._unanswered:
                    self._make_one()
                if self.number % 2:
                    answer = client.post(running.url, content=self._unanswered, headers={"Content-Type": PROTOBUF})
                    assert answer.status_code == 200
                else:
                    channel.unary_unary(EXPORT)(self._unanswered)
                self.acknowledged.update(self._unanswered_ids)
                self._unanswered = b""
                self.requests += 1

    def _make_one(self) -> None:
        message = request(self._ids, self._ids.randint(1, 40), padding=self._ids.choice((0, 50, 2000)))
        self._unanswered, self._unanswered_ids = message.SerializeToString(), tuple(trace_ids(message))
        self.sent.update(self._unanswered_ids)

    def __post_init__(self) -> None:
        self._ids = random.Random(self.number)


def test_no_acknowledged_span_is_lost_and_none_is_there_twice(tmp_path: Path) -> None:
    senders = [Sender(number) for number in range(SENDERS)]
    moment = random.Random(0)
    for kill in count(1):
        # Small segments, so that rotation and compression are under way when it happens, too.
        with collecting(tmp_path, "--rotate-size", "200kB") as running:
            stop = threading.Event()
            before = sum(sender.requests for sender in senders)
            threads = [threading.Thread(target=sender.run, args=(running, stop)) for sender in senders]
            for thread in threads:
                thread.start()
            deadline = time.monotonic() + 60
            while sum(sender.requests for sender in senders) < before + ENOUGH and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(moment.random() / 20)
            if kill == KILLS:
                stop.set()
            else:
                running.process.kill()
            for thread in threads:
                thread.join()
        ids, damage = stored(tmp_path)
        assert set().union(*(sender.acknowledged for sender in senders)) <= set(ids)
        assert set(damage) <= {"the last message ends early"}
        if kill == KILLS:
            break
    assert sum(sender.requests for sender in senders) >= KILLS * ENOUGH
    assert len(segments(tmp_path)) > KILLS
    # All were sent until they were acknowledged, but for the last of each, which may be there or not.
    assert set(ids) <= set().union(*(sender.sent for sender in senders))
    assert set(ids.values()) == {1}
