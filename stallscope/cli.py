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
from stallscope.errors import StallscopeError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from stallscope.diagnosis import Diagnosis
    from stallscope.trace import Trace
    from stallscope.workloads.recording import ExecutorName

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


PIPE_WIDTH = 120


class ExecutorChoice(StrEnum):
    """What runs the batches: the torch engine in real time, or virtual time by a cost model."""

    auto = "auto"
    torch = "torch"
    virtual = "virtual"


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
            inject=not without_inject,
            force=force,
            progress=advance,
        )
    length = duration((summary.end_ns - summary.start_ns) / 1e9)
    size = f"{summary.path.stat().st_size / 1e6:.2f} MB"
    typer.echo(f"{summary.path}: {counted(summary.requests, 'request')}, {summary.steps:,} steps, {length}, {size}")
    if summary.open:
        typer.echo(f"{counted(summary.open, 'request')} had not finished at the end", err=True)
    if summary.dropped:
        typer.echo(f"warning: {summary.dropped:,} telemetry records were dropped", err=True)


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
    kv_blocks: Annotated[int, typer.Option(min=1, help="Blocks of the KV cache, 16 tokens each.")] = 4096,
    chunked_prefill: Annotated[bool, typer.Option(help="Cut long prompts into several steps.")] = True,
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

    config = EngineConfig(
        model=model,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        chunked_prefill=chunked_prefill,
        kv_blocks=kv_blocks,
    )
    run(
        config,
        host=host,
        port=port,
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
