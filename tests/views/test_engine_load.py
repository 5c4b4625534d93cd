"""An engine's load: as a plain walk over the steps gives it; what nobody saw, or nothing tells, is not a number."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stallscope.diagnosis.replica import Replica, replicas
from stallscope.trace import read_trace, write_parquet
from stallscope.views.engine_load import EngineLoad, engine_load
from stallscope_telemetry import names, spans
from stallscope_telemetry.records import GpuSample
from tests.diagnosis.runs import MS, only_replica, random_run, scripted_lines
from tests.trace.recording import START_NS, line, read, steady
from tests.views.recordings import replica

SECOND = 1_000_000_000


def whole(r: Replica, width: int) -> EngineLoad:
    return engine_load(r, int(r.timeline.before[0]), int(r.timeline.end[-1]), width)


def shared(begin: int, end: int, low: int, high: int) -> int:
    """How much of one stretch of time lies in another, ns."""
    return max(0, min(end, high) - max(begin, low))


def walked(r: Replica, low: int, high: int) -> list[float]:
    """The values of one bin, from every step of the table."""
    timeline = r.timeline
    slices = list(zip(timeline.start.tolist(), timeline.end.tolist(), strict=True))
    unseen = zip(timeline.unobserved.begin.tolist(), timeline.unobserved.end.tolist(), strict=True)
    seen = shared(int(timeline.before[0]), slices[-1][1], low, high) - sum(shared(*one, low, high) for one in unseen)
    if not seen:
        return [math.nan] * 6
    rows = sorted(r.trace.steps.to_pylist(), key=lambda row: row["step"])
    parts = [shared(*one, low, high) / max(one[1] - one[0], 1) for one in slices]
    there = [row for row, one in zip(rows, slices, strict=True) if one[1] > low and one[0] < high]
    first_tokens = sum(low <= time < high for time in r.requests["first_token"])
    decoded, prefilled = (
        sum(row[column] * part for row, part in zip(rows, parts, strict=True))
        for column in ("decode_tokens", "prefill_tokens")
    )
    return [
        sum(shared(*one, low, high) for one in slices) / seen,
        max((row["kv_used"] / row["kv_total"] for row in there), default=0),
        (decoded + first_tokens) / (seen / 1e9),
        prefilled / (seen / 1e9),
        max((row["waiting"] for row in there), default=0),
        max((row["running"] for row in there), default=0),
    ]


@given(
    seed=st.integers(0, 10_000),
    lost=st.sampled_from([0.0, 0.0, 0.1, 0.4]),
    width=st.integers(1, 60),
    window=st.tuples(st.floats(-2, 3), st.floats(-2, 3)),
)
def test_each_bin_is_what_a_plain_walk_over_the_steps_gives(
    seed: int, lost: float, width: int, window: tuple[float, float]
) -> None:
    rng = random.Random(seed)
    lines = random_run(seed).recording.lines()
    assume(lines)
    r = only_replica(read([one for one in lines[1:] if rng.random() >= lost] + lines[:1]))
    start, end = (int(r.timeline.before[0]) + int(share * r.timeline_ns) for share in sorted(window))
    view = engine_load(r, start, end, width)
    edges = [*range(start, end, view.bin_ns), end]
    columns = (
        view.busy,
        view.kv_share,
        view.output_tokens_per_s,
        view.prefill_tokens_per_s,
        view.waiting,
        view.running,
    )
    assert len(view.start_ns) <= width
    assert view.start_ns.tolist() == edges[:-1]
    expected = [walked(r, low, high) for low, high in pairwise(edges)]
    assert np.stack(columns, axis=1) == pytest.approx(np.array(expected).reshape(-1, 6), rel=1e-6, nan_ok=True)
    assert np.isnan(view.gpu_utilization).all()


@pytest.mark.parametrize("width", [1, 7, 100])
def test_tokens_are_all_there_whatever_the_width(width: int) -> None:
    r = replica()
    start, end = int(r.timeline.before[0]), int(r.timeline.end[-1]) + 1
    view = engine_load(r, start, end, width)
    lengths = np.diff(np.append(np.minimum(view.start_ns, end - 1), end - 1)) / 1e9
    assert view.prefill_tokens_per_s @ lengths == pytest.approx(r.steps["prefill_tokens"].sum())
    assert view.output_tokens_per_s @ lengths == pytest.approx(r.requests["output_tokens"].sum())


def test_two_windows_that_meet_hold_what_the_whole_holds() -> None:
    r = replica()
    start, end = int(r.timeline.before[0]), int(r.timeline.end[-1])
    middle = int(r.requests["first_token"].iloc[len(r.requests) // 2])
    parts, total = (
        sum(engine_load(r, low, high, 1).output_tokens_per_s[0] * (high - low) for low, high in pairwise(edges))
        for edges in ((start, middle, end), (start, end))
    )
    assert parts == pytest.approx(total)


def test_a_step_is_in_no_bin_that_begins_where_it_ends() -> None:
    r = only_replica(read(scripted_lines([("chat", 0, 100, 20), ("batch", 1_000, 100, 20)])))
    over = int(r.timeline.idle.begin[0])
    assert engine_load(r, over, over + 100 * MS, 1).running.tolist() == [0]


def test_bins_are_of_a_length_that_people_count_in() -> None:
    r = replica()
    start = int(r.timeline.before[0])
    assert engine_load(r, start, start + 61 * SECOND, 60).bin_ns == 2 * SECOND


def test_an_engine_with_nothing_to_do_is_not_busy() -> None:
    r = only_replica(read(scripted_lines([("chat", 0, 100, 20), ("batch", 1_000, 100, 20)])))
    view = engine_load(r, START_NS, START_NS + 1_000 * MS, 10)
    assert view.busy[0] > 0
    assert view.output_tokens_per_s[0] == 200
    assert view.prefill_tokens_per_s[0] == 1000
    assert view.running.tolist() == [1, *[0] * 9]
    assert not view.busy[1:].any()
    assert not view.kv_share[1:].any()


def test_where_nobody_saw_the_engine_nothing_is_told() -> None:
    lines = scripted_lines([("chat", 0, 100, 1_000)])
    r = only_replica(read([one for number, one in enumerate(lines) if not 100 <= number < 900]))
    view = engine_load(r, START_NS, START_NS + 1_500 * MS, 15)
    hole = (view.start_ns > r.timeline.unobserved.begin[0]) & (view.start_ns + 100 * MS < r.timeline.unobserved.end[-1])
    after = view.start_ns >= r.timeline.end[-1]
    assert hole.any()
    assert after.any()
    for values in (view.busy, view.kv_share, view.output_tokens_per_s, view.waiting, view.running):
        assert np.isnan(values).tolist() == (hole | after).tolist()


def test_a_step_that_is_longer_than_the_window_fills_it() -> None:
    r = only_replica(read(scripted_lines([("chat", 0, 2_000, 1)])))
    (start,), (end,) = r.timeline.start.tolist(), r.timeline.end.tolist()
    view = engine_load(r, start + MS, end - MS, 1)
    assert (view.busy.tolist(), view.running.tolist()) == ([1], [1])
    rate = r.steps["prefill_tokens"].sum() / ((end - start) / 1e9)
    assert view.prefill_tokens_per_s.tolist() == pytest.approx([rate])


@pytest.mark.parametrize("end_ns", [0, 1])
def test_a_window_without_steps_has_no_values(end_ns: int) -> None:
    view = engine_load(replica(), 0, end_ns, 10)
    assert len(view.start_ns) == end_ns
    assert np.isnan(view.busy).all()
    assert len(view.busy) == len(view.gpu_utilization) == len(view.running) == end_ns


def test_a_trace_that_does_not_tell_the_cache_s_size_has_no_share_of_it() -> None:
    trace = read(steady().lines())
    at = trace.steps.column_names.index("kv_total")
    steps = trace.steps.set_column(at, "kv_total", pa.nulls(len(trace.steps), pa.int64()))
    view = whole(only_replica(replace(trace, tables={**trace.tables, "steps": steps})), 1)
    assert np.isnan(view.kv_share).all()
    assert view.running.max() == 1


# --- samples of GPUs ----------------------------------------------------------------------------------------------


def gpu_line(device: str, at_ms: int, utilization: float | None, name: str = "r0") -> bytes:
    sample = GpuSample(device, START_NS + at_ms * MS, utilization, power_w=70.0)
    return line(name, steady().config, names.GPU_SPAN, sample.time_ns, sample.time_ns, spans.gpu_attributes(sample))


SAMPLES = [
    *(gpu_line("GPU-a", at_ms, share) for at_ms, share in ((0, 0.5), (50, None), (99, 1.0), (300, 0.0), (400, 1.0))),
    *(gpu_line("GPU-b", at_ms, 0.3) for at_ms in (0, 300)),
    *(gpu_line("GPU-c", at_ms, 0.9, "r1") for at_ms in (0, 100)),
]


def test_gpu_utilization_is_the_mean_of_the_replica_s_own_samples_in_the_bin(tmp_path: Path) -> None:
    runs = [line for name in ("r0", "r1") for line in steady().lines(name)]
    trace = read([*runs, *SAMPLES])
    write_parquet(trace, tmp_path / "dataset")
    for source in (trace, read_trace(tmp_path / "dataset")):
        mine, other = (engine_load(r, START_NS, START_NS + 400 * MS, 4).gpu_utilization for r in replicas(source))
        assert mine == pytest.approx([0.6, np.nan, np.nan, 0.15], nan_ok=True)
        assert other == pytest.approx([0.9, 0.9, np.nan, np.nan], nan_ok=True)
