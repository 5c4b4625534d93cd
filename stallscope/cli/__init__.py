"""The command line: parse, call, print. Everything heavy is imported by the command that needs it.

A module a kind of command (``traffic``, ``analyze``, ``analysis``, ``conversion``, ``serving``, ``collecting``,
``alerts``), what they have in common in ``shared``; here they become one program.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points
from typing import Annotated

import typer

from stallscope import __version__
from stallscope.bench import command as bench
from stallscope.cli import alerts
from stallscope.cli.analysis import compare, doctor, explain
from stallscope.cli.analyze import analyze
from stallscope.cli.collecting import collect
from stallscope.cli.conversion import convert, sql
from stallscope.cli.serving import serve
from stallscope.cli.traffic import demo, load, record
from stallscope.cli.whatif import whatif
from stallscope.errors import StallscopeError

app = typer.Typer(
    name="stallscope",
    help="Who stalled whom on a shared LLM endpoint: by which mechanism, by how much, through which request.",
    epilog="Start with: stallscope demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stallscope {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


for _command, _example in (
    (demo, "stallscope demo --seed 7"),
    (record, "stallscope record reasoning_prompt --variant demo -o stall.otlp.jsonl.zst"),
    (load, "stallscope load reasoning_prompt --url http://127.0.0.1:8000 -o traces/"),
    (doctor, "stallscope doctor stall.otlp.jsonl.zst"),
    (analyze, "stallscope analyze stall.otlp.jsonl.zst --since -10m --format html -o stall.html"),
    (explain, "stallscope explain stall.otlp.jsonl.zst chat-000123"),
    (whatif, "stallscope whatif stall.otlp.jsonl.zst --usual reasoner"),
    (compare, "stallscope compare before.otlp.jsonl.zst after.otlp.jsonl.zst"),
    (convert, "stallscope convert stall.otlp.jsonl.zst stall.pftrace"),
    (sql, "stallscope sql stall.otlp.jsonl.zst 'select tenant, count(*) from requests group by all'"),
    (collect, "stallscope collect -o traces/ --disk-budget 20GB"),
    (serve, "stallscope serve --model tiny-llama -o served.otlp.jsonl.zst"),
):
    app.command(epilog=f"Example: {_example}")(_command)
# Packages above this one add theirs.
for _point in entry_points(group="stallscope.commands"):
    app.command(_point.name, epilog=f"Example: stallscope {_point.name} stall.otlp.jsonl.zst")(_point.load())
app.add_typer(bench.app)
app.add_typer(alerts.app)


def main() -> None:
    """Entry point: a user's mistake is one line on stderr and an exit code, never a traceback."""
    try:
        app()
    except StallscopeError as error:
        typer.echo(f"stallscope: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) went away: nothing to say, and no second error when stdout is closed at exit.
        sys.stderr.close()
        sys.exit(0)
