"""Does the replay's scheduler do what the recorded one did? Judged before anything rests on a replay.

Teacher-forced: from the recorded state before a step, does it choose the recorded batch? Free: how far are percentiles
from the recorded ones, once what the replay itself did is what it goes on from?
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.diagnosis.metrics import ITL, TTFT
from stallscope.diagnosis.replay.harm import FEWEST_REQUESTS, LEAST_CHANGE_S, recorded_outcomes, waits_of
from stallscope.diagnosis.replay.history import History, Standing, fill_cache, make_request, scheduled_at
from stallscope.diagnosis.replay.machine import Machine
from stallscope.diagnosis.replay.run import replay
from stallscope.diagnosis.replay.usual import as_recorded
from stallscope.diagnosis.timeline import Ints
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Scheduler
from stallscope_telemetry.records import RequestState

MOST_STEPS = 200
LEAST_AGREEMENT = 0.95  # below, the policy counts as unknown
FREE_NS, LEAD_NS, TAIL_NS = 60_000_000_000, 15_000_000_000, 10_000_000_000  # of a free run, and before and after it
QUANTILE = 0.9


@dataclass(frozen=True, slots=True)
class Agreement:
    """Share of ``steps`` steps whose recorded batch the scheduler chose from the recorded state."""

    share: float
    steps: int


def forced_agreement(history: History, first: int, last: int) -> Agreement:
    """Looks at up to ``MOST_STEPS`` steps between two positions of the timeline, and only where there is a choice.

    A step in which nobody waits and nobody joins can be told by any policy: half of those looked at have a queue, where
    there are as many.
    """
    chosen = _worth_looking_at(history, first, last)
    agreed = sum(_agrees(history, position) for position in chosen)
    return Agreement(agreed / len(chosen) if chosen else 0.0, len(chosen))


def free_error(history: History, machine: Machine) -> float:
    """Median relative error of the tenants' p90s of TTFT and longest gap in a free run of the busiest minute, of those
    with ``FEWEST_REQUESTS`` then; below 50 ms, of 50 ms. -1 where there are none.
    """
    arrival = np.sort(history.requests["arrival"].to_numpy(np.int64))
    start = int(arrival[np.argmax(np.searchsorted(arrival, arrival + FREE_NS) - np.arange(len(arrival)))])
    plan = as_recorded(history, start - LEAD_NS, start + FREE_NS + TAIL_NS, start + FREE_NS + TAIL_NS)
    free = replay(history, machine, plan, draw=0).requests
    # Retries and followers may come at another time, or not at all: those that came in both are compared.
    codes = free.loc[free["arrived"].between(start, start + FREE_NS) & (free["code"] >= 0), "code"].to_numpy(np.int64)
    recorded = recorded_outcomes(history.replica)
    there, met = (_percentiles(one[np.isin(one["code"], codes)]) for one in (recorded, free))
    pairs = pd.DataFrame({"recorded": there, "free": met}).dropna()
    if pairs.empty:
        return -1.0
    error = (pairs["free"] - pairs["recorded"]).abs() / pairs["recorded"].clip(lower=LEAST_CHANGE_S * 1e9)
    return float(error.median())


def _percentiles(outcomes: pd.DataFrame) -> pd.Series[float]:
    """Wait (ns) by tenant and metric, of tenants with enough requests."""
    waits = pd.concat([outcomes[["tenant"]].assign(metric=m, wait=waits_of(outcomes, m)) for m in (TTFT, ITL)])
    grouped = waits.groupby(["tenant", "metric"])["wait"]
    enough = grouped.size() >= FEWEST_REQUESTS
    return grouped.quantile(QUANTILE, interpolation="higher")[enough]


def _worth_looking_at(history: History, first: int, last: int) -> list[int]:
    batches = history.replica.steps.iloc[first : last + 1]
    positions = np.arange(first, last + 1)
    # A first step, and one after lost telemetry, follow no known state.
    known = (positions > 0) & history.replica.timeline.observed[first : last + 1]
    busy = (batches["waiting"].to_numpy() > 0) | (batches["prefill_tokens"].to_numpy() > 0)
    chosen = [*_spread(positions[known & busy], MOST_STEPS // 2), *_spread(positions[known], MOST_STEPS // 2)]
    return sorted(set(chosen))


def _spread(positions: Ints, most: int) -> list[int]:
    """At most ``most`` of them, evenly spread."""
    if len(positions) > most:
        positions = positions[np.linspace(0, len(positions) - 1, most).astype(np.int64)]
    spread: list[int] = positions.tolist()
    return spread


def _agrees(history: History, position: int) -> bool:
    recorded = history.batch_at(position)
    scheduler = Scheduler(history.config)
    standing = history.standing_at(position)
    requests = {one.request: _as_it_stood(history, one) for one in standing}
    running = [requests[one.request] for one in standing if one.running]
    preempted = [requests[one.request] for one in standing if one.preempted]
    waiting = [requests[one.request] for one in standing if not one.running and not one.preempted]
    if history.config.prefix_caching:
        fill_cache(scheduler, _found_later(history, standing))
    scheduler.resume(running, preempted + waiting)
    batch = scheduler.schedule(scheduled_at(history.replica, position))
    code_of = {request: code for code, request in requests.items()}
    replayed = {} if batch is None else dict(zip((code_of[r] for r in batch.requests), batch.num_tokens, strict=True))
    return replayed == recorded


def _found_later(history: History, standing: list[Standing]) -> list[tuple[int, int]]:
    """Beginnings of the prompts of those who wait that they were to find in the cache."""
    codes = [one.request for one in standing if not one.running]
    rows = history.requests.iloc[codes]
    return list(zip(rows["prefix"].to_list(), rows["cached_tokens"].to_list(), strict=True))


def _as_it_stood(history: History, one: Standing) -> Request:
    row = history.requests.iloc[one.request]
    request = make_request(
        history,
        one.request + 1,
        int(row["tenant"]),
        int(row["arrival"]),
        int(row["prompt_tokens"]),
        max(int(row["output_tokens"]), one.output_tokens + 1),
        int(row["limit"]),
        int(row["priority"]),
        int(row["prefix"]),
        # Who waits finds what it found then, whatever others of its kind did.
        int(row["shared_tokens"] if one.running else row["cached_tokens"]),
    )
    request.output_tokens = one.output_tokens
    request.computed_tokens = one.computed_tokens
    if one.preempted:
        request.state = RequestState.PREEMPTED
    return request
