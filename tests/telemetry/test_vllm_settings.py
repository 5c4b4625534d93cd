"""What the environment says to the hook for vLLM, and what requests say of themselves."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stallscope_telemetry.records import RequestInfo
from stallscope_telemetry.vllm import settings

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def request(**fields: Any) -> SimpleNamespace:
    """With the attributes of vLLM's ``Request`` that are read."""
    usual: dict[str, Any] = {
        "request_id": "cmpl-7",
        "arrival_time": 12.5,
        "num_prompt_tokens": 40,
        "max_tokens": 8,
        "priority": 0,
        "sampling_params": SimpleNamespace(extra_args=None),
        "trace_headers": None,
        "lora_request": None,
        "session_id": None,
    }
    return SimpleNamespace(**(usual | fields))


def info(monkeypatch: pytest.MonkeyPatch, one: SimpleNamespace, tenant_from: str | None = None) -> RequestInfo:
    if tenant_from is None:
        monkeypatch.delenv("STALLSCOPE_TENANT_FROM", raising=False)
    else:
        monkeypatch.setenv("STALLSCOPE_TENANT_FROM", tenant_from)
    return settings.info_of(settings.tenants_from_environment(), one, 1)


EXTRA = SimpleNamespace(extra_args={"tenant": "chat", "team": "red"})
STATE = {"tracestate": "vendor=1, tenant=search", "traceparent": TRACEPARENT}
LORA = SimpleNamespace(lora_name="legal-v2")


@pytest.mark.parametrize(
    ("one", "tenant_from", "tenant", "source"),
    [
        (request(), None, "", ""),
        (request(sampling_params=EXTRA, trace_headers=STATE, lora_request=LORA), None, "chat", "claim:vllm_xargs"),
        (request(trace_headers=STATE, lora_request=LORA), None, "search", "claim:tracestate"),
        (request(lora_request=LORA), None, "legal-v2", "lora"),
        (request(sampling_params=EXTRA, lora_request=LORA), "lora,xargs:tenant", "legal-v2", "lora"),
        (request(sampling_params=EXTRA), "xargs:team", "red", "claim:vllm_xargs"),
        (request(request_id="cmpl-acme-7"), r"request_id:^cmpl-(\w+)-", "acme", "claim:request_id"),
        (request(request_id="7"), r"request_id:^cmpl-(\w+)-", "", ""),
        (request(sampling_params=None), None, "", ""),
        (request(sampling_params=SimpleNamespace(extra_args={"tenant": 5})), None, "5", "claim:vllm_xargs"),
    ],
)
def test_the_tenant_is_the_first_that_is_found(
    monkeypatch: pytest.MonkeyPatch, one: SimpleNamespace, tenant_from: str | None, tenant: str, source: str
) -> None:
    found = info(monkeypatch, one, tenant_from)
    assert (found.tenant, found.tenant_source) == (tenant, source)


def test_a_name_from_outside_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    one = request(sampling_params=SimpleNamespace(extra_args={"tenant": "x" * 100_000}))
    assert len(info(monkeypatch, one).tenant) == settings.MOST_TENANT_CHARACTERS


@pytest.mark.parametrize("wrong", ["header:x", "xargs:", "lora:x", "request_id:(", "request_id:x", ""])
def test_a_rule_that_is_none_is_said_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, wrong: str
) -> None:
    with caplog.at_level(logging.WARNING, logger=settings.log.name):
        found = info(monkeypatch, request(lora_request=LORA), f"{wrong},lora")
    assert found.tenant == "legal-v2"
    assert len(caplog.records) == 1
    assert "STALLSCOPE_TENANT_FROM" in caplog.text


def test_the_caller_is_the_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    found = info(monkeypatch, request(trace_headers=STATE))
    assert (found.trace_id, found.parent_span_id) == (0x4BF92F3577B34DA6A3CE929D0E0E4736, 0xF067AA0BA902B7)
    for damaged in ({"traceparent": "00-zz"}, {"traceparent": ""}, {}):
        assert info(monkeypatch, request(trace_headers=damaged)).trace_id == 0


def test_what_never_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    found = info(monkeypatch, request(session_id="s1", priority=3))
    assert (found.request_id, found.arrival_ns, found.prompt_tokens, found.max_tokens) == (
        "cmpl-7",
        12_500_000_000,
        40,
        8,
    )
    assert (found.session, found.priority, found.handle) == ("s1", 3, 1)


def test_what_vllm_adds_to_an_id_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert info(monkeypatch, request(request_id="cmpl-acme-7-0-9f0c12ab")).request_id == "cmpl-acme-7-0"


def test_telemetry_goes_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "STALLSCOPE_TRACE_DIR"):
        monkeypatch.delenv(name, raising=False)
    scheduler = SimpleNamespace(
        observability_config=SimpleNamespace(otlp_traces_endpoint=None),
        parallel_config=SimpleNamespace(data_parallel_rank=0),
    )
    assert settings.exporters(scheduler) == []
    monkeypatch.setenv("STALLSCOPE_TRACE_DIR", str(tmp_path))
    monkeypatch.setenv("STALLSCOPE_REPLICA", "a/b c")
    (exporter,) = settings.exporters(scheduler)
    exporter.shutdown()
    (written,) = tmp_path.iterdir()
    assert written.name.startswith("a_b_c-")
    assert settings.replica_name(1) == "a/b c"
