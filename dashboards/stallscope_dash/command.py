"""The command ``dashboard``: what is asked of a recording, and where the app on it listens."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from stallscope.cli.shared import TenantLog, length_s
from stallscope.errors import UsageError


def dashboard(
    trace: Annotated[Path, typer.Argument(help="A trace: file, folder, glob or URL.")],
    since: Annotated[str | None, typer.Option(help="From when on, as for analyze.")] = None,
    until: Annotated[str | None, typer.Option(help="Until when; as --since.")] = None,
    replica: Annotated[str | None, typer.Option(help="Only this replica.")] = None,
    model: Annotated[str | None, typer.Option(help="Only replicas that serve this model.")] = None,
    tenants: TenantLog = None,
    slo: Annotated[
        list[str] | None, typer.Option(help="ttft=500ms@p99, or chat:itl=100ms@p99; may be given again.")
    ] = None,
    redact_for: Annotated[
        str | None, typer.Option(help="Name nobody but this tenant: others become tenant-1, tenant-2 ...")
    ] = None,
    no_replay: Annotated[bool, typer.Option("--no-replay", help="Faster, and less sure: charges alone.")] = False,
    save: Annotated[
        bool, typer.Option("--save", help="Keep the diagnosis beside the trace, for analyze and for the next time.")
    ] = False,
    live: Annotated[
        bool, typer.Option("--live", help="Follow a folder that is being written to, as `stallscope collect` does.")
    ] = False,
    last: Annotated[str, typer.Option(help="How much of it --live shows: 90s, 10m, 1h.")] = "10m",
    host: Annotated[str, typer.Option(help="Where to listen; anywhere but on loopback, a token is asked for.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8050,
    token: Annotated[
        str | None, typer.Option(envvar="STALLSCOPE_TOKEN", help="Ask for this token; by default, for a new one.")
    ] = None,
) -> None:
    """Look at a trace in the browser: what tenants waited, the incidents, and the batches behind them."""
    for module in ("dash", "dash_ag_grid", "waitress"):
        if importlib.util.find_spec(module) is None:
            raise UsageError(f"{module} is not installed; pip install 'stallscope[dashboard]'")
    from stallscope.asking import Asked
    from stallscope.diagnosis.slo import parse_slo
    from stallscope_dash.serving import serve

    last_s = length_s("--last", last) if live else None
    slos = tuple(parse_slo(text) for text in slo or ())
    asked = Asked(since, until, replica, model, redact_for, slos, not no_replay, tuple(tenants or ()))
    serve(trace, asked, save=save, last_s=last_s, host=host, port=port, token=token)
