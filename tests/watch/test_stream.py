"""Windows of a replica's spans add up to what the trace reader says of all of them, however they are cut."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.diagnosis.runs import random_run
from tests.trace.recording import Workload, read, run, steady, workloads
from tests.watch.streams import (
    Told,
    batches_in,
    cut_at,
    gaps_in,
    kv_block_ns_in,
    lives_of,
    restarted,
    shifted,
    tokens_in,
    watched,
)

seeds = st.integers(0, 1 << 16)


def in_windows(lines: list[bytes], rng: random.Random) -> list[list[bytes]]:
    """Cut at random, in random order within each."""
    cuts = [rng.randrange(len(lines)) for _ in range(rng.randrange(12))]
    return cut_at(lines, cuts, rng)


def positive(counts: Counter[str]) -> Counter[str]:
    return +counts


def check_same(told: Told, lines: list[bytes], block_tokens: int) -> None:
    """All that a watch counts, against the trace's tables."""
    trace = read(lines)
    assert told.batches == batches_in(trace)
    prefill, decode, recomputed = tokens_in(trace)
    assert positive(told.prefill) == positive(prefill)
    assert positive(told.decode) == positive(decode)
    assert positive(told.recomputed) == positive(recomputed)
    assert told.steps == trace.steps.num_rows
    assert told.lost == sum(trace.coverage["steps_lost"].to_pylist())
    rows = trace.requests.to_pylist()
    assert told.requests == Counter(row["tenant"] or "(unknown)" for row in rows)
    preemptions = Counter[str]()
    for row in rows:
        preemptions[row["tenant"] or "(unknown)"] += row["preemptions"] or 0
    assert positive(told.preemptions) == positive(preemptions)
    held = kv_block_ns_in(trace, block_tokens)
    for tenant, amount in told.kv_block_ns.items():
        assert amount == pytest.approx(held.get(tenant, 0.0), rel=1e-6, abs=1e3)
    gaps = gaps_in(trace)
    for tenant in {*gaps, *told.gaps}:
        lengths = told.gaps.get(tenant, Counter[int]())
        count, total, long = gaps[tenant]
        assert lengths.total() == count
        assert abs(sum(length * times for length, times in lengths.items()) - total) <= count
        assert long <= lengths


@settings(deadline=None, max_examples=60)
@given(seeds)
def test_windows_add_up_to_what_the_trace_says(seed: int) -> None:
    recording, rng = random_run(seed).recording, random.Random(seed)
    lines, block_tokens = recording.step_lines(), recording.config.block_size
    assume(lines)
    told = watched(in_windows(lines, rng), block_tokens)
    check_same(told, lines, block_tokens)
    ends = {row["request"]: row for row in read(lines).requests.to_pylist()}
    ended = Counter(
        (row["tenant"] or "(unknown)", row["end"] - row["arrival"])
        for row in ends.values()
        if row["finish_reason"] in ("stop", "length")
    )
    assert ended <= Counter((tenant, length) for tenant, lengths in told.whole_ns.items() for length in lengths)
    assert told.first_ns == {
        (1, name): row["first_token"] - row["arrival"] for name, row in ends.items() if row["first_token"] is not None
    }


@settings(deadline=None, max_examples=60)
@given(seeds, st.floats(0.02, 0.3))
def test_lost_steps_are_the_same_loss_as_for_the_trace_reader(seed: int, loss: float) -> None:
    recording, rng = random_run(seed).recording, random.Random(seed)
    lines = [line for line in recording.step_lines() if rng.random() > loss]
    assume(lines)
    check_same(watched(in_windows(lines, rng), recording.config.block_size), lines, recording.config.block_size)


@settings(deadline=None, max_examples=30)
@given(workloads(), seeds)
def test_policies_that_pause_and_preempt_are_told_alike(workload: Workload, seed: int) -> None:
    lines = run(workload).step_lines()
    assume(lines)
    windows = in_windows(lines, random.Random(seed))
    check_same(watched(windows, workload.config.block_size), lines, workload.config.block_size)


@settings(deadline=None, max_examples=40)
@given(seeds, seeds, st.integers(2, 600))
def test_a_process_that_begins_again_loses_nothing_of_either_life(one: int, other: int, pause_s: int) -> None:
    before, after = random_run(one).recording, random_run(other).recording
    assume(len(before.steps) > 3 and len(after.steps) > 3)
    lines = restarted(before, after, pause_s * 10**9)
    trace = read(lines)
    assume(len(lives_of(trace)) == 2)  # the reader takes a step or two with passed indices for wrong times
    told = watched(in_windows(lines, random.Random(one)), before.config.block_size)
    assert told.stream.lives == 2
    assert told.batches == batches_in(trace)
    assert (told.steps, told.lost) == (trace.steps.num_rows, 0)
    assert [positive(tokens) for tokens in (told.prefill, told.decode, told.recomputed)] == [
        positive(tokens) for tokens in tokens_in(trace)
    ]


def test_a_step_with_a_time_of_another_century_costs_a_window_and_poisons_no_sum() -> None:
    lines = steady(requests=2, output=60, keyframe_every=10).step_lines()
    for position in (0, 7, 20, 39, 40, len(lines) - 1):
        for years in (-40, 40):
            damaged = [*lines]
            damaged[position] = shifted(lines[position], years * 365 * 86_400 * 10**9)
            told = watched(cut_at(damaged, [20, 40]))
            steps = {number: batch for (life, number), batch in told.batches.items()}
            assert max(steps) >= len(lines) - 2, "it is watched on"
            assert told.longest_ns < 10**9
            assert all(length < 10**9 for lengths in told.gaps.values() for length in lengths)
            assert all(held < 1e13 for held in told.kv_block_ns.values())


def test_a_clock_that_is_set_back_is_watched_on() -> None:
    lines = steady(requests=2, output=60, keyframe_every=10).step_lines()
    whole = watched([lines])
    for back_s in (2, 300, 86_400):
        later = [shifted(line, -back_s * 10**9) for line in lines[30:]]
        told = watched(cut_at([*lines[:30], *later], [10, 30, 45]))
        assert told.batches == whole.batches
        assert told.longest_ns < 10**9


def test_after_a_night_without_a_request_batches_are_still_known() -> None:
    lines = steady(requests=2, output=60, keyframe_every=10_000).step_lines()
    night_ns = 10 * 3600 * 10**9
    told = watched(cut_at([*lines[:30], *(shifted(line, night_ns) for line in lines[30:])], [10, 30, 45]))
    assert told.batches == watched([lines]).batches
    assert told.longest_ns < 10**9, "and the night is nobody's step, gap or host time"


@settings(deadline=None, max_examples=30)
@given(seeds)
def test_batches_that_overtake_one_another_between_two_windows_lose_nothing(seed: int) -> None:
    recording, rng = random_run(seed).recording, random.Random(seed)
    lines = recording.step_lines()
    assume(len(lines) > 8)
    batches = cut_at(lines, [rng.randrange(1, len(lines)) for _ in range(6)])
    for number in range(0, len(batches) - 1, 2):
        batches[number : number + 2] = batches[number + 1], batches[number]
    begins, trace = [lines[:1], *batches], read(lines)  # from its first step on: else it begins with what came first
    told = watched(begins, recording.config.block_size)
    assert (told.steps, told.lost) == (trace.steps.num_rows, 0)
    assert told.batches == batches_in(trace)


def test_what_comes_again_or_too_late_counts_once() -> None:
    lines = steady(requests=3, output=40, keyframe_every=10).step_lines()
    whole = watched([lines])
    told = watched([lines[:20], [*lines[10:30], *lines[20:30]], lines[:5], lines[30:]])
    assert (told.steps, told.lost) == (whole.steps, 0)
    assert told.batches == whole.batches
    assert told.gaps == whole.gaps
