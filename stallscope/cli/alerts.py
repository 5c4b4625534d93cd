"""The commands about alert rules: stallscope alerts ..."""

from __future__ import annotations

import typer

from stallscope.cli.backtesting import backtest

app = typer.Typer(name="alerts", help="Alert rules, and the proof that they work.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    pass


app.command(epilog="Example: stallscope alerts backtest rules.yaml stall.otlp.jsonl.zst --quiet-on healthy.parquet")(
    backtest
)
