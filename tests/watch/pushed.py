"""A receiver of OTLP metrics on loopback, and what it was told as the series that Prometheus would make of it."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from prometheus_client.utils import floatToGoString

from stallscope.watch.samples import Series


@contextmanager
def receiver(
    status: int = 200, answer: ExportMetricsServiceResponse | None = None, headers: list[dict[str, str]] | None = None
) -> Iterator[tuple[str, list[bytes]]]:
    """Its URL, and the bodies that came, decompressed; headers are added to a list that is given."""
    bodies: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if headers is not None:
                headers.append({name.lower(): value for name, value in self.headers.items()})
            assert self.headers["Content-Type"] == "application/x-protobuf"
            bodies.append(gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body)
            sent = (answer or ExportMetricsServiceResponse()).SerializeToString()
            self.send_response(status if self.path == "/v1/metrics" else 404)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/metrics", bodies
        finally:
            server.shutdown()
            thread.join()


def values_of(request: ExportMetricsServiceRequest) -> dict[Series, float]:
    """Series by the rules of OpenTelemetry for Prometheus: a unit and a ``_total`` that a name has already stay one."""
    found: dict[Series, float] = {}
    (resource,) = request.resource_metrics
    (scope,) = resource.scope_metrics
    for metric in scope.metrics:
        name = _named(metric.name, metric.unit, metric.sum.is_monotonic)
        for point in [*metric.sum.data_points, *metric.gauge.data_points]:
            found[name, tuple(sorted((one.key, one.value.string_value) for one in point.attributes))] = point.as_double
        for histogram in metric.histogram.data_points:
            labels = [(one.key, one.value.string_value) for one in histogram.attributes]
            edges = [*map(floatToGoString, histogram.explicit_bounds), "+Inf"]
            below = 0
            for edge, count in zip(edges, histogram.bucket_counts, strict=True):
                below += count
                found[f"{name}_bucket", tuple(sorted([*labels, ("le", edge)]))] = below
            found[f"{name}_count", tuple(sorted(labels))] = histogram.count
            found[f"{name}_sum", tuple(sorted(labels))] = histogram.sum
    return found


def _named(name: str, unit: str, is_counter: bool) -> str:
    parts = name.removesuffix("_total").split("_") if is_counter else name.split("_")
    full = {"s": "seconds", "1": "" if is_counter else "ratio", "": ""}[unit]
    if full and full not in parts:
        parts.append(full)
    return "_".join([*parts, "total"] if is_counter else parts)
