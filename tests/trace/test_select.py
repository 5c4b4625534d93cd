"""Parts of a trace: sound traces themselves, with what was known by their end; times as people write them."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.compute as pc
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stallscope.diagnosis import diagnose
from stallscope.errors import UsageError
from stallscope.trace import Trace, read_trace, write_parquet
from stallscope.trace.cut import cut
from stallscope.trace.references import REFERENCES
from stallscope.trace.select import between, read_time, select, span, time_range
from stallscope_engine.config import EngineConfig
from tests.diagnosis.runs import MS, random_run
from tests.trace.recording import START_NS, Arrival, Workload, as_batches, read, run

SECOND = 1_000_000_000


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def at(text: str) -> int:
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * SECOND


@settings(max_examples=25)
@example(123, 1.0, 0.5, 0.1)  # a step that begins where one stretch of coverage ends and the next begins
@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0, 1), st.sampled_from([0.0, 0.1]))
def test_any_part_of_any_trace_is_sound_and_can_be_diagnosed(seed: int, a: float, b: float, lost: float) -> None:
    rng = random.Random(seed)
    lines = [line for line in random_run(seed).recording.lines() if rng.random() >= lost]
    if not any(b"engine.step" in line for line in lines):
        return
    trace = read(lines)
    start, end = span(trace)
    low, high = (start + round((end - start) * share) for share in sorted((a, b)))
    steps = trace.steps.to_pylist()
    if not any(low <= step["scheduled"] and step["ready"] <= high for step in steps):
        with pytest.raises(UsageError, match="no step lies between"):
            between(trace, low, high)
        return
    part = between(trace, low, high)
    assert part.validate() == []
    first, last = span(part)
    assert low <= first <= last <= high
    assert all(batch == as_batches(trace)[step] for step, batch in as_batches(part).items())
    assert sum(part.coverage["steps_seen"].to_pylist()) == part.steps.num_rows
    diagnose(part)


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.floats(0, 0.5), st.floats(0.5, 1))
def test_a_part_of_a_stored_trace_is_that_of_the_trace(seed: int, a: float, b: float) -> None:
    runs = [random_run(seed + shift).recording.lines(replica) for shift, replica in ((0, "r0"), (10, "r1"))]
    trace = read([line for lines in runs for line in lines])
    start, end = span(trace)
    low, high = start + round((end - start) * a), start + round((end - start) * b)
    with TemporaryDirectory() as folder:
        write_parquet(trace, Path(folder) / "stored")
        stored = read_trace(Path(folder) / "stored")
        for since, until in ((low, high), (None, high), (low, None)):
            made, kept = cut(trace, since, until), cut(stored, since, until)
            if made is None or kept is None:
                assert made is kept
                continue
            assert kept.is_stored
            for name, table in made.tables.items():
                assert kept.tables[name].to_pylist() == table.to_pylist(), name
            for name, columns in REFERENCES.items():
                for column in columns:
                    assert kept.request_rows(name, column).tolist() == made.request_rows(name, column).tolist()


def steady(requests: int = 3) -> Trace:
    """Requests a second apart; each takes some 40 steps of about 1 ms."""
    arrivals = [Arrival(SECOND if number else 0, 8, 40, f"t{number}") for number in range(requests)]
    return read(run(Workload(EngineConfig(), arrivals, 10, 10_000)).lines())


def test_the_whole_of_a_trace_is_the_trace() -> None:
    trace = steady()
    part = between(trace, *span(trace))
    for name, table in trace.tables.items():
        assert part.tables[name].to_pylist() == table.to_pylist()


def test_a_request_that_goes_on_after_the_part_is_open_with_what_it_had_by_then() -> None:
    trace = steady(1)
    steps = trace.steps.to_pylist()
    part = select(trace, until=f"+{(steps[9]['ready'] - START_NS) / 1e6}ms")
    assert part.steps.num_rows == 10
    (request,) = part.requests.to_pylist()
    assert (request["state"], request["end"], request["finish_reason"]) == ("open", None, None)
    assert request["output_tokens"] == 10  # one from the prefill, one from each of nine decodes
    assert request["first_token"] is not None


def test_what_was_over_before_the_part_is_not_in_it() -> None:
    trace = steady(3)
    part = select(trace, since="+0.5s", until="+1.5s")
    assert part.requests["tenant"].to_pylist() == ["t1"]
    assert set(part.residency["tenant"].to_pylist()) == {"t1"}


def test_a_request_that_began_before_the_part_keeps_its_arrival() -> None:
    trace = steady(1)
    step = trace.steps.to_pylist()[10]
    part = between(trace, step["scheduled"], span(trace)[1])
    assert part.requests["arrival"].to_pylist() == trace.requests["arrival"].to_pylist()
    assert part.residency["context_start"].to_pylist() == [8 + 9]


def two_replicas() -> Trace:
    first = run(Workload(EngineConfig(model="tiny-llama"), [Arrival(0, 8, 10, "a")], 10, 10_000))
    second = run(Workload(EngineConfig(model="8b"), [Arrival(0, 8, 10, "b")], 10, 10_000))
    return read([*first.lines("r0"), *second.lines("r1")])


def test_one_replica_or_the_replicas_of_one_model_can_be_taken() -> None:
    trace = two_replicas()
    for part in (select(trace, replica="r1"), select(trace, model="8b")):
        assert set(part.steps["replica"].to_pylist()) == {"r1"}
        assert part.requests["tenant"].to_pylist() == ["b"]
        assert part.validate() == []


def test_replicas_are_cut_at_the_same_times() -> None:
    trace = two_replicas()
    part = select(trace, until="+6ms")
    assert pc.max(part.steps["ready"]).as_py() <= START_NS + 6 * MS
    assert set(part.steps["replica"].to_pylist()) == {"r0", "r1"}


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"replica": "r7"}, "no replica 'r7'; it has r0, r1"),
        ({"model": "9b"}, "no model '9b'; it has 8b"),
        ({"replica": "r0", "model": "8b"}, "no replica 'r0'; it has r1"),
        ({"since": "+5ms", "until": "+2ms"}, "--since +5ms is not before --until +2ms"),
        ({"since": "yesterday"}, "time 'yesterday' can't be read; give"),
        ({"since": "+5h"}, "outside the trace, which goes from"),
    ],
)
def test_a_mistake_is_one_line_that_teaches(wanted: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError) as error:
        select(two_replicas(), **wanted)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("utc")
@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("+30s", "2026-03-01T22:00:30"),
        ("-5m", "2026-03-02T01:55:00"),
        ("+1h30m", "2026-03-01T23:30:00"),
        ("22:15", "2026-03-01T22:15:00"),
        ("22:15:07", "2026-03-01T22:15:07"),
        ("01:30", "2026-03-02T01:30:00"),
        ("2026-03-01T23:00:00", "2026-03-01T23:00:00"),
        ("2026-03-01 23:00", "2026-03-01T23:00:00"),
        ("2026-03-02T01:00:00+01:00", "2026-03-02T00:00:00"),
        ("2026-03-01T23:00:00Z", "2026-03-01T23:00:00"),
    ],
)
def test_times_are_read_as_people_write_them(text: str, means: str) -> None:
    assert read_time(text, at("2026-03-01T22:00:00"), at("2026-03-02T02:00:00")) == at(means)


@pytest.mark.usefixtures("utc")
def test_a_range_of_dates_need_not_know_when_the_recording_began_and_ended() -> None:
    start, end = at("2026-03-01T22:00:00"), at("2026-03-02T02:00:00")
    early, late = "2026-03-01T21:00:00Z", "2026-03-02T03:00:00Z"
    assert time_range("x", start, end, early, late) == (start, end)
    assert time_range("x", start, end, early, "+30s") == (start, start + 30 * 10**9)
    assert time_range("x", start, end, "-30s", late) == (end - 30 * 10**9, end)
    for since, until in ((late, None), (None, early), (late, late), (early, early)):
        with pytest.raises(UsageError, match="outside the trace"):
            time_range("x", start, end, since, until)


@pytest.mark.parametrize(
    "text", ["", "+", "5m", "+5", "+5 m", "+5m3", "25:00", "10:61", "noon", "2026-13-01", "-", "1"]
)
def test_what_is_no_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match=r"can't be read; give 2026-01-31T14:05:00, 14:05, \+30s"):
        read_time(text, 0, 10**18)
