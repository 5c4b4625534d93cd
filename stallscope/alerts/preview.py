"""The rules that would be exported from a trace, and when each of them fires on it: what a page on alerts shows.

Two steps, since rules need no promtool: ``preview`` makes them as ``stallscope alerts export --from`` does, ``trial``
runs them over the same trace as ``stallscope alerts backtest`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stallscope.alerts.backtest import Timeline, backtest
from stallscope.alerts.backtest.figures import Calm
from stallscope.alerts.backtest.firing import evaluation_s
from stallscope.alerts.backtest.judge import Fate, Judged
from stallscope.alerts.backtest.provable import reads
from stallscope.alerts.backtest.report import evidence, headline
from stallscope.alerts.backtest.rulefile import RuleFile, parse_rules
from stallscope.alerts.backtest.timeline import grid_of, rehearsed
from stallscope.alerts.choices import Format, Pack
from stallscope.alerts.export import Export, export
from stallscope.alerts.promtool import find_promtool
from stallscope.alerts.rules import Owner, Rule, Severity
from stallscope.alerts.settings import MARGIN_S
from stallscope.alerts.slo import objectives
from stallscope.alerts.texts import cases, for_people
from stallscope.alerts.thresholds import FromSamples
from stallscope.diagnosis.slo import Slo
from stallscope.views.words import counted
from stallscope.watch.rehearsal import Part, Progress

_FILE = Path("stallscope.rules.yml")  # as the rules are called where one of them can't be evaluated


@dataclass(frozen=True)
class PreviewedAlert:
    """``expression``: PromQL. ``summary``: what it will say, with ``<culprit>`` where a name will be.

    ``reasons``: why its threshold is that number, by the value of a label that has one of its own, "" for all others.
    ``not_provable``: why nothing of it can be told on this trace; "" where it can.
    """

    name: str
    severity: Severity
    expression: str
    for_s: int
    keep_firing_s: int
    summary: str
    runbook: str  # its path or address
    reasons: tuple[tuple[str, str], ...]
    not_provable: str


@dataclass(frozen=True, eq=False)
class Preview:
    """``text``: the rule file; ``alerts``: by their numbers in it; ``notes``: what a user should know of the thresholds
    and of what this trace can't prove. ``rules`` and ``timeline`` are for ``trial``. Can be pickled.
    """

    text: str
    notes: tuple[str, ...]
    alerts: tuple[PreviewedAlert, ...]
    rules: RuleFile
    timeline: Timeline


@dataclass(frozen=True)
class Trial:
    """When the alerts of a preview fire on its trace, which they have by their numbers.

    ``headline``, ``evidence``: the answer, and what it rests on, as the command has them. ``firings``: by their starts,
    with labels and what they caught; ``fates``: of each incident, by which alert it was caught first, and after how
    long; ``calm``: time without an incident, and pages that began in it.
    """

    headline: str
    evidence: tuple[str, ...]
    firings: tuple[Judged, ...]
    fates: tuple[Fate, ...]
    calm: Calm


def preview(
    trace: str | Path,
    slos: Sequence[Slo] = (),
    pack: Pack = Pack.BLAME,
    *,
    part: Part | None = None,
    progress: Progress | None = None,
) -> Preview:
    """Rules with thresholds from the calm stretches of a trace (a file, a folder or a URL), or of the ``part`` of it.

    ``progress`` is told the share done. Raises UsageError where objectives make no sense or there is nothing sound,
    InconclusiveError where the trace was not scraped at one interval.
    """
    objectives(slos)  # before any work
    timeline = rehearsed(str(trace), slos, progress, part)
    owner = Owner()
    made = export(FromSamples(timeline.samples, timeline.incidents), slos, owner, pack, Format.PROMETHEUS)
    rules = parse_rules(made.text, _FILE)
    read, grid = reads(rules), grid_of(timeline, evaluation_s(rules))
    alerts = tuple(
        _previewed(rule, owner, read.reason(alert, timeline, grid))
        for rule, alert in zip(made.rules, rules.alerts, strict=True)
    )
    return Preview(made.text, (*made.notes, *_limits(made, alerts, timeline)), alerts, rules, timeline)


def trial(previewed: Preview, *, progress: Progress | None = None) -> Trial:
    """Has promtool evaluate the rules on the trace that they were made from.

    ``progress`` is told the share done. Raises UsageError where promtool is missing, InconclusiveError where the trace
    is too long for it.
    """
    find_promtool()  # also where no rule is provable, and none would be evaluated
    result = backtest(previewed.rules, [previewed.timeline], progress=progress)
    (verdict,) = result.verdicts
    return Trial(headline(result), tuple(evidence(result)), verdict.firings, verdict.fates, result.calm)


def _previewed(rule: Rule, owner: Owner, not_provable: str) -> PreviewedAlert:
    return PreviewedAlert(
        name=rule.name,
        severity=rule.severity,
        expression=rule.expr,
        for_s=rule.for_s,
        keep_firing_s=rule.keep_firing_s,
        summary=for_people(rule.summary),
        runbook=owner.runbook(rule),
        reasons=cases(rule.threshold_reason),
        not_provable=not_provable,
    )


def _limits(made: Export, alerts: Sequence[PreviewedAlert], timeline: Timeline) -> list[str]:
    """What this trace can't prove."""
    said = []
    if made.learned and timeline.incidents:
        incidents = counted(len(timeline.incidents), "incident")
        said.append(
            f"thresholds were learned outside of the trace's {incidents}: {MARGIN_S:g} s around each, and what windows "
            "still see of it, are left out"
        )
    if made.learned:
        said.append(
            "thresholds were set by the calm of this trace, so that they are quiet in it says nothing of another day: "
            "stallscope alerts backtest --quiet-on runs them over one"
        )
    unproven = sum(bool(alert.not_provable) for alert in alerts)
    if unproven:
        said.append(f"of {unproven} of {len(alerts)} alerts this trace can prove nothing: each says why")
    return said
