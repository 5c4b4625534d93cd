"""The score as OTLP metrics, pushed over HTTP: for those who have a pipeline of OpenTelemetry and no scraper.

Names, labels and buckets are those of /metrics, unaltered, as OpenTelemetry's rules for Prometheus' metrics have it
(https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/#prometheus-metric-points-to-otlp):
what turns them into series again finds suffix and unit in the name and adds none. Units are UCUM's. Sums are
cumulative, so a push that failed needs no second try: the next one says all that it said.
"""

from __future__ import annotations

import gzip
import logging
import os
import socket
import threading
from collections.abc import Callable
from itertools import groupby

import httpx
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, InstrumentationScope, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import (
    AggregationTemporality,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.environment_variables import OTEL_EXPORTER_OTLP_HEADERS, OTEL_EXPORTER_OTLP_METRICS_HEADERS
from opentelemetry.sdk.resources import SERVICE_INSTANCE_ID, SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.util.re import parse_env_headers

from stallscope import __version__
from stallscope.watch.families import SCRAPE_S, Family, Kind
from stallscope.watch.scores import Scores
from stallscope.watch.snapshot import Point, Snapshot

log = logging.getLogger(__name__)

_WAIT_S = 5.0  # for an answer
_UCUM = {"": "", "seconds": "s", "ratio": "1"}
_CUMULATIVE = AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE


class Push:
    """Pushes to an OTLP/HTTP endpoint: at once, every few seconds, and at the end.

    ``before`` is called before each. What failed is logged once, until it works again. Headers, such as a key, are
    taken from ``OTEL_EXPORTER_OTLP_METRICS_HEADERS`` or ``OTEL_EXPORTER_OTLP_HEADERS``.
    """

    def __init__(
        self, scores: Scores, url: str, *, before: Callable[[], None] = lambda: None, every_s: float = SCRAPE_S
    ) -> None:
        self._scores, self._url, self._before, self._every_s = scores, url, before, every_s
        self._shown = str(httpx.URL(url).copy_with(username=None, password=None, query=None))  # no keys in a log
        self._ended = threading.Event()
        self._said = ""

    def run(self) -> None:
        """Blocks its thread until ``end``, and for one push more."""
        resource = Resource.create(
            {SERVICE_NAME: "stallscope", SERVICE_VERSION: __version__, SERVICE_INSTANCE_ID: socket.gethostname()}
        )
        keys = os.environ.get(OTEL_EXPORTER_OTLP_METRICS_HEADERS) or os.environ.get(OTEL_EXPORTER_OTLP_HEADERS) or ""
        headers = {"Content-Type": "application/x-protobuf", "Content-Encoding": "gzip", **parse_env_headers(keys)}
        with httpx.Client(timeout=_WAIT_S, headers=headers) as client:
            is_last = False
            while True:
                self._push(client, resource)
                if is_last:
                    return
                is_last = self._ended.wait(self._every_s)

    def end(self) -> None:
        """From any thread."""
        self._ended.set()

    def _push(self, client: httpx.Client, resource: Resource) -> None:
        self._before()
        snapshot = self._scores.snapshot()
        trouble = _sent(client, self._url, request_of(snapshot, resource))
        if not trouble:
            self._scores.seen(snapshot, self._url)
        if trouble != self._said:
            log.warning("%s %s", self._shown, trouble or "takes metrics again")
        self._said = trouble


def _sent(client: httpx.Client, url: str, request: ExportMetricsServiceRequest) -> str:
    """What went wrong, "" for nothing."""
    try:
        answer = client.post(url, content=gzip.compress(request.SerializeToString(), 1))
    except httpx.HTTPError as error:
        return f"can't be reached, metrics wait for it: {error or type(error).__name__}"
    if not answer.is_success:
        return f"does not take metrics: {answer.status_code} {answer.reason_phrase}"
    try:
        partial = ExportMetricsServiceResponse.FromString(answer.content).partial_success
    except DecodeError:
        return ""  # an answer in another form; 2xx says that it was taken
    if partial.rejected_data_points:
        return f"did not take {partial.rejected_data_points:,} of the metrics: {partial.error_message}"
    return ""


def request_of(snapshot: Snapshot, resource: Resource) -> ExportMetricsServiceRequest:
    """A snapshot as the body of a push."""
    metrics = [
        _metric(family, list(points), snapshot)
        for family, points in groupby(snapshot.points, key=lambda point: point.of.family)
    ]
    scope = InstrumentationScope(name="stallscope", version=__version__)
    of_resource = ResourceMetrics(scope_metrics=[ScopeMetrics(scope=scope, metrics=metrics)])
    of_resource.resource.attributes.extend(_attribute(name, str(value)) for name, value in resource.attributes.items())
    return ExportMetricsServiceRequest(resource_metrics=[of_resource])


def _metric(family: Family, points: list[Point], snapshot: Snapshot) -> Metric:
    metric = Metric(name=family.name, description=family.help, unit=_UCUM[family.unit])
    if family.kind is Kind.HISTOGRAM:
        metric.histogram.aggregation_temporality = _CUMULATIVE
        metric.histogram.data_points.extend(_histogram(point, snapshot) for point in points)
        return metric
    if family.kind is Kind.COUNTER:
        metric.sum.aggregation_temporality = _CUMULATIVE
        metric.sum.is_monotonic = True
    numbers = metric.sum if family.kind is Kind.COUNTER else metric.gauge
    numbers.data_points.extend(
        NumberDataPoint(
            attributes=_attributes(point),
            start_time_unix_nano=snapshot.start_ns if family.kind is Kind.COUNTER else 0,
            time_unix_nano=snapshot.when_ns,
            as_double=point.value,
        )
        for point in points
    )
    return metric


def _histogram(point: Point, snapshot: Snapshot) -> HistogramDataPoint:
    counts = [round(count) for count in point.counts.tolist()] if point.counts is not None else []
    return HistogramDataPoint(
        attributes=_attributes(point),
        start_time_unix_nano=snapshot.start_ns,
        time_unix_nano=snapshot.when_ns,
        count=sum(counts),
        sum=point.value,
        bucket_counts=counts,
        explicit_bounds=snapshot.bounds[point.of.family.name],
    )


def _attributes(point: Point) -> list[KeyValue]:
    return [_attribute(name, value) for name, value in point.of.named.items()]


def _attribute(name: str, value: str) -> KeyValue:
    return KeyValue(key=name, value=AnyValue(string_value=value))
