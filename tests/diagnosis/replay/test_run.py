"""A replay of what was recorded gives what was recorded; what is changed changes it as it would have in a real run."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from stallscope.diagnosis.replay.history import History, read_history
from stallscope.diagnosis.replay.machine import learn_machine
from stallscope.diagnosis.replay.run import Outcome, rejected_by, replay
from stallscope.diagnosis.replay.usual import as_recorded, without
from tests.diagnosis.replay.recorded import AGENTS, CHAT, FLOOD, PLAIN, history_of, only_replica, recorded

LATER_NS = 8_000_000_000


def replayed(history: History, since_ns: int = 0, draw: int = 0) -> Outcome:
    timeline = history.replica.timeline
    start, end = int(timeline.before[0]) + since_ns, int(timeline.end[-1])
    return replay(history, learn_machine(history), as_recorded(history, start, end, end), draw)


def ttft_p90(requests: pd.DataFrame, arrival: str) -> float:
    known = requests[requests["first_token"] >= 0]
    return float(np.quantile(known["first_token"] - known[arrival], 0.9))


@pytest.mark.parametrize("since_ns", [0, LATER_NS])
@pytest.mark.parametrize("engine", [PLAIN, "max_num_seqs: 8, kv_blocks: 4096", "max_num_seqs: 32, kv_blocks: 500"])
def test_an_unchanged_replay_meets_the_recorded_percentile(engine: str, since_ns: int) -> None:
    history = history_of(CHAT + FLOOD, engine)
    outcome = replayed(history, since_ns)
    both = history.replica.requests.iloc[outcome.requests["code"]]
    both = both[both["arrival"] > history.replica.timeline.before[0] + since_ns]
    mine = outcome.requests[outcome.requests["code"].isin(both.index)]
    assert ttft_p90(mine, "arrived") == pytest.approx(ttft_p90(both, "arrival"), rel=0.1)


def test_a_replay_without_the_culprit_is_the_run_without_it() -> None:
    history = history_of(CHAT + FLOOD)
    timeline = history.replica.timeline
    start, end = int(timeline.before[0]), int(timeline.end[-1])
    culprit = history.replica.tenants.index("batch")
    plan = without(as_recorded(history, start, end, end), tenants=[culprit])
    outcome = replay(history, learn_machine(history), plan, 0)
    control = only_replica(recorded(CHAT + FLOOD, inject=False))
    assert ttft_p90(outcome.requests, "arrived") == pytest.approx(ttft_p90(control.requests, "arrival"), rel=0.15)


def test_the_same_draw_gives_the_same_outcome_and_another_draw_another() -> None:
    history = history_of(CHAT + FLOOD)
    first, again, other = replayed(history), replayed(history), replayed(history, draw=1)
    pd.testing.assert_frame_equal(first.requests, again.requests)
    assert not first.requests["first_token"].equals(other.requests["first_token"])


def test_clients_wait_for_their_answers_in_a_replay_too() -> None:
    history = history_of(AGENTS)
    follows = history.requests["follows"] >= 0
    assert follows.sum() > 20
    outcome = replayed(history).requests
    codes = outcome.set_index("code")
    for code in history.requests.index[follows][:50]:
        before = int(history.requests.loc[code, "follows"])
        arrived = codes.loc[code, "arrived"]
        if arrived >= 0 and before in codes.index and codes.loc[before, "end"] >= 0:
            assert arrived >= codes.loc[before, "end"]


def test_without_the_stall_nobody_gives_up() -> None:
    history = history_of(AGENTS)
    gave_up = history.requests["patience"] > 0
    assert gave_up.any()
    timeline = history.replica.timeline
    start, end = int(timeline.before[0]), int(timeline.end[-1])
    plan = without(as_recorded(history, start, end, end), tenants=[history.replica.tenants.index("batch")])
    outcome = replay(history, learn_machine(history), plan, 0).requests.set_index("code")
    limit = history.requests.loc[gave_up, "patience"]
    waited = (outcome["end"] - outcome["arrived"]).reindex(limit.index).dropna()
    assert (waited < limit.reindex(waited.index)).mean() > 0.9
    # Nobody had to ask again.
    retries = history.requests.index[history.requests["retry"]]
    assert len(retries)
    assert (outcome["arrived"].reindex(retries).fillna(-1) < 0).mean() > 0.9


def test_what_another_configuration_would_reject_never_arrives() -> None:
    history = history_of(CHAT + FLOOD)
    timeline = history.replica.timeline
    start, end = int(timeline.before[0]), int(timeline.end[-1])
    plan = as_recorded(history, start, end, end)
    small = replace(history.config, kv_blocks=200)
    outcome = replay(history, learn_machine(history), plan, 0, small).requests
    culprit = history.replica.tenants.index("batch")
    assert (outcome.loc[outcome["tenant"] == culprit, "arrived"] == -1).all()
    assert (outcome.loc[outcome["tenant"] != culprit, "arrived"] >= 0).mean() > 0.95


def test_a_gateways_cap_lets_in_only_so_many_at_once() -> None:
    history = history_of(CHAT + FLOOD)
    timeline = history.replica.timeline
    start, end = int(timeline.before[0]), int(timeline.end[-1])
    culprit = history.replica.tenants.index("batch")
    plan = as_recorded(history, start, end, end)
    outcome = replay(history, learn_machine(history), plan, 0, most_at_once={culprit: 1}).requests
    mine = outcome[(outcome["tenant"] == culprit) & (outcome["end"] >= 0)].sort_values("first_token")
    assert (mine["first_token"].to_numpy()[1:] > mine["end"].to_numpy()[:-1]).all()


@pytest.mark.parametrize("cap", [1, 2])
def test_a_cap_holds_where_clients_give_up_before_the_gateway(cap: int) -> None:
    history = history_of(AGENTS)
    timeline = history.replica.timeline
    start, end = int(timeline.before[0]), int(timeline.end[-1])
    agents = history.replica.tenants.index("agents")
    plan = as_recorded(history, start, end, end)
    impatient = np.where(plan.requests["tenant"] == agents, 300_000_000, 0)
    plan = replace(plan, requests=plan.requests.assign(patience=impatient))
    outcome = replay(history, learn_machine(history), plan, 0, most_at_once={agents: cap}).requests
    mine = outcome[(outcome["tenant"] == agents) & (outcome["arrived"] >= 0)]
    assert ((mine["first_token"] < 0) & (mine["end"] >= 0)).any()  # who gave up outside
    inside = mine[mine["first_token"] >= 0]
    until = inside["end"].where(inside["end"] >= 0, end)
    at_once = [int(((inside["first_token"] <= t) & (until > t)).sum()) for t in inside["first_token"]]
    assert max(at_once) == cap


def test_clients_give_up_although_the_host_stands_still() -> None:
    history = history_of(AGENTS.split("inject")[0] + "inject: [{engine: pause, at_s: 12, for_s: 5}]")
    outcome = replayed(history).requests.set_index("code")
    patience = history.requests["patience"]
    waited = (outcome["end"] - outcome["arrived"])[(patience > 0) & (outcome["end"] >= 0)]
    assert len(waited) >= 3
    # Nobody can be told before the host goes on.
    assert (waited < 5.5e9).all()


def test_a_follower_that_would_be_rejected_never_arrives() -> None:
    history = history_of(AGENTS)
    timeline = history.replica.timeline
    start, end = int(timeline.before[0]), int(timeline.end[-1])
    plan = as_recorded(history, start, end, end)
    small = replace(history.config, kv_blocks=80)  # 1,280 tokens
    outcome = replay(history, learn_machine(history), plan, 0, small).requests.set_index("code")
    requests = history.requests.reindex(outcome.index)
    fits = requests["prompt_tokens"] + requests["limit"] <= 1280
    assert rejected_by(history, small, plan) == (~fits).sum()
    assert (outcome.loc[~fits, "arrived"] == -1).all()
    assert (outcome.loc[fits & (requests["follows"] < 0), "arrived"] >= 0).all()


def test_a_history_knows_who_stood_where() -> None:
    history = read_history(only_replica(recorded(CHAT + FLOOD)))
    steps = history.replica.steps
    for position in range(10, len(steps), len(steps) // 40):
        running = [one for one in history.standing_at(position) if one.running]
        batch = history.batch_at(position)
        joined = set(batch) - {one.request for one in running}
        assert len(running) + len(joined) >= steps["running"].iloc[position]
