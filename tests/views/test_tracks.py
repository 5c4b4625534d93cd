"""Tracks: every life is drawn whole, lanes never overlap, and a stalled wait's cause was there before it ended."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.diagnosis.timeline import Ints
from stallscope.views.tracks import Stays, engine, lanes, stalls, stays
from tests.views.recordings import diagnosed, replica, waits

SCENARIOS = ["kv_pinning", "reasoning_prompt"]


def overlaps(lane: Ints, begin: Ints, end: Ints) -> bool:
    """Whether two intervals of a lane share time; they are ordered by lane and begin."""
    return bool(((np.diff(lane) == 0) & (begin[1:] < end[:-1])).any() or (np.diff(lane) < 0).any())


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=40))
def test_lanes_are_as_few_as_intervals_that_meet_at_one_time(intervals: list[tuple[int, int]]) -> None:
    begin = np.array([start for start, _ in intervals], dtype=np.int64)
    end = begin + np.array([length for _, length in intervals], dtype=np.int64)
    lane = lanes(begin, end)
    order = np.lexsort((begin, lane))
    assert not overlaps(lane[order], begin[order], end[order])
    most = max((int(((begin <= time) & (end > time)).sum()) for time in begin), default=0)
    assert lane.max(initial=-1) + 1 == most


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_life_is_drawn_from_arrival_to_its_end(scenario: str) -> None:
    r = replica(scenario)
    waiting, batch = stays(r)
    drawn = np.zeros(len(r.requests), dtype=np.int64)
    for part in (waiting, batch):
        assert not overlaps(part.lane, part.begin, part.end)
        np.add.at(drawn, part.request, part.end - part.begin)
    assert (drawn == (r.requests["seen_until"] - r.requests["arrival"])).all()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_pieces_fill_their_stay_without_gaps(scenario: str) -> None:
    for part in stays(replica(scenario)):
        first, after = part.first_piece[:-1], part.first_piece[1:]
        assert after[-1] == len(part.pieces.begin)
        assert (part.pieces.begin[first] == part.begin).all()
        assert (part.pieces.end[after - 1] == part.end).all()
        inner = np.setdiff1d(np.arange(len(part.pieces.begin)), first)
        assert (part.pieces.begin[inner] == part.pieces.end[inner - 1]).all()


def test_a_request_waits_until_it_first_gets_into_a_batch() -> None:
    r = replica()
    waiting, batch = stays(r)
    assert not {"prefill", "decoding", "paused"} & set(waiting.pieces.doing)
    assert "waiting for KV blocks" in set(waiting.pieces.doing)
    entered = batch.begin[batch.of(len(r.requests))[waiting.request]]
    runs = batch.of(len(r.requests))[waiting.request] >= 0
    assert (waiting.end[runs] == entered[runs]).all()


def tokens_by_request(part: Stays, requests: int) -> Ints:
    stay = np.repeat(np.arange(len(part.request)), np.diff(part.first_piece))
    return np.bincount(part.request[stay], part.pieces.tokens, requests).astype(np.int64)


def test_tokens_of_the_pieces_are_those_that_the_steps_computed() -> None:
    r = replica()
    steps, _ = engine(r)
    computed = tokens_by_request(stays(r)[1], len(r.requests))
    assert computed.sum() == (steps.prefill_tokens + steps.decode_tokens).sum()


def test_counters_are_what_the_steps_say_and_zero_where_the_engine_was_idle() -> None:
    r = replica()
    _, counters = engine(r)
    by_name = {one.name.partition(" (")[0]: one for one in counters}
    waiting = by_name["requests waiting"]
    at = np.searchsorted(waiting.time_ns, r.timeline.start, side="right") - 1
    assert (waiting.value[at] == r.steps["waiting"].to_numpy()).all()
    running = by_name["requests running"]
    idle = r.timeline.idle
    assert len(idle.begin)
    inside = np.searchsorted(running.time_ns, idle.begin, side="right") - 1
    assert (running.value[inside] == 0).all()
    assert "(of" in next(one.name for one in counters if one.name.startswith("KV blocks"))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_stalled_waits_are_laid_to_a_culprits_request_that_was_there(scenario: str) -> None:
    r, incidents = replica(scenario), diagnosed(scenario).incidents
    found = stalls(r, waits(scenario), incidents, stays(r)[1])
    victims = {victim.tenant for incident in incidents for victim in incident.victims}
    culprits = {suspect.request for one in incidents for culprit in one.culprits for suspect in culprit.requests}
    assert not overlaps(found.lane, found.begin, found.end)
    assert {r.tenants[code] for code in r.tenant_of_request[found.request]} <= victims
    blamed = found.cause >= 0
    assert blamed.mean() > 0.9
    assert set(r.requests["request"].to_numpy()[found.cause[blamed]]) <= culprits
    assert (found.request[blamed] != found.cause[blamed]).all()
    assert (found.since >= found.begin).all()
    assert (found.since < found.end).all()
    there = np.where(found.cause_runs, stays(r)[1].begin[stays(r)[1].of(len(r.requests))[found.cause]], 0)
    assert (there[blamed] <= found.since[blamed]).all()


def test_without_incidents_nothing_is_stalled() -> None:
    r = replica()
    assert len(stalls(r, waits(), (), stays(r)[1]).request) == 0
