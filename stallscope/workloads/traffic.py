"""A scenario and a seed to the requests that they mean, in the order of their arrival.

Every tenant and every injection draws from random streams of its own, so that the run without the injections has the
same usual traffic: arrivals, lengths and all. That pair of runs is the truth that a diagnosis is judged by.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stallscope.errors import UsageError
from stallscope.workloads.draws import draw_one, stream
from stallscope.workloads.scenario import (
    AddedRequests,
    AddedTraffic,
    Arrivals,
    Change,
    ClosedLoop,
    Every,
    Lengths,
    Poisson,
    Scenario,
    Tenant,
    Traffic,
)

_GAPS_A_DRAW = 256
_MOST_REQUESTS = 5_000_000  # of one tenant; beyond it a rate is a slip of the pen

Times = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request to send ``offset_ns`` after the start.

    ``request_id`` counts a tenant's requests in the order of their arrival, whether injected or usual: it must not
    tell which. So where a tenant has both, the run without injections numbers its requests differently.

    ``max_tokens`` is the limit asked for, where the answer ends before it (0: it is ``output_tokens``).
    ``session``, ``predecessor``, ``retry_of``, ``timeout_ns`` (0: none) and ``prompt_key`` are of a simulated client's
    requests (``closed_loop``): those with the same key have prompts that begin alike.
    """

    offset_ns: int
    tenant: str
    prompt_tokens: int
    output_tokens: int
    request_id: str
    priority: int = 0
    injected: bool = False
    max_tokens: int = 0
    session: str = ""
    predecessor: str = ""
    retry_of: str = ""
    timeout_ns: int = 0
    prompt_key: str = ""


@dataclass(slots=True)
class _Requests:
    """Requests of one tenant as parallel arrays; a change of the tenant writes into them."""

    tenant: str
    times_s: Times
    prompts: Times
    outputs: Times
    limits: Times  # 0: no other than the output
    priority: int
    injected: NDArray[np.bool_]

    def keep(self, mask: NDArray[np.bool_]) -> None:
        self.times_s, self.prompts, self.outputs = self.times_s[mask], self.prompts[mask], self.outputs[mask]
        self.limits, self.injected = self.limits[mask], self.injected[mask]


def plan(scenario: Scenario, seed: int, inject: bool = True) -> list[PlannedRequest]:
    """The requests of one run whose time is known before it, ordered by arrival; without ``inject``, the usual ones.

    Those of closed loops come from ``closed_loop.clients_of``.
    """
    tenants = {tenant.name: tenant for tenant in scenario.tenants}
    usual = {
        name: _usual(tenant, tenant.arrivals, scenario.duration_s, seed)
        for name, tenant in tenants.items()
        if not isinstance(tenant.arrivals, ClosedLoop)
    }
    groups = list(usual.values())
    if inject:
        for key, injection in _keyed(scenario):
            if isinstance(injection, Change):
                groups.extend(_change(usual[injection.tenant], tenants[injection.tenant], injection, seed, key))
            else:
                groups.append(_added(injection, seed, key))
    return _in_order(groups)


Key = tuple[str, str, int]


def _keyed(scenario: Scenario) -> list[tuple[Key, Traffic]]:
    """Injected traffic, each with the key of its streams: the n-th of its tenant, so that another tenant's may go."""
    seen: dict[str, int] = {}
    keyed = []
    for injection in scenario.inject:
        if isinstance(injection, Traffic):
            seen[injection.tenant] = seen.get(injection.tenant, -1) + 1
            keyed.append((("inject", injection.tenant, seen[injection.tenant]), injection))
    return keyed


def _usual(tenant: Tenant, arrivals: Arrivals, duration_s: float, seed: int) -> _Requests:
    key = ("usual", tenant.name, 0)
    times = _arrivals(arrivals, 0, duration_s, seed, key)
    return _requests(tenant.name, times, tenant.lengths, seed, key, injected=False)


def _added(injection: AddedRequests | AddedTraffic, seed: int, key: Key) -> _Requests:
    if isinstance(injection, AddedTraffic):
        from_s, to_s = draw_one(injection.from_s, seed, *key, "from"), draw_one(injection.to_s, seed, *key, "to")
        times = _arrivals(injection.arrivals, from_s, to_s, seed, key)
    else:
        generator = stream(seed, *key, "at")
        moments = [float(at_s.sample(generator, 1)[0]) for at_s in injection.at_s]
        counts = np.rint(injection.count.sample(stream(seed, *key, "count"), len(moments))).astype(np.int64)
        times = np.repeat(np.array(moments, np.float64), counts)
    return _requests(injection.tenant, times, injection.lengths, seed, key, injected=True)


def _change(usual: _Requests, tenant: Tenant, change: Change, seed: int, key: Key) -> list[_Requests]:
    """Rewrites a tenant's usual requests within the stretch; returns those that new arrivals bring instead."""
    from_s, to_s = draw_one(change.from_s, seed, *key, "from"), draw_one(change.to_s, seed, *key, "to")
    inside = (usual.times_s >= from_s) & (usual.times_s < to_s)
    if change.arrivals is not None:
        usual.keep(~inside)
        times = _arrivals(change.arrivals, from_s, to_s, seed, key)
        lengths = Lengths(
            change.prompt_tokens or tenant.lengths.prompt_tokens,
            change.output_tokens or tenant.lengths.output_tokens,
            tenant.lengths.priority,
            tenant.lengths.max_tokens,
        )
        return [_requests(tenant.name, times, lengths, seed, key, injected=True)]
    size = int(inside.sum())
    if change.prompt_tokens is not None:
        usual.prompts[inside] = change.prompt_tokens.sample(stream(seed, *key, "prompt_tokens"), size)
    if change.output_tokens is not None:
        usual.outputs[inside] = change.output_tokens.sample(stream(seed, *key, "output_tokens"), size)
    usual.injected[inside] = True
    return []


def _requests(tenant: str, times: Times, lengths: Lengths, seed: int, key: Key, *, injected: bool) -> _Requests:
    limit = lengths.max_tokens
    return _Requests(
        tenant,
        times,
        lengths.prompt_tokens.sample(stream(seed, *key, "prompt_tokens"), len(times)),
        lengths.output_tokens.sample(stream(seed, *key, "output_tokens"), len(times)),
        np.zeros(len(times)) if limit is None else limit.sample(stream(seed, *key, "max_tokens"), len(times)),
        lengths.priority,
        np.full(len(times), injected),
    )


def _arrivals(arrivals: Arrivals, from_s: float, to_s: float, seed: int, key: Key) -> Times:
    """Seconds from the start of the run, in [from_s, to_s)."""
    length_s = to_s - from_s
    if isinstance(arrivals, Poisson):
        times = _poisson(draw_one(arrivals.per_s, seed, *key, "rate"), length_s, stream(seed, *key, "arrivals"))
    elif isinstance(arrivals, Every):
        interval_s = draw_one(arrivals.interval_s, seed, *key, "interval")
        _check_number(length_s / interval_s)
        times = np.arange(0, length_s, interval_s)
    else:
        times = np.array(arrivals.times_s, np.float64)
    return from_s + times[times < length_s]


def _poisson(per_s: float, length_s: float, generator: np.random.Generator) -> Times:
    """Arrivals in [0, length_s) and some beyond; a longer stretch begins with the same ones."""
    if per_s <= 0:
        return np.zeros(0)
    _check_number(per_s * length_s)
    gaps: list[Times] = []
    reached = 0.0
    while reached < length_s:
        gaps.append(generator.exponential(1 / per_s, _GAPS_A_DRAW))
        reached += float(gaps[-1].sum())
    return np.cumsum(np.concatenate(gaps))


def _check_number(requests: float) -> None:
    if requests > _MOST_REQUESTS:
        raise UsageError(f"about {requests:.0f} requests of one tenant are too many: lower its rate or the duration")


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _in_order(groups: list[_Requests]) -> list[PlannedRequest]:
    rows = sorted(
        (_ns(time_s), group.tenant, tokens(prompt), tokens(output), round(limit), group.priority, bool(injected))
        for group in groups
        for time_s, prompt, output, limit, injected in zip(
            group.times_s.tolist(),
            group.prompts.tolist(),
            group.outputs.tolist(),
            group.limits.tolist(),
            group.injected.tolist(),
            strict=True,
        )
    )
    numbers: dict[str, int] = {}
    planned = []
    for offset_ns, tenant, prompt, output, limit, priority, injected in rows:
        numbers[tenant] = numbers.get(tenant, 0) + 1
        request_id = f"{tenant}-{numbers[tenant]:06d}"
        max_tokens = max(output, limit) if limit else 0
        planned.append(PlannedRequest(offset_ns, tenant, prompt, output, request_id, priority, injected, max_tokens))
    return planned


def tokens(drawn: float) -> int:
    """A drawn length as a number of tokens."""
    return max(1, round(drawn))
