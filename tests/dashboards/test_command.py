"""``stallscope dashboard`` as its user types it."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.dashboards.browsing import ROOT

TRACE = ROOT / "sample_traces" / "healthy.otlp.jsonl.zst"


@contextmanager
def started(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and the link that it printed."""
    command = [sys.executable, "-m", "stallscope.cli", "dashboard", str(TRACE), "--port", "0", "--no-replay", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        assert said.startswith(f"{TRACE.name}: http://"), said
        yield process, said.removeprefix(f"{TRACE.name}: ").split("  ")[0]
    finally:
        process.kill()
        process.wait()


def test_on_loopback_it_asks_for_no_token_and_ends_with_an_interrupt() -> None:
    with started() as (process, link):
        answer = httpx.get(link, timeout=60)
        assert answer.status_code == 200
        assert "stallscope" in answer.text
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) in (0, 130)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_elsewhere_the_link_has_a_token_without_which_there_is_nothing() -> None:
    with started("--host", "0.0.0.0") as (_, link):
        plain, _, token = link.replace("0.0.0.0", "127.0.0.1").partition("?token=")
        assert len(token) >= 32
        assert httpx.get(plain, timeout=60).status_code == 401
        with httpx.Client(timeout=60, follow_redirects=True) as client:
            assert client.get(f"{plain}?token={token}").status_code == 200


def said_of(*arguments: str) -> str:
    command = [sys.executable, "-m", "stallscope.cli", "dashboard", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    return run.stderr


def test_what_is_not_there_is_said_before_anything_listens(tmp_path: Path) -> None:
    assert "no such file or folder" in said_of(str(tmp_path / "nothing.jsonl"))


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = said_of(str(TRACE), "--port", str(taken.getsockname()[1]))
    assert "cannot listen there" in said
    assert "--port 0 takes a free one" in said


@pytest.mark.parametrize("last", ["soon", "0s", "10"])
def test_a_length_that_is_none_is_refused(last: str) -> None:
    assert "--last" in said_of(str(TRACE), "--live", "--last", last)
