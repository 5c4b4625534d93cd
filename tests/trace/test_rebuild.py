"""The batches rebuilt from a recording are those that the scheduler ran, also where steps were lost."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.trace import Trace, read_trace
from stallscope_engine.config import EngineConfig
from tests.trace.recording import Arrival, Workload, as_batches, folder, read, run, steady, workloads, write

seeds = st.integers(0, 2**32)


@given(workloads())
def test_every_batch_is_rebuilt_as_the_scheduler_ran_it(workload: Workload) -> None:
    recording = run(workload)
    if recording.steps:
        trace = read(recording.lines())
        assert as_batches(trace) == recording.truth
        assert trace.findings == ()
        assert trace.validate() == []


def known_steps(seen: Sequence[int], keyframes: set[int]) -> set[int]:
    """Steps whose batch can be known: from step 0 or a keyframe on, until one is lost."""
    known: set[int] = set()
    for step in seen:
        if step == 0 or step in keyframes or step - 1 in known:
            known.add(step)
    return known


@given(workloads(), seeds, st.sampled_from([0.05, 0.3]))
def test_lost_steps_are_noticed_and_cost_no_batch_beyond_the_next_keyframe(
    workload: Workload, seed: int, share: float
) -> None:
    recording = run(workload)
    draw = random.Random(seed)
    kept = [one for one in recording.steps if draw.random() >= share]
    if not any(
        one.keyframe or one.joined or one.chunks or one.decodes or one.waits or one.preempted or one.left
        for one in kept
    ):
        return  # nothing tells that these steps had batches: they are sums, and what was in them is estimated
    seen = [one.step for one in kept]
    keyframes = {one.step for one in kept if one.keyframe is not None}
    lines = dict(zip((one.step for one in recording.steps), recording.step_lines(), strict=True))
    trace = read([*(lines[step] for step in seen), *recording.request_lines()])

    known = known_steps(seen, keyframes)
    found = as_batches(trace)
    truth = {step: recording.truth[step] if step in known else {} for step in seen}
    from_start = known_steps(seen, set())
    for step in known - from_start:  # a keyframe does not say who took the blocks of those preempted earlier
        truth[step] = {
            name: (*doing[:-1], None if found[step].get(name, doing)[-1] is None else doing[-1])
            for name, doing in truth[step].items()
        }
    assert found == truth
    coverage = trace.coverage.to_pylist()
    assert sum(row["steps_lost"] for row in coverage) == seen[-1] - seen[0] + 1 - len(seen)
    assert sum(row["steps_seen"] for row in coverage) == len(seen)
    assert sum(row["steps_seen"] for row in coverage if row["fidelity"] == 3) == len(known)
    assert trace.findings == ()
    assert trace.validate() == []


@given(workloads(), seeds)
def test_order_of_spans_and_files_changes_nothing(workload: Workload, seed: int) -> None:
    recording = run(workload)
    if not recording.steps:
        return
    lines = [*recording.lines("b"), *recording.lines("a"), *recording.step_lines("b")[:2]]
    draw = random.Random(seed)
    trace = read(lines)
    with folder() as path:
        draw.shuffle(lines)
        cut = draw.randrange(len(lines))
        (path / "deep").mkdir()
        write(path / "one.otlp.jsonl", lines[:cut])
        write(path / "deep" / "two.otlp.jsonl", lines[cut:])
        shuffled = read_trace(path)
    assert shuffled.tables == trace.tables
    assert trace.replicas.column("replica").to_pylist() == ["a", "b"]


def rows_by_request(trace: Trace) -> dict[str, dict[str, object]]:
    return {row["request"]: row for row in trace.requests.to_pylist()}


@given(workloads(), st.booleans())
def test_requests_are_told_alike_by_steps_and_by_their_spans(workload: Workload, with_spans: bool) -> None:
    recording = run(workload)
    if not recording.steps:
        return
    lines = recording.lines() if with_spans else recording.step_lines()
    rows = rows_by_request(read(lines))
    # A step that was scheduled before the one before it was done tells what that one's outputs changed.
    late = workload.config.async_scheduling
    said_left = {handle for one in recording.steps for handle, _ in one.left}
    # A keyframe leaves out who joined and was aborted before it was ever scheduled.
    joined = {
        info.handle
        for one in recording.steps
        for info in (one.joined if one.keyframe is None else [snapshot.info for snapshot in one.keyframe])
    }
    for request in recording.requests:
        info = request.info
        ended = request.finish_reason is not None and (with_spans or info.handle in said_left)
        if info.handle not in joined and not (with_spans and ended):
            continue
        row = rows.pop(info.request_id)
        assert row["handle"] == info.handle
        assert row["tenant"] == (info.tenant or "(unknown)")
        assert row["arrival"] == info.arrival_ns
        if request.scheduled_ns or not ended:
            assert row["queued"] == request.queued_ns
        assert row["scheduled"] == (request.scheduled_ns or None)
        assert row["first_token"] == (request.token_times_ns[0] if request.token_times_ns else None)
        assert (row["prompt_tokens"], row["max_tokens"]) == (info.prompt_tokens, info.max_tokens)
        assert row["output_tokens"] == request.output_tokens
        if ended or not late:
            assert row["preemptions"] == request.preemptions
        assert row["state"] == ("finished" if ended else "open")
        reason = request.finish_reason if ended else None
        assert row["finish_reason"] == (None if reason is None else reason.name.lower())
        if ended and row["finish_reason"] == "length" and (with_spans or not late):
            assert row["end"] == request.end_ns
    assert rows == {}


@given(workloads(), st.booleans())
def test_gaps_hold_every_gap_and_the_long_ones_exactly(workload: Workload, with_spans: bool) -> None:
    recording = run(workload)
    if not recording.steps:
        return
    trace = read(recording.lines() if with_spans else recording.step_lines())
    durations = sorted(one.ready_ns - one.scheduled_ns for one in recording.steps)
    middle = len(durations) // 2
    median = (durations[middle] + durations[-middle - 1]) / 2
    floor = max(1_000_000, 4 * int(median))
    rows = trace.gaps.to_pylist()
    for request in recording.requests:
        times = request.token_times_ns
        gaps = [(start, end - start) for start, end in pairwise(times)]
        mine = [row for row in rows if row["request"] == request.info.request_id]
        exact = [(row["start"], row["length_ns"]) for row in mine if row["length_ns"] >= floor]
        assert exact == [gap for gap in gaps if gap[1] >= floor]
        assert sum(row["count"] for row in mine) == len(gaps)
        total = sum(row["count"] * row["length_ns"] for row in mine)
        assert total == pytest.approx(sum(length for _, length in gaps), abs=len(gaps))


def test_a_decode_of_many_tokens_is_one_row() -> None:
    rows = read(steady(output=40).lines()).residency.to_pylist()
    assert [(row["phase"], row["first_step"], row["last_step"], row["tokens"]) for row in rows] == [
        ("prefill", 0, 0, 8),
        ("decode", 1, 39, 1),
    ]
    assert [(row["context_start"], row["kv_blocks"]) for row in rows] == [(0, 2), (8, 3)]


def test_chunks_of_equal_size_are_one_row() -> None:
    rows = read(steady(max_num_batched_tokens=2, output=1).lines()).residency.to_pylist()
    assert [(row["phase"], row["first_step"], row["last_step"], row["tokens"]) for row in rows] == [
        ("prefill", 0, 3, 2)
    ]


def test_recompute_is_charged_to_who_took_the_blocks_and_only_what_was_lost() -> None:
    recording = steady(requests=2, output=9, kv_blocks=6)
    rows = read(recording.lines()).residency.to_pylist()
    story = [(row["phase"], row["holder"], row["tokens"]) for row in rows if row["request"] == "req-1"]
    assert story == [
        ("prefill", None, 8),
        ("decode", None, 1),
        ("preempted", "req-0", 0),
        ("prefill", "req-0", 13),
        ("decode", None, 1),
    ]


def test_a_request_that_vanished_unseen_is_lost_and_one_alive_at_the_end_is_open() -> None:
    arrivals = [Arrival(0, 8, 6, "gone"), Arrival(0, 8, 60, "stays")]
    recording = run(Workload(EngineConfig(), arrivals, 4, 20))
    lines = recording.step_lines()
    rows = rows_by_request(read([*lines[:4], *lines[8:]]))
    assert {name: row["state"] for name, row in rows.items()} == {"req-0": "lost", "req-1": "open"}
    assert [rows["req-0"][name] for name in ("end", "finish_reason", "output_tokens")] == [None, None, 4]


def test_a_request_whose_join_was_lost_is_told_by_its_span() -> None:
    recording = steady(requests=1, output=6, keyframe_every=100)
    (request,) = recording.requests
    trace = read([*recording.step_lines()[1:], *recording.request_lines()])
    (row,) = trace.requests.to_pylist()
    assert (row["request"], row["state"], row["output_tokens"]) == ("req-0", "finished", 6)
    assert row["first_token"] == request.token_times_ns[0]
    assert trace.residency.num_rows == 0
    assert trace.coverage.column("fidelity").to_pylist() == [2]


def test_a_gap_between_tokens_is_not_derived_across_lost_steps() -> None:
    recording = run(Workload(EngineConfig(), [Arrival(0, 8, 60, "a")], 10, 30))
    lines = recording.step_lines()
    trace = read([*lines[:5], *lines[8:]])
    assert sum(trace.gaps.column("count").to_pylist()) == (5 - 1) + (30 - 10 - 1)


def test_a_replica_that_started_again_is_another_one() -> None:
    first, second = steady(requests=2), steady(requests=3, output=9)
    later = 60_000_000_000
    for one in second.steps:
        one.scheduled_ns += later
        one.dispatched_ns += later
        one.ready_ns += later
    lines = [*first.step_lines(), *second.step_lines()]
    random.Random(1).shuffle(lines)
    trace = read(lines)
    assert trace.replicas.column("replica").to_pylist() == ["r0", "r0 #2"]
    assert as_batches(trace, "r0") == first.truth
    assert as_batches(trace, "r0 #2") == second.truth
    assert trace.findings == ()


def test_dropped_records_count_in_the_gap_where_they_were_lost() -> None:
    recording = steady(requests=1, output=12)
    lines = recording.step_lines()
    dropped = b'{"key":"stallscope.dropped","value":{"intValue":"3"}}'
    lines[8:] = [
        line.replace(
            b'"attributes":[{"key":"stallscope.step"', b'"attributes":[' + dropped + b',{"key":"stallscope.step"'
        )
        for line in lines[8:]
    ]
    rows = read([*lines[:5], *lines[8:]]).coverage.to_pylist()
    assert [(row["fidelity"], row["steps_seen"], row["steps_lost"], row["spans_dropped"]) for row in rows] == [
        (3, 5, 0, 0),
        (1, 0, 3, 3),
        (3, 4, 0, 0),
    ]
