"""Rules on telemetry: what is missing can't be diagnosed, and nobody would notice."""

from __future__ import annotations

from stallscope.alerts import settings as s
from stallscope.alerts.commands import doctor
from stallscope.alerts.promql import number, span
from stallscope.alerts.quantities import Counted
from stallscope.alerts.rules import Owner, Rule, Severity
from stallscope.alerts.texts import ByLabel, Label, Value
from stallscope.alerts.thresholds import Teacher
from stallscope.diagnosis.model import Verdict
from stallscope.watch import families as f

_CAUSES = {
    "dropped_spans": "the engine's telemetry says that it dropped spans",
    "steps_lost": "iterations are missing between those that were seen",
    "coverage": "of many iterations the batch is not known",
}


def tickets(teacher: Teacher, owner: Owner) -> tuple[Rule, ...]:
    return _telemetry_lost(teacher, owner), _replica_silent(owner), _collector_down(owner)


def _telemetry_lost(teacher: Teacher, owner: Owner) -> Rule:
    lost = Counted(f.STEPS_LOST, ("replica",), s.LOST_WINDOW_S, over=f.STEPS)
    threshold = teacher.threshold(lost, s.STEPS_LOST)
    window = span(s.LOST_WINDOW_S)
    uncovered = f"max_over_time({f.COVERAGE.name}[{span(s.COVERAGE_FOR_S)}])"
    parts = {
        "dropped_spans": f"sum by (replica) (increase({f.DROPPED.name}[{window}])) > 0",
        "steps_lost": threshold.exceeded_by(lost),
        "coverage": f"max by (replica) ({uncovered}) < {number(s.LEAST_COVERAGE)}",
    }
    return Rule(
        "StallscopeTelemetryLost",
        "\nor\n".join(f'label_replace({expr}, "cause", "{cause}", "", "")' for cause, expr in parts.items()),
        Severity.TICKET,
        summary=(
            "Telemetry of ",
            Label("replica"),
            " has gaps: ",
            ByLabel("cause", _CAUSES, ""),
            " (",
            Value(),
            "); stalls may go unseen, and blame to the wrong tenant.",
        ),
        description=("What is missing can't be diagnosed. The number: spans dropped, or a share of the iterations.",),
        evidence=(f"{f.DROPPED.name}, {f.STEPS_LOST.name} over {f.STEPS.name}, {f.COVERAGE.name}; over {window}.",),
        threshold_reason=(
            ByLabel(
                "cause",
                {
                    "dropped_spans": "no span should be dropped",
                    "coverage": f"with less than {number(s.LEAST_COVERAGE)} of the batches known for "
                    f"{span(s.COVERAGE_FOR_S)}, charges go astray",
                },
                threshold.otherwise.reason,
            ),
            ".",
        ),
        command=doctor(owner),
        catches=(Verdict.INSUFFICIENT_DATA,),
        keep_firing_s=s.KEEP_FIRING_S,
    )


def _replica_silent(owner: Owner) -> Rule:
    silence = span(s.SILENT_S)
    return Rule(
        "StallscopeTelemetryStopped",
        f"sum by (replica) (increase({f.STEPS.name}[{silence}])) == 0\n"
        f"and on (replica) (max by (replica) ({f.RUNNING.name}) + max by (replica) ({f.WAITING.name}) > 0)",
        Severity.TICKET,
        summary=(
            "No iteration of ",
            Label("replica"),
            f" was seen for {silence} though requests are there: it hangs, or its telemetry no longer comes.",
        ),
        description=("Until it comes again, no stall of this replica is seen, and none of its alerts can fire.",),
        evidence=(
            f"Increase of {f.STEPS.name} against {f.RUNNING.name} and {f.WAITING.name}; see {f.LAST_SEEN.name}.",
        ),
        threshold_reason=(
            f"with requests there, a step comes every few seconds at the slowest: {silence} is silence.",
        ),
        command=doctor(owner),
        catches=(Verdict.INSUFFICIENT_DATA, Verdict.ENGINE_STALL),
        about={"cause": ("silent_replica",)},
        keep_firing_s=s.KEEP_FIRING_S,
    )


def _collector_down(owner: Owner) -> Rule:
    back = span(s.DOWN_LOOKBACK_S)
    return Rule(
        "StallscopeTelemetryStopped",
        f"up == 0 and on (job, instance) last_over_time({f.SERIES.name}[{back}])",
        Severity.TICKET,
        summary=("The collector at ", Label("instance"), " can't be scraped: no stall is seen there."),
        description=("Until it is back, no stall is seen, and no other of these alerts can fire.",),
        evidence=(f"up is 0 for a target that had {f.SERIES.name} within {back}.",),
        threshold_reason=(f"a restart takes less than {span(s.DOWN_FOR_S)}.",),
        command=doctor(owner),
        catches=(Verdict.INSUFFICIENT_DATA,),
        about={"cause": ("collector_down",)},
        for_s=s.DOWN_FOR_S,
    )
