"""The diagnosis of a dataset: planned, handed to a scheduler, and finished."""

from __future__ import annotations

from stallscope.diagnosis.diagnose import Options, notes_of
from stallscope.diagnosis.model import Diagnosis
from stallscope.diagnosis.partial import Partial, finish
from stallscope.diagnosis.replica import OTHER
from stallscope.errors import UsageError
from stallscope.fleet.plan import plan
from stallscope.fleet.work import Progress, Scheduler
from stallscope.trace import Trace


def diagnose_dataset(
    trace: Trace,
    options: Options,
    scheduler: Scheduler,
    *,
    start_ns: int | None = None,
    end_ns: int | None = None,
    progress: Progress = lambda share: None,
) -> Diagnosis:
    """The diagnosis of a stored trace, or of what it has between two times, portion by portion.

    Raises UsageError where no portion can be read, or an SLO is for a tenant that none has; ValueError where the trace
    isn't stored.
    """
    tasks = plan(trace, start_ns, end_ns)
    total = scheduler(tasks, options, progress) if tasks else Partial()
    if total.failed and total.failed == len(tasks):
        where, why = total.failures[0]
        raise UsageError(f"{trace.source}: none of its {len(tasks):,} portions can be read; {where}: {why}")
    for slo in options.slos:
        if slo.tenant is not None and slo.tenant not in total.tenants and OTHER not in total.tenants:
            known = ", ".join(list(total.tenants)[:10])
            raise UsageError(f"SLO for {slo.tenant!r}: the trace has no such tenant, but {known}")
    return finish(total, trace.source, notes_of(trace))
