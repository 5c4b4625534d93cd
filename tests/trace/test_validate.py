"""Each invariant of a trace is broken by hand once, and found at its place."""

from collections.abc import Callable
from functools import cache

import pyarrow as pa
import pytest

from stallscope.trace import Trace
from stallscope.trace.schema import TABLES
from tests.trace.recording import read, steady


@cache
def sound() -> Trace:
    return read([*steady(requests=3, output=9, kv_blocks=8).lines("a"), *steady(requests=2).lines("b")])


def broken(table: str, row: int, column: str, change: Callable[[int], int | str]) -> Trace:
    """The sound trace with one value changed."""
    rows = sound().tables[table].to_pylist()
    rows[row][column] = change(rows[row][column])
    return Trace({**sound().tables, table: pa.Table.from_pylist(rows, schema=TABLES[table])}, "")


def test_a_sound_trace_has_no_findings() -> None:
    assert sound().validate() == []


@pytest.mark.parametrize(
    ("table", "row", "column", "change", "kind", "where"),
    [
        ("steps", 2, "dispatched", lambda time: time - 1, "step_times", "a step 2"),
        ("steps", 2, "ready", lambda time: time - 10**10, "step_times", "a step 2"),
        ("steps", 2, "ready", lambda time: time + 10**10, "times_backwards", "a step 3"),
        ("steps", -1, "scheduled", lambda time: time - 10**8, "times_backwards", "b step 5"),
        ("steps", 3, "kv_used", lambda blocks: blocks + 99, "blocks_beyond_total", "a step 3"),
        ("steps", 4, "prefill_tokens", lambda tokens: tokens + 1, "prefill_tokens_differ", "a step 4"),
        ("steps", 4, "decode_tokens", lambda tokens: tokens + 1, "decode_tokens_differ", "a step 4"),
        ("steps", -2, "batch_size", lambda size: size + 1, "batch_size_differ", "b step 4"),
        ("steps", 4, "running", lambda size: size - 1, "running_differ", "a step 4"),
        ("steps", 4, "waiting", lambda size: size + 2, "waiting_differ", "a step 4"),
        ("residency", 0, "last_step", lambda step: step + 1, "rows_overlap", "a request req-0"),
        ("residency", 1, "request", lambda _: "nobody", "unknown_request", "a request nobody"),
        ("residency", 1, "holder", lambda _: "nobody", "unknown_request", "a request nobody"),
        ("gaps", 0, "request", lambda _: "nobody", "unknown_request", "a request nobody"),
        ("requests", 1, "request", lambda _: "req-0", "request_twice", "a request req-0"),
        ("requests", 0, "arrival", lambda time: time + 10**10, "request_times", "a request req-0"),
        ("requests", -1, "end", lambda time: time - 10**9, "request_times", "b request req-1"),
        ("requests", 0, "delivered", lambda time: time - 1, "request_times", "a request req-0"),
    ],
)
def test_a_broken_invariant_is_found(
    table: str, row: int, column: str, change: Callable[[int], int | str], kind: str, where: str
) -> None:
    found = {finding.kind: finding for finding in broken(table, row, column, change).validate()}
    assert found[kind].where == where
    assert found[kind].count >= 1


def test_asynchronous_steps_may_overlap() -> None:
    steps = sound().steps.to_pylist()
    steps[2]["ready"] = steps[3]["ready"]
    replicas = sound().replicas.to_pylist()
    replicas[0]["async_scheduling"] = True
    changed = {
        "steps": pa.Table.from_pylist(steps, schema=TABLES["steps"]),
        "replicas": pa.Table.from_pylist(replicas, schema=TABLES["replicas"]),
    }
    assert Trace({**sound().tables, **changed}, "").validate() == []
    changed.pop("replicas")
    (finding,) = Trace({**sound().tables, **changed}, "").validate()
    assert finding.kind == "times_backwards"


def test_a_trace_needs_all_tables_of_the_declared_schemas() -> None:
    tables = dict(sound().tables)
    with pytest.raises(ValueError, match="table steps is missing"):
        Trace({**tables, "steps": tables["gaps"]}, "")
