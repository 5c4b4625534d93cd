"""How much of a resource each tenant took in a stretch of time, and how much it usually takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from stallscope.diagnosis.changes import NO_CHANGES, Changes
from stallscope.diagnosis.partition import Mechanism
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Ints

STEP_TIME, KV, SLOTS = RESOURCES = "step time", "KV cache", "slots"
LEAST_WINDOW_NS = 15_000_000_000
LEAST_CALM = 0.1  # share of the trace that must be usual for usual to be known
RESOURCE_OF = {
    Mechanism.KV_PINNING: KV,
    Mechanism.HEAD_OF_LINE: KV,
    Mechanism.PREEMPTION: KV,
    Mechanism.RECOMPUTE: KV,
    Mechanism.SLOT_EXHAUSTION: SLOTS,
}  # all others are a matter of step time


@dataclass(frozen=True)
class Load:
    """Mean level of one tenant's load in a window, and what is usual for it (NaN where that is unknown)."""

    level: float
    usual: float


@dataclass(frozen=True, eq=False)
class Calm:
    """What of a tenant is usual: ``requests`` (by request code), and the ``stretches`` (ns) in which they arrived.

    ``unusual``: the stretches between those, of which some may overlap.
    """

    requests: NDArray[np.bool_]
    stretches: tuple[tuple[int, int], ...]
    unusual: tuple[tuple[int, int], ...]

    @cached_property
    def length(self) -> int:
        return sum(end - start for start, end in self.stretches)


class Loads:
    """Loads of the tenants of a replica.

    Usual is what a tenant does at other times than its ``changes``; where it has none, outside of ``windows`` (begin
    and end, ns), in which somebody was stalled.
    """

    def __init__(self, replica: Replica, windows: list[tuple[int, int]], changes: Changes = NO_CHANGES) -> None:
        self._replica = replica
        self.windows = windows
        self.changes = changes
        self._stretches = replica.ledger.stretches
        timeline = replica.timeline
        self._span = (int(timeline.before[0]), int(timeline.end[-1]))
        self._begin = timeline.before[self._stretches.first]
        self._end = timeline.end[self._stretches.last]
        self._calm_of: dict[int, Calm] = {}
        self._known: dict[tuple[str, int, int], tuple[Load, ...]] = {}
        self._usual_of: dict[str, Floats] = {}

    def totals(self, resource: str, start: int, end: int) -> Floats:
        """What each tenant took between two times (ns): ns of step time, of the whole KV cache, or of all slots."""
        rows = np.flatnonzero((self._end > start) & (self._begin < end))
        begin, finish = np.maximum(self._begin[rows], start), np.minimum(self._end[rows], end)
        tenant = self._replica.tenant_of_request[self._stretches.request[rows]]
        amount: Floats = np.bincount(
            tenant, self._amount(rows, resource, begin, finish), len(self._replica.tenants)
        ).astype(np.float64)
        return amount

    def of_all(self, resource: str, start: int, end: int) -> tuple[Load, ...]:
        """Load of each tenant on ``resource`` between two times (ns), as a share of the engine's.

        Over at least ``LEAST_WINDOW_NS`` around them: in a moment, a single request is a load beyond all measure.
        """
        wider = max(LEAST_WINDOW_NS - (end - start), 0) // 2
        start, end = max(start - wider, self._span[0]), min(end + wider, self._span[1])
        key = (resource, start, end)
        if key not in self._known:
            level, usual = self.totals(resource, start, end) / max(end - start, 1), self._usual(resource)
            self._known[key] = tuple(Load(*of) for of in zip(level.tolist(), usual.tolist(), strict=True))
        return self._known[key]

    def usual_is_known(self, tenant: int) -> bool:
        """Whether there is enough calm time to tell what is usual for a tenant."""
        return self.calm(tenant).length >= LEAST_CALM * (self._span[1] - self._span[0])

    def _usual(self, resource: str) -> Floats:
        """Each tenant's load by the requests of its calm time; NaN where there is hardly any."""
        if resource not in self._usual_of:
            tenants = range(len(self._replica.tenants))
            calm = np.zeros(len(self._replica.requests), dtype=np.bool_)
            length = np.full(len(tenants), np.nan)
            for tenant in tenants:
                if self.usual_is_known(tenant):
                    calm |= self.calm(tenant).requests
                    length[tenant] = self.calm(tenant).length
            rows = np.flatnonzero(calm[self._stretches.request])
            tenant_of = self._replica.tenant_of_request[self._stretches.request[rows]]
            amount = self._amount(rows, resource, self._begin[rows], self._end[rows])
            self._usual_of[resource] = np.bincount(tenant_of, amount, len(tenants)) / length
        return self._usual_of[resource]

    def calm(self, tenant: int) -> Calm:
        """Which requests are the tenant's usual ones, and when they arrived.

        Outside of all windows means too: before any request that was there in one. What pins the cache came earlier.
        """
        if tenant not in self._calm_of:
            self._calm_of[tenant] = self._find_calm(tenant)
        return self._calm_of[tenant]

    def _find_calm(self, tenant: int) -> Calm:
        requests = self._replica.requests
        arrival, until = requests["arrival"].to_numpy(), requests["seen_until"].to_numpy()
        calm = requests["tenant"].to_numpy() == tenant
        first, last = self._span
        excluded = []
        changes = self.changes.of(tenant)
        for start, end in [(change.start, change.end) for change in changes] or self.windows:
            there = (requests["tenant"].to_numpy() == tenant) & (arrival < end) & (until > start)
            since = min(start, int(arrival[there].min())) if there.any() and not changes else start
            excluded.append((max(since, first), min(end, last)))
            calm &= (arrival < since) | (arrival > end)
        stretches, reach = [], first
        for start, end in [*sorted(excluded), (last, last)]:
            if start > reach:
                stretches.append((reach, start))
            reach = max(reach, end)
        return Calm(calm, tuple(stretches), tuple(sorted(excluded)))

    def _amount(self, rows: Ints, resource: str, begin: Ints, end: Ints) -> Floats:
        """What each stretch took between two times: ns of step time, of the whole KV cache, or of all slots."""
        ledger, s = self._replica.ledger, self._stretches
        if resource == STEP_TIME:
            return ledger.own_cost(rows, begin, end)
        length = np.where(s.resident[rows], end - begin, 0).astype(np.float64)
        # The most that was ever in use stands for the capacity: what is configured need not be known.
        if resource == SLOTS:
            return length / max(ledger.most_slots, 1.0)
        steps = s.last[rows] - s.first[rows] + 1
        held = s.context[rows] + s.tokens[rows] * (steps + 1) / 2
        return length * held / max(ledger.most_kv_tokens, 1.0)
