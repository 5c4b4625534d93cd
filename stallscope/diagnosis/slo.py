"""Service-level objectives as a user gives them: ``ttft=500ms@p99``, for one tenant ``chat:itl=100ms@p99``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from stallscope.diagnosis.metrics import METRICS
from stallscope.errors import UsageError
from stallscope.trace import Trace

_UNITS_NS = {"us": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000}
_LIMIT = re.compile(r"(?P<amount>\d+(\.\d+)?)(?P<unit>us|ms|s|m)@p(?P<percent>\d+(\.\d+)?)")
_EXAMPLE = "write METRIC=LIMIT@PERCENTILE, such as ttft=500ms@p99, or chat:itl=100ms@p99 for the tenant chat"


@dataclass(frozen=True)
class Slo:
    """``quantile`` of ``metric`` (ttft, itl) shall not exceed ``limit_ns``: for ``tenant``, or (None) for each."""

    tenant: str | None
    metric: str
    limit_ns: int
    quantile: float


def parse_slo(text: str) -> Slo:
    """The objective that ``text`` says; a tenant's name may hold anything. Raises UsageError."""
    subject, _, limit = text.rpartition("=")
    named, colon, metric = subject.rpartition(":")
    if metric not in METRICS:
        raise UsageError(f"SLO {text!r}: {metric!r} is no metric ({', '.join(METRICS)}); {_EXAMPLE}")
    found = _LIMIT.fullmatch(limit)
    if found is None:
        raise UsageError(f"SLO {text!r}: {limit!r} is no limit at a percentile; {_EXAMPLE}")
    limit_ns = round(float(found["amount"]) * _UNITS_NS[found["unit"]])
    percent = float(found["percent"])
    if not limit_ns or not 0 < percent < 100:
        raise UsageError(f"SLO {text!r}: the limit must be above 0, the percentile between p0 and p100; {_EXAMPLE}")
    return Slo(named if colon else None, metric, limit_ns, percent / 100)


def check_tenants(trace: Trace, slos: Sequence[Slo]) -> None:
    """Raises UsageError where an objective is for a tenant that the trace doesn't have."""
    asked = [slo.tenant for slo in slos if slo.tenant is not None]
    if not asked:
        return
    known = [str(name) for name in pc.unique(trace.requests["tenant"].cast(pa.string())).to_pylist()]
    for tenant in asked:
        if tenant not in known:
            raise UsageError(f"SLO for {tenant!r}: the trace has no such tenant, but {', '.join(known[:10])}")


def limits_of(slos: Sequence[Slo], tenants: Sequence[str]) -> dict[tuple[int, int], Slo]:
    """The objective of each (tenant's code, metric's code) that has one; one for a tenant goes before one for all."""
    found = {}
    for slo in sorted(slos, key=lambda one: one.tenant is not None):
        for code, tenant in enumerate(tenants):
            if slo.tenant in (None, tenant):
                found[code, METRICS.index(slo.metric)] = slo
    return found
