"""SLOs as users write them."""

from __future__ import annotations

import pytest

from stallscope.diagnosis.slo import Slo, parse_slo
from stallscope.errors import UsageError


@pytest.mark.parametrize(
    ("text", "slo"),
    [
        ("ttft=500ms@p99", Slo(None, "ttft", 500_000_000, 0.99)),
        ("itl=0.1s@p99.9", Slo(None, "itl", 100_000_000, 0.999)),
        ("chat:itl=100ms@p90", Slo("chat", "itl", 100_000_000, 0.9)),
        ("team:a=b:ttft=2m@p50", Slo("team:a=b", "ttft", 120_000_000_000, 0.5)),
        (":ttft=800us@p50", Slo("", "ttft", 800_000, 0.5)),
    ],
)
def test_metric_limit_percentile_and_tenant_are_read(text: str, slo: Slo) -> None:
    read = parse_slo(text)
    assert (read.tenant, read.metric, read.limit_ns) == (slo.tenant, slo.metric, slo.limit_ns)
    assert read.quantile == pytest.approx(slo.quantile)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "'' is no metric"),
        ("tpot=5ms@p99", "'tpot' is no metric (ttft, itl, delivery)"),
        ("ttft", "'' is no metric"),
        ("ttft=500@p99", "'500@p99' is no limit at a percentile"),
        ("ttft=500ms", "'500ms' is no limit at a percentile"),
        ("ttft=500ms@99", "no limit at a percentile"),
        ("ttft=-1s@p99", "no limit at a percentile"),
        ("ttft=0ms@p99", "must be above 0"),
        ("ttft=1s@p100", "between p0 and p100"),
        ("ttft=1s@p0", "between p0 and p100"),
    ],
)
def test_a_mistake_is_one_line_with_an_example(text: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_slo(text)
    assert says in str(error.value)
    assert "such as ttft=500ms@p99" in str(error.value)
    assert "\n" not in str(error.value)
