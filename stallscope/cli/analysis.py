"""Commands that read a trace and say what is in it: doctor, explain, compare. (``analyze`` has a module of its own.)"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stallscope.cli.shared import INCONCLUSIVE, TenantLog, console, read, warn


class TableFormat(StrEnum):
    """How other results are written."""

    text = "text"
    json = "json"


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
