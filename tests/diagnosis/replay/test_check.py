"""Does the replay's scheduler do what the recorded one did: yes for our own, no for one that it does not have."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stallscope.diagnosis.replay.check import LEAST_AGREEMENT, forced_agreement, free_error
from stallscope.diagnosis.replay.history import History
from stallscope.diagnosis.replay.machine import learn_machine
from tests.diagnosis.replay.recorded import AGENTS, CHAT, FLOOD, history_of

ENGINES = [
    "max_num_seqs: 32, kv_blocks: 4096",
    "max_num_seqs: 8, kv_blocks: 4096",
    "max_num_seqs: 32, kv_blocks: 500",
    "max_num_seqs: 32, kv_blocks: 4096, max_num_batched_tokens: 512",
    "max_num_seqs: 32, kv_blocks: 4096, max_num_batched_tokens: 8192, chunked_prefill: false",
    "max_num_seqs: 32, kv_blocks: 4096, prefix_caching: true",
    "max_num_seqs: 16, kv_blocks: 4096, policy: prefill_first",
    "max_num_seqs: 16, kv_blocks: 4096, policy: shortest_remaining",
]


def agreement(history: History) -> float:
    return forced_agreement(history, 0, len(history.replica.timeline) - 1).share


@pytest.mark.parametrize("engine", ENGINES)
def test_our_own_scheduler_chooses_the_recorded_batches(engine: str) -> None:
    assert agreement(history_of(CHAT + FLOOD, engine)) >= 0.98


def test_aborted_requests_and_their_retries_do_not_confuse_it() -> None:
    assert agreement(history_of(AGENTS)) >= 0.98


@pytest.mark.parametrize("policy", ["prefill_first", "static"])
def test_another_policy_than_the_recorded_one_is_told(policy: str) -> None:
    history = history_of(CHAT + FLOOD, "max_num_seqs: 8, kv_blocks: 4096")
    other = History(history.replica, replace(history.config, policy=policy), history.requests)
    assert agreement(other) < LEAST_AGREEMENT


def test_another_budget_than_the_recorded_one_is_told() -> None:
    history = history_of(CHAT + FLOOD)
    other = History(history.replica, replace(history.config, max_num_batched_tokens=512), history.requests)
    assert agreement(other) < 1.0


@pytest.mark.parametrize("engine", ENGINES[:4])
def test_a_free_run_meets_the_recorded_percentiles(engine: str) -> None:
    history = history_of(CHAT + FLOOD, engine)
    assert 0 <= free_error(history, learn_machine(history)) < 0.15


def test_a_free_run_of_another_engine_does_not() -> None:
    history = history_of(CHAT + FLOOD)
    other = History(history.replica, replace(history.config, max_num_seqs=3), history.requests)
    assert free_error(other, learn_machine(history)) > 0.5
