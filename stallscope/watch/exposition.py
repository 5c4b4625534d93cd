"""A snapshot as text that Prometheus scrapes, by Prometheus' own client library: OpenMetrics 1.0, or the format before.

``_created`` is written for counters without labels only: all others are as old, Prometheus stores each as one more
series (2.42), and the budget is for what is of use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as open_metrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from stallscope.watch.families import Kind
from stallscope.watch.snapshot import Snapshot


@dataclass(frozen=True)
class _Families(Collector):
    snapshot: Snapshot

    def collect(self) -> Iterator[Metric]:
        for family, points in groupby(self.snapshot.points, key=lambda point: point.of.family):
            name = family.name.removesuffix("_total") if family.kind is Kind.COUNTER else family.name
            metric = Metric(name, family.help, family.kind.value, family.unit)
            metric.samples = [
                Sample(line, labels, value)
                for point in points
                for (line, labels), value in zip(point.of.samples, point.numbers(), strict=True)
            ]
            if family.kind is Kind.COUNTER and not family.labels:
                metric.samples.append(Sample(f"{name}_created", {}, self.snapshot.start_ns / 1e9))
            yield metric


def openmetrics(snapshot: Snapshot) -> bytes:
    """OpenMetrics 1.0 text, with ``# EOF``."""
    return bytes(open_metrics.generate_latest(_Families(snapshot)))


def classic(snapshot: Snapshot) -> bytes:
    """Prometheus' text format 0.0.4."""
    return bytes(generate_latest(_Families(snapshot)))


def negotiated(accept: str) -> tuple[Callable[[Snapshot], bytes], str]:
    """What writes the format that a scraper's Accept header asks for, and the content type of that."""
    encoder, content_type = choose_encoder(accept)
    return lambda snapshot: bytes(encoder(_Families(snapshot))), str(content_type)
