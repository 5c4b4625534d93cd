"""``stallscope serve`` as its user meets it: a process of its own, signals, a trace of what was served."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import httpx
import pytest

pytest.importorskip("torch", reason="torch is not installed (extra: engine)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: engine)")

from stallscope import cli
from stallscope.trace import read_trace
from stallscope_engine.server.serve import listen

WAIT_S = 60.0


@contextmanager
def served(*arguments: str | Path) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A ``stallscope serve`` that is ready, on a free port."""
    command = [sys.executable, "-m", "stallscope.cli", "serve", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        found = re.search(r"http://\S+:\d+", ready)
        assert found, (ready, process.communicate())
        with httpx.Client(base_url=found[0], timeout=WAIT_S) as client:
            yield process, client
    finally:
        process.kill()
        process.wait()


def stream(client: httpx.Client, lines: list[str], **body: object) -> Thread:
    """A client in a thread that writes its events to ``lines``; returns once the first is there."""

    def read() -> None:
        asked = {"prompt": [5] * 20, "ignore_eos": True, "stream": True, **body}
        # The server may end in the middle of it.
        with suppress(httpx.TransportError), client.stream("POST", "/v1/completions", json=asked) as answer:
            lines.extend(line for line in answer.iter_lines() if line)

    thread = Thread(target=read)
    thread.start()
    eventually(lambda: running_requests(client) == 1)
    return thread


def running_requests(client: httpx.Client) -> float:
    found = re.search(r"^vllm:num_requests_running\S+ (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert found
    return float(found[1])


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.01)


def test_sigterm_lets_running_requests_finish_and_refuses_new_ones(tmp_path: Path) -> None:
    trace = tmp_path / "served.otlp.jsonl"
    with served("-o", trace) as (process, client):
        lines: list[str] = []
        reader = stream(client, lines, max_tokens=300, user="chat")
        process.send_signal(signal.SIGTERM)
        eventually(lambda: client.get("/health").status_code == 503)
        refused = client.post("/v1/completions", json={"prompt": [5]})
        assert refused.status_code == 503
        assert refused.headers["Connection"] == "close"
        assert "shutting down" in refused.json()["error"]["message"]
        reader.join(WAIT_S)
        assert lines[-1] == "data: [DONE]"
        assert len(lines) == 301
        assert process.wait(WAIT_S) == 0
    (request,) = read_trace(trace).requests.to_pylist()
    assert (request["tenant"], request["tenant_source"], request["output_tokens"]) == ("chat", "claim:user", 300)
    assert request["finish_reason"] == "length"
    assert request["delivered"] > request["end"]


def test_requests_that_outlast_the_drain_are_ended_with_a_reason(tmp_path: Path) -> None:
    with served("--drain-timeout", "0.2", "-o", tmp_path / "served.otlp.jsonl.gz") as (process, client):
        lines: list[str] = []
        reader = stream(client, lines, max_tokens=30_000)
        process.send_signal(signal.SIGINT)
        reader.join(WAIT_S)
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "shut_down"
        assert process.wait(WAIT_S) == 0
    (request,) = read_trace(tmp_path / "served.otlp.jsonl.gz").requests.to_pylist()
    assert request["finish_reason"] == "abort"


def test_a_second_signal_ends_at_once_and_new_keys_are_read_at_sighup(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("key-a: {tenant: chat}\n")
    with served("--api-keys", keys) as (process, client):
        client.headers["Authorization"] = "Bearer key-a"
        assert client.get("/v1/models").status_code == 200
        keys.write_text("key-b: {tenant: chat}\n")
        process.send_signal(signal.SIGHUP)
        eventually(lambda: client.get("/v1/models").status_code == 401)
        keys.write_text("{")
        process.send_signal(signal.SIGHUP)  # a broken file changes nothing
        client.headers["Authorization"] = "Bearer key-b"
        reader = stream(client, [], max_tokens=2000)
        process.send_signal(signal.SIGTERM)
        eventually(lambda: client.get("/health").status_code == 503)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 128 + signal.SIGTERM
        assert process.stderr is not None
        said = process.stderr.read()
        assert "neither YAML nor JSON; write one KEY" in said
        assert "Traceback" not in said
        reader.join(WAIT_S)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "--api-keys"),
        (["--host", "nowhere.invalid"], "nowhere.invalid"),
        (["--port", "TAKEN"], "can't listen"),
        (["--api-keys", "missing.yaml"], "missing.yaml"),
        (["--api-keys", "wrong.yaml"], "entry 1"),
        (["--model", "gpt-9"], "gpt-9"),
        (["-o", "exists.otlp.jsonl"], "--force"),
        (["-o", "trace.txt"], "trace.txt"),
        (["-o", "wrong.yaml/trace.otlp.jsonl"], "wrong.yaml"),
    ],
)
def test_what_can_not_be_served_is_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("secret: chat\n")
    Path("exists.otlp.jsonl").write_text("")
    with listen("127.0.0.1", 0, has_keys=False) as taken:
        port = str(taken.getsockname()[1])
        arguments = [argument.replace("TAKEN", port) for argument in arguments]
        monkeypatch.setattr(sys, "argv", ["stallscope", "serve", "--port", "0", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    written = capsys.readouterr()
    assert (ended.value.code, written.out) == (2, "")
    assert says in written.err
    assert "secret" not in written.err
    assert len(written.err.splitlines()) == 1
    assert Path("exists.otlp.jsonl").read_text() == ""
