"""A backtest for a terminal, the answer first, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stallscope.alerts.backtest.figures import Calm, Share
from stallscope.alerts.backtest.firing import Firing, Run
from stallscope.alerts.backtest.judge import Answer, Fate, Judged, Outcome, Verdict
from stallscope.alerts.backtest.result import Backtest
from stallscope.alerts.backtest.rulefile import Alert
from stallscope.views import words

SCHEMA_VERSION = 1
MOST_FIRINGS = 50  # on a terminal
_LONGEST_NAME = 32
_LEAST_CALM_S = 600.0  # below which the bound on false pages, thousands a week, says nothing
_LEAST_SCRAPES = 3  # in a window, so that with one of them gone there still is a rate
_STYLE = {
    Answer.CAUGHT: "green",
    Answer.LATE: "red",
    Answer.MISSED: "red",
    Answer.TICKET: "green",
    Answer.NOT_REQUIRED: "dim",
    Answer.NOT_PROVABLE: "yellow",
}
_OUTCOME_STYLE = {
    Outcome.CAUGHT: "green",
    Outcome.WRONG_NAME: "red",
    Outcome.OTHER_KIND: "yellow",
    Outcome.FALSE: "red",
    Outcome.AFTER: "dim",
}


def print_backtest(result: Backtest, console: Console) -> None:
    """Writes all of it; names from traces and rules are text on one line."""
    style = "bold red" if result.found else "bold green" if result.conclusive else "bold yellow"
    console.print(Text(headline(result), style=style), soft_wrap=True)
    for line in evidence(result):
        console.print(Text(line), soft_wrap=True)
    console.print()
    if not all(result.reason(alert) for alert in result.rules.alerts):
        console.print(_rules(result))
    for alert in result.rules.alerts:
        if reason := result.reason(alert):
            text = f"{words.printable(alert.name)} is not provable on this data: {reason}"
            console.print(Text(text, style="yellow"), soft_wrap=True)
    if any(verdict.fates for verdict in result.verdicts):
        console.print()
        console.print(_incidents(result))
    firings = _all_firings(result)
    if firings:
        console.print()
        console.print(_firings(result, firings[:MOST_FIRINGS]))
        if len(firings) > MOST_FIRINGS:
            console.print(f"{len(firings) - MOST_FIRINGS:,} more: --format json has them all", soft_wrap=True)
    if result.tuning is not None:
        console.print()
        _print_tuning(result, console)


def headline(result: Backtest) -> str:
    """The answer in one sentence."""
    parts = []
    if result.verdicts:
        parts += [_caught(result), *_not_caught(result)]
        parts.append(_false(result.calm, "false page", "of calm"))
    if result.quiet:
        unproven = "no page that is provable on the quiet traces"
        parts.append(unproven if result.unprovable_quiet else _false(result.quiet_calm, "page", "that had to be quiet"))
    return "; ".join(parts)


def to_json(result: Backtest) -> str:
    """All of it; times in ns since the epoch, amounts of time in s."""
    made = {
        "schema_version": SCHEMA_VERSION,
        "headline": headline(result),
        "evidence": evidence(result),
        "found": result.found,
        "conclusive": result.conclusive,
        "within_s": result.within_s,
        "required": len(result.required),
        "caught_in_time": len(result.in_time),
        "missed": len(result.missed),
        "not_provable": len(result.not_provable),
        "share_in_time": None if result.share_in_time is None else _fields(result.share_in_time),
        "calm": _fields(result.calm) if result.verdicts else None,
        "quiet": _fields(result.quiet_calm) if result.quiet else None,
        "rules": [
            {
                "rule": alert.name,
                "group": alert.group,
                "severity": alert.severity,
                "catches": sorted(alert.catches),
                "expression": alert.expression,
                "not_provable": result.reason(alert) or None,
                **_counts(result, alert),
            }
            for alert in result.rules.alerts
        ],
        "incidents": [
            {
                "trace": verdict.run.timeline.name,
                "start_ns": fate.incident.start_ns,
                "end_ns": fate.incident.end_ns,
                "verdict": fate.incident.verdict,
                "culprits": [culprit.tenant for culprit in fate.incident.culprits],
                "required": fate.required,
                "answer": fate.answer,
                "rule": None if fate.alert is None else result.rules.alerts[fate.alert].name,
                "delay_s": fate.delay_s,
                "reason": fate.reason,
            }
            for verdict in result.verdicts
            for fate in verdict.fates
        ],
        "firings": [
            {
                "trace": trace,
                "rule": result.rules.alerts[judged.firing.alert].name,
                "start_ns": judged.firing.start_ns,
                "end_ns": judged.firing.end_ns,
                "at_end_of_trace": judged.firing.is_open,
                "labels": dict(judged.firing.labels),
                "outcome": judged.outcome,
                "delay_s": [judged.delay_s[number] for number in sorted(judged.delay_s)],
            }
            for trace, judged in _all_firings(result)
        ],
        "tuning": _tuning_fields(result),
    }
    return json.dumps(made, ensure_ascii=False, indent=2, allow_nan=False) + "\n"


def _fields(figure: Calm | Share) -> dict[str, object]:
    return dataclasses.asdict(figure)


# --- sentences ----------------------------------------------------------------------------------------------------


def _caught(result: Backtest) -> str:
    if not result.required:
        if not any(verdict.fates for verdict in result.verdicts):
            return "nothing to catch: the traces have no incident"
        if not any(alert.is_page for alert in result.rules.alerts):
            return "nothing had to be caught: no rule is a page"
        budget = words.duration(result.within_s)
        return f"nothing had to be caught: no incident lasts longer than {budget} and has a page that is for it"
    delays = sorted(fate.delay_s for fate in result.in_time if fate.delay_s is not None)
    after = ""
    if delays:
        few = words.listed([words.duration(delay) for delay in delays])
        after = f", after {few if len(delays) <= 3 else f'{_range(delays)}'}"
    return f"{len(result.in_time)} of {words.counted(len(result.required), 'lasting incident')} caught{after}"


def _range(delays: Sequence[float]) -> str:
    middle = delays[len(delays) // 2]
    return f"{words.duration(delays[0])} to {words.duration(delays[-1])}, {words.duration(middle)} in the middle"


def _not_caught(result: Backtest) -> list[str]:
    late = sum(fate.answer is Answer.LATE for fate in result.missed)
    missed = len(result.missed) - late
    made = [f"{missed:,} missed"] if missed else []
    if late:
        made.append(f"{late:,} caught only after more than {words.duration(result.within_s)}")
    if result.not_provable:
        reasons = dict.fromkeys(fate.reason for fate in result.not_provable)
        made.append(f"{len(result.not_provable):,} not provable on this data ({'; '.join(reasons)})")
    return made


def _false(calm: Calm, what: str, of_what: str) -> str:
    count = words.counted(calm.pages, what) if calm.pages else f"no {what}"
    return f"{count} in {_hours(calm.length_s)} {of_what}"


def _hours(length_s: float) -> str:
    if length_s < 360:
        return f"{length_s / 60:.2g} min"
    return f"{length_s / 3600:.2g} h" if length_s < 36000 else f"{length_s / 3600:,.0f} h"


def _rate(per_week: float) -> str:
    return f"{per_week:,.0f}" if per_week >= 10 else f"{per_week:.2g}"


def evidence(result: Backtest) -> list[str]:
    """What the answer rests on, and how far chance goes."""
    runs = result.runs
    length = _hours(sum(run.grid.length_s for run in runs))
    evaluations = f"every {runs[0].grid.evaluation_ms / 1e3:g} s"
    traces = f"{words.counted(len(runs), 'trace')}, {length}"
    made = [f"evaluated by Prometheus' own promtool, {evaluations}, over {traces}; the same run again gave the same"]
    made[0] += f"; delays ± {runs[0].grid.phase_ms / 1e3:g} s, as scrapes and evaluations happen to fall"
    share = result.share_in_time
    if share is not None:
        percent, interval = f"{share.hits / share.of:.0%}", f"{share.low:.0%} to {share.high:.0%}"
        made.append(f"caught in time: {percent} of {share.of:,} (95% interval {interval})")
    for calm, where in ((result.calm, "calm"), (result.quiet_calm, "the quiet traces")):
        if calm.most_per_week is None or (calm is result.quiet_calm and not result.quiet):
            continue
        if calm.length_s < _LEAST_CALM_S and not calm.pages:
            made.append(f"{words.duration(calm.length_s)} of {where}: too few to tell how rare false pages are")
        else:
            made.append(f"false pages by what was seen of {where}: at most {_rate(calm.most_per_week)} a week (95%)")
    brittle = [
        alert
        for alert, read in zip(result.rules.alerts, result.reads.alerts, strict=True)
        if read.shortest_s < _LEAST_SCRAPES * runs[0].grid.scrape_ms / 1e3 and not result.reason(alert)
    ]
    if brittle:
        names = words.listed(list(dict.fromkeys(words.printable(alert.name) for alert in brittle)))
        least = f"{_LEAST_SCRAPES * runs[0].grid.scrape_ms / 1e3:g} s"
        made.append(f"windows below {least}, which one late or failed scrape empties, and no backtest shows: {names}")
    longer = [
        alert
        for alert in result.rules.alerts
        if alert.interval_s and alert.interval_s * 1e3 > runs[0].grid.evaluation_ms and not result.reason(alert)
    ]
    if longer:
        names = words.listed(list(dict.fromkeys(words.printable(alert.group) for alert in longer)))
        made.append(f"evaluated more often here than they say: {names}; delays have the difference added")
    if result.verdicts and not result.required and result.found is False:
        made.append("inconclusive: give traces of stalls that last, as the rules are to catch them")
    return made


# --- tables -------------------------------------------------------------------------------------------------------


def _table(*columns: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading, side in columns:
        table.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
    return table


def _rules(result: Backtest) -> Table:
    table = _table(
        ("rule", "left"),
        ("severity", "left"),
        ("fired", "right"),
        ("caught", "right"),
        ("after", "left"),
        ("missed", "right"),
        ("false", "right"),
        ("wrong name", "right"),
        ("", "left"),
    )
    table.columns[0].no_wrap = True
    for alert in result.rules.alerts:
        if result.reason(alert):
            continue
        counts = _counts(result, alert)
        delays = sorted(delay for _, judged in _firings_of(result, alert) for delay in judged.delay_s.values())
        after = words.listed([words.duration(delay) for delay in delays])
        if len(delays) > 3:
            after = f"{words.duration(delays[0])} to {words.duration(delays[-1])}"
        figures = [f"{counts[key]:,}" for key in ("fired", "caught")]
        rest = [f"{counts[key]:,}" for key in ("missed", "false", "wrong_name")]
        name, severity = (Text(words.printable(text)) for text in (alert.name, alert.severity or "-"))
        table.add_row(name, severity, *figures, after, *rest, _partly(result, alert))
    return table


def _partly(result: Backtest, alert: Alert) -> str:
    """On how many traces nothing can be told of an alert of which something can be on others."""
    lacking = sum(bool(run.reasons[alert.number]) for run in result.runs)
    return f"not provable on {lacking} of {len(result.runs)} traces" if lacking else ""


def _counts(result: Backtest, alert: Alert) -> dict[str, int]:
    """Of one alert: how often it fired, incidents that it caught, those it is for and missed, and wrong firings.

    Of pages, only lasting incidents are missed; on quiet traces each firing is a false one.
    """
    firings = _firings_of(result, alert)
    caught = {(trace, number) for trace, judged in firings for number in judged.delay_s}
    for_it = {
        (position, fate.number)
        for position, verdict in enumerate(result.verdicts)
        if not verdict.run.reasons[alert.number]
        for fate in verdict.fates
        if alert.claims(fate.incident.verdict)
        and (not alert.is_page or fate.incident.end_ns - fate.incident.start_ns > result.within_s * 1e9)
    }
    quiet = [_on_quiet(run, one) for run in result.quiet for one in run.firings if one.alert == alert.number]
    outcomes = [judged.outcome for _, judged in firings]
    return {
        "fired": len(firings) + len(quiet),
        "caught": len(caught),
        "missed": len(for_it - caught),
        "false": (outcomes + quiet).count(Outcome.FALSE),
        "wrong_name": outcomes.count(Outcome.WRONG_NAME),
        "other_kind": outcomes.count(Outcome.OTHER_KIND),
    }


def _firings_of(result: Backtest, alert: Alert) -> list[tuple[int, Judged]]:
    """With the position of the trace."""
    return [
        (position, judged)
        for position, verdict in enumerate(result.verdicts)
        for judged in verdict.firings
        if judged.firing.alert == alert.number
    ]


def _incidents(result: Backtest) -> Table:
    table = _table(
        ("incident", "left"), ("length", "right"), ("culprit", "left"), ("", "left"), ("by", "left"), ("after", "right")
    )
    for verdict in result.verdicts:
        for fate in sorted(verdict.fates, key=lambda one: one.incident.start_ns):
            table.add_row(*_incident(result, verdict, fate))
    return table


def _incident(result: Backtest, verdict: Verdict, fate: Fate) -> list[Text]:
    incident = fate.incident
    when = f"{words.clock(incident.start_ns, zone=True)} {incident.verdict}"
    where = f" in {_short(Path(verdict.run.timeline.name).name)}" if len(result.verdicts) > 1 else ""
    culprits = words.listed([_short(culprit.tenant) for culprit in incident.culprits]) or "-"
    answer = f"{fate.answer}: {fate.reason}" if fate.reason else str(fate.answer)
    return [
        Text(when + where),
        Text(words.duration((incident.end_ns - incident.start_ns) / 1e9)),
        Text(culprits),
        Text(answer, style=_STYLE[fate.answer]),
        Text("-" if fate.alert is None else words.printable(result.rules.alerts[fate.alert].name)),
        Text("-" if fate.delay_s is None else words.duration(fate.delay_s)),
    ]


def _all_firings(result: Backtest) -> list[tuple[str, Judged]]:
    """With the trace's name; on quiet traces all are false."""
    on_traces = [(verdict.run.timeline.name, judged) for verdict in result.verdicts for judged in verdict.firings]
    on_quiet = [
        (run.timeline.name, Judged(firing, _on_quiet(run, firing), {}))
        for run in result.quiet
        for firing in run.firings
    ]
    return on_traces + on_quiet


def _on_quiet(run: Run, firing: Firing) -> Outcome:
    return Outcome.FALSE if run.grid.is_recorded(firing.start_ns) else Outcome.AFTER


def _firings(result: Backtest, firings: Sequence[tuple[str, Judged]]) -> Table:
    table = _table(("fired", "left"), ("until", "left"), ("rule", "left"), ("labels", "left"), ("", "left"))
    for trace, judged in firings:
        firing = judged.firing
        alert = result.rules.alerts[firing.alert]
        own = [
            f"{name}={_short(value)}"
            for name, value in firing.labels
            if name != "alertname" and alert.labels.get(name) != value
        ]
        where = f" in {_short(Path(trace).name)}" if len(result.runs) > 1 else ""
        until = "the end" if firing.is_open else words.clock(firing.end_ns)
        after = (
            f" after {words.listed([words.duration(one) for one in judged.delay_s.values()])}" if judged.delay_s else ""
        )
        table.add_row(
            Text(words.clock(firing.start_ns) + where),
            Text(until),
            Text(words.printable(alert.name)),
            Text(", ".join(own)),
            Text(f"{judged.outcome}{after}", style=_OUTCOME_STYLE[judged.outcome]),
        )
    return table


def _short(name: str) -> str:
    return words.shortened(words.printable(name), _LONGEST_NAME)


# --- tuning -------------------------------------------------------------------------------------------------------


def _print_tuning(result: Backtest, console: Console) -> None:
    tuning = result.tuning
    if tuning is None:
        return
    console.print(Text(f"tuned on quiet traces; {words.printable(tuning.how)}"), soft_wrap=True)
    for one in tuning.raised:
        name = words.printable(result.rules.alerts[one.alert].name)
        text = f"{name}: {one.reason}" if one.after is not None else f"{name} pages there and stays: {one.reason}"
        console.print(Text(text, style="" if one.after is not None else "red"), soft_wrap=True)
    if not tuning.raised:
        console.print("no page there: nothing to raise", soft_wrap=True)
    table = _table(
        ("", "left"), ("pages, as they were", "right"), ("as tuned", "right"), ("in", "right"), ("at most", "right")
    )
    for name, before, after in (
        ("tuned on", tuning.before.tuned, tuning.after.tuned),
        ("held out", tuning.before.held_out, tuning.after.held_out),
    ):
        most = "-" if after.most_per_week is None else f"{_rate(after.most_per_week)} a week (95%)"
        table.add_row(name, f"{before.pages:,}", f"{after.pages:,}", _hours(after.length_s), most)
    console.print(table)
    console.print("what was tuned on says nothing of tomorrow; the part held out does", soft_wrap=True)


def _tuning_fields(result: Backtest) -> dict[str, object] | None:
    tuning = result.tuning
    if tuning is None:
        return None
    return {
        "held_out": tuning.how,
        "raised": [
            {
                "rule": result.rules.alerts[one.alert].name,
                "before": one.before,
                "after": one.after,
                "reason": one.reason,
            }
            for one in tuning.raised
        ],
        **{
            name: {"tuned": _fields(sides.tuned), "held_out": _fields(sides.held_out)}
            for name, sides in (("before", tuning.before), ("after", tuning.after))
        },
    }
