"""``vllm serve`` with the hook, as a user has it: installed with pip, one flag, asked over HTTP, ended by SIGTERM."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from stallscope.trace import read_trace
from stallscope_telemetry import names
from tests.vllm.serving import Received, Receiver, Served, environment_beside, serving, tiny_llama

VLLM_PYTHON = os.environ.get("STALLSCOPE_VLLM_PYTHON", "")
ROOT = Path(__file__).parents[2]
SCHEDULER = "stallscope_telemetry.vllm.StallscopeAsyncScheduler"

pytestmark = pytest.mark.skipif(
    not VLLM_PYTHON, reason="STALLSCOPE_VLLM_PYTHON names no Python of an environment with vLLM 0.32"
)


@dataclass(frozen=True)
class Installed:
    """vLLM's environment with the hook in it, and what pip said of it before and after."""

    python: Path
    before: set[str]
    after: set[str]
    complaints_before: set[str]
    complaints_after: set[str]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("environment")
    python = environment_beside(Path(VLLM_PYTHON), folder / "venv")
    before, complaints_before = _pip(python, "list", "--format=freeze"), _pip(python, "check")
    _pip(python, "install", "--quiet", str(ROOT / "telemetry"))
    return Installed(python, before, _pip(python, "list", "--format=freeze"), complaints_before, _pip(python, "check"))


def _pip(python: Path, *arguments: str) -> set[str]:
    ran = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", *arguments], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0 or arguments == ("check",), ran.stderr
    return set(ran.stdout.splitlines())


def test_installed_into_vllms_environment_it_brings_nothing_else(installed: Installed) -> None:
    assert installed.before, "pip sees vLLM's environment"
    assert {line.partition("==")[0] for line in installed.after - installed.before} == {"stallscope-telemetry"}
    assert installed.before <= installed.after
    assert installed.complaints_after == installed.complaints_before


@dataclass(frozen=True)
class Answer:
    """What a client got: the id that it had asked under, and how many tokens."""

    request_id: str
    tenant: str
    tokens: int
    is_whole: bool


@dataclass(frozen=True)
class Run:
    served: Served
    answers: list[Answer]
    received: list[Received]
    trace: Path


@pytest.fixture(scope="module")
def run(installed: Installed, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Some requests of three tenants to their end, then SIGTERM while others are being answered, which may end."""
    folder = tmp_path_factory.mktemp("served")
    receiver = Receiver()
    options = (
        "--scheduler-cls",
        SCHEDULER,
        "--max-model-len",
        "8192",
        "--max-num-seqs",
        "4",
        "--shutdown-timeout",
        "120",
    )
    tracing = ("--otlp-traces-endpoint", f"{receiver.endpoint}/v1/traces")
    with serving(
        installed.python,
        Path(VLLM_PYTHON),
        tiny_llama(folder),
        folder / "log",
        *options,
        *tracing,
        OTEL_EXPORTER_OTLP_ENDPOINT=receiver.endpoint,
        OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="http/protobuf",
        STALLSCOPE_REPLICA="vllm-0",
        STALLSCOPE_TRACE_DIR=str(folder / "traces"),
        STALLSCOPE_TENANT_FROM=r"xargs:tenant,tracestate:tenant,request_id:by-(\w+)-",
    ) as served:
        answers = asyncio.run(_traffic(served))
    receiver.close()
    (trace,) = (folder / "traces").iterdir()
    return Run(served, answers, list(receiver.spans()), trace)


async def _traffic(served: Served) -> list[Answer]:
    async with httpx.AsyncClient(base_url=served.url, timeout=120) as client:
        whole = [
            *(_ask(client, served, f"a{one}", "chat", 100, 30) for one in range(6)),
            *(_ask(client, served, f"b{one}", "search", 400, 10) for one in range(4)),
            _ask(client, served, "by-reports-0", "reports", 3000, 5),
        ]
        answers = await asyncio.gather(*whole)
        late = [asyncio.create_task(_ask(client, served, f"c{one}", "chat", 50, 200)) for one in range(2)]
        await asyncio.sleep(0.3)
        await asyncio.to_thread(served.stop)
        return answers + await asyncio.gather(*late)


async def _ask(client: httpx.AsyncClient, served: Served, name: str, tenant: str, prompt: int, most: int) -> Answer:
    """``chat`` says who it is in the body, ``search`` to the tracing, and of ``reports`` the gateway made the id."""
    draw = random.Random(name)
    body: dict[str, Any] = {
        "model": served.model,
        "prompt": [draw.randrange(3, 2000) for _ in range(prompt)],
        "max_tokens": most,
        "ignore_eos": True,
        "stream": True,
        "detokenize": False,
        "return_token_ids": True,
    }
    headers = {"X-Request-Id": name}
    if tenant == "chat":
        body["vllm_xargs"] = {"tenant": tenant}
    if tenant == "search":
        headers |= {"traceparent": f"00-{draw.getrandbits(128):032x}-{draw.getrandbits(64):016x}-01"}
        headers |= {"tracestate": f"tenant={tenant},other=thing"}
    tokens, is_whole = 0, False
    try:
        async with client.stream("POST", "/v1/completions", json=body, headers=headers) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    tokens += len(choice["token_ids"] or ())
                    is_whole = is_whole or choice["finish_reason"] == "length"
    except httpx.TransportError:
        pass  # the server is gone
    return Answer(name, tenant, tokens, is_whole)


def test_the_trace_has_every_request_that_was_answered(run: Run) -> None:
    trace = read_trace(run.trace)
    assert trace.findings == ()
    assert not trace.validate()
    whole = [answer for answer in run.answers if answer.is_whole]
    assert len(whole) == 13
    requests = {row["request"]: row for row in trace.requests.to_pylist()}
    for answer in whole:
        known = requests[f"cmpl-{answer.request_id}-0"]
        assert known["output_tokens"] == answer.tokens
        assert known["tenant"] == answer.tenant
        assert known["finish_reason"] == "length"
    sources = {row["tenant"]: row["tenant_source"] for row in requests.values()}
    assert sources == {"chat": "claim:vllm_xargs", "search": "claim:tracestate", "reports": "claim:request_id"}
    assert "slots" in set(trace.residency["reason"].to_pylist())


def test_sigterm_in_mid_run_loses_nothing_that_was_due(run: Run) -> None:
    assert run.served.exit_code == 0
    assert all(answer.is_whole for answer in run.answers)
    requests = read_trace(run.trace).requests.to_pandas().set_index("request")
    assert (requests["state"] == "finished").all()
    for answer in run.answers[-2:]:
        assert requests["output_tokens"][f"cmpl-{answer.request_id}-0"] == answer.tokens == 200


def test_what_was_sent_is_what_was_written(run: Run) -> None:
    trace = read_trace(run.trace)
    ours = [one for one in run.received if one.scope == names.SCOPE]
    sent = {one.text(names.REQUEST_ID) for one in ours if one.span.name == names.REQUEST_SPAN}
    assert sent == set(trace.requests["request"].to_pylist())
    assert sum(one.span.name == names.STEP_SPAN for one in ours) == len(trace.steps)
    assert {one.resource[names.REPLICA] for one in ours} == {"vllm-0"}


def test_vllms_own_spans_are_found_by_request_id_and_caller(run: Run) -> None:
    requests = [one for one in run.received if one.span.name == names.REQUEST_SPAN]
    ours = {one.text(names.REQUEST_ID): one.span for one in requests if one.scope == names.SCOPE}
    theirs = {one.text(names.REQUEST_ID): one.span for one in requests if one.scope != names.SCOPE}
    assert ours.keys() == theirs.keys()
    for name, span in ours.items():
        assert abs(span.start_time_unix_nano - theirs[name].start_time_unix_nano) < 1000
        assert span.parent_span_id == theirs[name].parent_span_id
        if span.parent_span_id:
            assert span.trace_id == theirs[name].trace_id
    assert sum(bool(span.parent_span_id) for span in ours.values()) == 4


@pytest.mark.parametrize("command", ["doctor", "analyze"])
def test_the_trace_can_be_analysed(run: Run, command: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "stallscope.cli", command, run.trace], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "vllm-0" in ran.stdout
