"""The command ``analyze``: who stalled whom in a trace, what diagnoses its portions, and how that is written."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallscope import asking
from stallscope.asking import Asked
from stallscope.cli.shared import FOUND, INCONCLUSIVE, TenantLog, check_new, console, progress, warn, write
from stallscope.errors import UsageError

if TYPE_CHECKING:
    from stallscope.diagnosis import Diagnosis
    from stallscope.fleet.work import Scheduler
    from stallscope.trace import Trace


class Format(StrEnum):
    """How a diagnosis is written."""

    text = "text"
    json = "json"
    markdown = "markdown"
    html = "html"


class SchedulerName(StrEnum):
    """Where the portions of a dataset are diagnosed."""

    processes = "processes"
    dask = "dask"


@dataclass(frozen=True)
class _Run:
    """Where the portions of a dataset are diagnosed, which changes nothing in the result."""

    scheduler: SchedulerName | None
    jobs: int | None
    address: str | None

    def __post_init__(self) -> None:
        if (self.scheduler is SchedulerName.dask) != (self.address is not None):
            raise UsageError("--scheduler dask and --address tcp://HOST:8786 go together")


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
    scheduler: Annotated[
        SchedulerName | None,
        typer.Option(help="Where a dataset's portions are diagnosed: processes of this machine (default), or dask."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes for a dataset; by default, one a core.")] = None,
    address: Annotated[str | None, typer.Option(help="Of the Dask scheduler: tcp://HOST:8786.")] = None,
) -> None:
    """Say who stalled whom in a trace: verdict, culprits, victims, mechanism, evidence."""
    from stallscope.diagnosis.slo import parse_slo
    from stallscope.views.focus import concerning

    _check_output(output, out, force)
    slos = tuple(parse_slo(text) for text in slo or ())
    asked = Asked(since, until, replica, model, redact_for, slos, not no_replay, tuple(tenants or ()))
    run = _Run(scheduler, jobs, address)
    diagnosis, selected = _diagnosis(trace, asked, run, out, save, with_trace=output is Format.html)
    if tenant is not None:
        diagnosis = concerning(diagnosis, tenant)
    write(_rendered(diagnosis, selected, output, out), out)
    if fail_on_incident:
        _fail(diagnosis)


def _check_output(output: Format, out: Path | None, force: bool) -> None:
    """Says before any work what could not be written after it."""
    if out is None:
        if output is Format.html and sys.stdout.isatty():
            raise UsageError("an HTML report is 5 MB: give -o REPORT.html")
        return
    check_new(out, force)


def _diagnosis(
    path: Path, asked: Asked, run: _Run, out: Path | None, save: bool, *, with_trace: bool
) -> tuple[Diagnosis, Trace | None]:
    """What was kept of an earlier call, or is found now; and the part of the trace that was asked for, where a report
    shows it."""
    saved = asking.saved(path, asked, out)
    if save:
        saved.check()
    kept = saved.load()
    if kept is not None:
        diagnosis, place = kept
        typer.echo(f"diagnosed earlier: {place}", err=True)
        return diagnosis, asking.selected(_read(path, asked), asked) if with_trace else None
    trace = _read(path, asked)
    diagnosis = asking.diagnosed(trace, asked, progress, _scheduler(trace, asked, run))
    if save:
        typer.echo(f"kept: {saved.keep(diagnosis)}", err=True)
    return diagnosis, asking.selected(trace, asked) if with_trace else None


def _read(path: Path, asked: Asked) -> Trace:
    trace = asking.read(path, asked.tenants, progress)
    warn(trace)
    return trace


def _scheduler(trace: Trace, asked: Asked, run: _Run) -> Scheduler | None:
    """What is to diagnose the portions of a dataset; None where nothing was said."""
    if run == _Run(None, None, None):
        return None
    if not trace.is_stored:
        with_tenants = " with these tenants" if asked.tenants else ""
        raise UsageError(f"{trace.source} is no dataset{with_tenants}; make one: stallscope convert TRACE FOLDER")
    if run.scheduler is not None and asked.redact_for is not None:
        raise UsageError("--redact-for renames a whole trace; leave out --scheduler")
    if run.address is not None:
        from stallscope.fleet.cluster import DaskCluster

        return DaskCluster(run.address)
    if run.scheduler is None and not asking.in_portions(trace, asked):
        return None
    from stallscope.fleet.processes import Processes

    return Processes(run.jobs)


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


def _fail(diagnosis: Diagnosis) -> None:
    """Ends with the exit code that a check reads."""
    from stallscope.diagnosis import Verdict

    if diagnosis.verdict is Verdict.INSUFFICIENT_DATA:
        raise typer.Exit(INCONCLUSIVE)
    if diagnosis.incidents:
        raise typer.Exit(FOUND)
