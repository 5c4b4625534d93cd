"""Raises thresholds until pages are quiet on a part of the quiet traces, and holds the rest out to see if that holds.

One quiet trace: its first half in time is tuned on, its second half held out. Several: the last one is held out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stallscope.alerts.backtest.expressions import threshold
from stallscope.alerts.backtest.figures import Calm, calm
from stallscope.alerts.backtest.firing import Run, evaluate, values
from stallscope.alerts.backtest.provable import Reads, reads, spoken
from stallscope.alerts.backtest.rulefile import RuleFile

ANNOTATION = "threshold_tuned"


@dataclass(frozen=True)
class Part:
    """A stretch of a run: evaluations from ``start_ns`` on, and before ``end_ns``."""

    run: Run
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class Sides:
    """Pages on the part that was tuned on and on the part held out."""

    tuned: Calm
    held_out: Calm


@dataclass(frozen=True)
class Raised:
    """An alert's threshold as it was and is; ``after`` None: it pages there, and can't be raised, for ``reason``."""

    alert: int
    before: float | None
    after: float | None
    reason: str


@dataclass(frozen=True)
class Tuning:
    """``how``: what was held out, in words."""

    how: str
    raised: tuple[Raised, ...]
    before: Sides
    after: Sides


def tune(rules: RuleFile, quiet: Sequence[Run]) -> tuple[RuleFile, Reads, list[Run], Tuning]:
    """The rules with thresholds raised, what they read, the quiet runs with them, and what came of it."""
    tuned_on, held_out, how = _parts(quiet)
    noisy = sorted(
        {
            firing.alert
            for part in tuned_on
            for firing in part.run.firings
            if rules.alerts[firing.alert].is_page and firing.start_ns < part.end_ns
        }
    )
    raised = _raised(rules, reads(rules), noisy, tuned_on)
    changed = {}
    for one in raised:
        found = threshold(rules.alerts[one.alert].expression)
        if found is not None and one.after is not None:
            expression = rules.alerts[one.alert].expression
            changed[one.alert] = f"{expression[: found.start]}{one.after:.15g}{expression[found.end :]}"
    new = rules.with_expressions(changed, {one.alert: one.reason for one in raised}, ANNOTATION) if changed else rules
    read = reads(new)
    runs = [evaluate(new, read, run.timeline) for run in quiet] if changed else list(quiet)
    after_on, after_out, _ = _parts(runs)
    before = Sides(pages(rules, tuned_on), pages(rules, held_out))
    return new, read, runs, Tuning(how, raised, before, Sides(pages(new, after_on), pages(new, after_out)))


def pages(rules: RuleFile, parts: Sequence[Part]) -> Calm:
    """All pages that began in parts, whether or not there was an incident: on a quiet trace none may."""
    count = sum(
        rules.alerts[firing.alert].is_page and part.start_ns <= firing.start_ns < part.end_ns
        for part in parts
        for firing in part.run.firings
    )
    return calm(sum((part.end_ns - part.start_ns) / 1e9 for part in parts), count)


def whole(run: Run) -> Part:
    """All that was recorded, the evaluation that sees the last of it among it."""
    return Part(run, run.grid.start_ns, run.grid.until_ns + run.grid.phase_ms * 1_000_000 + 1)


def _parts(quiet: Sequence[Run]) -> tuple[list[Part], list[Part], str]:
    if len(quiet) > 1:
        return [whole(run) for run in quiet[:-1]], [whole(quiet[-1])], f"{quiet[-1].timeline.name} is held out"
    only = whole(quiet[0])
    middle = (only.start_ns + only.end_ns) // 2
    length = spoken((only.end_ns - middle) / 1e9)
    how = f"the second half of {only.run.timeline.name}, {length}, is held out"
    return [Part(only.run, only.start_ns, middle)], [Part(only.run, middle, only.end_ns)], how


def _raised(rules: RuleFile, read: Reads, noisy: Sequence[int], parts: Sequence[Part]) -> tuple[Raised, ...]:
    limits = {number: threshold(rules.alerts[number].expression) for number in noisy}
    tunable = [number for number, found in limits.items() if found is not None]
    highest = dict.fromkeys(noisy, -math.inf)
    for part in parts if tunable else []:
        for number, found in values(rules, read, part.run, tunable, part.end_ns).items():
            highest[number] = max([highest[number], *found])
    length = spoken(sum((part.end_ns - part.start_ns) / 1e9 for part in parts))
    made = []
    for number, limit in limits.items():
        if limit is None:
            made.append(Raised(number, None, None, "it is not of the form EXPR > NUMBER"))
        elif not math.isfinite(highest[number]):
            made.append(Raised(number, limit.value, None, f"its value is {highest[number]}, which no number exceeds"))
        else:
            after = rounded_up(highest[number], beyond=limit.or_equal)
            why = f"raised from {limit.value:g} to {after:g}: {highest[number]:.4g} was the highest in {length} of calm"
            made.append(Raised(number, limit.value, after, why))
    return tuple(made)


def rounded_up(value: float, *, beyond: bool = False) -> float:
    """The next number of two significant digits, ``beyond``: that is truly larger."""
    if not value:
        return 0.01 if beyond else 0.0
    digits = 1 - math.floor(math.log10(abs(value)))
    up = math.ceil(round(value * 10**digits, 9))
    if up / 10**digits < value or (beyond and up / 10**digits <= value):
        up += 1
    return up / 10**digits if digits >= 0 else float(up * 10**-digits)
