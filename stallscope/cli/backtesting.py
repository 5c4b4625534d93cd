"""The command ``alerts backtest``: would these rules have caught it, and would they have been quiet the day before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallscope.cli.shared import FOUND, INCONCLUSIVE, check_new, console, progress, write, write_parts
from stallscope.errors import StallscopeError, UsageError

if TYPE_CHECKING:
    from stallscope.alerts.backtest import Backtest, Timeline
    from stallscope.alerts.backtest.rulefile import RuleFile
    from stallscope.diagnosis.slo import Slo


class BacktestFormat(StrEnum):
    """How the answer is written."""

    text = "text"
    json = "json"


def backtest(
    rules: Annotated[Path, typer.Argument(help="Prometheus rules (groups:), or a PrometheusRule.")],
    traces: Annotated[
        list[str] | None,
        typer.Argument(metavar="TRACE...", help="Traces with what the rules are to catch: files, folders, URLs."),
    ] = None,
    quiet_on: Annotated[
        list[str] | None,
        typer.Option(metavar="TRACE", help="A healthy trace, on which no page may fire; may be given again."),
    ] = None,
    tune: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Raise thresholds until pages are quiet on a part of the quiet traces, show what they do on the rest, "
            "judge the rules so, and write them.",
        ),
    ] = None,
    within: Annotated[
        str, typer.Option(help="The latency budget: an incident that lasts longer must be paged within it.")
    ] = "60s",
    slo: Annotated[
        list[str] | None, typer.Option(help="As the collector is told: ttft=500ms@p99; may be given again.")
    ] = None,
    tests: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Keep the proof as unit tests for: promtool test rules FILE."),
    ] = None,
    output: Annotated[
        BacktestFormat, typer.Option("--format", help="text for people, json for machines.")
    ] = BacktestFormat.text,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; by default, stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite files that exist.")] = False,
) -> None:
    """Run alert rules over traces, by Prometheus itself: what they catch, how soon, and what they page for nothing.

    Exit code 3: they miss what they must catch, or page on a quiet trace; 4: that can't be told from these traces.
    """
    from stallscope.alerts.backtest import backtest as run
    from stallscope.alerts.backtest import read_rules
    from stallscope.alerts.backtest.provable import reads
    from stallscope.alerts.promtool import check_rules
    from stallscope.diagnosis.slo import parse_slo
    from stallscope.views.words import counted

    if not traces and not quiet_on:
        raise UsageError("give at least one trace to run the rules over, or --quiet-on TRACE")
    if tune is not None and not quiet_on:
        raise UsageError("--tune needs traces on which the rules are to be quiet: --quiet-on TRACE")
    _check_files(rules, out, tune, tests, force)
    within_s = _seconds(within)
    slos = tuple(parse_slo(text) for text in slo or ())
    read = read_rules(rules)
    check_rules(read.text() if read.is_resource else read.source, str(rules))
    reads(read)  # what it does not understand it says before the traces are rehearsed
    for_tests = _readable(read, rules if tune is None else tune, tests, force)
    timelines = [_rehearsed(trace, slos) for trace in traces or ()]
    quiet = [_rehearsed(trace, slos) for trace in quiet_on or ()]
    for timeline in quiet:
        if timeline.incidents:
            has = f"{timeline.name} has {counted(len(timeline.incidents), 'incident')} by its diagnosis"
            typer.echo(f"warning: {has}: a page in them counts as one that should not be", err=True)
    with progress("promtool evaluates the rules") as advance:
        result = run(read, timelines, quiet, tuned=tune is not None, within_s=within_s, progress=advance)
    if tune is not None:
        _write_tuned(result, tune)
    if tests is not None:
        _write_tests(result, tests, for_tests)
    write(_rendered(result, output, for_file=out is not None), out)
    if result.found:
        raise typer.Exit(FOUND)
    if not result.conclusive:
        raise typer.Exit(INCONCLUSIVE)


def _check_files(rules: Path, out: Path | None, tune: Path | None, tests: Path | None, force: bool) -> None:
    """Says before any work what could not be written after it."""
    named = [path for path in (out, tune, tests) if path is not None]
    for path in named:
        check_new(path, force)
    if len({path.resolve() for path in [rules, *named]}) <= len(named):
        raise UsageError("RULES, --out, --tune and --tests must be different files")


def _rehearsed(trace: str, slos: Sequence[Slo]) -> Timeline:
    from stallscope.alerts.backtest.timeline import rehearsed

    with progress(f"rehearsing {Path(trace).name}") as advance:
        return rehearsed(trace, slos, advance)


def _rendered(result: Backtest, output: BacktestFormat, *, for_file: bool) -> str:
    from stallscope.alerts.backtest.report import print_backtest, to_json

    if output is BacktestFormat.json:
        return to_json(result)
    screen = console(for_file=for_file)
    with screen.capture() as written:
        print_backtest(result, screen)
    return written.get()


def _write_tuned(result: Backtest, path: Path) -> None:
    write_parts(path, [result.rules.own_text()])


def _write_tests(result: Backtest, path: Path, rules: Path) -> None:
    """The proof, and beside it the rules where promtool can't read the user's; promtool runs it once more."""
    from stallscope.alerts.backtest.firing import proof
    from stallscope.alerts.backtest.promtool import passes

    if result.rules.is_resource:
        write_parts(rules, [result.rules.text()])
    relative = os.path.relpath(rules.resolve(), path.resolve().parent)
    lines = proof(result.rules, _literal(relative), result.reads, result.runs)
    write_parts(path, (f"{line}\n" for line in lines))
    if not passes(path):
        raise StallscopeError(f"{path}: promtool does not pass it; to see why: promtool test rules {path}")


def _readable(read: RuleFile, rules: Path, tests: Path | None, force: bool) -> Path:
    """The rules for unit tests: of a resource, which promtool does not read, a file beside the tests."""
    if tests is None or not read.is_resource:
        return rules
    beside = tests.with_suffix(".rules.yaml")
    check_new(beside, force)
    return beside


def _literal(path: str) -> str:
    """A path as promtool's pattern of paths."""
    return "".join(f"\\{one}" if one in "\\*?[" else one for one in path)


def _seconds(text: str) -> float:
    from stallscope.alerts.backtest.expressions import seconds

    try:
        found = seconds(text)
    except ValueError:
        found = 0.0
    if not found:
        raise UsageError(f"--within {text}: give a time such as 60s or 2m")
    return found
