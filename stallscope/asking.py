"""What a face asks of a trace, and how it is answered alike by all: kept earlier, or found in one go or in portions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stallscope.diagnosis import Diagnosis
    from stallscope.diagnosis.slo import Slo
    from stallscope.diagnosis.whatif import Question, WhatIf
    from stallscope.fleet.work import Scheduler
    from stallscope.reports.saved import Saved
    from stallscope.trace import Trace

# Begins a stage of the work by its name, for as long as the context is open; gives what hears the share done, in 0..1.
Stages = Callable[[str], AbstractContextManager[Callable[[float], None]]]

_DIAGNOSING = "looking for who did it"


@dataclass(frozen=True)
class Asked:
    """All that a diagnosis depends on but the trace: options of ``stallscope analyze``, as they are written there."""

    since: str | None = None
    until: str | None = None
    replica: str | None = None
    model: str | None = None
    redact_for: str | None = None
    slos: tuple[Slo, ...] = ()
    replay: bool = True
    tenants: tuple[str, ...] = ()

    @property
    def is_part(self) -> bool:
        """Whether that is not the trace as it is stored."""
        return any((self.since, self.until, self.replica, self.model, self.redact_for, self.tenants))


def saved(path: Path, asked: Asked, report: Path | None = None) -> Saved:
    """Where the diagnosis of a trace is kept, whichever face has found it; ``report``: what is written with it."""
    from stallscope.reports.saved import Saved
    from stallscope.trace.tenants import log_paths

    return Saved(path, repr(asked), report, log_paths(asked.tenants))


def read(path: Path, tenants: Sequence[str], stages: Stages) -> Trace:
    """The trace at a path, with tenants from gateways' logs where there are any."""
    from stallscope.trace import read_trace

    with stages(f"reading {path.name}") as advance:
        trace = read_trace(path, lambda done, total: advance(done / max(total, 1)))
    return with_logs(trace, tenants, stages)


def with_logs(trace: Trace, tenants: Sequence[str], stages: Stages) -> Trace:
    """The trace with tenants from gateways' logs, where there are any."""
    if not tenants:
        return trace
    from stallscope.trace.tenants import read_tenant_logs, with_tenants

    with stages("reading who sent what"):
        return with_tenants(trace, read_tenant_logs(tenants))


def selected(trace: Trace, asked: Asked) -> Trace:
    """The part of a trace that was asked for, with nobody's name in it but who may read it. Raises UsageError."""
    from stallscope.trace.rename import redacted
    from stallscope.trace.select import select

    part = select(trace, since=asked.since, until=asked.until, replica=asked.replica, model=asked.model)
    return part if asked.redact_for is None else redacted(part, asked.redact_for)


def in_portions(trace: Trace, asked: Asked) -> bool:
    """Whether a trace is diagnosed portion by portion: a dataset with several, as it is stored."""
    if not trace.is_stored or asked.redact_for is not None:  # which renames a whole trace
        return False
    from stallscope.fleet.plan import plan

    return len(plan(_of_replicas(trace, asked))) > 1


def diagnosed(trace: Trace, asked: Asked, stages: Stages, scheduler: Scheduler | None = None) -> Diagnosis:
    """The diagnosis of what was asked for of a trace. Raises UsageError.

    ``scheduler``: what diagnoses the portions, though it be one; by default, processes where there are several.
    """
    if scheduler is not None or in_portions(trace, asked):
        return _of_portions(_of_replicas(trace, asked), asked, stages, scheduler)
    from stallscope.diagnosis import diagnose

    part = selected(trace, asked)
    with stages(_DIAGNOSING) as advance:
        return diagnose(part, slos=asked.slos, replay=asked.replay, remedies=asked.replay, progress=advance)


def what_if(trace: Trace, question: Question, stages: Stages) -> WhatIf:
    """What would have been in a part of a trace. Raises UsageError and InconclusiveError."""
    from stallscope.diagnosis.whatif import what_if

    with stages("replaying") as advance:
        return what_if(trace, question, advance)


def _of_replicas(trace: Trace, asked: Asked) -> Trace:
    from stallscope.trace.select import select

    return select(trace, replica=asked.replica, model=asked.model)


def _of_portions(trace: Trace, asked: Asked, stages: Stages, scheduler: Scheduler | None) -> Diagnosis:
    from stallscope.diagnosis.diagnose import Options
    from stallscope.fleet import diagnose_dataset
    from stallscope.fleet.plan import span
    from stallscope.fleet.processes import Processes
    from stallscope.trace.select import time_range

    start: int | None
    end: int | None
    start = end = None
    if asked.since is not None or asked.until is not None:
        start, end = time_range(trace.source, *span(trace), asked.since, asked.until)
    options = Options(asked.slos, asked.replay, asked.replay)
    with stages(_DIAGNOSING) as advance:
        return diagnose_dataset(trace, options, scheduler or Processes(), start_ns=start, end_ns=end, progress=advance)
