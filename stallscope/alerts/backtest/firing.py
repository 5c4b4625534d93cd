"""Has Prometheus evaluate the rules on a timeline, and gives what fired from when to when, proven by a second run.

What will fire isn't known, so the first run expects nothing at all and reads what promtool objects to; it evaluates the
rules with a label that tells them apart. The second one has the rules as they are, and expects exactly that.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stallscope.alerts.backtest.promtool import Surprise, run_tests
from stallscope.alerts.backtest.provable import Reads
from stallscope.alerts.backtest.rulefile import TAG, RuleFile
from stallscope.alerts.backtest.timeline import Grid, Timeline, grid_of
from stallscope.alerts.backtest.unittests import Expectation, document, quoted, unit_test
from stallscope.alerts.promtool import RULES
from stallscope.errors import StallscopeError
from stallscope.watch.families import EVALUATION_S
from stallscope.watch.samples import Labels


@dataclass(frozen=True)
class Firing:
    """An alert (by its number) that fired with these labels in each evaluation from ``start_ns`` to ``end_ns``;
    ``is_open``: it did in the timeline's last one too."""

    alert: int
    labels: Labels
    start_ns: int
    end_ns: int
    is_open: bool


@dataclass(frozen=True)
class Run:
    """Of a timeline: when rules were evaluated on it, why some of them prove nothing there, and what fired."""

    timeline: Timeline
    grid: Grid
    reasons: tuple[str, ...]  # an alert's, by its number; "" where it is provable
    firings: tuple[Firing, ...]  # of provable alerts
    expected: tuple[Expectation, ...]  # what the proof says


def evaluation_s(rules: RuleFile) -> float:
    """How often rules are evaluated: as the group does that is in the greatest hurry."""
    return min((alert.interval_s or EVALUATION_S for alert in rules.alerts), default=EVALUATION_S)


def evaluate(rules: RuleFile, reads: Reads, timeline: Timeline) -> Run:
    """Raises UsageError where a rule can't be evaluated, InconclusiveError where the timeline is too short or long."""
    grid = grid_of(timeline, evaluation_s(rules))
    reasons = tuple(reads.reason(alert, timeline, grid) for alert in rules.alerts)
    names = {alert.name for alert, reason in zip(rules.alerts, reasons, strict=True) if not reason}
    if not names:
        return Run(timeline, grid, reasons, (), ())
    expression = _firing_of(sorted(names))
    times = [at * grid.evaluation_ms for at in range(grid.evaluations)]
    chosen = reads.series(timeline)

    def ask(text: str, expected: Sequence[Expectation]) -> list[Surprise]:
        lines = document([RULES], grid.evaluation_ms, unit_test(timeline, grid, chosen, expected))
        return run_tests(text, lines, str(rules.path))

    got = ask(rules.text(tagged=True), [Expectation(expression, at) for at in times])
    fired = {one.elapsed_ms: [dict(labels) for labels, _ in one.got] for one in got}
    expected = tuple(Expectation(expression, at, _untagged(fired.get(at, []))) for at in times)
    if ask(rules.text(), expected):
        raise StallscopeError(f"{timeline.name}: the rules fire otherwise with one more label; do they read ALERTS?")
    firings = tuple(one for one in _episodes(fired, grid) if not reasons[one.alert])
    return Run(timeline, grid, reasons, firings, expected)


def proof(rules: RuleFile, rule_file: str, reads: Reads, runs: Sequence[Run]) -> Iterator[str]:
    """The lines of a file of unit tests that says of each timeline what fires when; ``rule_file`` as seen from it."""
    tests = (
        line for run in runs for line in unit_test(run.timeline, run.grid, reads.series(run.timeline), run.expected)
    )
    return document([rule_file], round(evaluation_s(rules) * 1e3), tests)


def values(rules: RuleFile, reads: Reads, run: Run, alerts: Sequence[int], until_ns: int) -> dict[int, list[float]]:
    """What alerts' expressions gave, where they gave anything, in all evaluations before ``until_ns``."""
    grid = run.grid
    asked = {rules.alerts[number].expression for number in alerts}
    times = [at * grid.evaluation_ms for at in range(grid.evaluations)]
    expected = [Expectation(one, at) for at in times if grid.time_ns(at) < until_ns for one in sorted(asked)]
    lines = document([RULES], grid.evaluation_ms, unit_test(run.timeline, grid, reads.series(run.timeline), expected))
    found: dict[int, list[float]] = {number: [] for number in alerts}
    for surprise in run_tests(rules.text(), lines, str(rules.path)):
        for number in alerts:
            if rules.alerts[number].expression == surprise.expression:
                found[number] += [value for _, value in surprise.got]
    return found


def _firing_of(names: Sequence[str]) -> str:
    pattern = "|".join(re.sub(r"[\\.+*?()|\[\]{}^$]", r"\\\g<0>", name) for name in names)
    return f'ALERTS{{alertname=~{quoted(pattern)}, alertstate="firing"}}'


def _untagged(fired: Sequence[dict[str, str]]) -> tuple[tuple[Labels, float], ...]:
    """Rules of one name and labels are one series where nothing tells them apart."""
    plain = {tuple(sorted((name, value) for name, value in labels.items() if name != TAG)) for labels in fired}
    return tuple((labels, 1.0) for labels in sorted(plain))


def _episodes(fired: dict[int, list[dict[str, str]]], grid: Grid) -> list[Firing]:
    """Consecutive evaluations in which an alert fired with the same labels."""
    seen: dict[tuple[int, Labels], list[int]] = {}
    for elapsed_ms in sorted(fired):
        for labels in fired[elapsed_ms]:
            number = int(labels[TAG])
            own = tuple(
                sorted((name, value) for name, value in labels.items() if name not in (TAG, "__name__", "alertstate"))
            )
            seen.setdefault((number, own), []).append(elapsed_ms)
    made = []
    for (number, own), times in seen.items():
        start = times[0]
        for at, following in zip(times, [*times[1:], None], strict=True):
            if following is None or following - at > grid.evaluation_ms:
                end = grid.time_ns(at)
                made.append(Firing(number, own, grid.time_ns(start), end, end == grid.end_ns))
                start = following if following is not None else start
    return sorted(made, key=lambda one: (one.start_ns, one.alert, one.labels))
