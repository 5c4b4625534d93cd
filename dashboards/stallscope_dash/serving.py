"""Serves the app on a trace until it is interrupted."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from urllib.parse import quote

import typer
import waitress

from stallscope.diagnosis import diagnose
from stallscope.errors import UsageError
from stallscope_dash.app import make_app
from stallscope_dash.recording import Recording, opened
from stallscope_dash.security import is_loopback, new_token, protect

_THREADS = 8  # a page asks for all its parts at once
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def serve(trace: Path, *, host: str, port: int, token: str | None) -> None:
    """Listens before anything is read, and says where. Raises UsageError where it can't listen."""
    local = is_loopback(host)
    if token is None and not local:
        token = new_token()
    listening = _listen(host, port)
    recording = Recording(
        trace, opened(trace), lambda read, advance: diagnose(read, replay=False, remedies=False, progress=advance)
    )
    app = make_app(recording)
    protect(app.server, app.csp_hashes(), token, _LOOPBACK if local else ())
    shown = f"[{host}]" if ":" in host else host
    link = f"http://{shown}:{listening.getsockname()[1]}/" + (f"?token={quote(token)}" if token else "")
    typer.echo(f"{trace.name}: {link}  (Ctrl-C ends it)", err=True)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a page asks for more at once than there are threads
    waitress.serve(app.server, sockets=[listening], threads=_THREADS, ident=None)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        where = f"--host {host} --port {port}"
        raise UsageError(f"{where}: cannot listen there ({error.strerror}); --port 0 takes a free one") from error
    return listening
