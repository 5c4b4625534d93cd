"""The command ``dashboard``: reads a recording and serves the app on it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from stallscope.errors import UsageError


def dashboard(
    trace: Annotated[Path, typer.Argument(help="A trace: file, folder, glob or URL.")],
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
    from stallscope_dash.serving import serve

    serve(trace, host=host, port=port, token=token)
