"""One replica of a trace, ready for analysis: requests and tenants as integer codes, timeline, ledger, partition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.diagnosis.ledger import Ledger, read_stretches
from stallscope.diagnosis.lives import Lives, read_states
from stallscope.diagnosis.partition import Partition
from stallscope.diagnosis.timeline import Ints, Timeline
from stallscope.trace import Trace

MOST_TENANTS = 50  # by tokens; the rest are analysed as one
OTHER = "(other)"
UNKNOWN = "(unknown)"

# Policies whose queue is served in the order of arrival.
FIRST_COME = ("fcfs", "prefill_first", "static")

_STEP_COLUMNS = ("step", "scheduled", "dispatched", "ready", "idle_ns")
_RESIDENCY_COLUMNS = ("request", "phase", "reason", "first_step", "last_step", "tokens", "context_start", "holder")
_REQUEST_COLUMNS = (
    "request", "tenant", "tenant_source", "arrival", "first_token", "end", "delivered", "prompt_tokens",
    "output_tokens", "state",
)  # fmt: skip
_CLIENT_NUMBERS = ("max_tokens", "cached_tokens", "priority")
_CLIENT_NAMES = ("finish_reason", "session", "predecessor", "retry_of")
BATCH_COLUMNS = ("batch_size", "running", "waiting", "prefill_tokens", "kv_used", "kv_cached", "kv_total")
_GAP_COLUMNS = ("request", "start", "length_ns", "count")


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
    there is none), seen_until (end, or the last sight), prompt_tokens, output_tokens, state. ``gaps``: request (code),
    start, length_ns, count. ``steps``: step, scheduled, dispatched, ready, idle_ns.
    """

    name: str
    tenants: tuple[str, ...]
    sources: tuple[str, ...]
    requests: pd.DataFrame
    gaps: pd.DataFrame
    partition: Partition
    trace: Trace

    @cached_property
    def steps(self) -> pd.DataFrame:
        return _steps(self.trace, self.name)

    @cached_property
    def batches(self) -> pd.DataFrame:
        """Of each of ``steps``: its columns in ``BATCH_COLUMNS`` (0: unknown)."""
        rows = _rows(self.trace, "steps", ("step", *BATCH_COLUMNS), self.name).sort_by("step")
        return pd.DataFrame({column: _ints(rows[column]) for column in BATCH_COLUMNS})

    @cached_property
    def clients(self) -> pd.DataFrame:
        """Of each of ``requests``: max_tokens, cached_tokens, priority (0 where unknown), and finish_reason, session,
        predecessor, retry_of ("" where there is none)."""
        rows = _rows(self.trace, "requests", ("arrival", *_CLIENT_NUMBERS, *_CLIENT_NAMES), self.name)
        rows = rows.take(np.argsort(_ints(rows["arrival"]), kind="stable"))
        names = {name: rows[name].cast(pa.string()).fill_null("").to_pandas().astype(object) for name in _CLIENT_NAMES}
        return pd.DataFrame({name: _ints(rows[name]) for name in _CLIENT_NUMBERS} | names)

    @cached_property
    def settings(self) -> dict[str, object]:
        """What the replica said of itself last; empty where it said nothing."""
        rows: list[dict[str, object]] = self.trace.replicas.filter(
            pc.equal(self.trace.replicas["replica"].cast(pa.string()), self.name)
        ).to_pylist()
        return rows[-1] if rows else {}

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
    for name in pc.unique(trace.columns("steps", ["replica"])["replica"].cast(pa.string())).to_pylist():
        yield _read(trace, name)


def _rows(trace: Trace, table: str, columns: Sequence[str], replica: str) -> pa.Table:
    """One replica's rows of a table of the trace."""
    read = trace.columns(table, ["replica", *columns])
    codes = _codes(read["replica"], pa.array([replica]))
    return (read.filter(codes == 0) if codes.any() else read).drop_columns("replica")


def _steps(trace: Trace, name: str) -> pd.DataFrame:
    steps = _rows(trace, "steps", _STEP_COLUMNS, name)
    if not _ascends(_ints(steps["step"])):
        steps = steps.sort_by("step")
    return pd.DataFrame({column: _ints(steps[column]) for column in _STEP_COLUMNS})


def _read(trace: Trace, name: str) -> Replica:
    raw = _rows(trace, "requests", _REQUEST_COLUMNS, name)
    raw = raw.take(np.argsort(_ints(raw["arrival"]), kind="stable"))
    arrival = _ints(raw["arrival"])
    timeline = Timeline.of_steps(_steps(trace, name), arrival)
    names = raw["request"].cast(pa.string()).combine_chunks()

    residency = _residency(trace, name, names)
    stretches = read_stretches(residency, timeline)
    state, taker = read_states(residency), residency["holder"].to_numpy()
    del residency
    last_sight = np.full(len(arrival), timeline.bounds[0])
    seen = stretches.last >= stretches.first
    np.maximum.at(last_sight, stretches.request[seen], timeline.end[stretches.last[seen]])
    end = _ints(raw["end"], -1)
    seen_until = np.where(end >= 0, end, np.maximum(last_sight, arrival))
    tenants, tenant_codes = _tenant_codes(raw)
    requests = pd.DataFrame(
        {
            "request": names.to_pandas(),
            "tenant": tenant_codes,
            "arrival": arrival,
            "first_token": _ints(raw["first_token"], -1),
            "end": end,
            "delivered": _ints(raw["delivered"], -1),
            "seen_until": seen_until,
            "prompt_tokens": _ints(raw["prompt_tokens"]),
            "output_tokens": _ints(raw["output_tokens"]),
            "state": raw["state"].to_pandas(),
        }
    )
    ledger = Ledger.of(timeline, stretches)
    lives = Lives(ledger, arrival, np.maximum(seen_until, arrival), state, taker, _serves_by_arrival(trace, name))
    sources = _commonest(raw["tenant_source"], tenant_codes, len(tenants))
    gaps = _gaps(trace, name, names)
    return Replica(name, tenants, sources, requests, gaps, Partition(ledger, lives), trace)


def _residency(trace: Trace, name: str, requests: pa.Array) -> pd.DataFrame:
    """Rows ordered by first step, with request and holder as codes (holder -1: none); of known requests only."""
    table = _rows(trace, "residency", _RESIDENCY_COLUMNS, name)
    columns = {
        "request": _codes(table["request"], requests),
        "holder": _codes(table["holder"], requests),
        "phase": table["phase"].to_pandas(),
        "reason": table["reason"].to_pandas(),
        **{column: _ints(table[column]) for column in ("first_step", "last_step", "tokens", "context_start")},
    }
    rows = pd.DataFrame(columns)
    if (rows["request"] < 0).any():
        rows = rows[rows["request"] >= 0]
    return rows if _ascends(rows["first_step"].to_numpy()) else rows.sort_values(["first_step", "request"])


def _gaps(trace: Trace, name: str, requests: pa.Array) -> pd.DataFrame:
    table = _rows(trace, "gaps", _GAP_COLUMNS, name)
    gaps = pd.DataFrame(
        {"request": _codes(table["request"], requests)} | {column: _ints(table[column]) for column in _GAP_COLUMNS[1:]}
    )
    known = gaps["request"] >= 0
    return gaps if known.all() else gaps[known].reset_index(drop=True)


def _codes(column: pa.ChunkedArray, names: pa.Array) -> Ints:
    """Position of each name of a dictionary-coded column among ``names`` (int32); -1 where it is not, or null."""
    found = []
    for chunk in column.chunks:
        code = pc.index_in(chunk.dictionary, value_set=names).fill_null(-1).to_numpy(zero_copy_only=False)
        found.append(np.append(code, np.int32(-1))[chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False)])
    codes: Ints = np.concatenate(found) if found else np.zeros(0, dtype=np.int32)
    return codes


def _ints(column: pa.ChunkedArray, null: int = 0) -> Ints:
    """As int64, ``null`` where there is none. (As floats, times would be off by up to 128 ns.)"""
    values: Ints = (column.fill_null(null) if column.null_count else column).to_numpy()
    return values


def _ascends(values: Ints) -> bool:
    return bool((values[1:] >= values[:-1]).all())


def _serves_by_arrival(trace: Trace, name: str) -> bool:
    """Whether the replica's queue is first come, first served; so is that of an engine that does not say."""
    policies = _rows(trace, "replicas", ["policy"], name)["policy"].drop_null().to_pylist()
    return all(policy in FIRST_COME for policy in policies)


def _tenant_codes(requests: pa.Table) -> tuple[tuple[str, ...], Ints]:
    """Tenants by their tokens, the largest first; all beyond ``MOST_TENANTS`` share one code."""
    codes, names = _coded(requests["tenant"], UNKNOWN)
    tokens = np.bincount(codes, _ints(requests["prompt_tokens"]) + _ints(requests["output_tokens"]), len(names))
    ranked = np.argsort(-tokens, kind="stable")
    rank = np.empty(len(names), dtype=np.int64)
    rank[ranked] = np.arange(len(names))
    if len(names) <= MOST_TENANTS:
        return tuple(names[code] for code in ranked), rank[codes]
    kept = tuple(names[code] for code in ranked[: MOST_TENANTS - 1])
    return (*kept, OTHER), np.minimum(rank, len(kept))[codes]


def _commonest(column: pa.ChunkedArray, group: Ints, groups: int) -> tuple[str, ...]:
    """In each of ``groups`` groups, the name that occurs most; "" counts where there is none."""
    codes, names = _coded(column, "")
    pairs, counts = np.unique(group * max(len(names), 1) + codes, return_counts=True)
    rising = pairs[np.argsort(counts, kind="stable")].tolist()
    most = {pair // len(names): names[pair % len(names)] for pair in rising}
    return tuple(most.get(code, "") for code in range(groups))


def _coded(column: pa.ChunkedArray, null: str) -> tuple[Ints, list[str]]:
    """A dictionary-coded column as codes of the names that occur in it, which are sorted; ``null`` stands for none."""
    coded = column.unify_dictionaries().combine_chunks()
    positions = coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64) + 1
    words = np.array([null, *coded.dictionary.to_pylist()], dtype=object)
    used = np.flatnonzero(np.bincount(positions, minlength=len(words)))
    names, code = np.unique(words[used], return_inverse=True)
    code_of = np.zeros(len(words), dtype=np.int64)
    code_of[used] = code
    return code_of[positions], names.tolist()
