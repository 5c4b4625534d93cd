"""Plans for a replay: the recorded requests of a stretch, and the same with tenants as usual, or without them.

A tenant as usual is not its average: a stretch of its own calm time, chosen by draw, is put in the place of what it
did. So its rate, its sizes and its bursts are those that it has, a newcomer's are nothing, and what chance makes of
them shows in the draws.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from stallscope.diagnosis.load import Calm
from stallscope.diagnosis.replay.history import History
from stallscope.diagnosis.replay.run import Plan


def as_recorded(history: History, start_ns: int, end_ns: int, until_ns: int) -> Plan:
    """What stood and arrived between two times; the replay ends at ``until_ns``."""
    scheduled = history.replica.steps["scheduled"].to_numpy(np.int64)
    position = min(int(np.searchsorted(scheduled, start_ns)), len(scheduled) - 1)
    begin = min(int(scheduled[position]), start_ns) if position == 0 else int(scheduled[position])
    standing = history.standing_at(position)
    there = [one.request for one in standing]
    arrival = history.requests["arrival"].to_numpy(np.int64)
    chosen = np.union1d(np.flatnonzero((arrival > begin) & (arrival < end_ns)), np.array(there, dtype=np.int64))
    requests = history.requests.iloc[chosen].copy()
    requests.insert(0, "code", chosen)
    return Plan(_renumber(requests), standing, begin, until_ns)


def without(plan: Plan, *, tenants: Collection[int] = (), requests: Collection[int] = ()) -> Plan:
    """The plan without some tenants, or some requests (codes)."""
    gone = plan.requests["tenant"].isin(list(tenants)) | plan.requests["code"].isin(list(requests))
    return _keep(plan, ~gone.to_numpy())


def as_usual(
    history: History, plan: Plan, spans: Mapping[int, Sequence[tuple[int, int]]], calm: Mapping[int, Calm], draw: int
) -> Plan:
    """The plan with each tenant of ``spans`` as usual in those stretches (ns); ``calm``: what is usual for it."""
    arrival, tenant = plan.requests["arrival"].to_numpy(np.int64), plan.requests["tenant"].to_numpy()
    gone = np.zeros(len(arrival), dtype=bool)
    drawn = []
    for code, stretches in spans.items():
        generator = np.random.default_rng([draw, code])
        for start, end in stretches:
            gone |= (tenant == code) & (arrival >= start) & (arrival <= end)
            drawn.append(_calm_stretch(history, calm[code], start, end, generator))
    kept = _keep(plan, ~gone)
    requests = pd.concat([kept.requests, *(one for one in drawn if len(one))], ignore_index=True)
    requests = requests[(requests["arrival"] >= plan.start_ns) | (requests["code"] >= 0)]
    order = requests["arrival"].argsort(kind="stable").to_numpy()
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    ordered = requests.iloc[order].reset_index(drop=True)
    follows = ordered["follows"].to_numpy(np.int64)
    ordered["follows"] = np.where(follows >= 0, place[follows], -1)
    return replace(kept, requests=ordered)


def _calm_stretch(history: History, calm: Calm, start: int, end: int, generator: np.random.Generator) -> pd.DataFrame:
    """Calm requests of a tenant, moved to between two times: those of as long a stretch, from a random time on.

    Calm time is taken as one loop, so that no part of it is drawn more often than another.
    """
    mine = history.requests[calm.requests]
    if mine.empty or not calm.length:
        return mine.assign(code=-1)
    begins = np.array([a for a, _ in calm.stretches], dtype=np.int64)
    before = np.cumsum([0] + [b - a for a, b in calm.stretches])[:-1]
    arrival = mine["arrival"].to_numpy(np.int64)
    stretch = np.clip(np.searchsorted(begins, arrival, side="right") - 1, 0, None)
    place = np.clip(before[stretch] + arrival - begins[stretch], 0, calm.length - 1)
    offset = int(generator.integers(calm.length))
    parts = []
    for loop in range((end - start) // calm.length + 1):
        moved = (place - offset) % calm.length + loop * calm.length
        chosen = moved < end - start
        parts.append(mine[chosen].assign(arrival=start + moved[chosen]))
    # They follow nobody: whom they followed is elsewhere.
    moved_here: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return moved_here.assign(code=-1, follows=-1, think=0, retry=False)


def _keep(plan: Plan, kept: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Plan:
    requests = plan.requests[kept]
    left = set(requests["code"].to_list())
    standing = [one for one in plan.standing if one.request in left]
    place = np.full(len(kept), -1, dtype=np.int64)
    place[kept] = np.arange(int(kept.sum()))
    follows = requests["follows"].to_numpy(np.int64)
    requests = requests.assign(follows=np.where(follows >= 0, place[follows], -1)).reset_index(drop=True)
    return Plan(requests, standing, plan.start_ns, plan.until_ns)


def _renumber(requests: pd.DataFrame) -> pd.DataFrame:
    """``follows`` from request codes to positions in the plan; who follows somebody outside of it comes as recorded."""
    requests = requests.sort_values("arrival", kind="stable", ignore_index=True)
    place = pd.Series(np.arange(len(requests)), index=requests["code"].to_numpy())
    found = place.reindex(requests["follows"].to_numpy()).fillna(-1).to_numpy(np.int64)
    return requests.assign(follows=np.where(requests["follows"] >= 0, found, -1))
