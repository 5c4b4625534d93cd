"""A real Prometheus and a real Alertmanager on loopback, something for the one to scrape, and whom the other notifies.

Each is a context manager on a free port, with its data in a folder of the test's, and ends with the ``with`` block,
whatever happens in it. What is waited for is polled, with a deadline.
"""

from __future__ import annotations

import email
import json
import os
import shutil
import socket
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import EmailMessage
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
import yaml

PROMETHEUS = shutil.which("prometheus")
ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
AMTOOL = shutil.which("amtool")
NEEDS_PROMETHEUS = pytest.mark.skipif(
    PROMETHEUS is None, reason="prometheus is absent (Debian: apt install prometheus)"
)
NEEDS_ALERTMANAGER = pytest.mark.skipif(
    ALERTMANAGER is None or AMTOOL is None,
    reason="Alertmanager is absent (Debian: apt install prometheus-alertmanager)",
)
WAIT_S = 30.0
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

Found = TypeVar("Found")


def wait_for(look: Callable[[], Found], what: str, within_s: float = WAIT_S) -> Found:
    """What ``look`` finds, once that is something; AssertionError where it is nothing for too long."""
    until = time.monotonic() + within_s
    while not (found := look()):
        assert time.monotonic() < until, f"no {what} within {within_s:g} s"
        time.sleep(0.05)
    return found


# --- Prometheus and Alertmanager ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    """One of the two, ready."""

    url: str
    client: httpx.Client

    def get(self, path: str, **asked: str) -> Any:
        answer = self.client.get(self.url + path, params=asked)
        assert answer.status_code == 200, answer.text
        return answer.json()


@dataclass(frozen=True)
class Prometheus(Server):
    def alerts(self, name: str, state: str = "firing") -> list[dict[str, Any]]:
        """Alerts of one name, as ``/api/v1/alerts`` has them."""
        found = self.get("/api/v1/alerts")["data"]["alerts"]
        return [one for one in found if one["labels"]["alertname"] == name and one["state"] == state]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Labels and values of an instant query."""
        found = self.get("/api/v1/query", query=expr)["data"]["result"]
        return [(one["metric"], float(one["value"][1])) for one in found]


@dataclass(frozen=True)
class Alertmanager(Server):
    def fire(self, *alerts: Mapping[str, object]) -> None:
        """Alerts as a Prometheus would send them."""
        answer = self.client.post(f"{self.url}/api/v2/alerts", json=alerts)
        assert answer.status_code == 200, answer.text

    def alerts(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.get("/api/v2/alerts")
        return found


@contextmanager
def prometheus(folder: Path, config: Mapping[str, object]) -> Iterator[Prometheus]:
    """A Prometheus with this configuration, its data in ``folder``."""
    assert PROMETHEUS is not None
    (folder / "prometheus.yml").write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    command = [PROMETHEUS, f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/prometheus"]
    with _serving(command, folder / "prometheus.log") as url, httpx.Client(timeout=WAIT_S) as client:
        yield Prometheus(url, client)


@contextmanager
def alertmanager(folder: Path, config: Mapping[str, object]) -> Iterator[Alertmanager]:
    """An Alertmanager with this configuration, its data in ``folder``; alone, not one of a cluster."""
    assert ALERTMANAGER is not None
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    command = [ALERTMANAGER, f"--config.file={folder}/alertmanager.yml", f"--storage.path={folder}/alertmanager"]
    alone = "--cluster.listen-address="
    with _serving([*command, alone], folder / "alertmanager.log") as url, httpx.Client(timeout=WAIT_S) as client:
        yield Alertmanager(url, client)


@contextmanager
def _serving(command: list[str], log: Path) -> Iterator[str]:
    """The address of a server that is ready; it is ended at the end, and killed if it does not."""
    address = f"127.0.0.1:{free_port()}"
    with log.open("wb") as said:
        command = [*command, f"--web.listen-address={address}"]
        process = subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "TZ": "UTC"})
    try:

        def ready() -> bool:
            assert process.poll() is None, log.read_text(encoding="utf-8")
            try:
                return httpx.get(f"http://{address}/-/ready").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(ready, f"answer of {command[0]}")
        yield f"http://{address}"
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


# --- what is scraped, and who is notified -------------------------------------------------------------------------


@dataclass
class Exposition:
    """What a scrape gets: set ``text``."""

    text: str = "# EOF\n"
    port: int = 0


@contextmanager
def exposing() -> Iterator[Exposition]:
    """An exposition in OpenMetrics at ``/metrics``."""
    exposition = Exposition()

    class Handler(_Quiet):
        def do_GET(self) -> None:
            self.answer(exposition.text, OPENMETRICS)

    with _listening(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        exposition.port = port
        yield exposition


@dataclass
class Inbox:
    """What came over HTTP, as (path, JSON), in order."""

    port: int = 0
    bodies: list[tuple[str, Any]] = field(default_factory=list)

    def at(self, path: str) -> list[Any]:
        return [body for where, body in list(self.bodies) if where == path]


@contextmanager
def receiving() -> Iterator[Inbox]:
    """A receiver of webhooks, at any path: of Slack and PagerDuty too, when they are told so."""
    inbox = Inbox()

    class Handler(_Quiet):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            inbox.bodies.append((self.path, json.loads(body)))
            self.answer("ok", "text/plain")

    with _listening(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as port:
        inbox.port = port
        yield inbox


class _Quiet(BaseHTTPRequestHandler):
    def answer(self, text: str, content_type: str) -> None:
        body = text.encode()
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@dataclass
class Mailbox:
    """What came by SMTP, in order."""

    port: int = 0
    letters: list[EmailMessage] = field(default_factory=list)


@contextmanager
def mailbox() -> Iterator[Mailbox]:
    """A mail server that takes everything: as much of SMTP as a sender needs."""
    box = Mailbox()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.wfile.write(b"220 loopback\r\n")
            while line := self.rfile.readline():
                word = line[:4].upper().strip()
                if word == b"DATA":
                    self.wfile.write(b"354 go on\r\n")
                    lines = iter(self.rfile.readline, b".\r\n")
                    letter = b"".join(one.removeprefix(b".") if one.startswith(b"..") else one for one in lines)
                    message = email.message_from_bytes(letter, policy=default)
                    assert isinstance(message, EmailMessage)
                    box.letters.append(message)
                self.wfile.write(b"221 bye\r\n" if word == b"QUIT" else b"250 fine\r\n")
                if word == b"QUIT":
                    return

    with _listening(socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)) as port:
        box.port = port
        yield box


@contextmanager
def _listening(server: socketserver.TCPServer) -> Iterator[int]:
    server.daemon_threads = True  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
