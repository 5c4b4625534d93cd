"""What Prometheus scrapes has vLLM's names and adds up; tenants are bounded in number, and no counter falls."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="torch is not installed (extra: engine)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: engine)")

from prometheus_client.parser import text_string_to_metric_families

from stallscope_engine.server.metrics import MOST_TENANTS, OTHER, Histogram, TenantCounters
from stallscope_telemetry.records import RequestInfo
from tests.engine.server.running import Running, eventually, running

LABELS = '{engine="0",model_name="tiny"}'


@pytest.fixture
def live() -> Iterator[Running]:
    with running() as server:
        yield server


def test_counters_add_up_under_vllms_names(live: Running) -> None:
    for number in range(3):
        live.complete(prompt=[5] * (10 + number), max_tokens=4, user="chat")
    live.complete(prompt="abc", max_tokens=40, stop=[" ", "<", "e", "\ufffd"], temperature=1, user="search")
    families = {family.name: family for family in text_string_to_metric_families(live.client.get("/metrics").text)}
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency", "request_queue_time"):
        assert families[f"vllm:{name}_seconds"].type == "histogram"
    assert live.metric(f"vllm:num_requests_running{LABELS}") == 0
    assert live.metric(f"vllm:num_requests_waiting{LABELS}") == 0
    assert live.metric(f"vllm:kv_cache_usage_perc{LABELS}") == 0
    assert live.metric(f"vllm:prompt_tokens_total{LABELS}") == 36
    made = live.metric(f"vllm:generation_tokens_total{LABELS}")
    assert made > 12
    eventually(lambda: live.metric(f"vllm:e2e_request_latency_seconds_count{LABELS}") == 4)
    assert live.metric(f"vllm:time_to_first_token_seconds_count{LABELS}") == 4
    assert live.metric(f"vllm:request_queue_time_seconds_count{LABELS}") == 4
    assert live.metric(f"vllm:inter_token_latency_seconds_count{LABELS}") == made - 4
    tiny = '{engine="0",finished_reason="REASON",model_name="tiny"}'
    reasons = {
        name: live.metric(f"vllm:request_success_total{tiny.replace('REASON', name)}") for name in ("length", "stop")
    }
    assert reasons == {"length": 3, "stop": 1}
    assert live.metric('stallscope:tenant_prompt_tokens_total{model_name="tiny",tenant="chat"}') == 33
    assert live.metric('stallscope:tenant_generation_tokens_total{model_name="tiny",tenant="chat"}') == 12
    assert live.metric('stallscope:tenant_requests_total{model_name="tiny",tenant="search"}') == 1


def test_gauges_show_what_is_there_now(live: Running) -> None:
    with live.client.stream(
        "POST", "/v1/completions", json={"prompt": [5], "max_tokens": 2000, "ignore_eos": True, "stream": True}
    ):
        eventually(lambda: live.metric(f"vllm:num_requests_running{LABELS}") == 1)
        assert live.metric(f"vllm:kv_cache_usage_perc{LABELS}") > 0
    live.still_works()


@given(st.lists(st.floats(0, 100), max_size=50))
def test_a_histogram_counts_each_value_once_below_its_bound(values: list[float]) -> None:
    histogram = Histogram((0.5, 1.0, 50.0))
    for value in values:
        histogram.observe(value)
    buckets = histogram.buckets()
    assert [count for _, count in buckets] == [
        sum(value <= bound for value in values) for bound in (0.5, 1.0, 50.0, float("inf"))
    ]
    assert histogram.sum == pytest.approx(sum(values))


def info(tenant: str) -> RequestInfo:
    return RequestInfo(1, "r", 0, 1, 1, tenant)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60_000)), max_size=300))
def test_however_many_tenants_there_are_series_are_few_and_never_fall(uses: list[tuple[int, int]]) -> None:
    counters = TenantCounters()
    before: dict[str, float] = {}
    for tenant, tokens in uses:
        counters.add(info(f"t{tenant}"), "tokens", tokens, tokens)
        now = {name: sums["tokens"] for name, sums in counters.sums.items()}
        assert len(now) <= MOST_TENANTS + 1
        assert all(now[name] >= before[name] for name in now.keys() & before.keys())
        before = now


def test_a_tenant_that_uses_much_gets_series_of_its_own_late_as_it_comes() -> None:
    counters = TenantCounters()
    for number in range(MOST_TENANTS):
        counters.add(info(f"small-{number}"), "tokens", 10, 10)
    for _ in range(200):
        counters.add(info("large"), "tokens", 1000, 1000)
    assert "large" in counters.sums
    assert counters.sums["large"]["tokens"] + counters.sums[OTHER]["tokens"] == 200_000
