"""Invariants of a trace: what must hold between its tables, whatever it was read from.

All checks are vectorised over rows. A step's batch counts where coverage says that batches are known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.trace.findings import Finding

Tables = Mapping[str, pa.Table]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

_BETWEEN = "\x1f"  # a control character between replica and name


def validate(tables: Tables) -> list[Finding]:
    """Findings of all checks, none for a sound trace."""
    return [*check_times(tables), *check_blocks(tables), *check_requests(tables), *check_residency(tables)]


def check_times(tables: Tables) -> list[Finding]:
    """Steps end after they began, one after the other; requests pass their stations in order."""
    steps = tables["steps"]
    replica, order = _codes(steps.column("replica")), _ints(steps.column("step"))
    scheduled, dispatched, ready = (_ints(steps.column(name)) for name in ("scheduled", "dispatched", "ready"))

    def step_at(row: int) -> str:
        return f"{steps.column('replica')[row].as_py()} step {order[row]}"

    found = _found(
        "step_times",
        (scheduled > dispatched) | (dispatched > ready),
        step_at,
        "steps were not scheduled, dispatched and ready in this order",
    )
    same_replica = np.diff(replica) == 0
    asynchronous = _asynchronous(tables, steps.column("replica"))
    backwards = np.zeros(len(order), dtype=np.bool_)
    backwards[1:] = same_replica & (np.diff(scheduled) < 0)
    backwards[1:] |= same_replica & (np.diff(ready) <= 0) & ~asynchronous[1:]
    found += _found("times_backwards", backwards, step_at, "steps ended or began no later than the step before")

    requests = tables["requests"]
    stations = [requests.column(name) for name in ("arrival", "queued", "scheduled", "first_token", "end", "delivered")]
    wrong = np.zeros(requests.num_rows, dtype=np.bool_)
    latest = np.full(requests.num_rows, np.iinfo(np.int64).min)
    for station in stations:
        known = ~_nulls(station)
        time = _ints(station)
        wrong |= known & (time < latest)
        latest = np.where(known, np.maximum(latest, time), latest)
    return found + _found(
        "request_times",
        wrong,
        lambda row: f"{requests.column('replica')[row].as_py()} request {requests.column('request')[row].as_py()}",
        "requests did not arrive, queue, start, answer and end in this order",
    )


def check_blocks(tables: Tables) -> list[Finding]:
    """Blocks in use and cached blocks fit the KV cache."""
    steps = tables["steps"]
    total = steps.column("kv_total")
    over = ~_nulls(total) & (_ints(steps.column("kv_used")) + _ints(steps.column("kv_cached")) > _ints(total))
    return _found(
        "blocks_beyond_total",
        over,
        lambda row: f"{steps.column('replica')[row].as_py()} step {steps.column('step')[row].as_py()}",
        "steps hold more KV blocks than there are",
    )


def check_requests(tables: Tables) -> list[Finding]:
    """Every request and every holder that residency and gaps name is in the table of requests, once."""
    requests = _pairs(tables["requests"], "request")
    codes = _codes(requests)
    found = _found(
        "request_twice",
        np.bincount(codes, minlength=1)[codes] > 1,
        lambda row: _text(requests, row),
        "rows of requests share replica and id",
    )
    for table, column in (("residency", "request"), ("residency", "holder"), ("gaps", "request")):
        named = _pairs(tables[table], column)
        unknown = ~_bools(pc.is_in(named, value_set=requests)) & ~_nulls(named)
        where = partial(_text, named)
        found += _found("unknown_request", unknown, where, f"rows of {table} name a {column} that is no request")
    return found


def check_residency(tables: Tables) -> list[Finding]:
    """Rows of a request do not overlap; in steps whose batch is known, rows add up to what the step says."""
    residency = tables["residency"]
    pairs = _pairs(residency, "request")
    request, first, last = _codes(pairs), _ints(residency.column("first_step")), _ints(residency.column("last_step"))
    order = np.lexsort((first, request))
    overlaps = np.zeros(len(order), dtype=np.bool_)
    overlaps[order[1:]] = (np.diff(request[order]) == 0) & (first[order][1:] <= last[order][:-1])
    overlaps |= last < first
    found = _found("rows_overlap", overlaps, lambda row: _text(pairs, row), "rows of one request share steps")

    for name in pc.unique(tables["steps"].column("replica")).to_pylist():
        found += _check_sums(name, {key: _of_replica(table, name) for key, table in tables.items()})
    return found


def _check_sums(replica: str, tables: Tables) -> list[Finding]:
    steps, residency, coverage = tables["steps"], tables["residency"], tables["coverage"]
    index, scheduled = _ints(steps.column("step")), _ints(steps.column("scheduled"))
    stretch = np.searchsorted(_ints(coverage.column("start")), scheduled, side="right") - 1
    known = np.append(_ints(coverage.column("fidelity")) == 3, False)[stretch]
    begin = np.searchsorted(index, _ints(residency.column("first_step")))
    after = np.searchsorted(index, _ints(residency.column("last_step")), side="right")
    tokens = _ints(residency.column("tokens"))

    def total(phases: Sequence[str], amounts: Ints) -> Ints:
        """Sum of the amounts of the rows in these phases, for each step."""
        chosen = _bools(pc.is_in(residency.column("phase").cast(pa.string()), value_set=pa.array(phases)))
        edges = np.bincount(begin[chosen], amounts[chosen], len(index) + 1)
        edges -= np.bincount(after[chosen], amounts[chosen], len(index) + 1)
        return np.rint(np.cumsum(edges)[:-1]).astype(np.int64)

    ones = np.ones_like(tokens)
    expected = {
        "prefill_tokens": total(["prefill"], tokens),
        "decode_tokens": total(["decode"], tokens),
        "batch_size": total(["prefill", "decode"], ones),
        "running": total(["prefill", "decode", "paused"], ones),
        "waiting": total(["waiting", "preempted"], ones),
    }
    found = []
    for column, sums in expected.items():
        found += _found(
            f"{column}_differ",
            known & (sums != _ints(steps.column(column))),
            lambda row: f"{replica} step {index[row]}",
            f"steps say another {column} than the rows of their requests add up to",
        )
    return found


# --- columns ------------------------------------------------------------------------------------------------


def _found(kind: str, wrong: Mask, where: Callable[[int], str], text: str) -> list[Finding]:
    rows = np.flatnonzero(wrong)
    return [Finding(kind, where(int(rows[0])), len(rows), text)] if len(rows) else []


def _text(names: pa.Array, row: int) -> str:
    return str(names[row].as_py()).replace(_BETWEEN, " request ")


def _pairs(table: pa.Table, column: str) -> pa.Array:
    """Replica and name as one string, null where the name is null."""
    parts = (table.column(name).cast(pa.string()) for name in ("replica", column))
    return pc.binary_join_element_wise(*parts, _BETWEEN).combine_chunks()


def _of_replica(table: pa.Table, name: str) -> pa.Table:
    return table.filter(pc.equal(table.column("replica").cast(pa.string()), name))


def _asynchronous(tables: Tables, steps: pa.ChunkedArray) -> Mask:
    """Of each step, whether its replica may schedule one before the last is done."""
    replicas = tables["replicas"]
    names = replicas.column("replica").cast(pa.string()).filter(replicas.column("async_scheduling").fill_null(False))
    return _bools(pc.is_in(steps.cast(pa.string()), value_set=names))


def _ints(column: pa.ChunkedArray) -> Ints:
    """As int64, 0 where null."""
    return np.asarray(column.fill_null(0).to_numpy(), dtype=np.int64)


def _nulls(column: pa.Array) -> Mask:
    return _bools(pc.is_null(column))


def _bools(column: pa.Array) -> Mask:
    return np.asarray(column.fill_null(False).to_numpy(zero_copy_only=False), dtype=np.bool_)


def _codes(column: pa.Array) -> Ints:
    """Equal values as equal integers from 0 on; nulls share one of their own."""
    coded = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not pa.types.is_dictionary(coded.type):
        coded = coded.dictionary_encode(null_encoding="encode")
    return np.asarray(coded.indices.fill_null(-1).to_numpy(zero_copy_only=False), dtype=np.int64)
