"""Holds the record of a finished request until its answer has left the server, so that telemetry can say when.

Stands between the engine and its Recorder; everything happens on the engine's thread.
"""

from __future__ import annotations

from stallscope_engine.engine import Recorder
from stallscope_telemetry.records import RequestRecord, StepRecord

MOST_HELD = 4096  # records; a client that reads slowly for long costs its own delivery time and no memory


class DeliveryRecorder:
    """A Recorder that passes steps on at once, and requests when ``delivered`` is told of them."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._held: dict[int, RequestRecord] = {}  # by handle, the oldest first

    def wants_keyframe(self, step: int) -> bool:
        return self._recorder.wants_keyframe(step)

    def step(self, record: StepRecord) -> None:
        self._recorder.step(record)

    def request(self, record: RequestRecord) -> None:
        self._held[record.info.handle] = record
        if len(self._held) > MOST_HELD:
            self._recorder.request(self._held.pop(next(iter(self._held))))

    def delivered(self, handle: int, delivered_ns: int) -> None:
        """The last token of a request left the server, or nobody waits for it any more."""
        record = self._held.pop(handle, None)
        if record is not None:
            record.delivered_ns = delivered_ns
            self._recorder.request(record)

    def flush(self) -> None:
        """Passes on what is still held, as it is: no more deliveries will be told."""
        for handle in [*self._held]:
            self._recorder.request(self._held.pop(handle))
