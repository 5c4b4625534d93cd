"""What is pushed as OTLP metrics says what /metrics says, and counts as a scrape only where it was taken."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality

from stallscope.watch.families import COVERAGE, INCIDENTS, RUNNING, TTFT
from stallscope.watch.otlp import Push
from tests.watch.pushed import receiver, values_of
from tests.watch.scoring import HOSTILE, START_NS, S, Scored, blame, buckets, of, scored


@contextmanager
def pushing(push: Push) -> Iterator[None]:
    thread = threading.Thread(target=push.run)
    thread.start()
    try:
        yield
    finally:
        push.end()
        thread.join()


def twice(it: Scored, url: str, before: Callable[[], None] = lambda: None) -> None:
    """Two pushes: the first one, and the last one."""
    with pushing(Push(it.scores, url, before=before, every_s=3600)):
        pass


def busy() -> Scored:
    it = scored()
    for name in HOSTILE:
        it.scores.blame(name, "newcomer", "kv_pinning", 0.1)
        it.scores.observe(TTFT, (name,), buckets(0, 2, 0, 1), 0.7)
    it.scores.set(COVERAGE, ("r0",), 0.5)
    it.scores.set(RUNNING, ("r0",), 3)
    it.scores.add(INCIDENTS, ("noisy_neighbor",), 1)
    it.clock.passes(10)
    return it


def test_a_push_says_what_a_scrape_says() -> None:
    pushed, scraped = busy(), busy()
    with receiver() as (url, bodies):
        twice(pushed, url)
    first, last = map(ExportMetricsServiceRequest.FromString, bodies)
    assert values_of(first) == scraped.scores.exposed()
    assert values_of(last) == scraped.scores.exposed()
    assert values_of(first)[blame("plain", "newcomer")] == 0
    assert values_of(last)[blame("plain", "newcomer")] == 0.1


def test_sums_are_cumulative_from_the_start_and_histograms_have_their_bounds() -> None:
    with receiver() as (url, bodies):
        twice(it := busy(), url)
    (scope,) = ExportMetricsServiceRequest.FromString(bodies[-1]).resource_metrics[0].scope_metrics
    metrics = {metric.name: metric for metric in scope.metrics}
    cumulative = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    blames, ttft, coverage = (metrics[name] for name in (blame("", "")[0], TTFT.name, COVERAGE.name))
    assert (blames.unit, ttft.unit, coverage.unit, metrics[RUNNING.name].unit) == ("s", "s", "1", "")
    assert (blames.sum.aggregation_temporality, blames.sum.is_monotonic) == (cumulative, True)
    assert ttft.histogram.aggregation_temporality == cumulative
    for point in (blames.sum.data_points[0], ttft.histogram.data_points[0]):
        assert (point.start_time_unix_nano, point.time_unix_nano) == (START_NS, START_NS + 10 * S)
    assert tuple(ttft.histogram.data_points[0].explicit_bounds) == it.scores.bounds[TTFT.name]
    assert not coverage.gauge.data_points[0].start_time_unix_nano


def test_a_push_that_failed_was_seen_by_nobody_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    it = busy()
    with caplog.at_level(logging.WARNING), receiver(503) as (url, bodies):
        twice(it, url)
        assert len(bodies) == 2
    assert values_of(ExportMetricsServiceRequest.FromString(bodies[-1]))[blame("plain", "newcomer")] == 0
    assert [record.getMessage() for record in caplog.records] == [
        f"{url} does not take metrics: 503 Service Unavailable"
    ]
    assert it.scrape()[blame("plain", "newcomer")] == 0


def test_metrics_that_the_receiver_did_not_want_are_said(caplog: pytest.LogCaptureFixture) -> None:
    answer = ExportMetricsServiceResponse()
    answer.partial_success.rejected_data_points = 7
    answer.partial_success.error_message = "too many series"
    with caplog.at_level(logging.WARNING), receiver(200, answer) as (url, _):
        twice(busy(), url)
    assert "did not take 7 of the metrics: too many series" in caplog.text


def test_a_key_comes_from_the_environment_and_counts_are_asked_for_before_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "api-key=general")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_HEADERS", "api-key=se%20cret")
    headers: list[dict[str, str]] = []
    asked: list[int] = []
    with receiver(headers=headers) as (url, bodies):
        twice(busy(), url, before=lambda: asked.append(len(bodies)))
    assert [one["api-key"] for one in headers] == ["se cret", "se cret"]
    assert asked == [0, 1]


def test_a_resource_says_who_pushes() -> None:
    with receiver() as (url, bodies):
        twice(busy(), url)
    resource = ExportMetricsServiceRequest.FromString(bodies[0]).resource_metrics[0].resource
    assert {one.key: one.value.string_value for one in resource.attributes}["service.name"] == "stallscope"
    assert of(RUNNING, "r0") in values_of(ExportMetricsServiceRequest.FromString(bodies[0]))
