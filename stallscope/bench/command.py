"""``stallscope bench``: the benchmarks that come with the package."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallscope.errors import UsageError

if TYPE_CHECKING:
    from stallscope.workloads.replica import ExecutorName

app = typer.Typer(name="bench", help="How true diagnoses are, measured.", no_args_is_help=True)
PIPE_WIDTH = 140


class Executor(StrEnum):
    virtual = "virtual"
    torch = "torch"


@app.callback()
def _root() -> None:
    pass


@app.command(epilog="Example: stallscope bench stall --seeds 0:5")
def stall(
    scenarios: Annotated[
        Path | None,
        typer.Option(help="Folder of scenario files with an expect; the benchmark's own by default."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="A:B, from A to before B; work on 0:100, report on others.")] = "0:20",
    executor: Annotated[
        Executor, typer.Option(help="torch runs in real time, several times a case; give it scenarios made for it.")
    ] = Executor.virtual,
    fidelity: Annotated[
        int, typer.Option(min=1, max=3, help="2: judge by sums of steps; 1: by request spans alone; with decoys.")
    ] = 3,
    kept: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of request spans that are kept, below fidelity 3.")
    ] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="All scores and runs, for machines.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="Of this machine's cores; all by default.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for traces and truths; ~/.cache/stallscope/bench by default.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option(help="Judge nothing: write traces, and apart from them the truth, for others.")
    ] = None,
    score: Annotated[
        Path | None, typer.Option(help="Score these answers (JSON by case, as recorded) instead of our own.")
    ] = None,
) -> None:
    """StallBench: is what a diagnosis says true? Truth is the same run again, without the cause.

    Each scenario runs once a seed in virtual time, with one in five on a scheduler that replay does not have. Runs in
    which nobody is hurt noticeably count for false accusations only.
    """
    import sys
    from functools import partial

    from rich.console import Console
    from rich.progress import Progress

    from stallscope.bench import runner
    from stallscope.bench.answers import read_answers
    from stallscope.bench.cache import default_folder
    from stallscope.bench.cases import SCENARIOS, families
    from stallscope.bench.table import print_scores, to_json

    if record is not None and score is not None:
        raise UsageError("--record hands out traces, --score takes answers: give one of them")
    files, chosen, folder = families(scenarios or SCENARIOS), _seeds(seeds), cache or default_folder()
    many = processes or (1 if executor is Executor.torch else os.cpu_count() or 1)
    name: ExecutorName = "torch" if executor is Executor.torch else "virtual"
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(f"{len(files)} families x {len(chosen)} seeds", total=1.0)

        def advance(share: float) -> None:
            bar.update(task, completed=share)

        if record is not None:
            written = runner.run(
                partial(runner.hand_out, folder=folder, executor=name, out=record), files, chosen, many, advance
            )
            typer.echo(f"{len(written)} traces in {record / 'traces'}, what is true of them in {record / 'truth'}")
            return
        if score is not None:
            work = partial(runner.judge_answer, folder=folder, executor=name, answers=read_answers(score))
        else:
            work = partial(runner.judge, folder=folder, executor=name, fidelity=fidelity, kept=kept)
        judged = runner.run(work, files, chosen, many, advance)
    if as_json:
        typer.echo(to_json(judged))
    else:
        print_scores(judged, Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH))


def _seeds(text: str) -> range:
    first, _, end = text.partition(":")
    if not first.isdecimal() or not end.isdecimal() or int(first) >= int(end):
        raise UsageError(f"--seeds {text}: give A:B with A below B, such as 0:20")
    return range(int(first), int(end))
