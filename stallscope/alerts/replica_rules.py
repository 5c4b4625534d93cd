"""Rules on replicas that hold up everybody: engine, load, and GPUs."""

from __future__ import annotations

from dataclasses import replace

from stallscope.alerts import settings as s
from stallscope.alerts.commands import command
from stallscope.alerts.parts import found, lasting, reason
from stallscope.alerts.promql import one_of, selector, span
from stallscope.alerts.quantities import Counted
from stallscope.alerts.rules import Owner, Rule, Severity
from stallscope.alerts.texts import ByLabel, Label, Percent, Text, Value
from stallscope.alerts.thresholds import Teacher
from stallscope.diagnosis.model import Verdict
from stallscope.watch import families as f

_PAGE, _TICKET = span(s.PAGE_WINDOW_S), span(s.TICKET_WINDOW_S)
_JUDGED = f.JUDGED.name


def page(teacher: Teacher, owner: Owner) -> Rule:
    """The one that somebody is woken for."""
    return _engine_stalls(teacher, owner)


def tickets(teacher: Teacher, owner: Owner) -> tuple[Rule, ...]:
    return tuple(rule(teacher, owner) for rule in (_engine_stalled, _overload, _throttled))


def _engine_stalls(teacher: Teacher, owner: Owner) -> Rule:
    where = ("verdict", (Verdict.ENGINE_STALL.value,))
    quantity = Counted(f.JUDGED, ("replica",), s.PAGE_WINDOW_S, where)
    threshold = teacher.threshold(quantity, s.PAGE_ENGINE)
    rising = f"{selector(_JUDGED, one_of(*where))}[{span(s.RISES_WITHIN_S)}]"
    return Rule(
        "StallscopeEngineStall",
        threshold.exceeded_by(quantity, lasting("replica", f"sum by (replica) (changes({rising}))")),
        Severity.PAGE,
        summary=(
            "The engine itself is stalling everybody on ",
            Label("replica"),
            " right now (",
            Value(),
            " requests held up at any time); no tenant causes it.",
        ),
        description=("Steps are not dispatched, or take longer than their batches explain: pauses, clocks, the host.",),
        evidence=_engine_evidence(),
        threshold_reason=reason(threshold, quantity),
        command=command(
            owner,
            "replica",
            f"sum by (replica) (rate({_JUDGED}{{replica=%[1]q,{one_of(*where)}}}[{_PAGE}]) > 0)",
        ),
        catches=(Verdict.ENGINE_STALL,),
        keep_firing_s=s.KEEP_FIRING_S,
    )


def _engine_stalled(teacher: Teacher, owner: Owner) -> Rule:
    quantity = Counted(
        f.JUDGED, ("replica",), s.TICKET_WINDOW_S, ("verdict", (Verdict.ENGINE_STALL.value,)), whole=True
    )
    threshold = teacher.threshold(quantity, s.TICKET_ENGINE)
    return Rule(
        "StallscopeEngineStall",
        threshold.exceeded_by(quantity),
        Severity.TICKET,
        summary=(
            "The engine itself stalled everybody on ",
            Label("replica"),
            " for ",
            Value(),
            f" s of waiting within {_TICKET}; no tenant caused it.",
        ),
        description=("A stall that is over: steps were not dispatched, or took longer than their batches explain.",),
        evidence=_engine_evidence(),
        threshold_reason=reason(threshold, quantity),
        command=command(owner, "replica"),
        catches=(Verdict.ENGINE_STALL,),
        keep_firing_s=s.KEEP_FIRING_S,
    )


def _engine_evidence() -> Text:
    throttled = f"sum by (reason) (rate({f.THROTTLED.name}{{replica=%[1]q}}[5m])) > 0"
    return (
        f"Compare rate({f.HOST_GAP.name}[5m]) (nothing was dispatched) with rate({f.UNEXPLAINED.name}[5m]) (steps took "
        "too long). GPU clocks held down by: ",
        found(throttled, "replica", "reason", "nothing that is known"),
        ".",
    )


def _overload(teacher: Teacher, owner: Owner) -> Rule:
    quantity = Counted(f.JUDGED, ("replica",), s.OVERLOAD_WINDOW_S, ("verdict", (Verdict.OVERLOAD.value,)))
    threshold = teacher.threshold(quantity, s.OVERLOAD)
    waiting = f"sum by (tenant) (rate({f.STEP_TIME.name}[5m]))"
    return Rule(
        "StallscopeOverload",
        threshold.exceeded_by(quantity),
        Severity.TICKET,
        summary=(
            Label("replica"),
            " has more to do than it can: ",
            Value(),
            " requests held up at any time, and no tenant in particular causes it.",
        ),
        description=("All tenants together want more than the replica has; no one's return to its usual would help.",),
        evidence=(
            f"Rate of {_JUDGED} judged overload over {span(s.OVERLOAD_WINDOW_S)}. Largest by step time, on all "
            "replicas: ",
            found(waiting, "", "tenant", "see the metric"),
            ".",
        ),
        threshold_reason=reason(threshold, quantity),
        command=command(owner, "replica"),
        catches=(Verdict.OVERLOAD,),
        keep_firing_s=s.KEEP_FIRING_S,
    )


def _throttled(teacher: Teacher, owner: Owner) -> Rule:
    by = ("replica", "device", "reason")
    heat = Counted(f.THROTTLED, by, s.THROTTLE_WINDOW_S, ("reason", ("thermal", "other")))
    power = replace(heat, where=("reason", ("power",)))
    thresholds = teacher.threshold(heat, s.THROTTLED), teacher.threshold(power, s.THROTTLED_BY_POWER)
    exprs = [threshold.exceeded_by(quantity) for threshold, quantity in zip(thresholds, (heat, power), strict=True)]
    return Rule(
        "StallscopeGpuThrottled",
        "\nor\n".join(exprs),
        Severity.TICKET,
        summary=(
            "GPU ",
            Label("device"),
            " of ",
            Label("replica"),
            " runs below its clocks ",
            Percent(),
            " of the time: ",
            ByLabel("reason", {"thermal": "it is too hot", "power": "its power is capped"}, "the driver says why"),
            ".",
        ),
        description=("The GPU says itself that its clocks are held down: steps take longer for everybody.",),
        evidence=(
            f"Rate of {f.THROTTLED.name} over {span(s.THROTTLE_WINDOW_S)}. Effect: rate({f.UNEXPLAINED.name}[10m]) on "
            "that replica.",
        ),
        threshold_reason=(
            ByLabel("reason", {"power": thresholds[1].otherwise.reason}, thresholds[0].otherwise.reason),
            ".",
        ),
        command=command(owner, "replica"),
        catches=(Verdict.ENGINE_STALL,),
        keep_firing_s=s.KEEP_FIRING_S,
    )
