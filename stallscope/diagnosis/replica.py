"""One replica of a trace, ready for analysis: requests and tenants as integer codes, timeline, ledger, partition."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.diagnosis.ledger import Ledger, Stretches, read_stretches
from stallscope.diagnosis.lives import Lives, Small, read_states
from stallscope.diagnosis.partition import Partition
from stallscope.diagnosis.timeline import TIMELINE_COLUMNS, Ints, Mask, Timeline, narrow
from stallscope.trace import Trace
from stallscope.trace.reserved import UNKNOWN

MOST_TENANTS = 50  # by tokens; the rest are analysed as one
OTHER = "(other)"
REQUESTS_ONLY = 1  # the fidelity at which steps are estimates, too
BATCHES_SEEN = 3  # the fidelity from which on who was in each batch was seen, and need not be estimated

# Policies whose queue is served in the order of arrival.
FIRST_COME = ("fcfs", "prefill_first", "static")

_STEP_COLUMNS = (
    *TIMELINE_COLUMNS, "batch_size", "prefill_tokens", "decode_tokens", "running", "waiting", "kv_used", "kv_cached",
    "kv_total",
)  # fmt: skip
_RESIDENCY_COLUMNS = ("phase", "reason", "first_step", "last_step", "tokens", "context_start")
_REQUEST_COLUMNS = (
    "request", "tenant", "tenant_source", "arrival", "first_token", "end", "delivered", "prompt_tokens",
    "output_tokens", "state",
)  # fmt: skip
_CLIENT_NUMBERS = ("max_tokens", "cached_tokens", "prefix", "priority")
_CLIENT_NAMES = ("finish_reason", "session", "predecessor", "retry_of")
_GAP_COLUMNS = ("start", "length_ns", "count")


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
class RequestCodes:
    """The replica's code of each row of the trace's requests (int32; -1 for those of others) and, last, of no row."""

    of_row: Ints

    @staticmethod
    def of(trace: Trace, mine: Mask | None, order: Ints | None, count: int) -> RequestCodes:
        row = np.arange(count) if mine is None else np.flatnonzero(mine)
        of_row = np.full((count if mine is None else len(mine)) + 1, -1, dtype=np.int32)
        of_row[row if order is None else row[order]] = np.arange(count)
        return RequestCodes(of_row)

    def named(self, trace: Trace, table: str, column: str, rows: Mask | None) -> Ints:
        found = trace.request_rows(table, column)
        return self.of_row[found if rows is None else found[rows]]


@dataclass(frozen=True, eq=False)
class Replica:
    """One replica's tables with codes.

    ``requests`` (index = request code): request, tenant (code), arrival, first_token, end, delivered (ns; -1 where
    there is none), seen_until (end, or the last sight), prompt_tokens, output_tokens, state. ``gaps``: request (code),
    start, length_ns, count. ``fidelity``: the best of any stretch; below ``BATCHES_SEEN`` batches are estimates.
    ``beside``: the trace with the other replicas. ``kept_share``: of how many requests the spans were kept, as far as
    anything tells.
    """

    name: str
    tenants: tuple[str, ...]
    sources: tuple[str, ...]
    requests: pd.DataFrame
    partition: Partition
    trace: Trace
    beside: Trace
    request_codes: RequestCodes
    fidelity: int
    kept_share: float

    @cached_property
    def gaps(self) -> pd.DataFrame:
        return self.read_gaps()

    def read_gaps(self) -> pd.DataFrame:
        """``gaps``, for who needs them only once: they are not kept."""
        return _gaps(self.trace, self.name, self.request_codes)

    @cached_property
    def longest_gap(self) -> Ints:
        """The longest gap between two tokens of each of ``requests``, ns; -1 where there is none."""
        gaps = self.read_gaps()
        longest = np.full(len(self.requests), -1)
        np.maximum.at(longest, gaps["request"].to_numpy(), gaps["length_ns"].to_numpy())
        return longest

    def read_requests(self, columns: Sequence[str]) -> pa.Table:
        """Other columns of the table of requests, a row for each of ``requests``; they are not kept."""
        mine = _rows_of(self.trace, "requests", self.name)
        rows = _columns(self.trace, "requests", ("arrival", *columns), mine)
        return rows.take(np.argsort(_ints(rows["arrival"]), kind="stable"))

    def read_steps(self, columns: Sequence[str]) -> pd.DataFrame:
        """Other columns of the table of steps, in order, 0 where null; they are not kept."""
        return _steps(self.trace, self.name, ("step", *columns))

    def read_gpu(self, columns: Sequence[str], start_ns: int, end_ns: int) -> pa.Table:
        """Columns, "time" among them, of the samples of its GPUs from ``start_ns`` to before ``end_ns``; not kept."""
        near = self.trace.narrowed([self.name], start_ns, end_ns)
        samples = _columns(near, "gpu", columns, _rows_of(near, "gpu", self.name))
        return samples.filter((pc.field("time") >= start_ns) & (pc.field("time") < end_ns))

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Some columns of the table of steps, in order: those of its times, and how many did what."""
        return _steps(self.trace, self.name, _STEP_COLUMNS)

    @cached_property
    def clients(self) -> pd.DataFrame:
        """Of each of ``requests``: max_tokens, cached_tokens, prefix, priority (0 where unknown), and finish_reason,
        session, predecessor, retry_of ("" where there is none)."""
        rows = self.read_requests((*_CLIENT_NUMBERS, *_CLIENT_NAMES))
        names = {name: rows[name].cast(pa.string()).fill_null("").to_pandas().astype(object) for name in _CLIENT_NAMES}
        return pd.DataFrame({name: _ints(rows[name]) for name in _CLIENT_NUMBERS} | names)

    @cached_property
    def evictions(self) -> pd.DataFrame:
        """Cached blocks that were pushed out: time (ns), taker, owner (tenant codes), blocks; ordered by time."""
        mine = _rows_of(self.trace, "evictions", self.name)
        rows = _columns(self.trace, "evictions", ("step", "evicting_request", "owner_tenant", "blocks"), mine)
        code_of = pd.Series(self.tenant_of_request, index=self.requests["request"].to_numpy())
        taker = code_of.reindex(rows["evicting_request"].cast(pa.string()).to_pandas()).fillna(-1).to_numpy(np.int64)
        owner = rows["owner_tenant"].cast(pa.string()).to_pandas().map({n: c for c, n in enumerate(self.tenants)})
        position = np.searchsorted(self.steps["step"].to_numpy(np.int64), _ints(rows["step"]))
        position = np.minimum(position, len(self.timeline) - 1)
        found = pd.DataFrame(
            {
                "time": self.timeline.start[position],
                "taker": taker,
                "owner": owner.fillna(-1).to_numpy(np.int64),
                "blocks": _ints(rows["blocks"]),
            }
        )
        return found[(found["taker"] >= 0) & (found["owner"] >= 0)].sort_values("time", ignore_index=True)

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

    @property
    def timeline_ns(self) -> int:
        """How long the trace is."""
        return int(self.timeline.end[-1] - self.timeline.before[0])

    @cached_property
    def tenant_of_request(self) -> Ints:
        return self.requests["tenant"].to_numpy()

    @cached_property
    def first_tries(self) -> Mask:
        """Which of ``requests`` were not sent because one before them had failed."""
        rows = self.read_requests(["retry_of"])
        first: Mask = pc.equal(rows["retry_of"].cast(pa.string()).fill_null(""), "").to_numpy()
        return first

    def facts(self, request: int) -> RequestFacts:
        """The request with this code."""
        columns = (self.requests[field.name] for field in fields(RequestFacts))
        return RequestFacts(*(column.iloc[request : request + 1].to_list()[0] for column in columns))


def replicas(trace: Trace) -> Iterator[Replica]:
    """Each replica that has steps, one after the other."""
    for name in pc.unique(trace.columns("steps", ["replica"])["replica"].cast(pa.string())).to_pylist():
        yield replica_of(trace, name)


def replica_of(trace: Trace, name: str) -> Replica:
    """The replica with this name, which has steps."""
    return _read(trace.narrowed([name]), name, trace)


def _rows_of(trace: Trace, table: str, replica: str) -> Mask | None:
    """Which rows of a table are a replica's; None: all."""
    column = trace.columns(table, ["replica"])["replica"]
    mine = [_equals(chunk, replica) for chunk in column.chunks]
    return None if all(each.all() for each in mine) else np.concatenate(mine)


def _equals(chunk: pa.DictionaryArray, name: str) -> Mask:
    code = chunk.dictionary.to_pylist().index(name) if name in chunk.dictionary.to_pylist() else -2
    found: Mask = chunk.indices.fill_null(-1).to_numpy(zero_copy_only=False) == code
    return found


def _columns(trace: Trace, table: str, names: Sequence[str], rows: Mask | None) -> pa.Table:
    read = trace.columns(table, names)
    return read if rows is None else read.filter(pa.array(rows))


def _steps(trace: Trace, name: str, columns: Sequence[str]) -> pd.DataFrame:
    """Columns of a replica's steps, in order."""
    table = _columns(trace, "steps", columns, _rows_of(trace, "steps", name))
    if not _ascends(_ints(table["step"])):
        table = table.sort_by("step")
    return pd.DataFrame({column: _ints(table[column]) for column in columns}, copy=False)


def _read(trace: Trace, name: str, beside: Trace) -> Replica:
    mine = _rows_of(trace, "requests", name)
    raw = _columns(trace, "requests", _REQUEST_COLUMNS, mine)
    order = None if _ascends(_ints(raw["arrival"])) else np.argsort(_ints(raw["arrival"]), kind="stable")
    raw = raw if order is None else raw.take(order)
    codes = RequestCodes.of(trace, mine, order, len(raw))
    arrival = _ints(raw["arrival"])
    timeline = Timeline.of_steps(_steps(trace, name, TIMELINE_COLUMNS), arrival)
    stretches, state, taker = _residency(trace, name, codes, timeline)
    last_sight = np.full(len(arrival), timeline.bounds[0])
    seen = stretches.last >= stretches.first
    np.maximum.at(last_sight, stretches.request[seen], timeline.end[stretches.last[seen]])
    end = _ints(raw["end"], -1)
    seen_until = np.maximum(np.where(end >= 0, end, last_sight), arrival)
    tenants, tenant_codes = _tenant_codes(raw)
    requests = pd.DataFrame(
        {
            "request": raw["request"].cast(pa.string()).to_pandas(),
            "tenant": tenant_codes,
            "arrival": arrival,
            "first_token": _ints(raw["first_token"], -1),
            "end": end,
            "delivered": _ints(raw["delivered"], -1),
            "seen_until": seen_until,
            "prompt_tokens": _ints(raw["prompt_tokens"]),
            "output_tokens": _ints(raw["output_tokens"]),
            "state": raw["state"].to_pandas(),
        },
        copy=False,
    )
    sources = _commonest(raw["tenant_source"], tenant_codes, len(tenants))
    del raw
    coverage = trace.coverage.filter(pc.equal(trace.coverage["replica"].cast(pa.string()), name))
    fidelity = int(pc.max(coverage["fidelity"]).as_py() or BATCHES_SEEN)
    kept_share = float(pc.min(coverage["sampled_share"]).as_py() or 1.0)
    ledger = Ledger.of(timeline, stretches, estimated=fidelity == REQUESTS_ONLY)
    lives = Lives(ledger, arrival, seen_until, state, taker, _serves_by_arrival(trace, name))
    partition = Partition(ledger, lives)
    return Replica(name, tenants, sources, requests, partition, trace, beside, codes, fidelity, kept_share)


def _residency(trace: Trace, name: str, codes: RequestCodes, timeline: Timeline) -> tuple[Stretches, Small, Ints]:
    """Stretches of known requests, what each request is doing there, and who took its blocks (-1: nobody)."""
    mine = _rows_of(trace, "residency", name)
    table = _columns(trace, "residency", _RESIDENCY_COLUMNS, mine)
    request, holder = (codes.named(trace, "residency", column, mine) for column in ("request", "holder"))
    phase, reason = (table[column].to_pandas() for column in ("phase", "reason"))
    columns = (_ints(table[column]) for column in _RESIDENCY_COLUMNS[2:])
    stretches = read_stretches(timeline, request, phase, *columns)
    state = read_states(phase, reason, holder)
    if (request >= 0).all() and _ascends(stretches.first):
        return stretches, state, holder
    order = np.lexsort((request, stretches.first))
    order = order[request[order] >= 0]
    return stretches.take(order), state[order], holder[order]


def _gaps(trace: Trace, name: str, codes: RequestCodes) -> pd.DataFrame:
    mine = _rows_of(trace, "gaps", name)
    table = _columns(trace, "gaps", _GAP_COLUMNS, mine)
    columns = {"request": codes.named(trace, "gaps", "request", mine)} | {c: _ints(table[c]) for c in _GAP_COLUMNS}
    columns["count"] = narrow(columns["count"])
    gaps = pd.DataFrame(columns, copy=False)
    known = gaps["request"] >= 0
    return gaps if known.all() else gaps[known].reset_index(drop=True)


def _ints(column: pa.ChunkedArray, null: int = 0) -> Ints:
    """As int64, ``null`` where there is none. (As floats, times would be off by up to 128 ns.)"""
    values: Ints = (column.fill_null(null) if column.null_count else column).to_numpy()
    return values


def _ascends(values: Ints) -> bool:
    return bool((values[1:] >= values[:-1]).all())


def _serves_by_arrival(trace: Trace, name: str) -> bool:
    """Whether the replica's queue is first come, first served; so is that of an engine that does not say."""
    mine = trace.replicas.filter(pc.equal(trace.replicas["replica"].cast(pa.string()), name))
    return all(policy in FIRST_COME for policy in mine["policy"].drop_null().to_pylist())


def _tenant_codes(requests: pa.Table) -> tuple[tuple[str, ...], Ints]:
    """Tenants by their tokens, the largest first; all beyond ``MOST_TENANTS`` share one code."""
    codes, names = _coded(requests["tenant"], UNKNOWN)
    tokens = np.bincount(codes, _ints(requests["prompt_tokens"]) + _ints(requests["output_tokens"]), len(names))
    ranked = np.argsort(-tokens, kind="stable")
    rank = np.empty(len(names), dtype=np.int64)
    rank[ranked] = np.arange(len(names))
    if len(names) <= MOST_TENANTS:
        return tuple(names[code] for code in ranked), rank[codes].astype(np.int32)
    kept = tuple(names[code] for code in ranked[: MOST_TENANTS - 1])
    return (*kept, OTHER), np.minimum(rank, len(kept))[codes].astype(np.int32)


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
