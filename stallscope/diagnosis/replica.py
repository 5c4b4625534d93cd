"""One replica of a trace, ready for analysis: requests and tenants as integer codes, timeline, ledger, partition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.diagnosis.ledger import Ledger, read_stretches
from stallscope.diagnosis.lives import read_lives
from stallscope.diagnosis.partition import Partition
from stallscope.diagnosis.timeline import Ints, Timeline
from stallscope.trace import Trace

MOST_TENANTS = 50  # by tokens; the rest are analysed as one
OTHER = "(other)"

# Policies whose queue is served in the order of arrival; so is that of an engine that does not say.
FIRST_COME = ("fcfs", "prefill_first", "static")


@dataclass(frozen=True)
class RequestFacts:
    """One request, as reports show it; times in ns, -1 where there is none."""

    request: str
    tenant: int
    arrival: int
    first_token: int
    seen_until: int
    prompt_tokens: int
    output_tokens: int
    state: str


@dataclass(frozen=True, eq=False)
class Replica:
    """One replica's tables with codes.

    ``requests`` (index = request code): request, tenant (code), arrival, first_token, end, delivered (ns; -1 where
    there is none), seen_until (end, or the last sight), prompt_tokens, output_tokens, max_tokens, cached_tokens,
    priority (0 where unknown), state, and finish_reason, session, predecessor, retry_of ("" where there is none).
    ``gaps``: request (code), start, length_ns, count. ``settings``: its row of ``replicas``.
    """

    name: str
    tenants: tuple[str, ...]
    sources: tuple[str, ...]
    requests: pd.DataFrame
    gaps: pd.DataFrame
    steps: pd.DataFrame
    settings: dict[str, object]
    partition: Partition

    @property
    def ledger(self) -> Ledger:
        return self.partition.ledger

    @property
    def timeline(self) -> Timeline:
        return self.partition.ledger.timeline

    @cached_property
    def tenant_of_request(self) -> Ints:
        return self.requests["tenant"].to_numpy(np.int64)

    def facts(self, request: int) -> RequestFacts:
        """The request with this code."""
        columns = (self.requests[field.name] for field in fields(RequestFacts))
        return RequestFacts(*(column.iloc[request : request + 1].to_list()[0] for column in columns))


def replicas(trace: Trace) -> Iterator[Replica]:
    """Each replica that has steps, one after the other."""
    for name in pc.unique(trace.steps["replica"].cast(pa.string())).to_pylist():
        yield _read(trace, name)


def _rows(table: pa.Table, replica: str) -> pd.DataFrame:
    # Nullable integers: as floats, times would be off by up to 128 ns in each column with a null.
    kept = table.filter(pc.equal(table["replica"].cast(pa.string()), replica))
    frame: pd.DataFrame = kept.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get)
    return frame


def _read(trace: Trace, name: str) -> Replica:
    steps = _rows(trace.steps, name).sort_values("step", kind="stable").reset_index(drop=True)
    raw = _rows(trace.requests, name).sort_values("arrival", kind="stable").reset_index(drop=True)
    residency = _rows(trace.residency, name)
    gaps = _rows(trace.gaps, name)
    timeline = Timeline.of_steps(steps, raw["arrival"].to_numpy(np.int64))

    code_of = pd.Series(np.arange(len(raw)), index=raw["request"].astype(str).to_numpy())
    residency = residency[residency["request"].astype(str).isin(code_of.index)].reset_index(drop=True)
    gaps = gaps[gaps["request"].astype(str).isin(code_of.index)].reset_index(drop=True)
    gaps["request"] = code_of.reindex(gaps["request"].astype(str)).to_numpy(np.int64)
    residency["request"] = code_of.reindex(residency["request"].astype(str)).to_numpy(np.int64)
    holder = residency["holder"].astype(object)
    residency["holder"] = code_of.reindex(holder.to_numpy()).fillna(-1).to_numpy(np.int64)

    tenants, tenant_codes = _tenant_codes(raw)
    residency["tenant"] = tenant_codes[residency["request"].to_numpy()]
    stretches = read_stretches(residency, timeline)
    last_sight = np.full(len(raw), timeline.knots[0])
    np.maximum.at(last_sight, stretches.request, timeline.end[stretches.last])
    end = _times(raw["end"])
    requests = pd.DataFrame(
        {
            "request": raw["request"].astype(str),
            "tenant": tenant_codes,
            "arrival": raw["arrival"].astype(np.int64),
            "first_token": _times(raw["first_token"]),
            "end": end,
            "delivered": _times(raw["delivered"]),
            "seen_until": np.where(end >= 0, end, np.maximum(last_sight, raw["arrival"].to_numpy(np.int64))),
            "prompt_tokens": raw["prompt_tokens"].fillna(0).astype(np.int64),
            "output_tokens": raw["output_tokens"].fillna(0).astype(np.int64),
            "state": raw["state"].astype(str),
            **{name: raw[name].fillna(0).astype(np.int64) for name in ("max_tokens", "cached_tokens", "priority")},
            **{
                name: raw[name].astype(object).fillna("").astype(str)
                for name in ("finish_reason", "session", "predecessor", "retry_of")
            },
        }
    )
    life = requests[["arrival"]].assign(end=requests["seen_until"])
    ledger = Ledger(timeline, stretches)
    settings = _settings(trace, name)
    by_arrival = settings.get("policy") in (None, *FIRST_COME)
    partition = Partition(ledger, read_lives(ledger, life, residency, by_arrival))
    sources = _commonest(raw["tenant_source"].astype(object).fillna("").astype(str), tenant_codes, len(tenants))
    return Replica(name, tenants, sources, requests, gaps, steps, settings, partition)


def _settings(trace: Trace, name: str) -> dict[str, object]:
    """What the replica said of itself last; empty where it said nothing."""
    rows: list[dict[str, object]] = trace.replicas.filter(
        pc.equal(trace.replicas["replica"].cast(pa.string()), name)
    ).to_pylist()
    return rows[-1] if rows else {}


def _commonest(names: pd.Series[str], group: Ints, groups: int) -> tuple[str, ...]:
    """In each of ``groups`` groups, the name that occurs most."""
    counts = names.groupby([group, names.to_numpy()]).size().sort_values(kind="stable")
    last = {int(str(code)): str(name) for code, name in counts.index.to_list()}
    return tuple(last.get(code, "") for code in range(groups))


def _times(column: pd.Series[int]) -> Ints:
    return column.fillna(-1).to_numpy(np.int64).astype(np.int64)


def _tenant_codes(requests: pd.DataFrame) -> tuple[tuple[str, ...], Ints]:
    """Tenants by their tokens, the largest first; all beyond ``MOST_TENANTS`` share one code."""
    tokens = requests["prompt_tokens"].fillna(0) + requests["output_tokens"].fillna(0)
    names = requests["tenant"].astype(str)
    ranked = tokens.groupby(names.to_numpy()).sum().sort_values(ascending=False, kind="stable").index.to_list()
    kept = ranked if len(ranked) <= MOST_TENANTS else [*ranked[: MOST_TENANTS - 1], OTHER]
    code = {tenant: position for position, tenant in enumerate(kept)}
    return tuple(kept), np.array([code.get(tenant, len(kept) - 1) for tenant in names], dtype=np.int64)
