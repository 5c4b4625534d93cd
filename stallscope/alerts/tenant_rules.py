"""Rules on tenants that hold up others, and on what preemption costs them all."""

from __future__ import annotations

from dataclasses import replace

from stallscope.alerts import settings as s
from stallscope.alerts.commands import command
from stallscope.alerts.parts import amounts, found, lasting, mechanism, reason
from stallscope.alerts.promql import one_of, span
from stallscope.alerts.quantities import Counted
from stallscope.alerts.rules import Owner, RecordingRule, Rule, Severity
from stallscope.alerts.texts import ByLabel, Label, Percent, Value
from stallscope.alerts.thresholds import Teacher
from stallscope.diagnosis.model import Verdict
from stallscope.views.words import MECHANISM_WORDS
from stallscope.watch import families as f

PAIRS = "stallscope:blame:rate1m"
TOTALS = "stallscope:blame_seconds:sum"
_PAGE, _TICKET = span(s.PAGE_WINDOW_S), span(s.TICKET_WINDOW_S)
_BLAME = f.BLAME.name
_TOTAL = f"sum by (culprit) ({_BLAME})"
_KV = ("kv_pinning", "head_of_line")


def recordings() -> tuple[RecordingRule, ...]:
    """What rules, their texts and boards read of blame."""
    return (
        RecordingRule(PAIRS, f"sum by (victim, culprit, mechanism) (rate({_BLAME}[{_PAGE}])) > 0"),
        RecordingRule(TOTALS, _TOTAL),
    )


def page(teacher: Teacher, owner: Owner, *, recorded: bool) -> Rule:
    """The one that somebody is woken for."""
    return _stalls_others(teacher, owner, recorded=recorded)


def tickets(teacher: Teacher, owner: Owner) -> tuple[Rule, ...]:
    rules = (_stalled_others, _kv_pinned, _preemptions, _recompute)
    return tuple(rule(teacher, owner) for rule in rules)


def _stalls_others(teacher: Teacher, owner: Owner, *, recorded: bool) -> Rule:
    quantity = Counted(f.BLAME, ("culprit",), s.PAGE_WINDOW_S)
    threshold = teacher.threshold(quantity, s.PAGE_STALLS)
    shown = replace(quantity, recorded=PAIRS) if recorded else quantity
    within = span(s.RISES_WITHIN_S)
    # A stall moves from victim to victim: what must rise is what its culprit did to all of them.
    of_each = f"{TOTALS}[{within}]" if recorded else f"({_TOTAL})[{within}:{span(s.INTERVAL_S)}]"
    return Rule(
        "StallscopeTenantStallsOthers",
        threshold.exceeded_by(shown, lasting("culprit", f"changes({of_each})")),
        Severity.PAGE,
        summary=(
            Label("culprit"),
            " is stalling ",
            found(f"sum by (victim) ({PAIRS}{{culprit=%[1]q}})", "culprit", "victim", "other tenants"),
            " right now: ",
            mechanism(f"sum by (mechanism) ({PAIRS}{{culprit=%[1]q}})", "culprit"),
            " (",
            Value(),
            " requests held up at any time).",
        ),
        description=(
            "Requests of other tenants wait because of this one. Seconds of waiting a second are as many requests as"
            f" are held up at any time. They rose at {s.RISES} scrapes within {s.RISES_WITHIN_S} s, so it goes on.",
        ),
        evidence=(
            "By mechanism: ",
            amounts(f"sum by (mechanism) ({PAIRS}{{culprit=%[1]q}})", "culprit"),
            f". {_BLAME}, summed by culprit, over {_PAGE}.",
        ),
        threshold_reason=reason(threshold, quantity),
        command=command(owner, "culprit", f"sum by (culprit) ({PAIRS}{{culprit=%[1]q}})"),
        catches=(Verdict.NOISY_NEIGHBOR,),
        about={"tenant": (Label("culprit"),)},
        keep_firing_s=s.KEEP_FIRING_S,
    )


def _stalled_others(teacher: Teacher, owner: Owner) -> Rule:
    quantity = Counted(f.BLAME, ("culprit",), s.TICKET_WINDOW_S, whole=True)
    threshold = teacher.threshold(quantity, s.TICKET_STALLS)
    of = f"(increase({_BLAME}{{culprit=%[1]q}}[{_TICKET}]))"
    return Rule(
        "StallscopeTenantStalledOthers",
        threshold.exceeded_by(quantity),
        Severity.TICKET,
        summary=(
            Label("culprit"),
            " stalled ",
            found(f"sum by (victim) {of} > 0", "culprit", "victim", "other tenants"),
            " for ",
            Value(),
            f" s of waiting within {_TICKET}: ",
            mechanism(f"sum by (mechanism) {of} > 0", "culprit"),
            ".",
        ),
        description=(
            "A stall that is over, or too short to wake anybody for: requests of other tenants waited because of this "
            "one, all their seconds together.",
        ),
        evidence=(
            "By mechanism: ",
            amounts(f"sum by (mechanism) {of}", "culprit"),
            f". Increase of {_BLAME}, summed by culprit, over {_TICKET}.",
        ),
        threshold_reason=reason(threshold, quantity),
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
            found(f"sum by (victim) {of}", "culprit", "victim", "other tenants"),
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
        threshold_reason=reason(threshold, quantity),
        command=command(owner, "culprit"),
        catches=(Verdict.NOISY_NEIGHBOR,),
        about={"tenant": (Label("culprit"),)},
        keep_firing_s=s.KEEP_FIRING_S,
    )


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
            found(f"sum by (tenant) (rate({f.PREEMPTIONS.name}[{window}])) > 0", "", "tenant", "several tenants"),
            "; blamed for it: ",
            found(
                f'sum by (culprit) (rate({_BLAME}{{mechanism=~"preemption|recompute"}}[{window}])) > 0',
                "",
                "culprit",
                "nobody yet",
            ),
            ".",
        ),
        description=("The KV cache is too small for what is admitted: work is thrown away and done again.",),
        evidence=(f"Rate of {f.PREEMPTIONS.name} of all tenants over {window}.",),
        threshold_reason=reason(threshold, quantity),
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
            found(f"sum by (tenant) (rate({f.RECOMPUTED.name}[{window}])) > 0", "", "tenant", "several tenants"),
            ".",
        ),
        description=("That share of the engine's work is paid twice; a smaller batch would serve more.",),
        evidence=(f"{f.RECOMPUTED.name} over {f.TOKENS.name}, by their rates over {window}.",),
        threshold_reason=reason(threshold, quantity),
        command=command(owner),
        catches=(Verdict.NOISY_NEIGHBOR, Verdict.OVERLOAD),
        keep_firing_s=s.KEEP_FIRING_S,
    )
