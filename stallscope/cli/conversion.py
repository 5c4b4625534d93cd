"""Commands that give a trace another form: convert, for other programs and to share, and sql, for any question."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from stallscope.asking import with_logs
from stallscope.cli.shared import TenantLog, check_new, console, progress, read, warn
from stallscope.errors import UsageError

if TYPE_CHECKING:
    from stallscope.trace import Trace

PERFETTO_SUFFIXES = (".pftrace", ".perfetto-trace")
OTLP_SUFFIXES = (".otlp.jsonl", ".otlp.jsonl.gz", ".otlp.jsonl.zst")


class Form(StrEnum):
    """What a trace becomes."""

    perfetto = "Perfetto"
    otlp = "OTLP"
    dataset = "Parquet"


class RowFormat(StrEnum):
    """How rows are written."""

    text = "text"
    csv = "csv"
    json = "json"


def convert(
    trace: Annotated[
        Path, typer.Argument(metavar="IN", help="A trace: file, folder, glob, URL, or - for standard input.")
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT",
            help="NAME.pftrace for ui.perfetto.dev, NAME.otlp.jsonl.zst (.gz, plain) for OTLP, or the name of a folder "
            "for a dataset in Parquet.",
        ),
    ],
    since: Annotated[
        str | None, typer.Option(help="From when on: 2026-01-31T14:05:00, 14:05, +30s (after the start), -5m.")
    ] = None,
    until: Annotated[str | None, typer.Option(help="Until when; as --since.")] = None,
    replica: Annotated[str | None, typer.Option(help="Only this replica.")] = None,
    tenants: TenantLog = None,
    mapping: Annotated[
        Path | None,
        typer.Option(
            help="YAML that says which columns of a table, or attributes of spans, make IN a list of requests."
        ),
    ] = None,
    anonymize: Annotated[
        bool,
        typer.Option("--anonymize", help="For sharing: tenants, requests, sessions, replicas become tenant-1, ..."),
    ] = False,
    no_analysis: Annotated[
        bool, typer.Option("--no-analysis", help="Perfetto: without incidents, and arrows to their victims.")
    ] = False,
    no_replay: Annotated[bool, typer.Option("--no-replay", help="Perfetto: faster, and less sure who did it.")] = False,
    append: Annotated[
        bool, typer.Option("--append", help="Add to the dataset OUT: what is later, or of another replica.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT if it exists.")] = False,
) -> None:
    """Write a trace in another form: for ui.perfetto.dev, as OTLP, or as a dataset in Parquet, which is read faster."""
    target = Path(out)
    form = _form_of(target, out)
    if form is not Form.perfetto and (no_analysis or no_replay):
        raise UsageError(f"--no-analysis and --no-replay are for Perfetto: {form} has no diagnosis in it")
    if append and (form is not Form.dataset or force or anonymize):
        raise UsageError("--append adds to a dataset: it goes with no other form, nor with --force nor --anonymize")
    if form is Form.dataset:
        _check_dataset(target, force, append)
    else:
        check_new(target, force)
    loaded = read(trace, tenants) if mapping is None else _mapped(trace, mapping, tenants)
    selected = _selected(loaded, since, until, replica, anonymize)
    if form is Form.perfetto:
        _write_perfetto(selected, target, analysis=not no_analysis, replay=not no_replay)
    elif form is Form.otlp:
        _write_otlp(selected, target)
    else:
        _write_dataset(selected, target, append)


def sql(
    trace: Annotated[Path, typer.Argument(help="A trace: file, folder, glob, URL, or - for standard input.")],
    query: Annotated[str, typer.Argument(metavar="SELECT", help='Such as "select tenant, count(*) from requests ..."')],
    output: Annotated[
        RowFormat, typer.Option("--format", help="text for people (500 rows), csv and json for all rows.")
    ] = RowFormat.text,
) -> None:
    """Ask a trace's tables in SQL, as DuckDB has it: steps, residency, requests, gaps and others.

    "show tables" and "describe steps" list them and their columns. Times are ns since the epoch.
    """
    from stallscope.reports.rows import MOST_ROWS, print_rows, write_csv, write_json
    from stallscope.trace.query import ask

    answer = ask(read(trace), query)
    if output is RowFormat.csv:
        write_csv(answer.columns, answer.rows, sys.stdout)
    elif output is RowFormat.json:
        write_json(answer.columns, answer.rows, sys.stdout)
    elif print_rows(answer.columns, answer.rows, console()):
        typer.echo(f"the first {MOST_ROWS} rows; --format csv has them all", err=True)


# --- convert ------------------------------------------------------------------------------------------------------


def _form_of(target: Path, written: str) -> Form:
    """By the name of OUT. Raises UsageError for a kind of file that is not written."""
    if target.suffix in PERFETTO_SUFFIXES:
        return Form.perfetto
    if target.name.endswith(OTLP_SUFFIXES) and not written.endswith("/"):
        return Form.otlp
    if target.suffix in ("", ".parquet") or written.endswith("/") or target.is_dir():
        return Form.dataset
    raise UsageError(
        f"{target}: nothing is written as {target.suffix}; give NAME{' or NAME'.join(PERFETTO_SUFFIXES)} for Perfetto, "
        f"NAME{OTLP_SUFFIXES[-1]} for OTLP, or NAME/ for a folder in Parquet"
    )


def _check_dataset(target: Path, force: bool, append: bool) -> None:
    """Says before any work that the folder could not be written after it."""
    from stallscope.trace.parquet import is_trace_folder

    if target.is_file():
        raise UsageError(f"{target} is a file; give the name of a folder")
    if not target.is_dir():
        check_new(target, force)
    elif any(target.iterdir()) and not is_trace_folder(target):
        raise UsageError(f"{target} has something other in it than a dataset; give another name")
    elif any(target.iterdir()) and not force and not append:
        raise UsageError(f"{target} exists; give another name, --append to add to it, or --force to overwrite it")


def _mapped(path: Path, mapping: Path, tenants: Sequence[str] | None) -> Trace:
    """A trace of a table of requests, or of spans that are none of ours."""
    from stallscope.trace.estimated import trace_of_requests
    from stallscope.trace.mapping import read_mapped

    with progress(f"reading {path.name}"):
        requests, findings = read_mapped(path, mapping)
        return with_logs(trace_of_requests(requests, str(path), findings), tenants or (), progress)


def _selected(loaded: Trace, since: str | None, until: str | None, replica: str | None, anonymize: bool) -> Trace:
    from stallscope.trace.rename import anonymized
    from stallscope.trace.select import select

    trace = select(loaded, since=since, until=until, replica=replica)
    warn(trace)
    return anonymized(trace) if anonymize else trace


def _write_perfetto(trace: Trace, target: Path, *, analysis: bool, replay: bool) -> None:
    from stallscope.diagnosis import diagnose
    from stallscope.reports.perfetto import write_perfetto

    diagnosis = None
    if analysis:
        with progress("looking for who did it") as advance:
            diagnosis = diagnose(trace, replay=replay, progress=advance)
    with _made_whole(target) as part, progress(f"writing {target.name}") as advance, part.open("wb") as file:
        write_perfetto(trace, diagnosis, file, advance)
    typer.echo(f"{target}: {target.stat().st_size / 1e6:.2f} MB; open it in https://ui.perfetto.dev", err=True)


def _write_otlp(trace: Trace, target: Path) -> None:
    from stallscope.trace.to_otlp import write_otlp

    with _made_whole(target) as part, progress(f"writing {target.name}") as advance:
        left_out = write_otlp(trace, part, lambda done, total: advance(done / max(total, 1)), named=target.name)
    if left_out:
        text = "stretches of batches are estimates beside others that are not, and are left out"
        typer.echo(f"warning: {text} ({left_out:,} times)", err=True)
    _say_size(trace, target)


def _write_dataset(trace: Trace, target: Path, append: bool) -> None:
    from stallscope.trace import append_parquet, write_parquet
    from stallscope.trace.lock import only_writer
    from stallscope.trace.parquet import is_trace_folder

    with progress(f"writing {target.name}") as advance:

        def told(done: int, total: int) -> None:
            advance(done / max(total, 1))

        if append and is_trace_folder(target):
            append_parquet(trace, target, told)
        else:
            # Of several that make the same dataset, one does, and the others add to it.
            with only_writer(target if target.is_dir() else target.parent):
                made = append and is_trace_folder(target)
                if not made:
                    with _made_whole(target) as part:
                        write_parquet(trace, part, told)
            if made:
                append_parquet(trace, target, told)
    _say_size(trace, target)


def _say_size(trace: Trace, target: Path) -> None:
    files = [target] if target.is_file() else target.rglob("*")
    size = sum(file.stat().st_size for file in files if file.is_file())
    typer.echo(f"{target}: {size / 1e6:.2f} MB, {trace.columns('steps', ['step']).num_rows:,} steps", err=True)


@contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """Where to write what is to be ``target``: it takes that name, and the place of what had it, once it is whole."""
    part, old = (target.with_name(f".{target.name}.{os.getpid()}.{what}") for what in ("part", "old"))
    try:
        yield part
        if target.is_dir():
            target.rename(old)
        part.replace(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror}); check the path and its rights") from error
    finally:
        part.unlink(missing_ok=True) if part.is_file() else shutil.rmtree(part, ignore_errors=True)
