"""The dataset: partitions by replica and hour that are read alone, and grow; what is read, is as it was written."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stallscope.diagnosis import diagnose
from stallscope.errors import UsageError
from stallscope.trace import Trace, append_parquet, parquet, read_trace, write_parquet
from stallscope.trace.rename import renamed
from stallscope.trace.schema import TABLES
from stallscope.trace.select import select, span
from stallscope_engine.config import EngineConfig
from tests.trace.recording import START_NS, Arrival, Recording, Workload, as_batches, folder, read, run, workloads

HOUR_NS = 3_600_000_000_000
TO_NEXT_HOUR_NS = HOUR_NS - START_NS % HOUR_NS


def over_hours(output: int = 120) -> Recording:
    """Requests in three hours; some of those of the first go on in the second."""
    first = [Arrival(gap, 30, 20, "chat") for gap in (0, 1_000_000, 5_000_000)]
    across = [Arrival(gap, 30, output, "batch") for gap in (TO_NEXT_HOUR_NS - 50_000_000, 1_000_000, 1_000_000)]
    last = [Arrival(gap, 30, 20, "chat") for gap in (HOUR_NS + 1_000_000_000, 2_000_000)]
    return run(Workload(EngineConfig(block_size=4, kv_blocks=200), [*first, *across, *last], 10, 10_000))


def two_replicas() -> Trace:
    return read([*over_hours().lines("r0"), *over_hours(80).lines("r1")])


def rows(table: pa.Table) -> list[str]:
    """Rows in an order that says nothing of how they were read."""
    return sorted(str(row) for row in table.to_pylist())


def same(one: Trace, other: Trace) -> bool:
    return all(rows(one.tables[name]) == rows(other.tables[name]) for name in TABLES)


def stored(trace: Trace, path: Path) -> Trace:
    write_parquet(trace, path)
    return read_trace(path)


# --- partitions ---------------------------------------------------------------------------------------------------


def test_a_table_lies_in_partitions_by_replica_and_hour(tmp_path: Path) -> None:
    trace = two_replicas()
    assert same(stored(trace, tmp_path / "data"), trace)
    files = {str(file.relative_to(tmp_path / "data")) for file in (tmp_path / "data" / "steps").rglob("*.parquet")}
    hours = ("2026-09-21T14", "2026-09-21T15", "2026-09-21T16")
    assert files == {f"steps/replica={name}/hour={hour}/0.parquet" for name in ("r0", "r1") for hour in hours}


def test_rows_refer_to_the_same_requests_wherever_these_lie(tmp_path: Path) -> None:
    trace = two_replicas()
    read_back = stored(trace, tmp_path / "data")
    names = read_back.requests.column("request").to_pylist()
    for table, column in (("residency", "request"), ("residency", "holder"), ("gaps", "request")):
        meant = read_back.request_rows(table, column)
        told = read_back.tables[table].column(column).to_pylist()
        assert [names[row] if row >= 0 else None for row in meant.tolist()] == told
    owners = read_back.requests.column("replica").to_pylist()
    assert [owners[row] for row in read_back.request_rows("gaps", "request")] == read_back.gaps["replica"].to_pylist()


def test_columns_are_those_asked_for_in_that_order(tmp_path: Path) -> None:
    trace = two_replicas()
    read_back = stored(trace, tmp_path / "data")
    assert read_back.columns("steps", ["ready", "replica", "step"]).column_names == ["ready", "replica", "step"]
    assert read_back.columns("steps", ["replica"]).num_rows == trace.steps.num_rows
    assert read_back.columns("evictions", ["blocks", "replica"]).column_names == ["blocks", "replica"]
    assert read_back.request_rows("gaps", "request").dtype == np.int64


@settings(max_examples=20)
@given(workloads(), st.sampled_from([2_000_000, 50_000_000]))
def test_any_trace_comes_back_from_any_partitions(workload: Workload, length_ns: int) -> None:
    recording = run(workload)
    assume(recording.steps)
    trace = read(recording.lines())
    with folder() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_HOUR_NS", length_ns)
        patch.setattr(parquet, "_named_hour", str)
        read_back = stored(trace, path / "data")
        assert same(read_back, trace)
        assert len(list((path / "data" / "steps").rglob("*.parquet"))) == len(
            np.unique(trace.steps["scheduled"].to_numpy() // length_ns)
        )
        assert as_batches(read_back) == as_batches(trace)
        assert read_back.validate() == trace.validate()
        assert diagnose(read_back, replay=False).to_dict() == diagnose(trace, replay=False).to_dict()


@pytest.mark.parametrize("name", ["../../up", "a/b", "", "x" * 10_000, "\u202e\n\x00%2F", "é=ü", "CON"])
def test_a_replicas_name_may_be_anything_and_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    trace = renamed(read(over_hours().lines()), {"replica": lambda old: name})
    read_back = stored(trace, tmp_path / "deep" / "data")
    assert same(read_back, trace)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["data"]
    table = read_back.scannable("steps").to_table()
    assert table.column("replica").unique().to_pylist() == [name]


def test_the_number_of_partitions_is_bounded_by_the_hours_with_steps(tmp_path: Path) -> None:
    trace = read(over_hours().lines())
    at = trace.requests.schema.get_field_index("arrival")
    wild = trace.requests.set_column(at, "arrival", pa.array(np.arange(trace.requests.num_rows) * 10**17))
    changed = Trace({**trace.tables, "requests": wild}, "wild")
    assert same(stored(changed, tmp_path / "data"), changed)
    assert len(list((tmp_path / "data" / "requests").rglob("*.parquet"))) <= 3


# --- read in part -------------------------------------------------------------------------------------------------


def test_of_one_replica_nothing_of_another_is_read(tmp_path: Path) -> None:
    trace = two_replicas()
    write_parquet(trace, tmp_path / "data")
    for file in (tmp_path / "data").rglob("replica=r1"):
        shutil.rmtree(file)
    part = select(read_trace(tmp_path / "data"), replica="r0")
    assert same(part, select(trace, replica="r0"))
    assert len(diagnose(part, replay=False).tenants) == 2


@pytest.mark.parametrize("since", ["+3000s", "+6000s"])
def test_of_a_later_time_nothing_earlier_is_read_and_the_same_is_found(tmp_path: Path, since: str) -> None:
    trace = two_replicas()
    write_parquet(trace, tmp_path / "data")
    hour = (START_NS // HOUR_NS + (1 if since == "+6000s" else 0)) * HOUR_NS
    for table in ("steps", "gaps"):
        for file in (tmp_path / "data" / table).rglob(f"hour={np.datetime64(hour, 'ns').astype('datetime64[h]')}"):
            shutil.rmtree(file)
    assert same(select(Trace(dict(trace.tables), "memory"), since=since), _narrow(tmp_path / "data", trace, since))


def _narrow(path: Path, trace: Trace, since: str) -> Trace:
    """The part of a stored trace since a time, which is said as the time itself: the trace's start is not read."""
    start = span(trace)[0] + int(since.strip("+s")) * 10**9
    from stallscope.trace.select import between

    return between(read_trace(path), start, span(trace)[1])


@settings(max_examples=20)
@given(workloads(), st.floats(0, 1), st.floats(0, 1))
def test_a_part_is_the_same_from_any_partitions(workload: Workload, a: float, b: float) -> None:
    recording = run(workload)
    assume(recording.steps)
    trace = read(recording.lines())
    start, end = span(trace)
    low, high = (f"+{round((end - start) * share / 1e6)}ms" for share in sorted((a, b)))
    with folder() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_HOUR_NS", 5_000_000)
        patch.setattr(parquet, "_named_hour", str)
        read_back = stored(trace, path / "data")
        try:
            expected = select(trace, since=low, until=high)
        except UsageError:
            with pytest.raises(UsageError):
                select(read_back, since=low, until=high)
            return
        assert same(select(read_back, since=low, until=high), expected)


# --- growing ------------------------------------------------------------------------------------------------------


def cut(recording: Recording, step: int) -> tuple[Trace, Trace]:
    """What an engine's two files have, if the second begins with a step (one with a keyframe)."""
    time = recording.steps[step].scheduled_ns
    steps, requests = recording.step_lines(), recording.request_lines()
    ended = [request.end_ns < time for request in recording.ended]
    early = [line for line, over in zip(requests, ended, strict=True) if over]
    late = [line for line, over in zip(requests, ended, strict=True) if not over]
    return read([*steps[:step], *early]), read([*steps[step:], *late])


def grown(path: Path, parts: Sequence[Trace]) -> Trace:
    write_parquet(parts[0], path)
    for part in parts[1:]:
        append_parquet(part, path)
    return read_trace(path)


@pytest.mark.parametrize("step", [10, 60, 100])
def test_two_files_of_an_engine_are_one_trace(tmp_path: Path, step: int) -> None:
    recording = over_hours()
    whole = read(recording.lines())
    both = grown(tmp_path / "data", cut(recording, step))
    assert rows(both.steps) == rows(whole.steps)
    assert rows(both.requests) == rows(whole.requests)
    assert as_batches(both) == as_batches(whole)
    assert both.validate() == []
    lengths = [
        trace.gaps.to_pandas().assign(ns=lambda gaps: gaps["length_ns"] * gaps["count"]).groupby("request")["ns"].sum()
        for trace in (both, whole)
    ]
    assert (lengths[0] - lengths[1]).abs().max() < 1000


def test_a_request_that_goes_on_is_one_and_its_row_is_found_from_both_sides(tmp_path: Path) -> None:
    recording = over_hours()
    first, second = cut(recording, 100)
    open_then = {row["request"] for row in first.requests.to_pylist() if row["end"] is None}
    assert open_then & set(second.requests["request"].to_pylist())
    both = grown(tmp_path / "data", (first, second))
    names = both.requests["request"].to_pylist()
    assert len(names) == len(set(names)) == len(recording.requests)
    meant = both.request_rows("residency", "request")
    assert [names[row] for row in meant] == both.residency["request"].to_pylist()
    later = select(both, since=f"+{(recording.steps[110].scheduled_ns - START_NS) // 1_000_000}ms")
    assert later.validate() == []


def test_steps_that_neither_file_has_are_lost(tmp_path: Path) -> None:
    recording = over_hours()
    first, second = cut(recording, 60)[0], cut(recording, 70)[1]
    both = grown(tmp_path / "data", (first, second))
    assert sum(both.coverage["steps_lost"].to_pylist()) == 10
    (hole,) = (row for row in both.coverage.to_pylist() if row["steps_lost"])
    assert (hole["start"], hole["end"]) == (recording.steps[59].ready_ns, recording.steps[70].scheduled_ns)
    assert both.validate() == []
    assert diagnose(both, replay=False).coverage.steps_lost == 10


def test_another_replica_is_added_as_it_is(tmp_path: Path) -> None:
    one, other = read(over_hours().lines("r0")), read(over_hours(80).lines("r1"))
    assert same(grown(tmp_path / "data", (one, other)), two_replicas())


def test_a_replica_whose_steps_begin_anew_is_another_life(tmp_path: Path) -> None:
    first = over_hours()
    later = run(Workload(EngineConfig(), [Arrival(10 * HOUR_NS, 8, 40, "chat")], 10, 10_000))
    after = run(Workload(EngineConfig(), [Arrival(20 * HOUR_NS, 8, 40, "chat")], 10, 10_000))
    both = grown(tmp_path / "data", [read(one.lines()) for one in (first, later, after)])
    assert both.steps["replica"].unique().to_pylist() == ["r0", "r0 #2", "r0 #3"]
    assert both.validate() == []


def test_what_is_there_already_is_not_added_again(tmp_path: Path) -> None:
    trace = two_replicas()
    write_parquet(trace, tmp_path / "data")
    before = sorted(str(file) for file in (tmp_path / "data").rglob("*"))
    with pytest.raises(UsageError, match="must be later"):
        append_parquet(read(over_hours().lines("r1")), tmp_path / "data")
    assert sorted(str(file) for file in (tmp_path / "data").rglob("*")) == before
    with pytest.raises(UsageError, match="no dataset"):
        append_parquet(trace, tmp_path)


def test_a_write_that_breaks_off_leaves_the_dataset_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = cut(over_hours(), 100)
    write_parquet(first, tmp_path / "data")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("stallscope.trace.append.write_metadata", fail)
        with pytest.raises(UsageError, match="No space left"):
            append_parquet(second, tmp_path / "data")
    assert same(read_trace(tmp_path / "data"), first)
    append_parquet(second, tmp_path / "data")
    assert read_trace(tmp_path / "data").steps.num_rows == first.steps.num_rows + second.steps.num_rows
