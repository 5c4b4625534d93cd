"""What a scenario does on purpose to the engine and to its telemetry: planned by seed, then done around a run.

Flow: scenario → ``plan_faults`` → ``recording`` puts ``EngineFaults`` on the engine's hooks and a ``Collector`` before
the exporters. Requests feel the faults of the engine, and none of those of telemetry.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from stallscope.workloads.draws import Draw, chance, draw_one
from stallscope.workloads.scenario import (
    EnginePause,
    Fault,
    Scenario,
    SlowClient,
    SlowStep,
    TelemetryAggregate,
    TelemetryDrop,
    TelemetryHang,
    TelemetrySample,
    Throttle,
)
from stallscope_engine.engine import Clock, Engine, Recorder
from stallscope_engine.scheduler import Batch
from stallscope_telemetry import names
from stallscope_telemetry.emitter import CAPACITY, Emitter
from stallscope_telemetry.records import RequestRecord, StepRecord

_COMPOSITION = {names.KEYFRAME} | {
    attribute.name for attribute in names.ATTRIBUTES if attribute.on == "step" and attribute.type.endswith("[]")
}


# --- by seed ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stretch:
    """From ``start_ns`` to ``end_ns`` after the start of the run."""

    start_ns: int
    end_ns: int

    def holds(self, offset_ns: int) -> bool:
        return self.start_ns <= offset_ns < self.end_ns


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """The faults of one run. ``seed`` says which of the steps and requests are lost."""

    seed: int
    pauses: tuple[Stretch, ...] = ()
    slow_steps: tuple[tuple[Stretch, int, int], ...] = ()  # every n-th step, by so many ns
    throttles: tuple[tuple[Stretch, float], ...] = ()  # factor on the time of the device
    slow_clients: tuple[tuple[str, Stretch, Draw], ...] = ()  # tenant, and the seconds that each of its answers takes
    hangs: tuple[Stretch, ...] = ()
    lost_steps: tuple[float, ...] = ()  # shares
    kept_requests: tuple[float, ...] = ()  # shares
    aggregate: bool = False

    @property
    def spares_telemetry(self) -> bool:
        """Whether all telemetry arrives, in time and as it was."""
        return not (self.hangs or self.lost_steps or self.kept_requests or self.aggregate)


def plan_faults(scenario: Scenario, seed: int, inject: bool = True) -> FaultPlan:
    """The faults of a run; without ``inject``, none."""
    if not inject:
        return FaultPlan(seed)
    faults = [_Drawn(fault, seed, key) for fault, key in _keyed(scenario)]
    return FaultPlan(
        seed,
        pauses=tuple(sorted((one.pause() for one in faults if isinstance(one.fault, EnginePause)), key=_start)),
        slow_steps=tuple(
            (one.stretch(), round(one("every")), _ns(one("by_s"))) for one in faults if isinstance(one.fault, SlowStep)
        ),
        throttles=tuple((one.stretch(), one("factor")) for one in faults if isinstance(one.fault, Throttle)),
        slow_clients=tuple(
            (one.fault.tenant, one.stretch(), one.fault.delay_s) for one in faults if isinstance(one.fault, SlowClient)
        ),
        hangs=tuple(sorted((one.stretch() for one in faults if isinstance(one.fault, TelemetryHang)), key=_start)),
        lost_steps=tuple(one("share") for one in faults if isinstance(one.fault, TelemetryDrop)),
        kept_requests=tuple(one("share") for one in faults if isinstance(one.fault, TelemetrySample)),
        aggregate=any(isinstance(one.fault, TelemetryAggregate) for one in faults),
    )


Key = tuple[str, str, int]


def _keyed(scenario: Scenario) -> list[tuple[Fault, Key]]:
    """Faults, each with the key of its streams: the n-th of its kind, so that those of other kinds may go."""
    seen: dict[str, int] = {}
    keyed: list[tuple[Fault, Key]] = []
    for fault in scenario.inject:
        if isinstance(fault, Fault):
            kind = f"{type(fault).__name__}:"  # ":" is in no tenant's name
            seen[kind] = seen.get(kind, -1) + 1
            keyed.append((fault, ("inject", kind, seen[kind])))
    return keyed


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A fault whose fields, called by name, are the numbers of this run."""

    fault: Fault
    seed: int
    key: Key

    def __call__(self, name: str) -> float:
        draw: Draw = getattr(self.fault, name)
        return draw_one(draw, self.seed, *self.key, name)

    def stretch(self) -> Stretch:
        return Stretch(_ns(self("from_s")), _ns(self("to_s")))

    def pause(self) -> Stretch:
        at_s = self("at_s")
        return Stretch(_ns(at_s), _ns(at_s + self("for_s")))


def _start(stretch: Stretch) -> int:
    return stretch.start_ns


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


# --- the engine ---------------------------------------------------------------------------------------------


class EngineFaults:
    """Holds the host up as planned, by the hooks of ``engine``, for a run that starts at ``start_ns``."""

    def __init__(self, plan: FaultPlan, engine: Engine, start_ns: int) -> None:
        self._plan = plan
        self._clock = engine.clock
        self._start_ns = start_ns
        self._steps = [0] * len(plan.slow_steps)  # of each: steps within its stretch so far
        self._host_work = engine.before_dispatch
        if plan.slow_steps:
            engine.before_dispatch = self._before_dispatch

    def before_step(self) -> None:
        """Holds the host up when a step would begin within a pause (``Engine.run``'s ``before_step``).

        A pause that passes while a batch is in flight ends with it unnoticed, as on real hardware.
        """
        for pause in self._plan.pauses:
            if pause.holds(self._clock.now_ns() - self._start_ns):
                self._clock.wait_until(self._start_ns + pause.end_ns)

    def _before_dispatch(self, batch: Batch) -> None:
        if self._host_work is not None:
            self._host_work(batch)
        for index, (stretch, every, by_ns) in enumerate(self._plan.slow_steps):
            if stretch.holds(batch.scheduled_ns - self._start_ns):
                self._steps[index] += 1
                if self._steps[index] % every == 0:
                    self._clock.wait_until(self._clock.now_ns() + by_ns)


def slowdown(plan: FaultPlan, start_ns: int) -> Callable[[int], float]:
    """The factor on a step's time on the device by when it is dispatched, in a run that starts at ``start_ns``."""

    def factor_at(time_ns: int) -> float:
        return math.prod(factor for stretch, factor in plan.throttles if stretch.holds(time_ns - start_ns))

    return factor_at


class SlowDelivery:
    """A recorder before which clients read their answers slowly, in a run that starts at ``start_ns``.

    The engine is done with a request when its last token is made; what the client takes beyond that is delivery.
    """

    def __init__(self, recorder: Recorder, plan: FaultPlan, start_ns: int) -> None:
        self._recorder = recorder
        self._plan = plan
        self._start_ns = start_ns
        self.wants_keyframe = recorder.wants_keyframe
        self.step = recorder.step

    def request(self, record: RequestRecord) -> None:
        delay_ns = sum(
            _ns(draw_one(delay_s, self._plan.seed, "slow_client", number, record.info.request_id))
            for number, (tenant, stretch, delay_s) in enumerate(self._plan.slow_clients)
            if tenant == record.info.tenant and stretch.holds(record.end_ns - self._start_ns)
        )
        self._recorder.request(replace(record, delivered_ns=record.delivered_ns + delay_ns))


# --- telemetry ----------------------------------------------------------------------------------------------


class Collector:
    """What stands between an engine's telemetry and its exporters: it loses, thins out and hangs as planned.

    It takes everything until ``begin``. As a context manager it ends what hangs, so that what waits isn't given up on.
    """

    def __init__(self, plan: FaultPlan, clock: Clock) -> None:
        self._plan = plan
        self._clock = clock
        self._start_ns: int | None = None
        self._ended = threading.Event()

    def begin(self, start_ns: int) -> None:
        """The run starts then."""
        self._start_ns = start_ns

    def __enter__(self) -> Collector:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended.set()

    def exporters(self, exporters: Sequence[SpanExporter], *, blocking: bool) -> list[SpanExporter]:
        """The exporters behind it; ``blocking``, where a thread of its own exports and may hang."""
        if self._plan.spares_telemetry:
            return list(exporters)
        return [_FaultyExporter(exporter, self, blocking) for exporter in exporters]

    def recorder(self, emitter: Emitter) -> Emitter | HungRecorder:
        """What takes records in virtual time: there the engine's thread exports, and must not wait."""
        return HungRecorder(emitter, self) if self._plan.hangs else emitter

    def hangs_until(self) -> int | None:
        """Until when it hangs now, on the engine's clock; None where it doesn't."""
        if self._start_ns is None or self._ended.is_set():
            return None
        offset_ns = self._clock.now_ns() - self._start_ns
        ends = [hang.end_ns for hang in self._plan.hangs if hang.holds(offset_ns)]
        return self._start_ns + max(ends) if ends else None

    def wait(self) -> None:
        """Returns when it no longer hangs."""
        while (end_ns := self.hangs_until()) is not None:
            self._ended.wait((end_ns - self._clock.now_ns()) / 1e9)

    def passes(self, span: ReadableSpan) -> ReadableSpan | None:
        """The span as it arrives, None where it is lost; which ones depends on the seed and the span alone."""
        plan, attributes = self._plan, span.attributes or {}
        if span.name == names.STEP_SPAN:
            step = str(attributes[names.STEP])
            if any(chance(plan.seed, "lost", n, step) < share for n, share in enumerate(plan.lost_steps)):
                return None
            return _without_composition(span) if plan.aggregate else span
        if span.name == names.REQUEST_SPAN:
            request = str(attributes[names.REQUEST_ID])
            if any(chance(plan.seed, "kept", n, request) >= share for n, share in enumerate(plan.kept_requests)):
                return None
        return span


class _FaultyExporter(SpanExporter):
    """An exporter behind a faulty collector."""

    def __init__(self, exporter: SpanExporter, collector: Collector, blocking: bool) -> None:
        self._exporter = exporter
        self._collector = collector
        self._blocking = blocking

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        if self._blocking:
            self._collector.wait()
        return self._exporter.export([passed for span in spans if (passed := self._collector.passes(span)) is not None])

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return self._exporter.force_flush(timeout_millis)

    def shutdown(self) -> None:
        self._exporter.shutdown()


class HungRecorder:
    """A recorder in virtual time that loses what a hanging exporter would have cost: what no queue has room for.

    What fits is handed on at once; in the file it can't be told from what waited.
    """

    def __init__(self, emitter: Emitter, collector: Collector) -> None:
        self._emitter = emitter
        self._collector = collector
        self._waiting = 0
        self._wants_keyframe = False

    def wants_keyframe(self, step: int) -> bool:
        return self._has_room() and (self._wants_keyframe or self._emitter.wants_keyframe(step))

    def step(self, record: StepRecord) -> None:
        if self._takes_one():
            self._emitter.step(record)
            if record.keyframe is not None:
                self._wants_keyframe = False

    def request(self, record: RequestRecord) -> None:
        if self._takes_one():
            self._emitter.request(record)

    def _has_room(self) -> bool:
        if self._collector.hangs_until() is None:
            self._waiting = 0
        return self._waiting < CAPACITY

    def _takes_one(self) -> bool:
        if not self._has_room():
            self._emitter.dropped += 1
            self._wants_keyframe = True
            return False
        self._waiting += 1
        return True


def _without_composition(span: ReadableSpan) -> ReadableSpan:
    """The step span with its sums alone."""
    return ReadableSpan(
        span.name,
        context=span.get_span_context(),
        resource=span.resource,
        attributes={name: value for name, value in (span.attributes or {}).items() if name not in _COMPOSITION},
        kind=span.kind,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
