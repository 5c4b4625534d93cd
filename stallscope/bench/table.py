"""Scores as a table for a terminal and as JSON, with the runs that failed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stallscope.bench.rivals import RULES
from stallscope.bench.scores import Judged, Score, score_all, score_families, score_rival, split_by_harm
from stallscope.views.words import counted, duration

MOST_FAILURES = 40


def to_json(judged: Sequence[Judged]) -> str:
    """All scores, those of rivals by harm, and every run with its truth and answer."""
    doubled, milder = split_by_harm(judged)
    rivals = {
        rule: {name: _plain(score_rival(rule, runs)) for name, runs in (("doubled", doubled), ("less", milder))}
        for rule in RULES
    }
    result = {
        "scores": [_plain(score) for score in score_all(judged)],
        "families": {family: _plain(score) for family, score in score_families(judged).items()},
        "rivals": rivals,
        "runs": [asdict(one) for one in judged],
    }
    return json.dumps(result, indent=1, allow_nan=False)


def _plain(score: Score) -> dict[str, object]:
    return {name: None if value != value else value for name, value in asdict(score).items()}  # noqa: PLR0124 - NaN


def print_scores(judged: Sequence[Judged], console: Console) -> None:
    """The scores, our first name beside the rivals', the families, and what failed."""
    harmful = sum(one.truth.is_harmful for one in judged)
    console.print(f"{counted(len(judged), 'run')}, {harmful:,} with harm that somebody would notice\n")
    console.print(_scores(score_all(judged)))
    if any(one.rivals for one in judged):
        console.print()
        console.print(_rivals(judged))
    console.print()
    console.print(_families(judged))
    _print_failures([one for one in judged if one.fails], console)


def _columns(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for number, name in enumerate(names):
        table.add_column(name, justify="right" if number else "left")
    return table


def _scores(scores: Sequence[Score]) -> Table:
    table = _columns("score", "value", "95%", "goal", "runs")
    for score in scores:
        goal = "" if score.goal is None else f"{'≤' if score.at_most else '≥'} {score.goal:.2f}"
        table.add_row(score.name, Text(_figure(score), _style(score)), _interval(score), goal, f"{score.runs:,}")
    return table


def _figure(score: Score) -> str:
    return "-" if math.isnan(score.value) else f"{score.value:.3f}"


def _interval(score: Score) -> str:
    return "-" if math.isnan(score.low) else f"{score.low:.3f} to {score.high:.3f}"


def _style(score: Score) -> str:
    if score.goal is None or math.isnan(score.value):
        return ""
    reached = score.value <= score.goal if score.at_most else score.value >= score.goal
    return "green" if reached else "red"


def _rivals(judged: Sequence[Judged]) -> Table:
    table = _columns("names a culprit first", "harm at least doubled", "95%", "less", "95%")
    doubled, milder = split_by_harm(judged)
    for rule in RULES:
        scores = [score_rival(rule, runs) for runs in (doubled, milder)]
        table.add_row(rule, *(text for score in scores for text in (_figure(score), _interval(score))))
    return table


def _families(judged: Sequence[Judged]) -> Table:
    table = _columns("family", "runs", "scored", "right verdict", "95%", "culprit first", "mechanism", "false")
    for family, verdicts in score_families(judged).items():
        runs = [one for one in judged if one.truth.family == family]
        named = [one for one in runs if one.must_name]
        table.add_row(
            family,
            f"{len(runs):,}",
            f"{verdicts.runs:,}",
            Text(_figure(verdicts), _style(verdicts)),
            _interval(verdicts),
            f"{sum(one.names_a_culprit_first for one in named)}/{len(named)}" if named else "",
            f"{sum(one.mechanism_is_right for one in named)}/{len(named)}" if named else "",
            f"{sum(bool(one.falsely_accused) for one in runs)}",
        )
    return table


def _print_failures(failed: Sequence[Judged], console: Console) -> None:
    for number, one in enumerate(failed[:MOST_FAILURES]):
        if not number:
            console.print("\nwhat failed", style="dim")
        console.print(Text(_failure(one)), soft_wrap=True)
    if len(failed) > MOST_FAILURES:
        console.print(f"and {counted(len(failed) - MOST_FAILURES, 'more')}; --json lists them all")


def _failure(one: Judged) -> str:
    truth, answer, harm = one.truth, one.answer, one.truth.harm
    parts = (answer.verdict, ", ".join(answer.culprits), answer.mechanism and f"({answer.mechanism})")
    said = " ".join(filter(None, parts))
    right = " or ".join(truth.verdicts) + (f" {', '.join(truth.culprits)}" if truth.culprits else "")
    mechanisms = f" ({', '.join(truth.mechanisms)})" if truth.mechanisms else ""
    if not truth.is_scored:
        right, mechanisms = "nobody, for no percentile moved", ""
    hurt = (
        "" if harm is None else f"; {harm.tenant} {harm.metric} {duration(harm.without_s)} to {duration(harm.with_s)}"
    )
    also = f"; falsely accused: {', '.join(one.falsely_accused)}" if one.falsely_accused else ""
    unusual = "" if truth.telemetry_is_whole else ", telemetry lost"
    where = f"{truth.family} {truth.seed} [{truth.variant}, {truth.policy}{unusual}]"
    return f"{where}: said {said or 'nothing'}; right: {right}{mechanisms}{hurt}{also}"
