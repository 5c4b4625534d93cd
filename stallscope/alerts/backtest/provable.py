"""Which rules a timeline can say anything about: it has the metrics that they read, and is as long as they look."""

from __future__ import annotations

import re
from dataclasses import dataclass

from stallscope.alerts.backtest.expressions import Needs, needs, needs_of_recordings
from stallscope.alerts.backtest.rulefile import Alert, RuleFile
from stallscope.alerts.backtest.timeline import Grid, Timeline
from stallscope.errors import UsageError
from stallscope.views.words import listed, printable
from stallscope.watch import families
from stallscope.watch.samples import Series

# A watch has no series of these until something of the sort happens: that one is missing is an answer.
EVENTS = {
    family.name
    for family in (
        families.BLAME,
        families.STALLED,
        families.JUDGED,
        families.INCIDENTS,
        families.PREEMPTIONS,
        families.RECOMPUTED,
        families.FOLDED,
    )
}
_MADE_BY_RULES = {"ALERTS", "ALERTS_FOR_STATE"}
_MOST_NAMES = 4


@dataclass(frozen=True)
class Reads:
    """What each alert of a file reads, through recording rules too; ``look_back_s`` has its ``for`` in it."""

    alerts: tuple[Needs, ...]
    look_back_s: tuple[float, ...]
    recorded: frozenset[str]
    templates: str  # of all labels: they may query more

    def reason(self, alert: Alert, timeline: Timeline, grid: Grid) -> str:
        """Why a timeline can't prove anything of an alert; "" where it can."""
        read = self.alerts[alert.number]
        there = {name for name, _ in timeline.samples.values} | self.recorded | EVENTS | _MADE_BY_RULES
        missing = sorted(read.names - there)
        missing += sorted(one for one in read.patterns if not any(_matches(one, name) for name in there))
        if missing:
            more = [f"{len(missing) - _MOST_NAMES} more"] if len(missing) > _MOST_NAMES else []
            return f"needs {listed([*map(printable, missing[:_MOST_NAMES]), *more])}"
        if read.clock:
            return f"asks for the date ({read.clock}), and a backtest's clock starts in 1970"
        if self.look_back_s[alert.number] > grid.length_s:
            return f"looks back {spoken(self.look_back_s[alert.number])}, the trace has {spoken(grid.length_s)}"
        return ""

    def series(self, timeline: Timeline) -> list[Series]:
        """The series of a timeline that any alert of the file reads, through recording rules too."""
        names = {name for name, _ in timeline.samples.values}
        if any(read.any_metric for read in self.alerts):
            chosen = names
        else:
            mentioned = frozenset().union(*(read.names for read in self.alerts))
            patterns = frozenset().union(*(read.patterns for read in self.alerts))
            chosen = {name for name in names if name in mentioned or name in self.templates}
            chosen |= {name for name in names if any(_matches(one, name) for one in patterns)}
        return [series for series in timeline.samples.values if series[0] in chosen]


def reads(rules: RuleFile) -> Reads:
    """Raises UsageError where a rule is not understood."""
    recordings = rules.recordings
    try:
        recorded = needs_of_recordings(recordings)
        read = tuple(needs(alert.expression, recorded) for alert in rules.alerts)
    except ValueError as error:
        raise UsageError(f"{rules.path}: {printable(str(error))}") from error
    back = tuple(one.look_back_s + alert.for_s for one, alert in zip(read, rules.alerts, strict=True))
    templates = "\n".join(text for alert in rules.alerts for text in alert.labels.values())
    return Reads(read, back, frozenset(recordings), templates)


def spoken(length_s: float) -> str:
    """``4 min``, ``6 h``, ``3 d``: the largest unit of which there are at least two, or one and nothing else."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if length_s >= 2 * size or length_s == size:
            return f"{_short(length_s / size)} {unit}"
    return f"{_short(length_s)} s"


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}".removesuffix(".0")


def _matches(pattern: str, name: str) -> bool:
    """Go's patterns are nearly Python's; one that Python does not know may match anything."""
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return True
