"""The command that asks what would have been: whatif."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stallscope import asking
from stallscope.asking import Asked
from stallscope.cli.analysis import TableFormat
from stallscope.cli.shared import TenantLog, console, progress, read, warn
from stallscope.errors import UsageError


def whatif(
    trace: Annotated[Path, typer.Argument(help="A trace: file, folder, glob, URL, or - for standard input.")],
    usual: Annotated[
        list[str] | None, typer.Option(help="With this tenant as it usually is; may be given again.")
    ] = None,
    without: Annotated[list[str] | None, typer.Option(help="Without this tenant; may be given again.")] = None,
    without_request: Annotated[
        list[str] | None, typer.Option(help="Without this request (its id); may be given again.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="With another setting of the engine: max_num_batched_tokens=512; may be given again."
        ),
    ] = None,
    since: Annotated[str | None, typer.Option(help="From when on, as for analyze.")] = None,
    until: Annotated[str | None, typer.Option(help="Until when; as --since.")] = None,
    replica: Annotated[str | None, typer.Option(help="Only this replica.")] = None,
    tenants: TenantLog = None,
    output: Annotated[TableFormat, typer.Option("--format", help="text for people, json for machines.")] = (
        TableFormat.text
    ),
) -> None:
    """Replay a trace with one thing changed, and say what every tenant would have waited.

    Exit code 4: the recording can't be replayed well enough to say.
    """
    from stallscope.diagnosis.whatif import Question
    from stallscope.reports.json import to_json
    from stallscope.reports.whatif import print_what_if

    question = Question(
        tuple(usual or ()),
        tuple(without or ()),
        tuple(without_request or ()),
        tuple(_setting(text) for text in settings or ()),
    )
    part = asking.selected(read(trace, tenants), Asked(since, until, replica))
    warn(part)
    answer = asking.what_if(part, question, progress)
    if output is TableFormat.json:
        typer.echo(to_json(answer), nl=False)
    else:
        print_what_if(answer, console())


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise UsageError(f"--set {text!r}: write NAME=VALUE, such as max_num_batched_tokens=512")
    return name, value
