"""Resources over time: as a plain reading of the tables gives them, peaks at any width, nothing held while idle."""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from stallscope.diagnosis.replica import Replica, replicas
from stallscope.diagnosis.timeline import Floats
from stallscope.views.resources import Resource, Stack, resources
from stallscope.views.words import OTHERS
from stallscope_engine.config import EngineConfig
from tests.diagnosis.runs import MS, only_replica, random_run, scripted_lines
from tests.trace.recording import START_NS, Arrival, Workload, read, run
from tests.views.recordings import replica

HOLDING = {
    Resource.TOKENS: ("prefill", "decode"),
    Resource.KV: ("prefill", "decode", "paused"),
    Resource.SLOTS: ("prefill", "decode", "paused"),
    Resource.QUEUE: ("waiting", "preempted"),
}
COUNTED = {
    Resource.TOKENS: ("prefill_tokens", "decode_tokens"),
    Resource.KV: ("kv_used",),
    Resource.SLOTS: ("running",),
    Resource.QUEUE: ("waiting",),
}


def whole(r: Replica, resource: Resource, width: int, most_tenants: int = 8) -> Stack:
    return resources(r, resource, int(r.timeline.before[0]), int(r.timeline.end[-1]), width, most_tenants)


def at(view: Stack, time_ns: int) -> Floats:
    """What each tenant held at a time."""
    return view.values[:, np.searchsorted(view.time_ns, time_ns, side="right") - 1]


def read_plainly(r: Replica, resource: Resource) -> tuple[list[int], list[dict[str, float]]]:
    """For each step in order: the engine's count, and what the requests of each tenant held, by the tables."""
    steps = sorted(r.trace.steps.to_pylist(), key=lambda row: row["step"])
    steps = [row for row in steps if row["replica"] == r.name]
    tenant_of = dict(zip(r.requests["request"], (r.tenants[code] for code in r.requests["tenant"]), strict=True))
    held: list[dict[str, float]] = [defaultdict(float) for _ in steps]
    for row in r.trace.residency.to_pylist():
        if row["replica"] != r.name or row["phase"] not in HOLDING[resource]:
            continue
        for number, step in enumerate(steps):
            if row["first_step"] <= step["step"] <= row["last_step"]:
                tokens = row["context_start"] + row["tokens"] * (step["step"] - row["first_step"] + 1)
                amount = {Resource.TOKENS: row["tokens"], Resource.KV: tokens}.get(resource, 1)
                held[number][tenant_of[row["request"]]] += amount
    return [sum(row[column] for column in COUNTED[resource]) for row in steps], held


@example(seed=0, lost=0.0, resource=Resource.KV, width=1, window=(0.0, 1.0))
@given(
    seed=st.integers(0, 10_000),
    lost=st.sampled_from([0.0, 0.0, 0.1, 0.4]),
    resource=st.sampled_from(Resource),
    width=st.integers(1, 60),
    window=st.tuples(st.floats(-0.1, 1.1), st.floats(-0.1, 1.1)),
)
def test_each_moment_is_the_highest_step_of_its_bin_by_a_plain_reading(
    seed: int, lost: float, resource: Resource, width: int, window: tuple[float, float]
) -> None:
    rng = random.Random(seed)
    lines = random_run(seed).recording.step_lines()
    assume(lines)
    r = only_replica(read([line for line in lines[1:] if rng.random() >= lost] + lines[:1]))
    first, length = int(r.timeline.before[0]), r.timeline_ns
    start, end = (first + int(share * length) for share in sorted(window))
    end = max(end, start + 1)
    view = resources(r, resource, start, end, width, most_tenants=2)
    counted, held = read_plainly(r, resource)

    steps = list(zip(r.timeline.start.tolist(), r.timeline.end.tolist(), counted, held, strict=True))
    inside = [(max(begin, start), *rest) for begin, *rest in steps if begin < end and rest[0] > start]
    sums: dict[str, float] = defaultdict(float)
    for _, _, _, mine in inside:
        for tenant, amount in mine.items():
            sums[tenant] += amount
    most = sorted((amount for amount in sums.values() if amount), reverse=True)
    assert [sums[one] for one in view.tenants[:2]] == most[:2]
    assert view.tenants[2:] == (OTHERS,) * (len(most) > 2)

    expected = []
    for low, high in pairwise(start + int(edge) for edge in np.linspace(0, end - start, width + 1)):
        there = [one for one in inside if low <= one[0] < high]
        if there:
            time, _, total, mine = max(there, key=lambda one: one[2])
            known = sum(mine.values())
            values = [mine[one] * total / known if known else 0.0 for one in view.tenants[:2]]
            rest = [total - sum(values) if known else 0.0] * len(view.tenants[2:])
            expected.append([time - start, total, *values, *rest])
    for spans, nothing in ((r.timeline.idle, 0.0), (r.timeline.unobserved, np.nan)):
        for begin, over in zip(spans.begin.tolist(), spans.end.tolist(), strict=True):
            length = min(over, end) - max(begin, start)
            if length > 0 and length * width >= end - start:
                expected.append([max(begin - start, 0), *[nothing] * (1 + len(view.tenants))])
    expected.sort(key=lambda row: row[0])
    if expected:
        expected.append([min(end, int(r.timeline.end[-1])) - start, *expected[-1][1:]])
    found = np.vstack([view.time_ns - start, view.total, view.values]).T
    assert found == pytest.approx(np.array(expected).reshape(-1, found.shape[1]), abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("resource", Resource)
@pytest.mark.parametrize("most_tenants", [1, 8])
def test_tenants_add_up_to_what_the_engine_counted(resource: Resource, most_tenants: int) -> None:
    r, view = replica(), whole(replica(), resource, 100, most_tenants)
    counted = sum(r.steps[column].to_numpy() for column in COUNTED[resource])
    shown = counted[np.searchsorted(r.timeline.start, view.time_ns[:-1])]
    runs = view.total[:-1] > 0
    assert view.values.sum(axis=0) == pytest.approx(view.total)
    assert view.total[:-1][runs].tolist() == shown[runs].tolist()
    assert (view.values >= 0).all()


@pytest.mark.parametrize("resource", Resource)
@pytest.mark.parametrize("width", [1, 7, 100])
def test_the_peak_is_shown_whatever_the_width(resource: Resource, width: int) -> None:
    r = replica()
    view = whole(r, resource, width)
    assert view.total.max() == max(sum(r.steps[column] for column in COUNTED[resource]))
    assert len(view.time_ns) <= 2 * width + 1
    assert (np.diff(view.time_ns) >= 0).all()


@pytest.mark.parametrize("width", [1, 10, 500])
def test_who_holds_most_comes_first_whatever_the_width_and_the_rest_last(width: int) -> None:
    assert whole(replica(), Resource.KV, width).tenants[0] == "archive"
    assert whole(replica(), Resource.KV, width).tenants == whole(replica(), Resource.KV, 50).tenants
    assert whole(replica(), Resource.KV, width, most_tenants=1).tenants == ("archive", OTHERS)


def test_the_capacity_is_what_the_engine_says_of_itself() -> None:
    r = replica()
    said = {resource: whole(r, resource, 5).capacity for resource in Resource}
    assert said == {
        Resource.TOKENS: r.settings["max_num_batched_tokens"],
        Resource.KV: r.steps["kv_total"].max(),
        Resource.SLOTS: r.settings["max_num_seqs"],
        Resource.QUEUE: 0,
    }
    silent = only_replica(read(scripted_lines([("chat", 0, 8, 4)])))
    assert "max_num_seqs" not in silent.settings or silent.settings["max_num_seqs"] is None
    assert whole(silent, Resource.SLOTS, 5).capacity == 0


def test_only_the_kv_cache_has_blocks_of_finished_requests() -> None:
    config = EngineConfig(block_size=4, prefix_caching=True)
    arrivals = [Arrival(500 * MS, 60, 4, "chat") for _ in range(4)]
    r = only_replica(read(run(Workload(config, arrivals, 10, 10_000)).lines()))
    assert whole(r, Resource.KV, 10).cached.max() == r.steps["kv_cached"].max() > 0
    assert not whole(r, Resource.SLOTS, 10).cached.any()


def test_what_is_cached_while_the_engine_is_idle_is_what_the_next_step_finds() -> None:
    trace = read(scripted_lines([("chat", 0, 100, 20), ("batch", 1_000, 100, 20)]))
    column, number = trace.steps.column_names.index("kv_cached"), np.arange(len(trace.steps))
    steps = trace.steps.set_column(column, "kv_cached", pa.array(number))
    r = only_replica(replace(trace, tables={**trace.tables, "steps": steps}))
    view = whole(r, Resource.KV, 30)
    pause = int(np.searchsorted(view.time_ns, r.timeline.idle.begin[0]))
    assert view.total[pause] == 0
    assert view.cached[pause] == np.searchsorted(r.timeline.start, r.timeline.idle.end[0])


@pytest.mark.parametrize("resource", [Resource.TOKENS, Resource.KV, Resource.SLOTS])
def test_an_idle_engine_holds_nothing(resource: Resource) -> None:
    r = only_replica(read(scripted_lines([("chat", 0, 100, 20), ("batch", 1_000, 100, 20)])))
    view = whole(r, resource, 100)
    assert at(view, START_NS + 500 * MS).tolist() == [0, 0]
    assert sorted((at(view, START_NS + 5 * MS) > 0).tolist()) == [False, True]
    for start in (START_NS + 200 * MS, int(r.timeline.idle.begin[0])):
        pause = resources(r, resource, start, START_NS + 800 * MS, 10)
        assert (pause.tenants, pause.total.tolist()) == ((), [0, 0])
        assert pause.time_ns.tolist() == [start, START_NS + 800 * MS]


def test_where_nobody_saw_the_engine_nothing_is_told() -> None:
    lines = scripted_lines([("chat", 0, 100, 400)])
    r = only_replica(read([line for number, line in enumerate(lines) if not 100 <= number < 300]))
    view = whole(r, Resource.SLOTS, 20)
    middle = int(r.timeline.unobserved.begin[0] + r.timeline.unobserved.end[0]) // 2
    assert np.isnan(at(view, middle)).all()
    assert at(view, int(r.timeline.end[50])).tolist() == [1]


def test_a_step_that_began_before_the_window_or_ends_after_it_is_in_it() -> None:
    r = only_replica(read(scripted_lines([("chat", 0, 100, 1)])))
    assert len(r.timeline) == 1
    start, end = int(r.timeline.start[0]), int(r.timeline.end[0])
    for resource in (Resource.TOKENS, Resource.KV, Resource.SLOTS):
        view = resources(r, resource, start + 10, end - 10, 7)
        assert (view.tenants, view.time_ns.tolist()) == (("chat",), [start + 10, end - 10])
        assert view.values[0].tolist() == view.total.tolist() == [view.total[0]] * 2
        assert view.total[0] > 0


@pytest.mark.parametrize("resource", Resource)
def test_a_window_without_steps_is_empty(resource: Resource) -> None:
    view = resources(replica(), resource, 0, 1, 10)
    assert (len(view.time_ns), view.tenants, view.values.shape, len(view.cached)) == (0, (), (0, 0), 0)


def test_each_replica_of_a_trace_shows_its_own() -> None:
    recordings = {name: random_run(seed).recording for name, seed in (("r0", 3), ("r1", 4))}
    both = read([line for name, one in recordings.items() for line in one.lines(name)])
    for mine in replicas(both):
        alone = only_replica(read(recordings[mine.name].lines(mine.name)))
        for resource in Resource:
            view, expected = whole(mine, resource, 20), whole(alone, resource, 20)
            assert (view.replica, view.tenants, view.capacity) == (mine.name, expected.tenants, expected.capacity)
            assert view.values.tolist() == expected.values.tolist()
