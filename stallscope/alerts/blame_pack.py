"""Rules on what a watch exposes: who stalls whom, what that is by, and whether telemetry is there to tell."""

from __future__ import annotations

from dataclasses import replace

from stallscope.alerts import settings as s
from stallscope.alerts.commands import command
from stallscope.alerts.promql import number, one_of, span
from stallscope.alerts.quantities import Counted
from stallscope.alerts.rules import Group, Owner, RecordingRule, Rule, Severity
from stallscope.alerts.texts import ByLabel, Found, Label, Percent, Text, Value
from stallscope.alerts.thresholds import Teacher, Threshold
from stallscope.diagnosis.model import Verdict
from stallscope.views.words import MECHANISM_WORDS
from stallscope.watch import families as f

PAIRS = "stallscope:blame:rate1m"
_PAGE, _TICKET = span(s.PAGE_WINDOW_S), span(s.TICKET_WINDOW_S)
_BLAME, _JUDGED = f.BLAME.name, f.JUDGED.name
_KV = ("kv_pinning", "head_of_line")
_CAUSES = {
    "dropped_spans": "the engine's telemetry says that it dropped spans",
    "steps_lost": "iterations are missing between those that were seen",
    "coverage": "of many iterations the batch is not known",
}


def blame_groups(teacher: Teacher, owner: Owner, *, recorded: bool = True) -> tuple[Group, ...]:
    """The pack but for SLOs; without recording rules where whoever evaluates has none."""
    pairs = RecordingRule(PAIRS, f"sum by (victim, culprit, mechanism) (rate({_BLAME}[{_PAGE}])) > 0")
    rules = [
        _stalls_others(teacher, owner, recorded=recorded),
        _engine_stalls(teacher, owner),
        _stalled_others(teacher, owner),
        _kv_pinned(teacher, owner),
        _engine_stalled(teacher, owner),
        _overload(teacher, owner),
        _preemptions(teacher, owner),
        _recompute(teacher, owner),
        _throttled(teacher, owner),
        _telemetry_lost(teacher, owner),
        _replica_silent(owner),
        _collector_down(owner),
    ]
    return (Group("stallscope", s.INTERVAL_S, (pairs,) if recorded else (), tuple(rules)),)


# --- who stalls whom ----------------------------------------------------------------------------------------------


def _stalls_others(teacher: Teacher, owner: Owner, *, recorded: bool) -> Rule:
    quantity = Counted(f.BLAME, ("culprit",), s.PAGE_WINDOW_S)
    threshold = teacher.threshold(quantity, s.PAGE_STALLS)
    shown = replace(quantity, recorded=PAIRS) if recorded else quantity
    return Rule(
        "StallscopeTenantStallsOthers",
        threshold.exceeded_by(shown, _rising("culprit", _BLAME)),
        Severity.PAGE,
        summary=(
            Label("culprit"),
            " is stalling ",
            _found(f"sum by (victim) ({PAIRS}{{culprit=%[1]q}})", "culprit", "victim", "other tenants"),
            " right now: ",
            _mechanism(f"sum by (mechanism) ({PAIRS}{{culprit=%[1]q}})", "culprit"),
            " (",
            Value(),
            " requests held up at any time).",
        ),
        description=(
            "Requests of other tenants wait because of this one. Seconds of waiting a second are as many requests as"
            f" are held up at any time. It rose in the last {s.RISING_S} s and in those before, so it goes on.",
        ),
        evidence=(
            "By mechanism: ",
            _found(f"sum by (mechanism) ({PAIRS}{{culprit=%[1]q}})", "culprit", "mechanism", "see the metric", "%.3g"),
            f". {_BLAME}, summed by culprit, over {_PAGE}.",
        ),
        threshold_reason=_reason(threshold, quantity),
        command=command(owner, "culprit", f"sum by (culprit) ({PAIRS}{{culprit=%[1]q}})"),
        catches=(Verdict.NOISY_NEIGHBOR,),
        about={"tenant": (Label("culprit"),)},
        keep_firing_s=s.KEEP_FIRING_S,
    )


def _stalled_others(teacher: Teacher, owner: Owner) -> Rule:
    quantity = Counted(f.BLAME, ("culprit",), s.TICKET_WINDOW_S, whole=True)
    threshold = teacher.threshold(quantity, s.TICKET_STALLS)
    of = f"(increase({_BLAME}{{culprit=%[1]q}}[{_TICKET}])) > 0"
    return Rule(
        "StallscopeTenantStalledOthers",
        threshold.exceeded_by(quantity),
        Severity.TICKET,
        summary=(
            Label("culprit"),
            " stalled ",
            _found(f"sum by (victim) {of}", "culprit", "victim", "other tenants"),
            " for ",
            Value(),
            f" s of waiting within {_TICKET}: ",
            _mechanism(f"sum by (mechanism) {of}", "culprit"),
            ".",
        ),
        description=(
            "A stall that is over, or too short to wake anybody for: requests of other tenants waited because of this "
            "one, all their seconds together.",
        ),
        evidence=(
            "By mechanism: ",
            _found(f"sum by (mechanism) {of}", "culprit", "mechanism", "see the metric", "%.3g"),
            f". Increase of {_BLAME}, summed by culprit, over {_TICKET}.",
        ),
        threshold_reason=_reason(threshold, quantity),
        command=command(owner, "culprit"),
        catches=(Verdict.NOISY_NEIGHBOR,),
        about={"tenant": (Label("culprit"),)},
        keep_firing_s=s.KEEP_FIRING_S,
    )


def _kv_pinned(teacher: Teacher, owner: Owner) -> Rule:
    quantity = Counted(f.BLAME, ("culprit", "mechanism"), s.TICKET_WINDOW_S, where=("mechanism", _KV), whole=True)
    threshold = teacher.threshold(quantity, s.TICKET_KV)
    of = f"(increase({_BLAME}{{culprit=%[1]q,{one_of('mechanism', _KV)}}}[{_TICKET}])) > 0"
    return Rule(
        "StallscopeKvPinned",
        threshold.exceeded_by(quantity),
        Severity.TICKET,
        summary=(
            Label("culprit"),
            " kept KV blocks from ",
            _found(f"sum by (victim) {of}", "culprit", "victim", "other tenants"),
            ": ",
            ByLabel("mechanism", {name: MECHANISM_WORDS[name] for name in _KV}, ""),
            " (",
            Value(),
            f" s of waiting within {_TICKET}).",
        ),
        description=("The KV cache is what others waited for, not compute: fewer or shorter requests at once help.",),
        evidence=(
            f"Increase of {_BLAME} by ",
            Label("mechanism"),
            f" over {_TICKET}. Who holds the cache: rate({f.KV.name}[5m]), in blocks.",
        ),
        threshold_reason=_reason(threshold, quantity),
        command=command(owner, "culprit"),
        catches=(Verdict.NOISY_NEIGHBOR,),
        about={"tenant": (Label("culprit"),)},
        keep_firing_s=s.KEEP_FIRING_S,
    )


# --- nobody's fault, or everybody's ---------------------------------------------------------------------------------


def _engine_stalls(teacher: Teacher, owner: Owner) -> Rule:
    where = ("verdict", (Verdict.ENGINE_STALL.value,))
    quantity = Counted(f.JUDGED, ("replica",), s.PAGE_WINDOW_S, where)
    threshold = teacher.threshold(quantity, s.PAGE_ENGINE)
    return Rule(
        "StallscopeEngineStall",
        threshold.exceeded_by(quantity, _rising("replica", _JUDGED, one_of(*where))),
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
        threshold_reason=_reason(threshold, quantity),
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
        threshold_reason=_reason(threshold, quantity),
        command=command(owner, "replica"),
        catches=(Verdict.ENGINE_STALL,),
        keep_firing_s=s.KEEP_FIRING_S,
    )


def _engine_evidence() -> Text:
    throttled = f"sum by (reason) (rate({f.THROTTLED.name}{{replica=%[1]q}}[5m])) > 0"
    return (
        f"Compare rate({f.HOST_GAP.name}[5m]) (nothing was dispatched) with rate({f.UNEXPLAINED.name}[5m]) (steps took "
        "too long). GPU clocks held down by: ",
        _found(throttled, "replica", "reason", "nothing that is known"),
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
            _found(waiting, "", "tenant", "see the metric"),
            ".",
        ),
        threshold_reason=_reason(threshold, quantity),
        command=command(owner, "replica"),
        catches=(Verdict.OVERLOAD,),
        keep_firing_s=s.KEEP_FIRING_S,
    )


# --- preemption -----------------------------------------------------------------------------------------------------


def _preemptions(teacher: Teacher, owner: Owner) -> Rule:
    quantity = Counted(f.PREEMPTIONS, (), s.PREEMPTION_WINDOW_S)
    threshold = teacher.threshold(quantity, s.PREEMPTIONS)
    window = span(s.PREEMPTION_WINDOW_S)
    return Rule(
        "StallscopePreemptionStorm",
        threshold.exceeded_by(quantity),
        Severity.TICKET,
        summary=(
            "Requests lose their KV blocks again and again (",
            Value(),
            " preemptions a second), most of all those of ",
            _found(f"sum by (tenant) (rate({f.PREEMPTIONS.name}[{window}])) > 0", "", "tenant", "several tenants"),
            "; blamed for it: ",
            _found(
                f'sum by (culprit) (rate({_BLAME}{{mechanism=~"preemption|recompute"}}[{window}])) > 0',
                "",
                "culprit",
                "nobody yet",
            ),
            ".",
        ),
        description=("The KV cache is too small for what is admitted: work is thrown away and done again.",),
        evidence=(f"Rate of {f.PREEMPTIONS.name} of all tenants over {window}.",),
        threshold_reason=_reason(threshold, quantity),
        command=command(owner),
        catches=(Verdict.NOISY_NEIGHBOR, Verdict.OVERLOAD),
        keep_firing_s=s.KEEP_FIRING_S,
    )


def _recompute(teacher: Teacher, owner: Owner) -> Rule:
    quantity = Counted(f.RECOMPUTED, (), s.RECOMPUTE_WINDOW_S, over=f.TOKENS)
    threshold = teacher.threshold(quantity, s.RECOMPUTED)
    window = span(s.RECOMPUTE_WINDOW_S)
    return Rule(
        "StallscopeRecomputeTax",
        threshold.exceeded_by(quantity),
        Severity.TICKET,
        summary=(
            Percent(),
            " of all tokens are computed a second time after preemptions, most of all for ",
            _found(f"sum by (tenant) (rate({f.RECOMPUTED.name}[{window}])) > 0", "", "tenant", "several tenants"),
            ".",
        ),
        description=("That share of the engine's work is paid twice; a smaller batch would serve more.",),
        evidence=(f"{f.RECOMPUTED.name} over {f.TOKENS.name}, by their rates over {window}.",),
        threshold_reason=_reason(threshold, quantity),
        command=command(owner),
        catches=(Verdict.NOISY_NEIGHBOR, Verdict.OVERLOAD),
        keep_firing_s=s.KEEP_FIRING_S,
    )


# --- GPUs and telemetry -----------------------------------------------------------------------------------------------


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
        command=command(owner, "replica"),
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
        command=command(owner, "replica"),
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
        command=command(owner),
        catches=(Verdict.INSUFFICIENT_DATA,),
        about={"cause": ("collector_down",)},
        for_s=s.DOWN_FOR_S,
    )


# --- parts ----------------------------------------------------------------------------------------------------------


def _rising(label: str, counter: str, *matchers: str) -> str:
    """That a counter rose in the last stretch and in the one before: what it counts lasts."""
    chosen = f"{counter}{{{','.join(matchers)}}}" if matchers else counter
    window = span(s.RISING_S)
    latest, before = f"{chosen}[{window}]", f"{chosen}[{window}] offset {window}"
    return "\n".join(f"and on ({label}) (sum by ({label}) (increase({each})) > 0)" for each in (latest, before))


def _found(query: str, given: str, label: str, otherwise: str, form: str = "") -> Found:
    return Found(f"sort_desc(topk(3, {query}))", given, label, otherwise, form=form)


def _mechanism(query: str, given: str) -> Found:
    words = {name: MECHANISM_WORDS[name] for name in BLAMED}
    return Found(f"topk(1, {query})", given, "mechanism", "by what, the command tells", words)


# Mechanisms by which a tenant holds up others.
BLAMED = (
    "step_boundary",
    "prefill_queue",
    "kv_pinning",
    "slot_exhaustion",
    "head_of_line",
    "policy",
    "prefill_interference",
    "decode_drag",
    "prefill_priority",
    "preemption",
    "recompute",
    "cache_eviction",
)


def _reason(threshold: Threshold, quantity: Counted) -> Text:
    return (threshold.reason(quantity), ".")
