"""Tenants as usual: their own calm time in the place of what they did, nothing for a newcomer, nobody else changed."""

from __future__ import annotations

import numpy as np
import pytest

from stallscope.diagnosis.changes import Change
from stallscope.diagnosis.load import Calm
from stallscope.diagnosis.replay.history import History
from stallscope.diagnosis.replay.run import Plan
from stallscope.diagnosis.replay.usual import as_recorded, as_usual
from tests.diagnosis.replay.recorded import CHAT, FLOOD, GROWTH, history_of

S = 1_000_000_000


def whole(history: History) -> Plan:
    timeline = history.replica.timeline
    return as_recorded(history, int(timeline.before[0]), int(timeline.end[-1]), int(timeline.end[-1]))


def calm_outside(history: History, tenant: int, start: int, end: int) -> Calm:
    arrival = history.requests["arrival"].to_numpy(np.int64)
    first, last = int(history.replica.timeline.before[0]), int(history.replica.timeline.end[-1])
    mine = (history.requests["tenant"].to_numpy() == tenant) & ((arrival < start) | (arrival > end))
    return Calm(mine, ((first, start), (end, last)), ((start, end),))


def test_a_newcomers_usual_is_nothing() -> None:
    history = history_of(CHAT + FLOOD)
    culprit = history.replica.tenants.index("batch")
    begin = int(history.replica.timeline.before[0])
    span = (begin + 11 * S, begin + 25 * S)
    plan = as_usual(history, whole(history), {culprit: [span]}, {}, {culprit: calm_outside(history, culprit, *span)}, 0)
    assert not (plan.requests["tenant"] == culprit).any()


@pytest.mark.parametrize("draw", range(3))
def test_a_steady_tenant_as_usual_does_about_the_same(draw: int) -> None:
    history = history_of(CHAT + FLOOD)
    chat = history.replica.tenants.index("chat")
    begin = int(history.replica.timeline.before[0])
    span = (begin + 11 * S, begin + 21 * S)
    base = whole(history)
    plan = as_usual(history, base, {chat: [span]}, {}, {chat: calm_outside(history, chat, *span)}, draw)
    drawn = plan.requests[plan.requests["code"] < 0]
    there = base.requests[(base.requests["tenant"] == chat) & base.requests["arrival"].between(*span)]
    assert drawn["arrival"].between(*span).all()
    assert 0.6 < len(drawn) / len(there) < 1.6
    calm_sizes = set(history.requests.loc[calm_outside(history, chat, *span).requests, "prompt_tokens"])
    assert set(drawn["prompt_tokens"]) <= calm_sizes


def test_nobody_else_is_changed_and_all_stay_in_the_order_of_arrival() -> None:
    history = history_of(CHAT + FLOOD)
    chat = history.replica.tenants.index("chat")
    begin = int(history.replica.timeline.before[0])
    span = (begin + 11 * S, begin + 21 * S)
    base = whole(history)
    plan = as_usual(history, base, {chat: [span]}, {}, {chat: calm_outside(history, chat, *span)}, 0)
    others = [requests[requests["tenant"] != chat]["code"].to_list() for requests in (base.requests, plan.requests)]
    assert others[0] == others[1]
    assert plan.requests["arrival"].is_monotonic_increasing


def change_of(history: History, tenant: int, start: int, end: int, **said: object) -> Change:
    return Change(tenant, start, end, end, "requests", 0.0, 1, 0.0, -9.0, **said)  # type: ignore[arg-type]


def test_a_newcomer_leaves_and_nobody_else_does() -> None:
    history = history_of(CHAT + FLOOD)
    culprit = history.replica.tenants.index("batch")
    first, last = int(history.replica.timeline.before[0]), int(history.replica.timeline.end[-1])
    change = change_of(history, culprit, first, last, newcomer=True)
    base = whole(history)
    plan = as_usual(history, base, {}, {culprit: [change]}, {culprit: calm_outside(history, culprit, first, last)}, 0)
    assert plan.requests["code"].to_list() == base.requests.loc[base.requests["tenant"] != culprit, "code"].to_list()


@pytest.mark.parametrize("draw", range(3))
def test_a_tenant_whose_numbers_are_usual_stays_as_it_was_recorded(draw: int) -> None:
    history = history_of(CHAT)
    chat = history.replica.tenants.index("chat")
    begin = int(history.replica.timeline.before[0])
    span = (begin + 11 * S, begin + 21 * S)
    base = whole(history)
    change = change_of(history, chat, *span)
    plan = as_usual(history, base, {}, {chat: [change]}, {chat: calm_outside(history, chat, *span)}, draw)
    assert len(set(base.requests["code"]) - set(plan.requests["code"])) <= 0.1 * len(base.requests)


@pytest.mark.parametrize("draw", range(3))
def test_a_tenant_that_grew_is_thinned_to_its_usual_and_what_stays_is_as_recorded(draw: int) -> None:
    history = history_of(CHAT + GROWTH)
    chat = history.replica.tenants.index("chat")
    begin = int(history.replica.timeline.before[0])
    span = (begin + 11 * S, begin + 21 * S)
    base = whole(history)
    calm = calm_outside(history, chat, *span)
    plan = as_usual(history, base, {}, {chat: [change_of(history, chat, *span)]}, {chat: calm}, draw)
    before, after = (
        requests[(requests["tenant"] == chat) & requests["arrival"].between(*span)]
        for requests in (base.requests, plan.requests)
    )
    expected = calm.requests.sum() * (span[1] - span[0]) / calm.length
    assert len(before) > 1.8 * expected
    assert 0.6 * expected < len(after) < 1.4 * expected
    kept = after[after["code"] >= 0]
    assert len(kept) > 0.85 * len(after)
    assert kept.set_index("code")["arrival"].equals(before.set_index("code").loc[kept["code"], "arrival"])


def test_requests_of_another_size_come_with_a_usual_one_at_their_time() -> None:
    history = history_of(CHAT + "inject: [{tenant: chat, from_s: 11, to_s: 21, prompt_tokens: 2000}]")
    chat = history.replica.tenants.index("chat")
    begin = int(history.replica.timeline.before[0])
    span = (begin + 11 * S, begin + 21 * S)
    base = whole(history)
    change = Change(chat, *span, span[1], "prompt tokens", 2000.0, 80, 0.0, -50.0)
    plan = as_usual(history, base, {}, {chat: [change]}, {chat: calm_outside(history, chat, *span)}, 0)
    before, after = (
        requests[(requests["tenant"] == chat) & requests["arrival"].between(*span)]
        for requests in (base.requests, plan.requests)
    )
    assert (before["prompt_tokens"] == 2000).sum() > 50
    assert after["prompt_tokens"].max() <= 400
    assert set(after["arrival"]) <= set(before["arrival"])
    assert 0.7 * len(before) < len(after) <= len(before)
