"""The loop: schedule, execute, complete, and a record of each step for telemetry."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Protocol

from stallscope_engine.config import EngineConfig
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch, Scheduler
from stallscope_telemetry.records import FinishReason, RequestRecord, RequestSnapshot, StepRecord


class Clock(Protocol):
    """Time as the engine sees it: int ns since the Unix epoch, never running backwards."""

    def now_ns(self) -> int: ...
    def wait_until(self, time_ns: int) -> None: ...


class WallClock:
    """Real time: the monotonic clock, set to the Unix epoch once at the start."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.perf_counter_ns()

    def now_ns(self) -> int:
        return time.perf_counter_ns() + self._offset

    def wait_until(self, time_ns: int) -> None:
        while (left := time_ns - self.now_ns()) > 0:
            time.sleep(left / 1e9)


class VirtualClock:
    """Time that moves only when told to: waiting costs nothing."""

    def __init__(self, start_ns: int) -> None:
        self._now_ns = start_ns

    def now_ns(self) -> int:
        return self._now_ns

    def wait_until(self, time_ns: int) -> None:
        self._now_ns = max(self._now_ns, time_ns)


class Executor(Protocol):
    """Runs a batch to its outputs: by computing it, or by letting virtual time pass.

    ``execute`` returns when the outputs are ready on the engine's clock, and has appended the sampled token ids
    where it computes any.
    """

    def execute(self, batch: Batch) -> StepResult: ...


@dataclass(frozen=True, slots=True)
class StepResult:
    """``stopped``: requests whose sampled token ends them. ``device_ns``: time on the device, -1 if not measured."""

    stopped: Collection[Request] = ()
    device_ns: int = -1


class Recorder(Protocol):
    """Where records go; must return at once and never raise (``stallscope_telemetry.emitter``)."""

    def wants_keyframe(self, step: int) -> bool: ...
    def step(self, record: StepRecord) -> None: ...
    def request(self, record: RequestRecord) -> None: ...


class Engine:
    """One replica: a scheduler, an executor and a clock. Everything happens on the thread that calls ``step``.

    ``before_dispatch`` is host work that belongs to a batch: in virtual time, what scheduling it costs.
    """

    def __init__(
        self,
        config: EngineConfig,
        executor: Executor,
        clock: Clock,
        recorder: Recorder | None = None,
        before_dispatch: Callable[[Batch], None] | None = None,
    ) -> None:
        self.config = config
        self.scheduler = Scheduler(config)
        self.executor = executor
        self.clock = clock
        self.recorder = recorder
        self.before_dispatch = before_dispatch
        self.steps = 0
        self._idle_ns = 0

    def submit(self, request: Request) -> None:
        """Queues a request for the next step. Raises RequestRejected where it could never run."""
        self.scheduler.add(request)

    def abort(self, request: Request, reason: FinishReason) -> None:
        """Ends a request before the next step."""
        now_ns = self.clock.now_ns()
        self.scheduler.abort(request, reason, now_ns)
        if self.recorder is not None:
            self.recorder.request(_request_record(request, now_ns))

    def note_idle(self, idle_ns: int) -> None:
        """Says that for this part of the time before the next step there was no request at all."""
        self._idle_ns += idle_ns

    def step(self) -> list[Request]:
        """Schedules, executes and completes one batch; returns the requests that finished with it."""
        if not self.scheduler.has_work:
            return []
        scheduled_ns = self.clock.now_ns()
        batch = self.scheduler.schedule(scheduled_ns)
        keyframe = self._keyframe()
        if self.before_dispatch is not None:
            self.before_dispatch(batch)
        dispatched_ns = self.clock.now_ns()
        result = self.executor.execute(batch)
        ready_ns = self.clock.now_ns()
        finished = self.scheduler.complete(batch, ready_ns, result.stopped)
        self._record(
            batch, finished, keyframe, dispatched_ns=dispatched_ns, ready_ns=ready_ns, device_ns=result.device_ns
        )
        self._idle_ns = 0
        self.steps += 1
        return finished

    # What telemetry costs this thread is in the two methods below (benchmarks/telemetry_overhead.py times them).

    def _keyframe(self) -> list[RequestSnapshot] | None:
        recorder = self.recorder
        return self.scheduler.snapshot() if recorder is not None and recorder.wants_keyframe(self.steps) else None

    def _record(
        self,
        batch: Batch,
        finished: list[Request],
        keyframe: list[RequestSnapshot] | None,
        *,
        dispatched_ns: int,
        ready_ns: int,
        device_ns: int,
    ) -> None:
        recorder = self.recorder
        if recorder is None:
            return
        recorder.step(
            StepRecord(
                self.steps,
                batch.scheduled_ns,
                dispatched_ns,
                ready_ns,
                self._idle_ns,
                dispatched_ns - batch.scheduled_ns,
                device_ns,
                batch.prefill_tokens,
                batch.decode_tokens,
                len(batch.requests),
                batch.running,
                batch.waiting,
                batch.kv_used,
                0,
                [request.info for request in batch.joined] if batch.joined else (),
                batch.chunks,
                batch.paused,
                batch.waits,
                batch.preempted,
                batch.left,
                keyframe,
            )
        )
        for request in finished:
            recorder.request(_request_record(request, ready_ns))

    def run(
        self,
        arrivals: Iterable[Request],
        until_ns: int | None = None,
        before_step: Callable[[], None] | None = None,
        after_step: Callable[[list[Request]], None] | None = None,
    ) -> None:
        """Serves ``arrivals`` (ordered by ``info.arrival_ns``) open-loop until all are done.

        A request enters the queue before the first step after its arrival, whatever the engine was doing then.
        ``until_ns`` ends the run early and leaves the rest open. ``before_step`` comes before a step's arrivals are
        queued: whatever holds the host up there is a gap between steps. ``after_step`` sees who finished.
        """
        pending = deque(arrivals)
        while pending or self.scheduler.has_work:
            if before_step is not None:
                before_step()
            now_ns = self.clock.now_ns()
            if until_ns is not None and now_ns >= until_ns:
                return
            while pending and pending[0].info.arrival_ns <= now_ns:
                self.submit(pending.popleft())
            if self.scheduler.has_work:
                finished = self.step()
                if after_step is not None:
                    after_step(finished)
            else:
                self.clock.wait_until(pending[0].info.arrival_ns)
                self.note_idle(self.clock.now_ns() - now_ns)


def _request_record(request: Request, delivered_ns: int) -> RequestRecord:
    return RequestRecord(
        request.info,
        request.queued_ns,
        request.scheduled_ns,
        request.token_times_ns[0] if request.token_times_ns else 0,
        request.end_ns,
        delivered_ns,
        request.cached_tokens,
        request.preemptions,
        request.finish_reason or FinishReason.ERROR,
        request.token_times_ns,
        request.events,
    )
