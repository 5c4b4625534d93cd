"""Serves the app on a trace until it is interrupted."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

import typer
import waitress

from stallscope import asking
from stallscope.asking import Asked, Stages
from stallscope.diagnosis import diagnose
from stallscope.diagnosis.model import Diagnosis
from stallscope.errors import UsageError
from stallscope.trace import Trace
from stallscope.trace.otlp import find_sources
from stallscope.trace.parquet import is_trace_folder
from stallscope.trace.read import read_recent
from stallscope.trace.rename import UnknownTenantError
from stallscope_dash.answers import diagnosed
from stallscope_dash.jobs import Job, Jobs
from stallscope_dash.recording import Advance, Recording
from stallscope_dash.security import is_loopback, new_token, protect

_THREADS = 8  # a page asks for all its parts at once
_BACKLOG = 64
_EVERYWHERE = ("0.0.0.0", "::")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_RENEW_S = 5.0  # from one look at a folder that grows to the next
_LOOK_S = 0.2  # between two looks at a job's progress


def serve(
    trace: Path, asked: Asked, *, save: bool, last_s: float | None, host: str, port: int, token: str | None
) -> None:
    """Listens before anything is read, and says where. Raises UsageError where it can't listen."""
    local = is_loopback(host)
    if token is None and not local:
        token = new_token()
    if not is_trace_folder(trace) and not (last_s is not None and trace.is_dir()):
        find_sources(trace)  # says at once what is not there; a folder that is followed may be empty yet
    if save:
        asking.saved(trace, asked).check()
    listening = _listen(host, port)
    recording = recording_at(trace, asked, save) if last_s is None else live_at(trace, asked, last_s)
    from stallscope_dash.app import make_app  # takes a while, in which the recording is being read

    app = make_app(recording)
    protect(app.server, app.csp_hashes(), token, _LOOPBACK if local else ())
    reached = socket.gethostname() if host in _EVERYWHERE else host  # how another machine may call this one
    shown = f"[{reached}]" if ":" in reached else reached
    link = f"http://{shown}:{listening.getsockname()[1]}/" + (f"?token={quote(token)}" if token else "")
    typer.echo(f"{trace.name}: {link}  (Ctrl-C ends it)", err=True)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a page asks for more at once than there are threads
    waitress.serve(app.server, sockets=[listening], threads=_THREADS, ident=None)


def recording_at(path: Path, asked: Asked, save: bool) -> Recording:
    """The recording at a path: diagnosed at once where that was kept, else by charges, and then by replay."""
    jobs = Jobs()

    def opened(advance: Advance) -> Trace:
        return _selected(asking.read(path, asked.tenants, _stages(advance)), asked)

    def kept_or_by_charges(trace: Trace, advance: Advance) -> Diagnosis:
        kept = asking.saved(path, asked).load()
        if kept is not None:
            return kept[0]
        quick = replace(asked, replay=False)
        return _followed(jobs.ask(diagnosed, path, quick, save and not asked.replay), advance)

    def kept_or_replayed(trace: Trace, advance: Advance) -> Diagnosis:
        kept = asking.saved(path, asked).load()
        return kept[0] if kept is not None else _followed(jobs.ask(diagnosed, path, asked, save), advance)

    diagnoses = (kept_or_by_charges, kept_or_replayed) if asked.replay else (kept_or_by_charges,)
    return Recording(path, asked, jobs, opened, diagnoses)


def live_at(folder: Path, asked: Asked, last_s: float) -> Recording:
    """The last seconds of a folder that is being written to, again and again; diagnosed by charges alone."""

    def opened(_: Advance) -> Trace:
        recent = asking.with_logs(read_recent(folder, last_s), asked.tenants, _stages(lambda _doing, _share: None))
        return _selected(recent, asked)

    def by_charges(trace: Trace, _: Advance) -> Diagnosis:
        return diagnose(trace, slos=asked.slos, replay=False, remedies=False)

    return Recording(folder, asked, Jobs(), opened, [by_charges], _RENEW_S)


def _selected(trace: Trace, asked: Asked) -> Trace:
    """The part that was asked for. Raises UsageError, which names no tenant to whoever may see one alone."""
    try:
        return asking.selected(trace, asked)
    except UnknownTenantError as error:
        typer.echo(f"note: {error}", err=True)
        raise UsageError(f"no tenant {asked.redact_for!r} in the trace; the terminal says which there are") from error


def _followed(job: Job[Diagnosis], advance: Advance) -> Diagnosis:
    """What a job finds; its progress is passed on. Raises StallscopeError where it finds nothing."""
    while not job.state.is_final:
        advance(job.progress.stage, job.progress.share)
        time.sleep(_LOOK_S)
    return job.result()


def _stages(advance: Advance) -> Stages:
    @contextmanager
    def begin(stage: str) -> Iterator[Callable[[float], None]]:
        advance(stage, 0.0)
        yield partial(advance, stage)

    return begin


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)  # who comes before the app is there, waits for it
    except OSError as error:
        where = f"--host {host} --port {port}"
        raise UsageError(f"{where}: cannot listen there ({error.strerror}); --port 0 takes a free one") from error
    return listening
