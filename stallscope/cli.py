"""The command line: parse, call, print. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallscope import __version__
from stallscope.bench import command as bench
from stallscope.errors import StallscopeError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from stallscope.diagnosis import Diagnosis
    from stallscope.trace import Trace
    from stallscope.workloads.load import LoadSummary
    from stallscope.workloads.replica import ExecutorName

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
app.add_typer(bench.app)


PIPE_WIDTH = 120
INCONCLUSIVE = 4
INTERRUPTED = 130  # as a shell says it of SIGINT


class ExecutorChoice(StrEnum):
    """What runs the batches: the torch engine in real time, or virtual time by a cost model."""

    auto = "auto"
    torch = "torch"
    virtual = "virtual"


class Prompts(StrEnum):
    """What a load driver's prompts are made of."""

    ids = "ids"
    text = "text"


class Format(StrEnum):
    text = "text"
    json = "json"


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


@app.command(epilog="Example: stallscope demo --seed 7")
def demo(
    seed: Annotated[int | None, typer.Option(help="Seed of the traffic; the scenario's own by default.")] = None,
    executor: Annotated[ExecutorChoice, typer.Option(help="What runs the batches.")] = ExecutorChoice.auto,
    out: Annotated[Path, typer.Option(help="Folder for the two recordings; replaced.")] = Path("stallscope-demo"),
) -> None:
    """Record a stall on the bundled engine, diagnose it, and say who did it.

    Two recordings of the same traffic: once with one tenant's huge prompts in it, once without.
    """
    from stallscope.demo import run_demo

    run_demo(seed, _choose(executor), out, _console(), _progress)


@app.command(
    epilog="Example: stallscope record reasoning_prompt --variant demo -o stall.otlp.jsonl.zst",
)
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
    with _progress(f"recording {loaded.name}") as advance:
        summary = run(
            loaded,
            out,
            seed=loaded.seed if seed is None else seed,
            executor=_choose(executor),
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


@app.command(epilog="Example: stallscope load reasoning_prompt --url http://127.0.0.1:8000 -o traces/")
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
    with _progress(f"loading {url}") as advance:
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


@app.command(epilog="Example: stallscope analyze stall.otlp.jsonl.zst --format json | jq .verdict")
def analyze(
    trace: Annotated[Path, typer.Argument(help="A trace file, or a folder of them.")],
    output: Annotated[Format, typer.Option("--format", help="text for people, json for machines.")] = Format.text,
) -> None:
    """Say who stalled whom in a trace: verdict, culprits, victims, mechanism, evidence."""
    from stallscope.reports.json import to_json
    from stallscope.reports.text import print_diagnosis

    diagnosis = _diagnose(_read(trace))
    if output is Format.json:
        typer.echo(to_json(diagnosis), nl=False)
    else:
        print_diagnosis(diagnosis, _console())


@app.command(epilog="Example: stallscope explain stall.otlp.jsonl.zst chat-000123")
def explain(
    trace: Annotated[Path, typer.Argument(help="A trace file, or a folder of them.")],
    request: Annotated[str, typer.Argument(help="The request's id, as `stallscope analyze` shows it.")],
) -> None:
    """Show where each millisecond of one request went, and to whom."""
    from stallscope.reports.text import print_waterfall
    from stallscope.views.waterfall import waterfall

    print_waterfall(waterfall(_read(trace), request), _console())


@app.command(epilog="Example: stallscope serve --model tiny-llama -o served.otlp.jsonl.zst")
def serve(
    model: Annotated[str, typer.Option(help="A model's name, or a Hugging Face folder.")] = "tiny-llama",
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine only with keys.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_keys: Annotated[
        Path | None, typer.Option(help="YAML or JSON, KEY: {tenant: NAME}; read again at SIGHUP.")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Most requests in a batch.")] = 32,
    max_num_batched_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in a batch.")] = 2048,
    kv_blocks: Annotated[
        int | None,
        typer.Option(min=1, help="KV blocks of 16 tokens; 4096, or what a GPU has room for."),
    ] = None,
    chunked_prefill: Annotated[bool, typer.Option(help="Cut long prompts into several steps.")] = True,
    prefix_caching: Annotated[bool, typer.Option(help="Find beginnings of prompts computed before.")] = True,
    policy: Annotated[str, typer.Option(help="Who goes first; a wrong name lists them all.")] = "fcfs",
    preemption: Annotated[str, typer.Option(help="Who loses its KV blocks: latest or least_work.")] = "latest",
    long_prefill_token_threshold: Annotated[
        int, typer.Option(min=0, help="Most prompt tokens of one request in a batch; 0: no limit of its own.")
    ] = 0,
    tenant_kv_share: Annotated[float, typer.Option(help="Share of the KV cache that a tenant may hold.")] = 1.0,
    tenant_token_share: Annotated[
        float, typer.Option(help="Share of a batch's tokens that its prompts may take.")
    ] = 1.0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="Threads that compute; all cores by default.")] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Most requests that wait; others are told to come back.")] = 256,
    drain_timeout: Annotated[float, typer.Option(min=0, help="Seconds to finish requests after SIGTERM.")] = 30.0,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Trace to write: NAME.otlp.jsonl, .gz or .zst.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the trace if it exists.")] = False,
) -> None:
    """Serve a model behind an OpenAI-compatible API, instrumented.

    Telemetry goes to the trace, and to an OTLP endpoint where OTEL_EXPORTER_OTLP_ENDPOINT names one.
    """
    from stallscope.serving import serve as run
    from stallscope_engine.config import EngineConfig

    try:
        config = EngineConfig(
            model=model,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            chunked_prefill=chunked_prefill,
            kv_blocks=kv_blocks or EngineConfig().kv_blocks,
            prefix_caching=prefix_caching,
            policy=policy,
            preemption=preemption,
            long_prefill_token_threshold=long_prefill_token_threshold,
            tenant_kv_share=tenant_kv_share,
            tenant_token_share=tenant_token_share,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    run(
        config,
        host=host,
        port=port,
        device=device,
        fill_memory=kv_blocks is None,
        api_keys=api_keys,
        threads=threads,
        max_queue=max_queue,
        drain_timeout_s=drain_timeout,
        out=out,
        force=force,
        say=typer.echo,
    )


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


# --- shared by the commands ---------------------------------------------------------------------------------------


def _console() -> Console:
    from rich.console import Console

    # Into a pipe or file, nobody's window sets the width: wide enough that no table is cut.
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr where that is a terminal; yields what is to be told the share done, in 0..1."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def _choose(executor: ExecutorChoice) -> ExecutorName:
    """The executor to use; without torch, auto is virtual time, and says so."""
    if executor is ExecutorChoice.virtual:
        return "virtual"
    if executor is ExecutorChoice.torch or importlib.util.find_spec("torch") is not None:
        return "torch"
    typer.echo(
        "PyTorch is not installed: running on the virtual executor, whose step times come from a cost model "
        "(pip install 'stallscope[engine]' for the real one)",
        err=True,
    )
    return "virtual"


def _print_load(summary: LoadSummary) -> None:
    """A line of the run, a table by tenant, and how late the driver was; warnings on stderr."""
    from rich.table import Table
    from rich.text import Text

    from stallscope.views.words import counted, duration

    def shown(seconds: float | None) -> str:
        return "-" if seconds is None else duration(seconds)

    console, late = _console(), summary.lateness
    length = f"{counted(summary.sent, 'request')} to {summary.model} in {duration(summary.duration_s)}"
    console.print(Text(f"{length}, {summary.ok:,} ok"), soft_wrap=True)
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
    console.print(table)
    console.print(f"driver late by {duration(late.p50)} p50, {duration(late.p99)} p99, {duration(late.most)} at most")
    if summary.path is not None:
        console.print(Text(f"{summary.path}: the clients' view"), soft_wrap=True)
    for note in summary.notes:
        typer.echo(f"warning: {note}", err=True)
    if summary.driver_was_late:
        typer.echo("warning: the driver could not keep up: these times are its own as much as the server's", err=True)
    if summary.interrupted:
        typer.echo("interrupted: what was not sent by then is missing, what was not answered is abandoned", err=True)


def _read(path: Path) -> Trace:
    from stallscope.trace import read_trace

    with _progress(f"reading {path.name}") as advance:
        trace = read_trace(path, lambda done, total: advance(done / max(total, 1)))
    for finding in trace.findings:
        typer.echo(f"warning: {finding.text} ({finding.where}, {finding.count} times)", err=True)
    return trace


def _diagnose(trace: Trace) -> Diagnosis:
    from stallscope.diagnosis import diagnose

    return diagnose(trace)


if __name__ == "__main__":
    main()
