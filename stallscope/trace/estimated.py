"""Requests alone to a whole trace (fidelity 1): steps and batches are estimates, which coverage says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.errors import UsageError
from stallscope.trace.findings import Finding
from stallscope.trace.gaps import NO_TOKENS, TokenTimes, gap_table, mean_gaps
from stallscope.trace.model import Trace
from stallscope.trace.reconstruct import estimate_clock, reconstruct, step_sums
from stallscope.trace.requests import NO_STEPS, told_stations
from stallscope.trace.residency import residency_table
from stallscope.trace.schema import TABLES
from stallscope.trace.tables import Column, encode, plain_schema, plain_table, same

FIDELITY_REQUESTS = 1


def trace_of_requests(requests: pa.Table, source: str, findings: Sequence[Finding]) -> Trace:
    """A trace of a table of requests (``schema.REQUESTS``). Raises UsageError where none says when it was scheduled and
    answered."""
    plain = requests.cast(plain_schema(TABLES["requests"]))
    parts = []
    for replica in pc.unique(plain["replica"]).to_pylist():
        mine = plain.filter(pc.equal(plain["replica"], replica)).sort_by(
            [("arrival", "ascending"), ("request", "ascending")]
        )
        models = pc.drop_null(mine["model"])
        told: dict[str, Column] = {
            "replica": [replica],
            "since": [pc.min(mine["arrival"]).as_py()],
            "model": [models[0].as_py() if len(models) else None],
        }
        parts.append(
            {"replicas": plain_table("replicas", told, 1), "requests": mine}
            | estimated_tables(replica, mine, NO_TOKENS)
        )
    if not any(part["steps"].num_rows for part in parts):
        raise UsageError(
            f"{source}: nothing says when a request was scheduled and answered; map scheduled and first_token"
        )
    return Trace(
        {name: encode(name, [part[name] for part in parts if name in part]) for name in TABLES}, source, tuple(findings)
    )


def estimated_tables(
    replica: str, requests: pa.Table, tokens: TokenTimes, *, kept: float = 1.0, block_size: int = 0
) -> dict[str, pa.Table]:
    """Steps, residency, gaps and coverage of one replica's requests (a plain table), as far as they tell.

    ``tokens``: those whose times are known; ``kept``: the share of requests that are there; ``block_size``: 0 where it
    is not known.
    """
    names, tenants = requests["request"].to_pylist(), requests["tenant"].to_pylist()
    gaps = gap_table(replica, names, [tokens], NO_STEPS, mean_gaps(requests, tokens))
    rows_of, stations = told_stations(requests)
    if not len(stations):
        return {"steps": plain_table("steps", {}, 0), "gaps": gaps}
    clock = estimate_clock(stations)
    numbers = np.arange(len(clock.start))
    rows = reconstruct(stations, clock, numbers, None)
    idle = np.zeros(len(numbers), dtype=np.int64)
    idle[1:] = clock.start[1:] - clock.ready[:-1]  # nobody was there between two steps that do not touch
    steps: dict[str, Column] = {
        "replica": same(replica, len(numbers)),
        "step": numbers,
        "scheduled": clock.start,
        "dispatched": clock.start,
        "ready": clock.ready,
        "idle_ns": idle,
        **step_sums(rows, numbers),
    }
    start, end = pc.min(requests["arrival"]).as_py(), pc.max(requests["end"]).as_py()
    seen = (replica, start, end, FIDELITY_REQUESTS, 0, 0, 0, kept)
    coverage: dict[str, Column] = {name: [value] for name, value in zip(TABLES["coverage"].names, seen, strict=True)}
    sizes = np.full(len(rows.request), block_size, dtype=np.int64)
    return {
        "steps": plain_table("steps", steps, len(numbers)),
        "residency": residency_table(replica, rows.of_requests(rows_of), names, tenants, sizes),
        "gaps": gaps,
        "coverage": plain_table("coverage", coverage, 1),
    }
