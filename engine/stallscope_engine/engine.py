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
from stallscope_telemetry.prefixes import PrefixGroups
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
    """Runs batches to their outputs: by computing them, or by letting virtual time pass.

    ``dispatch`` starts a batch and may return before it is done; batches run in the order of their dispatch.
    ``collect`` returns when the outputs of ``batch``, the oldest in flight, are ready on the engine's clock, and has
    appended the sampled token ids to each request where it computes any. Where one of the two raises, all batches in
    flight are lost, and others may follow.
    """

    def dispatch(self, batch: Batch) -> None: ...
    def collect(self, batch: Batch) -> StepResult: ...


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


@dataclass(eq=False, slots=True)
class StepInFlight:
    """A dispatched batch, and what its record says of the time before."""

    batch: Batch
    step: int
    idle_ns: int
    dispatched_ns: int
    keyframe: list[RequestSnapshot] | None


class Engine:
    """One replica: a scheduler, an executor and a clock. Everything happens on the thread that calls ``step``.

    With ``async_scheduling`` one batch is in flight while the next is scheduled, so the device need not wait for the
    host. ``before_dispatch`` is host work that belongs to a batch: in virtual time, what scheduling it costs.
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
        self._prefixes = PrefixGroups()
        self.before_dispatch = before_dispatch
        self.steps = 0
        self._in_flight: deque[StepInFlight] = deque()
        self._most_in_flight = 1 if config.async_scheduling else 0
        self._finished: list[Request] = []  # by an abort's wait, to be returned by the next step
        self._idle_ns = 0

    @property
    def has_work(self) -> bool:
        """Whether a request waits, runs, or has outputs in flight."""
        return self.scheduler.has_work or bool(self._in_flight or self._finished)

    def submit(self, request: Request) -> None:
        """Queues a request for the next step. Raises RequestRejected where it could never run."""
        self.scheduler.add(request)

    def abort(self, request: Request, reason: FinishReason) -> None:
        """Ends a request before the next step; no-op if it has ended.

        Waits for the steps in flight, so that what they compute for it is told truly.
        """
        self.drain()
        if request.finish_reason is not None:
            return
        now_ns = self.clock.now_ns()
        self.scheduler.abort(request, reason, now_ns)
        if self.recorder is not None:
            self.recorder.request(self._request_record(request, now_ns))

    def drain(self) -> None:
        """Completes the steps in flight, without scheduling another; the next step returns who finished."""
        while self._in_flight:
            self._finished += self._complete_oldest()

    def _take_finished(self) -> list[Request]:
        finished, self._finished = self._finished, []
        return finished

    def note_idle(self, idle_ns: int) -> None:
        """Says that for this part of the time before the next step there was no request at all."""
        self._idle_ns += idle_ns

    def step(self) -> list[Request]:
        """Schedules and dispatches one batch and completes the oldest that is due; returns who finished with it."""
        scheduled = self.scheduler.has_work and self._dispatch_next()
        finished = self._take_finished()
        if self._in_flight and (len(self._in_flight) > self._most_in_flight or not scheduled):
            finished += self._complete_oldest()
        return finished

    def _dispatch_next(self) -> bool:
        batch = self.scheduler.schedule(self.clock.now_ns())
        if batch is None:
            return False
        keyframe = self._keyframe(batch)
        if self.before_dispatch is not None:
            self.before_dispatch(batch)
        self._in_flight.append(StepInFlight(batch, self.steps, self._idle_ns, self.clock.now_ns(), keyframe))
        self._idle_ns = 0
        try:
            self.executor.dispatch(batch)
        except BaseException:
            self._lose_in_flight()
            raise
        finally:
            self.steps += 1
        return True

    def _complete_oldest(self) -> list[Request]:
        oldest = self._in_flight[0]
        try:
            result = self.executor.collect(oldest.batch)
        except BaseException:
            self._lose_in_flight()
            raise
        self._in_flight.popleft()
        ready_ns = self.clock.now_ns()
        finished = self.scheduler.complete(oldest.batch, ready_ns, result.stopped)
        self._record(oldest, finished, ready_ns, result.device_ns)
        return finished

    def _lose_in_flight(self) -> None:
        """Forgets steps whose outputs will never come: they leave no record, and their tokens were not computed."""
        self._in_flight.clear()
        self.scheduler.lose_in_flight()

    # What telemetry costs this thread is in the two methods below (benchmarks/telemetry_overhead.py times them).

    def _keyframe(self, batch: Batch) -> list[RequestSnapshot] | None:
        recorder = self.recorder
        return self.scheduler.snapshot(batch) if recorder is not None and recorder.wants_keyframe(self.steps) else None

    def _record(self, step: StepInFlight, finished: list[Request], ready_ns: int, device_ns: int) -> None:
        recorder, batch = self.recorder, step.batch
        if recorder is None:
            return
        recorder.step(
            StepRecord(
                step.step,
                batch.scheduled_ns,
                step.dispatched_ns,
                ready_ns,
                step.idle_ns,
                step.dispatched_ns - batch.scheduled_ns,
                device_ns,
                batch.prefill_tokens,
                batch.decode_tokens,
                batch.size,
                batch.running,
                batch.waiting,
                batch.kv_used,
                batch.kv_cached,
                [request.info for request in batch.joined] if batch.joined else (),
                batch.cached,
                batch.chunks,
                batch.paused,
                batch.waits,
                batch.preempted,
                batch.evicted,
                batch.left,
                step.keyframe,
            )
        )
        for request in finished:
            recorder.request(self._request_record(request, ready_ns))

    def run(
        self,
        arrivals: Iterable[Request],
        until_ns: int | None = None,
        before_step: Callable[[], None] | None = None,
        after_step: Callable[[list[Request]], None] | None = None,
    ) -> None:
        """Serves ``arrivals`` (ordered by ``info.arrival_ns``) until all are done; a deque may grow meanwhile.

        A request enters the queue before the first step after its arrival, whatever the engine was doing then.
        ``until_ns`` ends the run early and leaves the rest open. ``before_step`` comes before a step's arrivals are
        queued: whatever holds the host up there is a gap between steps. ``after_step`` sees who finished.
        """
        pending = arrivals if isinstance(arrivals, deque) else deque(arrivals)
        while pending or self.has_work:
            if before_step is not None:
                before_step()
            now_ns = self.clock.now_ns()
            if until_ns is not None and now_ns >= until_ns:
                self.drain()
                if after_step is not None:
                    after_step(self._take_finished())
                return
            while pending and pending[0].info.arrival_ns <= now_ns:
                self.submit(pending.popleft())
            if self.has_work:
                finished = self.step()
                if after_step is not None:
                    after_step(finished)
            elif pending:
                self.clock.wait_until(pending[0].info.arrival_ns)
                self.note_idle(self.clock.now_ns() - now_ns)

    def _request_record(self, request: Request, delivered_ns: int) -> RequestRecord:
        return RequestRecord(
            request.info,
            request.queued_ns,
            request.scheduled_ns,
            request.token_times_ns[0] if request.token_times_ns else 0,
            request.end_ns,
            delivered_ns,
            request.cached_tokens,
            request.preemptions,
            FinishReason.ERROR if request.finish_reason is None else request.finish_reason,
            request.token_times_ns,
            request.events,
            self._prefixes.number(request.block_hashes),
        )
