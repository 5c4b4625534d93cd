"""Commands that read a trace and say what is in it: doctor, analyze, explain, compare."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallscope.cli.shared import FOUND, INCONCLUSIVE, TenantLog, check_new, console, progress, read, warn
from stallscope.errors import UsageError

if TYPE_CHECKING:
    from stallscope.diagnosis import Diagnosis
    from stallscope.diagnosis.slo import Slo
    from stallscope.trace import Trace


class Format(StrEnum):
    """How a diagnosis is written."""

    text = "text"
    json = "json"
    markdown = "markdown"
    html = "html"


class TableFormat(StrEnum):
    """How other results are written."""

    text = "text"
    json = "json"


@dataclass(frozen=True)
class _Asked:
    """All that a diagnosis depends on but the trace."""

    since: str | None
    until: str | None
    replica: str | None
    model: str | None
    redact_for: str | None
    slos: tuple[Slo, ...]
    replay: bool
    tenants: tuple[str, ...]


def analyze(
    trace: Annotated[Path, typer.Argument(help="A trace: file, folder, glob, URL, or - for standard input.")],
    since: Annotated[
        str | None, typer.Option(help="From when on: 2026-01-31T14:05:00, 14:05, +30s (after the start), -5m.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Until when; as --since.")] = None,
    replica: Annotated[str | None, typer.Option(help="Only this replica.")] = None,
    model: Annotated[str | None, typer.Option(help="Only replicas that serve this model.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Only incidents that this tenant was part of.")] = None,
    tenants: TenantLog = None,
    slo: Annotated[
        list[str] | None, typer.Option(help="ttft=500ms@p99, or chat:itl=100ms@p99; may be given again.")
    ] = None,
    output: Annotated[
        Format, typer.Option("--format", help="text for people, json for machines, markdown or html to pass on.")
    ] = Format.text,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File to write; by default, stdout.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT if it exists.")] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the diagnosis beside the trace, or OUT; later calls load it.")
    ] = False,
    no_replay: Annotated[bool, typer.Option("--no-replay", help="Faster, and less sure: charges alone.")] = False,
    fail_on_incident: Annotated[
        bool, typer.Option("--fail-on-incident", help="Exit code 3 if there was one, 4 if that can't be told.")
    ] = False,
    redact_for: Annotated[
        str | None, typer.Option(help="Name nobody but this tenant: others become tenant-1, tenant-2 ...")
    ] = None,
) -> None:
    """Say who stalled whom in a trace: verdict, culprits, victims, mechanism, evidence."""
    from stallscope.diagnosis.slo import parse_slo
    from stallscope.views.focus import concerning

    _check_output(output, out, force)
    slos = tuple(parse_slo(text) for text in slo or ())
    asked = _Asked(since, until, replica, model, redact_for, slos, not no_replay, tuple(tenants or ()))
    diagnosis, selected = _diagnosis(trace, asked, out, save, with_trace=output is Format.html)
    if tenant is not None:
        diagnosis = concerning(diagnosis, tenant)
    _write(_rendered(diagnosis, selected, output, out), out)
    if fail_on_incident:
        _fail(diagnosis)


def explain(
    trace: Annotated[Path, typer.Argument(help="A trace: file, folder, glob, URL, or - for standard input.")],
    request: Annotated[str, typer.Argument(help="The request's id, as `stallscope analyze` shows it.")],
    tenants: TenantLog = None,
) -> None:
    """Show where each millisecond of one request went, and to whom."""
    from stallscope.reports.text import print_waterfall
    from stallscope.views.waterfall import waterfall

    loaded = read(trace, tenants)
    warn(loaded)
    print_waterfall(waterfall(loaded, request), console())


def doctor(
    trace: Annotated[Path, typer.Argument(help="A trace: file, folder, glob, URL, or - for standard input.")],
    tenants: TenantLog = None,
    output: Annotated[TableFormat, typer.Option("--format", help="text for people, json for machines.")] = (
        TableFormat.text
    ),
) -> None:
    """Say how complete a trace is, and which questions it can't answer.

    Exit code 4: it can't say who stalled whom, or how long requests waited.
    """
    from stallscope.reports.checkup import print_checkup
    from stallscope.reports.json import to_json
    from stallscope.views.checkup import check_up

    checkup = check_up(read(trace, tenants))
    if output is TableFormat.json:
        typer.echo(to_json(checkup), nl=False)
    else:
        print_checkup(checkup, console())
    if not checkup.usable:
        raise typer.Exit(INCONCLUSIVE)


def compare(
    before: Annotated[Path, typer.Argument(help="The trace from before a change.")],
    after: Annotated[Path, typer.Argument(help="The trace from after it.")],
    tenants: TenantLog = None,
    output: Annotated[TableFormat, typer.Option("--format", help="text for people, json for machines.")] = (
        TableFormat.text
    ),
) -> None:
    """Say whether a fix worked: each tenant's percentiles before and after, beyond what chance explains.

    Exit code 4: no tenant has enough requests in both.
    """
    from stallscope.diagnosis import diagnose
    from stallscope.reports.comparison import print_comparison
    from stallscope.reports.json import to_json
    from stallscope.views.comparison import compare as compared

    first, second = read(before, tenants), read(after, tenants)
    warn(first)
    warn(second)
    comparison = compared((first, diagnose(first, replay=False)), (second, diagnose(second, replay=False)))
    if output is TableFormat.json:
        typer.echo(to_json(comparison), nl=False)
    else:
        print_comparison(comparison, console())
    if not comparison.changes:
        raise typer.Exit(INCONCLUSIVE)


# --- analyze ------------------------------------------------------------------------------------------------------


def _check_output(output: Format, out: Path | None, force: bool) -> None:
    """Says before any work what could not be written after it."""
    if out is None:
        if output is Format.html and sys.stdout.isatty():
            raise UsageError("an HTML report is 5 MB: give -o REPORT.html")
        return
    check_new(out, force)


def _diagnosis(
    path: Path, asked: _Asked, out: Path | None, save: bool, *, with_trace: bool
) -> tuple[Diagnosis, Trace | None]:
    """What was kept of an earlier call, or is found now; and the part of the trace that was asked for, where it was
    read."""
    from stallscope.reports.saved import Saved

    saved = Saved(path, repr(asked), out, _logs(asked))
    if save:
        saved.check()
    kept = saved.load()
    if kept is not None:
        diagnosis, place = kept
        typer.echo(f"diagnosed earlier: {place}", err=True)
        return diagnosis, _selected(path, asked) if with_trace else None
    selected = _selected(path, asked)
    diagnosis = _diagnosed(selected, asked)
    if save:
        typer.echo(f"kept: {saved.keep(diagnosis)}", err=True)
    return diagnosis, selected


def _logs(asked: _Asked) -> list[Path]:
    if not asked.tenants:
        return []
    from stallscope.trace.tenants import log_paths

    return log_paths(asked.tenants)


def _selected(path: Path, asked: _Asked) -> Trace:
    from stallscope.trace.rename import redacted
    from stallscope.trace.select import select

    trace = read(path, asked.tenants)
    trace = select(trace, since=asked.since, until=asked.until, replica=asked.replica, model=asked.model)
    if asked.redact_for is not None:
        trace = redacted(trace, asked.redact_for)
    warn(trace)
    return trace


def _diagnosed(trace: Trace, asked: _Asked) -> Diagnosis:
    from stallscope.diagnosis import diagnose

    with progress("looking for who did it") as advance:
        return diagnose(trace, slos=asked.slos, replay=asked.replay, remedies=asked.replay, progress=advance)


def _rendered(diagnosis: Diagnosis, trace: Trace | None, output: Format, out: Path | None) -> str:
    """The report as it is written."""
    if output is Format.json:
        from stallscope.reports.json import to_json

        return to_json(diagnosis)
    if output is Format.markdown:
        from stallscope.reports.markdown import to_markdown

        return to_markdown(diagnosis)
    if output is Format.html and trace is not None:
        from stallscope.reports.html import to_html

        return to_html(diagnosis, trace)
    from stallscope.reports.text import print_diagnosis

    screen = console(for_file=out is not None)
    with screen.capture() as written:
        print_diagnosis(diagnosis, screen)
    return written.get()


def _write(text: str, out: Path | None) -> None:
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{out}: cannot be written ({error.strerror}); check the path and its rights") from error
    typer.echo(f"{out}: {len(text.encode()) / 1e6:.2f} MB", err=True)


def _fail(diagnosis: Diagnosis) -> None:
    """Ends with the exit code that a check reads."""
    from stallscope.diagnosis import Verdict

    if diagnosis.verdict is Verdict.INSUFFICIENT_DATA:
        raise typer.Exit(INCONCLUSIVE)
    if diagnosis.incidents:
        raise typer.Exit(FOUND)
