"""Shares of tenants over time: what a plain walk over the steps gives, whatever the names, the bins and the window."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from stallscope.diagnosis.replica import Replica
from stallscope.views.shares import Shares, shares
from stallscope.views.words import OTHERS
from stallscope_engine.config import EngineConfig
from tests.diagnosis.runs import MS, only_replica, random_run, scripted_lines
from tests.trace.recording import START_NS, read
from tests.views.recordings import replica

EVERYONE = 50


@cache
def random_replica(seed: int) -> Replica:
    lines = random_run(seed).recording.lines()
    assume(lines)  # some send nothing that the engine takes
    return only_replica(read(lines))


def whole(r: Replica, width: int, most_tenants: int = EVERYONE) -> Shares:
    return shares(r, int(r.timeline.before[0]), int(r.timeline.end[-1]), width, most_tenants)


def overlap(start: int, end: int, low: int, high: int) -> float:
    """Share of a stretch that lies between two times."""
    return max(min(end, high) - max(start, low), 0) / max(end - start, 1)


def by_steps(r: Replica, view: Shares, end_ns: int) -> dict[str, np.ndarray]:
    """Tokens, seconds, block-seconds of ``view.tenants`` and their fairness, by a walk over steps and requests."""
    lines, steps, tenants = r.timeline, r.steps, len(r.tenants)
    tenant_of = r.tenant_of_request[r.ledger.stretches.request]
    cost = np.array([r.ledger.step_cost(tenant_of == tenant) for tenant in range(tenants)])
    held = np.array([r.ledger.kv_tokens(tenant_of == tenant) for tenant in range(tenants)])
    stretches = r.ledger.stretches
    computes = (stretches.prefill | stretches.decode) * stretches.tokens
    bounds = [*view.start_ns.tolist(), end_ns]
    found = {name: np.zeros((tenants, len(bounds) - 1)) for name in ("tokens", "step_time", "kv")}
    used, present = np.zeros(len(bounds) - 1), np.zeros((tenants, len(bounds) - 1), dtype=bool)
    for k, (low, high) in enumerate(pairwise(bounds)):
        for step in range(len(lines)):
            slice_ = overlap(int(lines.start[step]), int(lines.end[step]), low, high)
            since = overlap(int(lines.before[step]), int(lines.end[step]), low, high)
            length = (int(lines.end[step]) - int(lines.before[step])) * since / 1e9
            used[k] += int(steps["kv_used"].iloc[step]) * length
            there = (stretches.first <= step) & (stretches.last >= step)
            found["step_time"][:, k] += cost[:, step] * slice_ / 1e9
            found["kv"][:, k] += held[:, step] * length
            found["tokens"][:, k] += np.bincount(tenant_of[there], computes[there], tenants) * slice_
        for request in r.requests.itertuples():
            present[request.tenant, k] |= request.arrival < high and request.seen_until > low
    total = found["kv"].sum(axis=0)
    found["kv"] = found["kv"] / np.where(total > 0, total, 1) * used
    got = found["step_time"]
    counts = np.maximum((present | (got > 1e-9 * got.sum(axis=0))).sum(axis=0), 1)
    squares = counts * (got**2).sum(axis=0)
    fairness = np.where(squares > 0, got.sum(axis=0) ** 2 / np.where(squares > 0, squares, 1), np.nan)
    codes = [r.tenants.index(name) for name in view.tenants]
    return {name: amount[codes] for name, amount in found.items()} | {"fairness": fairness}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 30), st.integers(1, 12), st.floats(0, 1), st.floats(0, 1))
@example(9, 1, 1.0, 0.5)  # a step in which a tenant had no part costs it 1e-16 s, as floating point has it
def test_a_plain_walk_over_the_steps_gives_the_same(seed: int, width: int, first: float, second: float) -> None:
    r = random_replica(seed)
    start, length = int(r.timeline.before[0]), int(r.timeline.end[-1] - r.timeline.before[0])
    low, high = sorted((start + int(first * length), start + int(second * length)))
    view = shares(r, low, high, width, EVERYONE)
    expected = by_steps(r, view, high)
    for name in ("tokens", "step_time", "kv"):
        assert getattr(view, name).amount == pytest.approx(expected[name], rel=1e-6, abs=1e-9), name
    assert view.fairness == pytest.approx(expected["fairness"], rel=1e-6, nan_ok=True)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 30), st.integers(1, 40), st.integers(1, 4))
def test_shares_sum_to_one_where_anybody_got_anything_and_fairness_has_its_bounds(
    seed: int, width: int, most: int
) -> None:
    view = whole(random_replica(seed), width, most)
    for spent in (view.tokens, view.step_time, view.kv):
        total = spent.share.sum(axis=0)
        assert ((np.abs(total - 1) < 1e-9) | ((total == 0) & (spent.amount.sum(axis=0) == 0))).all()
        assert (spent.amount >= 0).all()
    fairness = view.fairness[~np.isnan(view.fairness)]
    assert ((fairness > 0) & (fairness <= 1 + 1e-9)).all()
    assert (np.isnan(view.fairness) == (view.step_time.amount.sum(axis=0) == 0)).all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 30), st.integers(1, 12), st.integers(0, 2**32))
def test_other_names_change_nothing_but_the_names(seed: int, width: int, shuffle: int) -> None:
    r = random_replica(seed)
    order = list(range(len(r.tenants)))
    random.Random(shuffle).shuffle(order)  # tenant i gets code order[i]
    names = [f"<b>{code}</b>\n" for code in range(len(order))]
    requests = r.requests.assign(tenant=np.array(order)[r.tenant_of_request])
    before, after = whole(r, width), whole(replace(r, tenants=tuple(names), requests=requests), width)
    rows = [after.tenants.index(names[order[r.tenants.index(tenant)]]) for tenant in before.tenants]
    assert sorted(rows) == list(range(len(after.tenants)))
    for name in ("tokens", "step_time", "kv"):
        assert getattr(before, name).amount == pytest.approx(getattr(after, name).amount[rows])
    assert before.fairness == pytest.approx(after.fairness, nan_ok=True)


@pytest.mark.parametrize("width", [1, 13, 400])
def test_the_width_changes_no_sum(width: int) -> None:
    r, view = replica(), whole(replica(), width)
    computed = r.read_steps(["prefill_tokens", "decode_tokens"])[["prefill_tokens", "decode_tokens"]].to_numpy().sum()
    blocks = (r.steps["kv_used"].to_numpy(np.int64) * (r.timeline.end - r.timeline.before)).sum() / 1e9
    assert view.tokens.total.sum() == pytest.approx(computed)
    assert view.step_time.total.sum() == pytest.approx(r.ledger.marginal[-1] / 1e9)
    assert view.kv.total.sum() == pytest.approx(blocks)
    assert len(view.start_ns) <= width


def test_who_pins_the_cache_has_nearly_all_of_it_and_far_fewer_of_the_tokens() -> None:
    view = whole(replica(), 40)
    archive = view.tenants.index("archive")
    assert view.kv.total[archive] / view.kv.total.sum() > 0.9
    assert view.tokens.total[archive] / view.tokens.total.sum() < 0.9


def test_tenants_beyond_the_most_shown_are_one_and_keep_the_sum() -> None:
    every, few = whole(replica(), 20), whole(replica(), 20, most_tenants=1)
    assert few.tenants == (every.tenants[0], OTHERS)
    assert few.step_time.amount.sum(axis=0) == pytest.approx(every.step_time.amount.sum(axis=0))
    assert few.fairness == pytest.approx(every.fairness, nan_ok=True)


def test_it_is_fair_where_two_do_the_same_and_half_as_fair_where_one_of_them_only_waits() -> None:
    same, first = [("a", 0, 100, 20), ("b", 0, 100, 20)], [("a", 0, 100, 200), ("b", 0, 100, 20)]
    together, one_by_one = (
        only_replica(read(scripted_lines(requests, config=EngineConfig(max_num_seqs=slots))))
        for requests, slots in ((same, 2), (first, 1))
    )
    assert whole(together, 1).fairness == pytest.approx([1.0])
    begin = int(one_by_one.timeline.start[0])
    assert shares(one_by_one, begin, begin + 10 * MS, 1).fairness == pytest.approx([0.5])


def test_who_comes_when_a_bin_begins_was_not_there_in_the_one_before() -> None:
    r = only_replica(read(scripted_lines([("a", 0, 100, 300), ("b", 100, 100, 300)])))
    alone, both = shares(r, START_NS, START_NS + 200 * MS, 2).fairness
    assert alone == pytest.approx(1.0)
    assert both == pytest.approx(1.0, abs=0.1)


def test_a_window_without_steps_is_empty() -> None:
    view = shares(replica(), 0, 1, 10)
    assert (view.tenants, view.tokens.amount.shape, np.isnan(view.fairness).all()) == ((), (0, 1), True)
    assert shares(replica(), START_NS, START_NS, 10).kv.share.shape == (0, 0)
