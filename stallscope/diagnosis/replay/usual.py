"""Plans for a replay: the recorded requests of a stretch, and the same with tenants as usual, or without them.

A tenant that changed is thinned to what is usual for it: what stays is what was recorded, and nothing else differs.
Where nobody is known to have changed, usual is not an average either: a stretch of the tenant's own calm time, chosen
by draw, is put in the place of what it did. So its rate, its sizes and its bursts are those that it has, a newcomer's
are nothing, and what chance makes of them shows in the draws.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from stallscope.diagnosis.changes import Change
from stallscope.diagnosis.load import Calm
from stallscope.diagnosis.replay.history import History
from stallscope.diagnosis.replay.run import Plan
from stallscope.diagnosis.timeline import Ints, Mask

_SIZES = ("prompt_tokens", "output_tokens")
_EDGES = (0.33, 0.67, 1.0)  # of what is usual, beyond the last of which nothing is
_BY_CHANCE = 2.0  # deviations of a count


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
    history: History,
    plan: Plan,
    spans: Mapping[int, Sequence[tuple[int, int]]],
    changes: Mapping[int, Sequence[Change]],
    calm: Mapping[int, Calm],
    draw: int,
) -> Plan:
    """The plan with some tenants as usual: those of ``changes`` without what is more than usual in them, and those of
    ``spans`` by calm time in the place of those stretches (ns); ``calm``: what is usual for each."""
    arrival, tenant = plan.requests["arrival"].to_numpy(np.int64), plan.requests["tenant"].to_numpy()
    gone = np.zeros(len(arrival), dtype=np.bool_)
    drawn = []
    for code, stretches in spans.items():
        generator = np.random.default_rng([draw, code])
        for start, end in stretches:
            gone |= (tenant == code) & (arrival >= start) & (arrival <= end)
            drawn.append(_calm_stretch(history, calm[code], start, end, generator))
    for code, of_tenant in changes.items():
        generator = np.random.default_rng([draw, code])
        for change in of_tenant:
            inside = np.flatnonzero((tenant == code) & (arrival >= change.start) & (arrival <= change.end))
            left, others = _thinned(history, plan.requests.iloc[inside], calm[code], change, generator)
            gone[inside[~left]] = True
            drawn.append(others)
    gone = _with_retries(plan, gone)
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


def _thinned(
    history: History, mine: pd.DataFrame, calm: Calm, change: Change, generator: np.random.Generator
) -> tuple[Mask, pd.DataFrame]:
    """Which of a tenant's requests in a change stay, and others that take the place of some that don't.

    As many leave as there are more than usual in so long a time, of those kinds of size of which there are too many. If
    there still are, beyond chance, some of them come with a usual size. The rest stays as it was recorded.
    """
    usual = history.requests[calm.requests]
    if usual.empty or change.newcomer:
        return np.zeros(len(mine), dtype=np.bool_), mine.iloc[:0].assign(code=-1)
    share = (change.end - change.start) / max(calm.length, 1)
    kinds, kind_of = _kinds(usual, mine, change)
    size = int(max(kinds.max(), kind_of.max(initial=0))) + 1
    there, expected = np.bincount(kind_of, minlength=size), np.bincount(kinds, minlength=size) * share
    surplus = np.maximum(there - expected, 0.0)
    more = len(mine) - len(usual) * share
    leave = round(more) if more > _BY_CHANCE * (len(usual) * share) ** 0.5 else 0
    weight = np.where(there > 0, surplus / np.maximum(there, 1), 0.0)[kind_of]
    stay = np.ones(len(mine), dtype=np.bool_)
    if leave:
        able = min(leave, int((weight > 0).sum()))
        stay[generator.choice(len(mine), size=able, replace=False, p=weight / weight.sum())] = False
    left = np.bincount(kind_of[stay], minlength=size)
    others = []
    for kind in np.flatnonzero(left > expected + _BY_CHANCE * expected**0.5 + 1).tolist():
        members = generator.permutation(np.flatnonzero(stay & (kind_of == kind)))
        others.append(members[: left[kind] - int(np.rint(expected[kind]))])
    replaced = np.concatenate(others) if others else np.zeros(0, dtype=np.int64)
    stay[replaced] = False
    drawn = usual.iloc[generator.integers(len(usual), size=len(replaced))]
    at = mine["arrival"].to_numpy()[replaced]
    return stay, drawn.assign(arrival=at, code=-1, follows=-1, think=0, retry=False)


def _kinds(usual: pd.DataFrame, mine: pd.DataFrame, change: Change) -> tuple[Ints, Ints]:
    """A number by the sizes of each request, of two tables: in which third of what is usual they lie, or beyond all of
    that, and on which side of what had changed."""
    kinds = [np.zeros(len(table), dtype=np.int64) for table in (usual, mine)]
    for of in _SIZES:
        edges = np.quantile(usual[of].to_numpy(), _EDGES)
        if change.of == of.replace("_", " "):
            edges = np.unique(np.append(edges, np.nextafter(change.above, 0.0)))
        for place, table in enumerate((usual, mine)):
            kinds[place] = kinds[place] * (len(edges) + 1) + np.searchsorted(edges, table[of].to_numpy(), side="left")
    return kinds[0], kinds[1]


def _with_retries(plan: Plan, gone: Mask) -> Mask:
    """Who is not there is not tried again either."""
    follows, retry = plan.requests["follows"].to_numpy(np.int64), plan.requests["retry"].to_numpy(np.bool_)
    again = retry & (follows >= 0)
    while True:
        more = gone | (again & gone[follows])
        if (more == gone).all():
            return gone
        gone = more


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


def _keep(plan: Plan, kept: Mask) -> Plan:
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
