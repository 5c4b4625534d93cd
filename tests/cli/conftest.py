"""The command line within this process, and a trace to give it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stallscope import cli
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stallscope", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return call


@pytest.fixture(scope="session")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's stall, in virtual time."""
    path = tmp_path_factory.mktemp("trace") / "stall.otlp.jsonl"
    record(load_scenario("reasoning_prompt", "demo"), path, seed=1001, executor="virtual")
    return path
