"""The KV cache over time: how many blocks each tenant held, what was cached, what was free, and who waited for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Ints

OTHERS = "(others)"


@dataclass(frozen=True, eq=False)
class Occupancy:
    """KV blocks at one moment of each bin: that of the step with most blocks in use, so that no peak is lost.

    ``blocks[i, k]``: held by ``tenants[i]`` at ``time_ns[k]``; a step's blocks in use, shared out by the tokens that
    each tenant's requests hold. Tenants are sorted by what they held, "(others)" last. ``cached``: of finished
    requests, taken when needed; the rest of ``total`` (0 where the trace doesn't say) is free. ``waiting``: the most
    requests that waited in the bin, for whatever reason.
    """

    replica: str
    total: int
    tenants: tuple[str, ...]
    time_ns: Ints
    blocks: Floats
    cached: Floats
    waiting: Ints


def occupancy(replica: Replica, start_ns: int, end_ns: int, width: int, most_tenants: int = 8) -> Occupancy:
    """The replica's KV cache from ``start_ns`` to ``end_ns``, in at most ``width`` moments."""
    ledger, timeline = replica.ledger, replica.timeline
    inside = np.flatnonzero((timeline.end > start_ns) & (timeline.start < end_ns))
    used = replica.steps["kv_used"].to_numpy(np.int64)[inside]
    bins = _bins(timeline.end[inside], start_ns, end_ns, width)
    chosen = inside[_fullest(bins, used)]
    first = np.flatnonzero(np.diff(bins, prepend=-1))
    waiting = replica.steps["waiting"].to_numpy(np.int64)[inside]
    most_waiting = np.maximum.reduceat(waiting, first) if len(first) else waiting

    tenant_of = replica.tenant_of_request[ledger.stretches.request]
    order = _by_tokens_held(replica, inside)
    shown = order[:most_tenants]
    everyone = ledger.kv_tokens()[chosen]
    in_use = replica.steps["kv_used"].to_numpy(np.float64)[chosen]
    held = np.zeros((len(shown), len(chosen)))
    for row, tenant in enumerate(shown):
        held[row] = ledger.kv_tokens(tenant_of == tenant)[chosen]
    blocks = np.divide(held * in_use, everyone, out=np.zeros_like(held), where=everyone > 0)
    names = [replica.tenants[tenant] for tenant in shown]
    if len(order) > most_tenants:
        blocks = np.vstack([blocks, np.maximum(np.where(everyone > 0, in_use, 0.0) - blocks.sum(axis=0), 0.0)])
        names.append(OTHERS)
    return Occupancy(
        replica.name,
        int(replica.steps["kv_total"].max()) if len(replica.steps) else 0,
        tuple(names),
        timeline.end[chosen],
        blocks,
        replica.steps["kv_cached"].to_numpy(np.float64)[chosen],
        most_waiting,
    )


def _bins(times: Ints, start_ns: int, end_ns: int, width: int) -> Ints:
    """Which of ``width`` equal bins each time lies in."""
    found: Ints = np.clip((times - start_ns) * width // max(end_ns - start_ns, 1), 0, width - 1)
    return found


def _fullest(bins: Ints, used: Ints) -> Ints:
    """In each bin, the first step with the most blocks in use (positions, ascending)."""
    order = np.lexsort((np.arange(len(bins)), -used, bins))
    return np.sort(order[np.flatnonzero(np.diff(bins[order], prepend=-1))])


def _by_tokens_held(replica: Replica, inside: Ints) -> list[int]:
    """Tenants that held anything in the steps ``inside``, those with most token-steps first."""
    s = replica.ledger.stretches
    if not len(inside):
        return []
    low, high = np.maximum(s.first, inside[0]), np.minimum(s.last, inside[-1])
    steps = np.where(s.resident, np.maximum(high - low + 1, 0), 0)
    middle = s.context + s.tokens * ((low + high) / 2 - s.first + 1)
    held = np.bincount(replica.tenant_of_request[s.request], steps * middle, len(replica.tenants))
    return [int(tenant) for tenant in np.argsort(-held, kind="stable") if held[tenant] > 0]
