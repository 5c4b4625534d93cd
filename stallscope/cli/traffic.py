"""Commands that make traffic and recordings of it: demo, record, load."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallscope.cli.shared import INCONCLUSIVE, INTERRUPTED, ExecutorChoice, choose, console, progress
from stallscope.errors import UsageError

if TYPE_CHECKING:
    from stallscope.workloads.load import LoadSummary


class Prompts(StrEnum):
    """What a load driver's prompts are made of."""

    ids = "ids"
    text = "text"


def demo(
    seed: Annotated[int | None, typer.Option(help="Seed of the traffic; the scenario's own by default.")] = None,
    executor: Annotated[ExecutorChoice, typer.Option(help="What runs the batches.")] = ExecutorChoice.auto,
    out: Annotated[Path, typer.Option(help="Folder for the two recordings; replaced.")] = Path("stallscope-demo"),
) -> None:
    """Record a stall on the bundled engine, diagnose it, and say who did it.

    Two recordings of the same traffic: once with one tenant's huge prompts in it, once without.
    """
    from stallscope.demo import run_demo

    run_demo(seed, choose(executor), out, console(), progress)


def record(
    scenario: Annotated[str, typer.Argument(help="Name of a bundled scenario, or a YAML file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Trace to write: NAME.otlp.jsonl, .gz or .zst.")],
    variant: Annotated[str, typer.Option(help="A variant that the scenario names, such as demo.")] = "cpu",
    seed: Annotated[int | None, typer.Option(help="Seed of the traffic; the scenario's own by default.")] = None,
    executor: Annotated[ExecutorChoice, typer.Option(help="What runs the batches.")] = ExecutorChoice.auto,
    device: Annotated[str, typer.Option(help="Of the torch executor: cpu, cuda or auto.")] = "auto",
    without_inject: Annotated[
        bool, typer.Option("--without-inject", help="The control run: usual traffic alone.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the trace if it exists.")] = False,
) -> None:
    """Run a scenario on the bundled engine and write its trace."""
    from stallscope.views.words import counted, duration
    from stallscope.workloads.recording import record as run
    from stallscope.workloads.scenario import load_scenario

    loaded = load_scenario(scenario, variant)
    with progress(f"recording {loaded.name}") as advance:
        summary = run(
            loaded,
            out,
            seed=loaded.seed if seed is None else seed,
            executor=choose(executor),
            device=device,
            inject=not without_inject,
            force=force,
            progress=advance,
        )
    length = duration((summary.end_ns - summary.start_ns) / 1e9)
    size = f"{summary.path.stat().st_size / 1e6:.2f} MB"
    typer.echo(f"{summary.path}: {counted(summary.requests, 'request')}, {summary.steps:,} steps, {length}, {size}")
    if summary.given_up:
        typer.echo(f"{counted(summary.given_up, 'request')} took longer than their clients waited", err=True)
    if summary.open:
        typer.echo(f"{counted(summary.open, 'request')} had not finished at the end", err=True)
    if summary.dropped:
        typer.echo(f"warning: {summary.dropped:,} telemetry records were dropped", err=True)


def load(
    scenario: Annotated[str, typer.Argument(help="Name of a bundled scenario, or a YAML file.")],
    url: Annotated[str, typer.Option(help="An OpenAI-compatible endpoint, such as http://127.0.0.1:8000.")],
    model: Annotated[str, typer.Option(help="Model to ask for; by default the one that the endpoint serves.")] = "",
    api_key_file: Annotated[Path | None, typer.Option(help="File with the key of all tenants.")] = None,
    api_keys: Annotated[Path | None, typer.Option(help="YAML or JSON file with each tenant's key.")] = None,
    variant: Annotated[str, typer.Option(help="A variant that the scenario names, such as demo.")] = "cpu",
    seed: Annotated[int | None, typer.Option(help="Seed of the traffic; the scenario's own by default.")] = None,
    without_inject: Annotated[
        bool, typer.Option("--without-inject", help="The control run: usual traffic alone.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Trace file, or folder, for what the clients saw.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the trace if it exists.")] = False,
    prompts: Annotated[Prompts, typer.Option(help="ids sends token ids, text sends words.")] = Prompts.ids,
    vocab_size: Annotated[
        int | None, typer.Option(min=100, help="Token ids are below it; 2,000 by default, which any model has.")
    ] = None,
) -> None:
    """Drive an OpenAI-compatible endpoint with a scenario's traffic, and record what the clients see.

    Requests are sent when they are due, whether earlier ones were answered or not. Exit code 4: the driver itself was
    too late for its figures to mean anything.
    """
    from stallscope.workloads.endpoint import Target, read_key, read_keys
    from stallscope.workloads.load import load as run
    from stallscope.workloads.prompts import VOCABULARY
    from stallscope.workloads.scenario import load_scenario

    loaded = load_scenario(scenario, variant)
    target = Target(
        url,
        model,
        "" if api_key_file is None else read_key(api_key_file),
        {} if api_keys is None else read_keys(api_keys),
        prompts.value,
        vocab_size or VOCABULARY,
    )
    with progress(f"loading {url}") as advance:
        summary = run(
            loaded,
            target,
            seed=loaded.seed if seed is None else seed,
            inject=not without_inject,
            out=out,
            force=force,
            progress=advance,
        )
    _print_load(summary)
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not summary.ok:
        raise UsageError(f"none of {summary.sent} requests was answered: is {url} what the scenario is for?")
    if summary.driver_was_late:
        raise typer.Exit(INCONCLUSIVE)


def _print_load(summary: LoadSummary) -> None:
    """A line of the run, a table by tenant, and how late the driver was; warnings on stderr."""
    from rich.table import Table
    from rich.text import Text

    from stallscope.views.words import counted, duration

    def shown(seconds: float | None) -> str:
        return "-" if seconds is None else duration(seconds)

    out, late = console(), summary.lateness
    length = f"{counted(summary.sent, 'request')} to {summary.model} in {duration(summary.duration_s)}"
    out.print(Text(f"{length}, {summary.ok:,} ok"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    columns = (
        "tenant",
        "sent",
        "ok",
        "failed",
        "tokens",
        "TTFT p50",
        "p99",
        "longest gap p99",
        "end to end p50",
        "p99",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("tenant", "failed") else "right", overflow="fold")
    for one in summary.tenants:
        failed = ", ".join(f"{status} {count}" for status, count in sorted(one.statuses.items()) if status != "ok")
        counts = (f"{one.sent:,}", f"{one.ok:,}", failed or "-", f"{one.output_tokens:,}")
        times = (one.ttft_p50, one.ttft_p99, one.longest_gap_p99, one.e2e_p50, one.e2e_p99)
        table.add_row(Text(one.tenant), *counts, *map(shown, times))
    out.print(table)
    out.print(f"driver late by {duration(late.p50)} p50, {duration(late.p99)} p99, {duration(late.most)} at most")
    if summary.path is not None:
        out.print(Text(f"{summary.path}: the clients' view"), soft_wrap=True)
    for note in summary.notes:
        typer.echo(f"warning: {note}", err=True)
    if summary.driver_was_late:
        typer.echo("warning: the driver could not keep up: these times are its own as much as the server's", err=True)
    if summary.interrupted:
        typer.echo("interrupted: what was not sent by then is missing, what was not answered is abandoned", err=True)
