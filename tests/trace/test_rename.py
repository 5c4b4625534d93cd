"""Redaction and anonymity: no name that must not be told is left in any table, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from stallscope.errors import UsageError
from stallscope.trace import Trace
from stallscope.trace.rename import anonymized, redacted, renamed
from stallscope_engine.config import EngineConfig
from tests.trace.recording import Arrival, Workload, read, run

HOSTILE = "a\nb|`<script>alert(1)</script>\"'&$x$"


def crowded() -> Trace:
    """Three tenants, one with a name like a label, short of KV blocks, so that requests hold up and preempt others."""
    tenants = ["chat", "tenant-1", "batch"]
    arrivals = [Arrival(500_000, 20, 30, tenants[number % 3]) for number in range(12)]
    config = EngineConfig(block_size=4, kv_blocks=40, max_num_seqs=6)
    return read(run(Workload(config, arrivals, 20, 10_000)).lines())


def texts(trace: Trace) -> set[str]:
    """Every string in any cell."""
    found: set[str] = set()
    for table in trace.tables.values():
        for column in table.columns:
            if pa.types.is_dictionary(column.type):
                found |= set(column.combine_chunks().dictionary.to_pylist())
    return found


def requests_of(trace: Trace, *tenants: str) -> set[str]:
    mine = pc.is_in(trace.requests.column("tenant").cast(pa.string()), value_set=pa.array(tenants))
    return set(trace.requests.filter(mine).column("request").to_pylist())


def test_no_name_or_id_of_another_tenant_is_left_in_any_table() -> None:
    trace = crowded()
    shown = redacted(trace, "chat")
    assert not texts(shown) & {"batch", *requests_of(trace, "batch", "tenant-1")}
    assert texts(shown) >= {"chat", *requests_of(trace, "chat")}
    assert trace.source not in shown.source


def test_times_and_amounts_stay_and_the_trace_stays_sound() -> None:
    trace = crowded()
    shown = redacted(trace, "chat")
    assert shown.steps.equals(trace.steps)
    assert shown.requests.column("arrival").equals(trace.requests.column("arrival"))
    assert shown.residency.column("tokens").equals(trace.residency.column("tokens"))
    assert shown.validate() == []


def test_a_label_is_the_same_everywhere_and_never_ones_own_name() -> None:
    trace = crowded()
    shown = redacted(trace, "tenant-1")
    assert set(shown.requests.column("tenant").to_pylist()) == {"tenant-1", "tenant-2", "tenant-3"}
    for table in ("requests", "residency"):
        before, after = (one.tables[table].column("tenant").to_pylist() for one in (trace, shown))
        assert len(set(zip(before, after, strict=True))) == 3
    assert all(old == new for old, new in zip(before, after, strict=True) if old == "tenant-1")


def test_an_unknown_tenant_is_told_the_nearest_names() -> None:
    with pytest.raises(UsageError, match="no tenant 'chatt'; it has chat"):
        redacted(crowded(), "chatt")


def test_names_may_be_anything() -> None:
    shown = renamed(crowded(), {"tenant": lambda name: f"{HOSTILE}{name}"})
    assert set(shown.requests.column("tenant").to_pylist()) == {f"{HOSTILE}{n}" for n in ("chat", "tenant-1", "batch")}


def test_a_trace_to_share_names_nobody_and_nothing_but_models() -> None:
    trace = crowded()
    shared = anonymized(trace)
    kinds = ("tenant", "request", "session", "adapter", "trace_id", "replica", "group", "device")
    named = {
        name
        for table in trace.tables.values()
        for kind in kinds
        if kind in table.schema.names
        for name in table.column(kind).drop_null().to_pylist()
    }
    assert {"chat", "batch", "r0"} <= named
    assert not texts(shared) & (named - {"tenant-1"})
    assert set(shared.requests.column("model").to_pylist()) == set(trace.requests.column("model").to_pylist())
    assert trace.source not in shared.source
    assert shared.validate() == []


def test_a_shared_trace_has_one_alias_for_one_name_and_another_for_another() -> None:
    trace = crowded()
    shared = anonymized(trace)
    for table, column in (("requests", "tenant"), ("residency", "request"), ("residency", "holder")):
        before, after = (one.tables[table].column(column).to_pylist() for one in (trace, shared))
        pairs = set(zip(before, after, strict=True))
        assert len(pairs) == len({old for old, _ in pairs}) == len({new for _, new in pairs})
    assert shared.tables["steps"].drop(["replica"]).equals(trace.tables["steps"].drop(["replica"]))


def test_which_prompts_begin_alike_stays_but_not_how() -> None:
    trace = crowded()
    at = trace.requests.schema.get_field_index("prefix")
    hashes = pa.array([(7919, None, 104_729)[number % 3] for number in range(trace.requests.num_rows)])
    told = replace(
        trace,
        tables={**trace.tables, "requests": trace.requests.set_column(at, trace.requests.schema.field(at), hashes)},
    )
    shared = anonymized(told).requests.column("prefix").to_pylist()
    assert shared == [(0, None, 1)[number % 3] for number in range(len(shared))]
