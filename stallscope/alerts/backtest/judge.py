"""Holds what fired against the incidents: what was caught, how soon, what was missed, and what fired for nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from stallscope.alerts.backtest.firing import Firing, Run, evaluation_s
from stallscope.alerts.backtest.rulefile import Alert, RuleFile
from stallscope.diagnosis.model import Incident

# An alert may come this long after an incident's end and still be about it: a window of a minute, which is the usual
# one of pages, a scrape and an evaluation, and half as much again for tickets that wait until a stall is over.
GRACE_S = 120.0


class Outcome(StrEnum):
    """What a firing was."""

    CAUGHT = "caught"
    WRONG_NAME = "wrong name"  # in an incident that the rule is for, but of a tenant that has no part in it
    OTHER_KIND = "other kind"  # in an incident that the rule is not for
    FALSE = "false"  # it began while there was none
    AFTER = "after the end"  # it began when nothing was recorded any more, which it may well be about


class Answer(StrEnum):
    """What became of an incident."""

    CAUGHT = "caught"  # by a page, in time
    LATE = "late"  # by a page, not in time
    MISSED = "missed"
    TICKET = "ticket"  # no page is required, and a ticket caught it
    NOT_REQUIRED = "not required"  # no page is required, and nothing caught it
    NOT_PROVABLE = "not provable"


@dataclass(frozen=True)
class Judged:
    """A firing with its outcome: of the incidents (by their numbers in the timeline) that it caught, after how long, s.

    ``delay_s`` is 0 for an incident that began while it fired already, for an earlier one.
    """

    firing: Firing
    outcome: Outcome
    delay_s: dict[int, float]


@dataclass(frozen=True)
class Fate:
    """An incident: whether some page must catch it, and what became of it.

    ``alert``: which caught it first, ``delay_s`` after its start; None where none did. ``reason``: why it is missed,
    not provable, or not required.
    """

    number: int
    incident: Incident
    required: bool
    answer: Answer
    alert: int | None
    delay_s: float | None
    reason: str


@dataclass(frozen=True)
class Verdict:
    """Of one timeline: each firing, each incident's fate, and how long it was calm, s."""

    run: Run
    firings: tuple[Judged, ...]
    fates: tuple[Fate, ...]
    calm_s: float


def judge(rules: RuleFile, run: Run, within_s: float) -> Verdict:
    """Lasting incidents, longer than ``within_s``, must be caught by a page within that, where a page is for them."""
    firings = tuple(_judged(firing, rules, run) for firing in run.firings)
    fates = tuple(
        _fate(number, incident, rules, run, firings, within_s) for number, incident in enumerate(run.timeline.incidents)
    )
    return Verdict(run, firings, fates, _calm_s(run))


def is_within(time_ns: int, incident: Incident) -> bool:
    """From its start to its end, and ``GRACE_S`` more."""
    return incident.start_ns <= time_ns <= incident.end_ns + GRACE_S * 1e9


def _judged(firing: Firing, rules: RuleFile, run: Run) -> Judged:
    """One that began in calm catches nothing later, else a rule that always fires would catch everything."""
    alert, incidents = rules.alerts[firing.alert], run.timeline.incidents
    if not any(is_within(firing.start_ns, incident) for incident in incidents):
        return Judged(firing, Outcome.FALSE if run.grid.is_recorded(firing.start_ns) else Outcome.AFTER, {})
    touched = [
        (number, incident)
        for number, incident in enumerate(incidents)
        if firing.start_ns <= incident.end_ns + GRACE_S * 1e9 and firing.end_ns >= incident.start_ns
    ]
    kind = [(number, incident) for number, incident in touched if alert.claims(incident.verdict)]
    caught = {
        number: _delay_s(firing, incident, rules) for number, incident in kind if _names_right(firing, alert, incident)
    }
    if caught:
        return Judged(firing, Outcome.CAUGHT, caught)
    return Judged(firing, Outcome.WRONG_NAME if kind else Outcome.OTHER_KIND, {})


def _delay_s(firing: Firing, incident: Incident, rules: RuleFile) -> float:
    """With what a group that is evaluated less often than the backtest does may add; 0 where it fired already."""
    if firing.start_ns <= incident.start_ns:
        return 0.0
    own = evaluation_s(rules)
    lag_s = max(0.0, (rules.alerts[firing.alert].interval_s or own) - own)
    return (firing.start_ns - incident.start_ns) / 1e9 + lag_s


def _names_right(firing: Firing, alert: Alert, incident: Incident) -> bool:
    """Whom an alert names must be a culprit, or, with the annotation ``names: victim``, a victim."""
    labels = dict(firing.labels)
    named = {labels[label] for label in ("culprit", "tenant") if label in labels}
    if alert.annotations.get("names") == "victim":
        return named <= {victim.tenant for victim in incident.victims}
    return named <= {culprit.tenant for culprit in incident.culprits}


def _fate(
    number: int, incident: Incident, rules: RuleFile, run: Run, firings: Sequence[Judged], within_s: float
) -> Fate:
    claiming = [alert for alert in rules.alerts if alert.claims(incident.verdict)]
    pages = [alert for alert in claiming if alert.is_page]
    caught = [(judged.delay_s[number], judged.firing.alert) for judged in firings if number in judged.delay_s]
    by_pages = [(delay, alert) for delay, alert in caught if rules.alerts[alert].is_page]
    length_s = (incident.end_ns - incident.start_ns) / 1e9
    required = bool(pages) and length_s > within_s
    delay_s, first = min(by_pages or caught, default=(None, None))

    def fate(answer: Answer, reason: str = "") -> Fate:
        return Fate(number, incident, required, answer, first, delay_s, reason)

    if by_pages and delay_s is not None and (delay_s <= within_s or not required):
        return fate(Answer.CAUGHT)
    if not required:
        reason = "over within the latency budget" if pages else "no page is for it"
        return fate(Answer.TICKET if caught else Answer.NOT_REQUIRED, reason)
    if all(run.reasons[alert.number] for alert in pages):
        return fate(Answer.NOT_PROVABLE, "no page that is for it is provable here")
    if run.grid.end_ns < incident.start_ns + within_s * 1e9:
        return fate(Answer.NOT_PROVABLE, "the trace ends before the latency budget does")
    if by_pages:
        return fate(Answer.LATE)
    return fate(Answer.MISSED, "only a ticket caught it" if caught else "")


def _calm_s(run: Run) -> float:
    """Evaluated time of the recording that is within no incident."""
    grid = run.grid
    times = [grid.time_ns(at * grid.evaluation_ms) for at in range(1, grid.evaluations)]
    recorded = [time for time in times if grid.is_recorded(time)]
    calm = [time for time in recorded if not any(is_within(time, incident) for incident in run.timeline.incidents)]
    return len(calm) * grid.evaluation_ms / 1e3
