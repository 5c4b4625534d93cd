"""A scenario and a seed to the requests that they mean, in the order of their arrival.

Every tenant and every injection draws from random streams of its own, so that the run without the injections has the
same usual traffic: arrivals, lengths and all. That pair of runs is the truth that a diagnosis is judged by.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from stallscope.errors import UsageError
from stallscope.workloads.draws import Literal, draw_one, settle, stream
from stallscope.workloads.scenario import (
    AddedRequests,
    AddedTraffic,
    Arrivals,
    Change,
    ClosedLoop,
    Every,
    Growth,
    Lengths,
    Poisson,
    Scenario,
    Tenant,
    Traffic,
    tenants_of,
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
    requests (``closed_loop``): those with the same key have prompts that begin alike. So do those with the same
    ``prefix_key``, for ``prefix_tokens`` tokens.
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
    prefix_key: str = ""
    prefix_tokens: int = 0

    @property
    def prompt_parts(self) -> list[tuple[str, int]]:
        """What the prompt is made of, as (key, tokens): of two parts with one key the shorter begins the longer."""
        own = (self.prompt_key or self.request_id, self.prompt_tokens - self.prefix_tokens)
        return [(self.prefix_key, self.prefix_tokens), own] if self.prefix_tokens else [own]


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
    prefixes: NDArray[np.int64]  # which of the tenant's shared beginnings
    prefix_tokens: int

    def keep(self, mask: NDArray[np.bool_]) -> None:
        self.times_s, self.prompts, self.outputs = self.times_s[mask], self.prompts[mask], self.outputs[mask]
        self.limits, self.injected, self.prefixes = self.limits[mask], self.injected[mask], self.prefixes[mask]


def plan(scenario: Scenario, seed: int, inject: bool = True) -> list[PlannedRequest]:
    """The requests of one run whose time is known before it, ordered by arrival; without ``inject``, the usual ones.

    Those of closed loops come from ``closed_loop.clients_of``.
    """
    tenants = {tenant.name: settled(tenant, seed) for tenant in scenario.tenants}
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
            elif isinstance(injection, AddedRequests):
                groups.append(_added_requests(injection, seed, key))
            else:
                groups.extend(_added_traffic(injection, tenants, seed, key))
    return _in_order(groups)


def settled(tenant: Tenant, seed: int) -> Tenant:
    """``tenant`` once that is drawn of its lengths which a run draws once."""
    return replace(tenant, lengths=_settled(tenant.lengths, seed, ("usual", tenant.name, 0)))


def _settled(lengths: Lengths, seed: int, key: Key) -> Lengths:
    return replace(
        lengths,
        prompt_tokens=settle(lengths.prompt_tokens, seed, *key, "prompt_tokens"),
        output_tokens=settle(lengths.output_tokens, seed, *key, "output_tokens"),
    )


Key = tuple[str | int, ...]


def _keyed(scenario: Scenario) -> list[tuple[Key, Traffic]]:
    """Injected traffic, each with the key of its streams: the n-th of its tenant, so that another tenant's may go."""
    seen: dict[str, int] = {}
    keyed: list[tuple[Key, Traffic]] = []
    for injection in scenario.inject:
        if isinstance(injection, Traffic):
            seen[injection.tenant] = seen.get(injection.tenant, -1) + 1
            keyed.append((("inject", injection.tenant, seen[injection.tenant]), injection))
    return keyed


def _usual(tenant: Tenant, arrivals: Arrivals, duration_s: float, seed: int) -> _Requests:
    key = ("usual", tenant.name, 0)
    times = _arrivals(arrivals, 0, duration_s, seed, key)
    return _requests(tenant.name, times, tenant.lengths, seed, key, injected=False)


def _added_requests(injection: AddedRequests, seed: int, key: Key) -> _Requests:
    generator = stream(seed, *key, "at")
    moments = [float(at_s.sample(generator, 1)[0]) for at_s in injection.at_s]
    counts = np.rint(injection.count.sample(stream(seed, *key, "count"), len(moments))).astype(np.int64)
    times = np.repeat(np.array(moments, np.float64), counts)
    return _requests(injection.tenant, times, _settled(injection.lengths, seed, key), seed, key, injected=True)


def _added_traffic(
    injection: AddedTraffic | Growth, tenants: Mapping[str, Tenant], seed: int, key: Key
) -> list[_Requests]:
    """Requests of each tenant of the injection: those who act alike share stretch, rate and kind, and no request."""
    from_s, to_s = draw_one(injection.from_s, seed, *key, "from"), draw_one(injection.to_s, seed, *key, "to")
    added = []
    for name in tenants_of(injection):
        own = key if name == injection.tenant else (*key, name)
        if isinstance(injection, AddedTraffic):
            arrivals, lengths = _settled_rate(injection.arrivals, seed, key), _settled(injection.lengths, seed, key)
        else:
            usual = tenants[name]
            arrivals, lengths = _more(usual, draw_one(injection.factor, seed, *key, "grow"), seed), usual.lengths
        times = _arrivals(arrivals, from_s, to_s, seed, own)
        added.append(_requests(name, times, lengths, seed, own, injected=True))
    return added


def _settled_rate(arrivals: Arrivals, seed: int, key: Key) -> Arrivals:
    if isinstance(arrivals, Poisson):
        return Poisson(Literal(draw_one(arrivals.per_s, seed, *key, "rate")))
    return arrivals


def _more(tenant: Tenant, factor: float, seed: int) -> Poisson:
    """What must come beside a tenant's usual requests for ``factor`` times as many; it has Poisson arrivals."""
    if not isinstance(tenant.arrivals, Poisson):
        raise ValueError(f"{tenant.name} has no rate that could grow")
    return Poisson(Literal((factor - 1) * draw_one(tenant.arrivals.per_s, seed, "usual", tenant.name, 0, "rate")))


def _change(usual: _Requests, tenant: Tenant, change: Change, seed: int, key: Key) -> list[_Requests]:
    """Rewrites a tenant's usual requests within the stretch; returns those that new arrivals bring instead."""
    from_s, to_s = draw_one(change.from_s, seed, *key, "from"), draw_one(change.to_s, seed, *key, "to")
    prompt_tokens = None if change.prompt_tokens is None else settle(change.prompt_tokens, seed, *key, "prompt_tokens")
    output_tokens = None if change.output_tokens is None else settle(change.output_tokens, seed, *key, "output_tokens")
    inside = (usual.times_s >= from_s) & (usual.times_s < to_s)
    if change.arrivals is not None:
        usual.keep(~inside)
        times = _arrivals(change.arrivals, from_s, to_s, seed, key)
        lengths = Lengths(
            prompt_tokens or tenant.lengths.prompt_tokens,
            output_tokens or tenant.lengths.output_tokens,
            tenant.lengths.priority,
            tenant.lengths.max_tokens,
            tenant.lengths.shared_prefix_tokens,
            tenant.lengths.shared_prefixes,
        )
        return [_requests(tenant.name, times, lengths, seed, key, injected=True)]
    size = int(inside.sum())
    if prompt_tokens is not None:
        usual.prompts[inside] = prompt_tokens.sample(stream(seed, *key, "prompt_tokens"), size)
    if output_tokens is not None:
        usual.outputs[inside] = output_tokens.sample(stream(seed, *key, "output_tokens"), size)
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
        stream(seed, *key, "prefix").integers(lengths.shared_prefixes, size=len(times)),
        lengths.shared_prefix_tokens,
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
        (
            _ns(time_s),
            group.tenant,
            tokens(prompt),
            tokens(output),
            round(limit),
            group.priority,
            bool(injected),
            prefix,
            min(group.prefix_tokens, tokens(prompt)),
        )
        for group in groups
        for time_s, prompt, output, limit, injected, prefix in zip(
            group.times_s.tolist(),
            group.prompts.tolist(),
            group.outputs.tolist(),
            group.limits.tolist(),
            group.injected.tolist(),
            group.prefixes.tolist(),
            strict=True,
        )
    )
    numbers: dict[str, int] = {}
    planned = []
    for offset_ns, tenant, prompt, output, limit, priority, injected, prefix, shared in rows:
        numbers[tenant] = numbers.get(tenant, 0) + 1
        request_id = f"{tenant}-{numbers[tenant]:06d}"
        max_tokens = max(output, limit) if limit else 0
        planned.append(
            PlannedRequest(
                offset_ns,
                tenant,
                prompt,
                output,
                request_id,
                priority,
                injected,
                max_tokens,
                prefix_key=f"{tenant}/prefix/{prefix}" if shared else "",
                prefix_tokens=shared,
            )
        )
    return planned


def tokens(drawn: float) -> int:
    """A drawn length as a number of tokens."""
    return max(1, round(drawn))
