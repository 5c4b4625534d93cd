"""An engine's resources over time: how much of each every tenant held, as a stack below the capacity."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

import numpy as np

from stallscope.diagnosis.ledger import Ledger, Lines
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Intervals, Ints
from stallscope.views.words import OTHERS


class Resource(StrEnum):
    """What an engine has only so much of."""

    TOKENS = "tokens"  # computed in a step
    KV = "kv"  # blocks of the KV cache
    SLOTS = "slots"  # requests in the batch, paused ones included
    QUEUE = "queue"  # requests that wait, preempted ones included


@dataclass(frozen=True, eq=False)
class Stack:
    """What ``tenants`` held of a resource: ``values[i, k]`` from ``time_ns[k]`` (ns) until the next moment.

    In each bin of time it is the step with the highest ``total[k]``, so that no peak is lost: the engine's own count,
    shared out by what each tenant's requests hold (of the KV cache, by their tokens; 0 where nobody is known). Where
    the engine goes idle for longer than a bin a moment more says that nothing is held, and where nobody saw it for so
    long it says NaN. The last moment is where the picture ends, and repeats the one before.

    ``tenants``: by what they held in all the steps of the window, "(others)" last. ``capacity``: 0 where the trace does
    not say, and of the queue. ``cached[k]``: of the KV cache, blocks of finished requests, taken when needed (while the
    engine is idle, what the next step finds); else 0.
    """

    replica: str
    resource: Resource
    capacity: int
    tenants: tuple[str, ...]
    time_ns: Ints
    values: Floats
    total: Floats
    cached: Floats


def resources(
    replica: Replica, resource: Resource, start_ns: int, end_ns: int, width: int, most_tenants: int = 8
) -> Stack:
    """A replica's ``resource`` from ``start_ns`` to ``end_ns``, in ``width`` bins of equal length."""
    timeline = replica.timeline
    inside = slice(
        int(np.searchsorted(timeline.end, start_ns, side="right")), int(np.searchsorted(timeline.start, end_ns))
    )
    used = _used(replica, resource)
    time, step, counts = _moments(replica, inside, used, start_ns, end_ns, width)
    holdings = _Holdings.of(replica, resource, inside)
    held = holdings.at(step)
    everyone = held.sum(axis=0)
    total = used[step] * counts
    values = held * total
    np.divide(values, everyone, out=values, where=everyone > 0)
    tenants = holdings.ranked(inside)
    shown, rest = tenants[:most_tenants], tenants[most_tenants:]
    names, stacked = [replica.tenants[tenant] for tenant in shown], values[shown]
    if len(rest):
        names, stacked = [*names, OTHERS], np.vstack([stacked, values[rest].sum(axis=0)])
    cached = replica.steps["kv_cached"].to_numpy()[step] if resource is Resource.KV else np.zeros(len(step))
    return Stack(
        replica.name,
        resource,
        _capacity(replica, resource),
        tuple(names),
        time,
        stacked,
        total,
        np.where(np.isnan(counts), np.nan, cached),
    )


def _used(replica: Replica, resource: Resource) -> Ints:
    """How much of it each step used, as the engine counted."""
    steps = replica.steps
    match resource:
        case Resource.TOKENS:
            used = steps["prefill_tokens"] + steps["decode_tokens"]
        case Resource.KV:
            used = steps["kv_used"]
        case Resource.SLOTS:
            used = steps["running"]
        case Resource.QUEUE:
            used = steps["waiting"]
    return used.to_numpy(np.int64)


def _lines(ledger: Ledger, resource: Resource) -> Lines:
    """How much of it each stretch holds."""
    match resource:
        case Resource.TOKENS:
            return ledger.token_lines
        case Resource.KV:
            return ledger.kv_lines
        case Resource.SLOTS:
            return ledger.slot_lines
        case Resource.QUEUE:
            return ledger.queue_lines


def _capacity(replica: Replica, resource: Resource) -> int:
    match resource:
        case Resource.TOKENS:
            said = replica.settings.get("max_num_batched_tokens")
        case Resource.KV:
            said = int(replica.steps["kv_total"].max())
        case Resource.SLOTS:
            said = replica.settings.get("max_num_seqs")
        case Resource.QUEUE:
            said = None
    return said if isinstance(said, int) else 0


def _moments(
    replica: Replica, inside: slice, used: Ints, start_ns: int, end_ns: int, width: int
) -> tuple[Ints, Ints, Floats]:
    """Moments in order: time (ns), the step that is shown or, where none runs, the next one, and what of it counts."""
    timeline = replica.timeline
    edges = start_ns + np.linspace(0, end_ns - start_ns, width + 1).astype(np.int64)
    bounds = inside.start + np.searchsorted(timeline.start[inside], edges)
    bounds[0] = inside.start  # a step that had begun before belongs to the first bin
    chosen = [low + int(used[low:high].argmax()) for low, high in pairwise(bounds.tolist()) if high > low]
    step = np.array(chosen, dtype=np.int64)
    times, steps, counts = [np.maximum(timeline.start[step], start_ns)], [step], [np.ones(len(step))]
    for spans, count in ((timeline.idle, 0.0), (timeline.unobserved, np.nan)):
        begin, end = np.maximum(spans.begin, start_ns), np.minimum(spans.end, end_ns)
        long = (end > begin) & ((end - begin) * width >= end_ns - start_ns)
        times.append(begin[long])
        steps.append(np.searchsorted(timeline.end, end[long]))
        counts.append(np.full(int(long.sum()), count))
    time = np.concatenate(times)
    order = np.argsort(time, kind="stable")
    order = np.append(order, order[-1:])
    time = time[order]
    time[-1:] = min(end_ns, int(timeline.bounds[-1]))
    return time, np.concatenate(steps)[order], np.concatenate(counts)[order]


@dataclass(frozen=True, eq=False)
class _Holdings:
    """What each stretch holds in the steps (positions) from ``first`` to ``last``: ``level``, as of step 0, and
    ``rise`` a step; ``tenant`` (code, of so many ``tenants``)."""

    tenants: int
    tenant: Ints
    first: Ints
    last: Ints
    level: Floats
    rise: Floats

    @staticmethod
    def of(replica: Replica, resource: Resource, inside: slice) -> _Holdings:
        """Of the stretches with a step ``inside``."""
        s = replica.ledger.stretches
        rows = s.within(Intervals(np.array([inside.start]), np.array([inside.stop])))
        first = s.first[rows]
        level, rise = _lines(replica.ledger, resource)(rows)
        tenant = replica.tenant_of_request[s.request[rows]]
        return _Holdings(len(replica.tenants), tenant, first, s.last[rows], level - rise * first, rise)

    def at(self, step: Ints) -> Floats:
        """What each tenant (row) holds in each of these steps (ascending)."""
        begin, after = np.searchsorted(step, self.first), np.searchsorted(step, self.last, side="right")
        there = np.flatnonzero(after > begin)
        shape = self.tenants, len(step) + 1
        row = self.tenant[there] * shape[1]
        begin, after = row + begin[there], row + after[there]

        def total(amount: Floats) -> Floats:
            size = shape[0] * shape[1]
            change = np.bincount(begin, amount[there], size) - np.bincount(after, amount[there], size)
            return change.reshape(shape).cumsum(axis=1)[:, :-1]

        return total(self.level) + total(self.rise) * step

    def ranked(self, inside: slice) -> Ints:
        """Tenants that held anything in the steps ``inside``; those that held most, summed over the steps, first."""
        low, high = np.maximum(self.first, inside.start), np.minimum(self.last, inside.stop - 1)
        amount = (high - low + 1) * (self.level + self.rise * ((low + high) / 2))
        held = np.bincount(self.tenant, amount, self.tenants)
        order = np.argsort(-held, kind="stable")
        return order[held[order] > 0]
