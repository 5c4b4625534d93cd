"""The waterfall of a request: its rows tile its life, their parts add up, and a wrong id gets a hint."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallscope.errors import UsageError
from stallscope.trace import Trace
from stallscope.views.waterfall import ENGINE, OWN, TELEMETRY, Waterfall, waterfall
from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine
from stallscope_telemetry.records import FinishReason
from tests.diagnosis.runs import MS, random_run, scripted_lines
from tests.trace.recording import Arrival, Workload, read, run


def ns(seconds: float) -> int:
    return round(seconds * 1e9)


def lives(trace: Trace) -> list[Waterfall]:
    return [waterfall(trace, request) for request in trace.requests.column("request").to_pylist()]


def assert_sound(shown: Waterfall) -> None:
    at = 0
    for row in shown.rows:
        assert ns(row.offset_s) == at
        assert row.length_s > 0
        assert row.parts
        assert sum(ns(part.seconds) for part in row.parts) == ns(row.length_s)
        at += ns(row.length_s)
    assert at == ns(shown.length_s) == sum(ns(part.seconds) for part in shown.parts)
    assert list(shown.parts) == sorted(shown.parts, key=lambda part: -part.seconds)


@settings(max_examples=5)
@given(st.integers(0, 2**32), st.sampled_from([0.0, 0.15]))
def test_rows_tile_the_life_and_parts_add_up_to_each_row(seed: int, lost: float) -> None:
    rng = random.Random(seed)
    lines = [line for line in random_run(seed).recording.lines() if rng.random() >= lost]
    if any(b"engine.step" in line for line in lines):
        for shown in lives(read(lines))[:4]:
            assert_sound(shown)


def stalled_run() -> Trace:
    """A short request decodes when a huge prompt comes, whose prefill is one step, and a third request waits for it."""
    config = EngineConfig(kv_blocks=1000, max_num_batched_tokens=12_000)
    arrivals = [Arrival(0, 8, 60, "chat"), Arrival(20 * MS, 9000, 3, "hog"), Arrival(30 * MS, 8, 4, "chat")]
    return read(run(Workload(config, arrivals, 50, 10_000)).lines())


def test_a_stalled_row_is_a_single_gap_from_token_to_token() -> None:
    trace = stalled_run()
    shown = waterfall(trace, "req-0")
    (stalled,) = (row for row in shown.rows if row.stalled)
    longest = max(
        (row for row in trace.gaps.to_pylist() if row["request"] == "req-0"), key=lambda row: row["length_ns"]
    )
    assert shown.arrival_ns + ns(stalled.offset_s) == longest["start"]
    assert ns(stalled.length_s) == longest["length_ns"] > 90 * MS
    assert stalled.doing == "decoding"
    assert (stalled.parts[0].holder, stalled.parts[0].mechanism) == ("hog", "prefill_interference")


def test_a_life_reads_as_what_the_request_did() -> None:
    shown = waterfall(stalled_run(), "req-2")
    assert [row.doing for row in shown.rows] == ["arrived during a step", "prefill", "decoding"]
    assert shown.tenant == "chat"
    assert shown.state == "finished"
    assert shown.ttft_s == pytest.approx(sum(row.length_s for row in shown.rows[:2]))
    assert {part.holder for part in shown.parts} >= {OWN, "hog"}


def test_an_unknown_id_is_a_usage_error_that_names_near_ones() -> None:
    trace = stalled_run()
    with pytest.raises(UsageError, match=r"no request 'req-9' among 3; did you mean req-\d, req-\d, req-\d\?"):
        waterfall(trace, "req-9")
    with pytest.raises(UsageError, match=r"no request 'Q-2' among 3; did you mean req-2\?"):
        waterfall(trace, "Q-2")
    with pytest.raises(UsageError, match="copy an id from `stallscope analyze`"):
        waterfall(trace, "zzzzzzzz")


def test_an_open_request_is_shown_up_to_its_last_sight() -> None:
    arrivals = [Arrival(0, 8, 500, "chat"), Arrival(0, 8, 500, "chat")]
    trace = read(run(Workload(EngineConfig(max_num_seqs=1), arrivals, 10, 30)).lines())
    running, waiting = lives(trace)
    last_ready = max(trace.steps.column("ready").to_pylist())
    for shown in (running, waiting):
        assert_sound(shown)
        assert shown.state == "open"
        assert shown.arrival_ns + ns(shown.length_s) == last_ready
    assert running.ttft_s is not None
    assert waiting.ttft_s is None
    assert [row.doing for row in waiting.rows] == ["waiting for a slot"]


def test_an_aborted_request_ends_where_it_was_aborted() -> None:
    arrivals = [Arrival(0, 8, 50, "chat"), Arrival(0, 8, 50, "chat", abort_after=6)]
    shown = waterfall(read(run(Workload(EngineConfig(), arrivals, 10, 10_000)).lines()), "req-1")
    assert_sound(shown)
    assert shown.output_tokens == 6
    assert [row.doing for row in shown.rows] == ["prefill", "decoding"]


def test_the_time_from_the_last_step_to_an_abort_is_told_apart() -> None:
    def abort(engine: Engine, moment: str) -> None:
        if moment == "after step" and engine.steps == 5:
            engine.clock.wait_until(engine.clock.now_ns() + 7 * MS)
            engine.abort(engine.scheduler.running[0], FinishReason.ABORT)

    shown = waterfall(read(scripted_lines([("chat", 0, 20, 30), ("chat", 0, 30, 30)], abort)), "0")
    assert_sound(shown)
    assert (shown.rows[-1].doing, ns(shown.rows[-1].length_s)) == ("between two steps", 7 * MS)


def test_a_request_aborted_before_any_step_saw_it_is_shown() -> None:
    arrivals = [Arrival(0, 8, 20, "chat"), Arrival(5 * MS, 8, 50, "chat", abort_after=0)]
    shown = waterfall(read(run(Workload(EngineConfig(), arrivals, 10, 10_000)).lines()), "req-1")
    assert_sound(shown)
    assert [row.doing for row in shown.rows] == ["arrived during a step"]


def test_a_request_lost_from_sight_is_shown_as_far_as_it_was_seen() -> None:
    """Its end and the step that tells of it are lost; the next keyframe has it no more."""
    recording = run(Workload(EngineConfig(), [Arrival(0, 8, 10, "a"), Arrival(0, 8, 60, "b")], 20, 10_000))
    lines = [line for index, line in enumerate(recording.step_lines()) if not 5 <= index < 15]
    shown = waterfall(read(lines), "req-0")
    assert_sound(shown)
    assert shown.state == "lost"
    trace = read([*lines, *recording.request_lines()])
    ended = waterfall(trace, "req-0")
    assert_sound(ended)
    assert ended.state == "finished"
    assert ended.rows[-1].doing == "not seen"
    assert {part.holder for part in ended.rows[-1].parts} == {TELEMETRY}


def test_a_request_of_a_trace_without_any_known_batch_is_shown_as_unseen() -> None:
    """Recording began late, and no keyframe came before its end."""
    recording = run(Workload(EngineConfig(), [Arrival(0, 8, 30, "a")], 100, 10_000))
    shown = waterfall(read([*recording.step_lines()[5:], *recording.request_lines()]), "req-0")
    assert_sound(shown)
    assert {part.holder for part in shown.parts} <= {TELEMETRY, ENGINE}
