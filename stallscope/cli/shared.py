"""What the commands share: the console, progress, exit codes, and the choice of what runs batches."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallscope import asking
from stallscope.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from stallscope.trace import Trace
    from stallscope.workloads.replica import ExecutorName

PIPE_WIDTH = 120
FOUND = 3
INCONCLUSIVE = 4
_LENGTH = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
INTERRUPTED = 130  # as a shell says it of SIGINT

TenantLog = Annotated[
    list[str] | None,
    typer.Option(
        "--tenants",
        metavar="FILE",
        help="A gateway's log of whose request is whose (CSV, JSON lines, Parquet): FILE, or "
        "FILE:request=COLUMN,tenant=COLUMN; may be given again.",
    ),
]


class ExecutorChoice(StrEnum):
    """What runs the batches: the torch engine in real time, or virtual time by a cost model."""

    auto = "auto"
    torch = "torch"
    virtual = "virtual"


def length_s(option: str, text: str) -> float:
    """A length of time such as 15m, in s. Raises UsageError where it is none."""
    found = _LENGTH.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise UsageError(f"{option} {text}: give a time such as 90s, 15m, 1h or 1d")
    return float(found[1]) * _SECONDS[found[2]]


def console(*, for_file: bool = False) -> Console:
    """The console on stdout, or one without colours whose output is captured for a file."""
    from rich.console import Console

    # Into a pipe or file, nobody's window sets the width: wide enough that no table is cut.
    if for_file:
        return Console(highlight=False, width=PIPE_WIDTH, file=StringIO())
    return Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)


@contextmanager
def progress(what: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr where that is a terminal; yields what is to be told the share done, in 0..1."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)


def choose(executor: ExecutorChoice) -> ExecutorName:
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


def check_new(out: Path, force: bool) -> None:
    """Says before any work that a file could not be written after it."""
    if out.is_dir():
        raise UsageError(f"{out} is a folder; name a file in it")
    if out.exists() and not force:
        raise UsageError(f"{out} exists; give another name, or --force to overwrite it")
    if not out.parent.is_dir():
        raise UsageError(f"{out}: there is no folder {out.parent}; make it first")


def write(text: str, out: Path | None, what: str = "") -> None:
    """To stdout, or to a file; what is in that is told then, its size by default. Raises UsageError where it can't be
    written."""
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_parts(out, [text], what)


def write_parts(path: Path, parts: Iterable[str], what: str = "") -> None:
    """The same of a text that comes in parts, to a file."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(parts)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written ({error.strerror}); check the path and its rights") from error
    typer.echo(f"{path}: {what or f'{path.stat().st_size / 1e6:.2f} MB'}", err=True)


def read(path: Path, tenants: Sequence[str] | None = None) -> Trace:
    """The trace at a path, with tenants from gateways' logs where there are any; shows progress.

    What reading left out is for ``warn`` to say.
    """
    return asking.read(path, tenants or (), progress)


def warn(trace: Trace) -> None:
    """Says on stderr what reading left out."""
    from stallscope.views.words import printable

    for finding in trace.findings:
        typer.echo(f"warning: {printable(finding.line)}", err=True)
