"""One incident replayed: unchanged, and with something changed, by the same draws; and what the change restores.

Replays of the same draw meet the same noise at the same time and the same unknown answers, so that what differs between
them is what was changed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from stallscope.diagnosis.changes import Change
from stallscope.diagnosis.incidents import TAIL_REQUESTS, Window
from stallscope.diagnosis.load import Loads
from stallscope.diagnosis.metrics import ITL, METRICS, TTFT
from stallscope.diagnosis.model import Intervention, InterventionKind, Prediction
from stallscope.diagnosis.replay.harm import (
    Harm,
    Norms,
    change_of_all,
    in_scope,
    recorded_outcomes,
    same_harm,
    waits_of,
    worst_harm,
)
from stallscope.diagnosis.replay.history import History
from stallscope.diagnosis.replay.machine import Machine
from stallscope.diagnosis.replay.relaxations import Relaxation
from stallscope.diagnosis.replay.run import Outcome, Plan, rejected_by, replay
from stallscope.diagnosis.replay.usual import as_recorded, as_usual, without
from stallscope.diagnosis.timeline import Floats, Ints
from stallscope_engine.config import EngineConfig

LEAD_NS = 15_000_000_000  # of a replay before the window, so that it has forgotten how it began
MOST_LEAD_NS = 60_000_000_000
TAIL_NS = 10_000_000_000
DRAWS = (0, 1, 2)
MEDIAN = 0.5


@dataclass(frozen=True, slots=True)
class Effect:
    """What a change restores of the victims' excess, by draw; ``own``: of the changed tenants' excess a request."""

    restored: tuple[float, ...]
    own: float
    outcomes: tuple[Outcome, ...]

    @property
    def mean(self) -> float:
        return sum(self.restored) / len(self.restored)


class StretchReplays:
    """Replays of one stretch of a replica's time, in which some incidents lie; made when asked for, and kept."""

    def __init__(self, history: History, machine: Machine, loads: Loads, start_ns: int, end_ns: int) -> None:
        self.history = history
        self.machine = machine
        self.start_ns = start_ns
        self.end_ns = end_ns
        self._loads = loads
        self._made: dict[tuple[object, ...], Outcome] = {}

    @cached_property
    def plan(self) -> Plan:
        """The recorded arrivals of the stretch, from before anything unusual in it on."""
        spans = [span[0] for tenant in range(len(self.history.replica.tenants)) for span in self.spans(tenant)]
        since = min([*spans, *(change.start for change in self._changes)], default=self.start_ns)
        begin = max(min(self.start_ns - LEAD_NS, since - 1), self.start_ns - MOST_LEAD_NS)
        return as_recorded(self.history, begin, self.end_ns + TAIL_NS, self.end_ns + TAIL_NS)

    @cached_property
    def _changes(self) -> list[Change]:
        """Those that began in the stretch, or not long before."""
        earliest = self.start_ns - MOST_LEAD_NS
        return [one for one in self._loads.changes.found if one.end >= earliest and one.start <= self.end_ns]

    def spans(self, tenant: int) -> list[tuple[int, int]]:
        """Where a tenant did nothing unusual: the parts of the stretch in which somebody was stalled all the same."""
        if any(change.tenant == tenant for change in self._changes):
            return []
        unusual = self._loads.windows if self._loads.changes.of(tenant) else self._loads.calm(tenant).unusual
        earliest = self.start_ns - MOST_LEAD_NS
        return [span for span in unusual if span[1] >= earliest and span[0] <= self.end_ns]

    def usual_is_known(self, tenant: int) -> bool:
        """Whether there is enough calm time to tell what is usual for a tenant."""
        return self._loads.usual_is_known(tenant)

    def unchanged(self, draw: int) -> Outcome:
        return self._replay(("unchanged", draw), lambda: self.plan, draw)

    def usual(self, tenants: Sequence[int], draw: int) -> Outcome:
        """With these tenants as usual."""

        def plan() -> Plan:
            spans = {tenant: self.spans(tenant) for tenant in tenants}
            calm = {tenant: self._loads.calm(tenant) for tenant in tenants}
            changes = {tenant: [one for one in self._changes if one.tenant == tenant] for tenant in tenants}
            return as_usual(self.history, self.plan, spans, changes, calm, draw)

        return self._replay(("usual", frozenset(tenants), draw), plan, draw)

    def without_faults(self, draw: int) -> Outcome:
        """With an engine without pauses and drops of its clocks."""
        return self._replay(("faults", draw), lambda: self.plan, draw, machine=self.machine.without_faults())

    def without(self, tenants: Sequence[int], requests: Sequence[int], draw: int) -> Outcome:
        """Without some tenants, and some requests (codes)."""
        key = ("without", frozenset(tenants), frozenset(requests), draw)
        return self._replay(key, lambda: without(self.plan, tenants=tenants, requests=requests), draw)

    def configured(self, config: EngineConfig, draw: int) -> Outcome:
        """With another configuration."""
        return self._replay(("configured", config, draw), lambda: self.plan, draw, config=config)

    def relaxed(self, relaxation: Relaxation, draw: int) -> Outcome:
        """With one resource endless or free."""
        config, machine = relaxation.change(self.history.config, self.machine)
        return self._replay(("relaxed", relaxation.name, draw), lambda: self.plan, draw, machine=machine, config=config)

    def capped(self, most_at_once: Mapping[int, int], draw: int) -> Outcome:
        """With so many requests of some tenants in the engine at once."""
        key = ("capped", tuple(sorted(most_at_once.items())), draw)
        return self._replay(key, lambda: self.plan, draw, most_at_once=most_at_once)

    def _replay(
        self,
        key: tuple[object, ...],
        plan: Callable[[], Plan],
        draw: int,
        *,
        machine: Machine | None = None,
        config: EngineConfig | None = None,
        most_at_once: Mapping[int, int] | None = None,
    ) -> Outcome:
        if key not in self._made:
            self._made[key] = replay(self.history, machine or self.machine, plan(), draw, config, most_at_once)
        return self._made[key]


class IncidentReplays:
    """The replays of a stretch as one of its incidents sees them (``window``)."""

    def __init__(
        self, stretch: StretchReplays, norms: Norms, window: Window, kinds: Collection[tuple[int, int]]
    ) -> None:
        """``kinds``: tenants and metrics to which harm is looked for; of nobody in particular, to all."""
        everybody = range(len(stretch.history.replica.tenants))
        self._kinds = kinds or {(tenant, metric) for tenant in everybody for metric in (TTFT, ITL)}
        self.stretch = stretch
        self.history = stretch.history
        self.window = window
        self._norms = norms
        requests = self.history.replica.requests
        there = (requests["arrival"] <= window.end) & (requests["seen_until"] >= window.start)
        self._scope: Ints = np.flatnonzero(there.to_numpy())
        self._recorded = recorded_outcomes(self.history.replica)

    @cached_property
    def recorded_excess(self) -> float:
        """Seconds by which the window's requests were delayed beyond the usual."""
        return self._excess(self._recorded)

    @cached_property
    def replayed_excess(self) -> float:
        """The same in an unchanged replay."""
        return self._excess(self.stretch.unchanged(DRAWS[0]).requests)

    def usual(self, tenants: Sequence[int], draws: Sequence[int] = DRAWS) -> Effect:
        """The effect of these tenants' return to their usual."""
        return self.effect([self.stretch.usual(tenants, draw) for draw in draws], draws, tenants)

    def without_faults(self, draws: Sequence[int] = DRAWS) -> Effect:
        """The effect of an engine without pauses and drops of its clocks."""
        return self.effect([self.stretch.without_faults(draw) for draw in draws], draws, ())

    def without_requests(
        self, requests: Sequence[int], apart: Sequence[int] | None = None, draws: Sequence[int] = DRAWS[:1]
    ) -> Effect:
        """The effect of some requests (codes) not being there, on tenants not ``apart`` (default: whose they are)."""
        tenants = np.unique(self.history.requests["tenant"].to_numpy()[list(requests)]).tolist()
        outcomes = [self.stretch.without((), requests, draw) for draw in draws]
        return self.effect(outcomes, draws, tenants if apart is None else apart)

    def configured(self, config: EngineConfig, apart: Sequence[int] = (), draws: Sequence[int] = DRAWS[:1]) -> Effect:
        """The effect of another configuration on tenants not ``apart``."""
        return self.effect([self.stretch.configured(config, draw) for draw in draws], draws, apart)

    def rejected_by(self, config: EngineConfig) -> int:
        """How many of the stretch's requests another configuration would not take: their absence is no cure."""
        return rejected_by(self.history, config, self.stretch.plan)

    def relaxed(self, relaxation: Relaxation, apart: Sequence[int]) -> Effect:
        """The effect of one resource being endless or free, on tenants not ``apart``."""
        return self.effect([self.stretch.relaxed(relaxation, DRAWS[0])], DRAWS[:1], apart)

    def capped(self, most_at_once: Mapping[int, int], draws: Sequence[int] = DRAWS) -> Effect:
        """The effect of so many requests of some tenants in the engine at once."""
        outcomes = [self.stretch.capped(most_at_once, draw) for draw in draws]
        return self.effect(outcomes, draws, list(most_at_once))

    def effect(self, outcomes: Sequence[Outcome], draws: Sequence[int], tenants: Sequence[int]) -> Effect:
        """The effect of what these outcomes, one a draw, are of, on tenants other than these, whom it changes."""
        restored = []
        for draw, outcome in zip(draws, outcomes, strict=True):
            there = np.intersect1d(self._scope, outcome.requests["code"].to_numpy(np.int64))
            before = self._excess(self.stretch.unchanged(draw).requests, tenants, there)
            after = self._excess(outcome.requests, tenants, there)
            restored.append(1.0 - after / before if before > 0 else 0.0)
        return Effect(tuple(restored), self._own(outcomes, draws, tenants), tuple(outcomes))

    def harm(self, effect: Effect, apart: Sequence[int] = ()) -> Harm | None:
        """What that which the effect undoes had done to the worst hit percentile of tenants not ``apart``."""
        others = set(range(len(self.history.replica.tenants))) - set(apart)
        return self.harm_to(others, effect)

    def harm_to(self, tenants: Collection[int], effect: Effect) -> Harm | None:
        """The same of these tenants; of those of their requests that the effect leaves there."""
        kinds = [kind for kind in self._kinds if kind[0] in tenants]
        return worst_harm(self._pairs(effect.outcomes), self.window, kinds)

    def same_harm(self, harm: Harm, outcomes: Sequence[Outcome]) -> Harm:
        """What other outcomes (of the first draws) do to the same percentile."""
        return same_harm(harm, self._pairs(outcomes))

    def _pairs(self, outcomes: Sequence[Outcome]) -> list[tuple[pd.DataFrame, pd.DataFrame]]:
        unchanged = self._unchanged(outcomes)
        return [(before.requests, after.requests) for before, after in zip(unchanged, outcomes, strict=True)]

    def change_of_all(self, effect: Effect, tenants: Sequence[int]) -> Harm | None:
        """The worst change of a percentile of all that tenants sent in the window, though they sent other requests."""
        return change_of_all(
            self.stretch.unchanged(DRAWS[0]).requests, effect.outcomes[0].requests, self.window, tenants
        )

    # --- measures ---------------------------------------------------------------------------------------------

    def _excess(self, outcomes: pd.DataFrame, apart: Sequence[int] = (), scope: Ints | None = None) -> float:
        rows = (
            in_scope(outcomes, self._scope if scope is None else scope)
            & ~outcomes["tenant"].isin(list(apart)).to_numpy()
        )
        return float(self._norms.excess(outcomes[rows]).sum()) / 1e9

    def excess_of(self, tenants: Sequence[int]) -> float:
        """Seconds of the unchanged replay's excess that are these tenants' own."""
        return self.replayed_excess - self._excess(self.stretch.unchanged(DRAWS[0]).requests, tenants)

    def _own(self, outcomes: Sequence[Outcome], draws: Sequence[int], tenants: Sequence[int]) -> float:
        """Share of the tenants' own excess a request, in the window, that their return to usual restores."""
        before = [self._each(self.stretch.unchanged(draw).requests, tenants) for draw in draws]
        after = [self._each(outcome.requests, tenants) for outcome in outcomes]
        mean = sum(before) / len(before)
        return 1.0 - sum(after) / len(after) / mean if mean > 0 else 0.0

    def _each(self, outcomes: pd.DataFrame, tenants: Sequence[int]) -> float:
        mine = outcomes["tenant"].isin(list(tenants)).to_numpy()
        arrival = outcomes["arrival"].to_numpy(np.int64)
        mine = mine & (arrival >= self.window.start) & (arrival <= self.window.end)
        return float(self._norms.excess(outcomes[mine]).sum()) / max(int(mine.sum()), 1)

    # --- for people -------------------------------------------------------------------------------------------

    def describe(
        self,
        kind: InterventionKind,
        what: str,
        tenants: Sequence[int],
        effect: Effect,
        how: str = "",
        *,
        medians: bool = False,
    ) -> Intervention:
        """An effect as reports show it, with a tail, and a median if wanted, of all tenants that met the incident."""
        names = self.history.replica.tenants
        pairs = list(zip(self._unchanged(effect.outcomes), effect.outcomes, strict=True))
        made = float(np.mean([_throughput(before, after) for before, after in pairs]))
        return Intervention(
            kind=kind,
            what=what,
            how=how,
            tenants=tuple(names[tenant] for tenant in tenants),
            restored=effect.mean,
            restored_low=min(effect.restored),
            restored_high=max(effect.restored),
            predictions=tuple(self._predictions(effect.outcomes, medians)),
            throughput=made,
            tonight=False,
            unseen=float(np.mean([one.unseen for one in effect.outcomes])),
        )

    def _unchanged(self, outcomes: Sequence[Outcome]) -> list[Outcome]:
        """As many unchanged replays, by the same draws."""
        return [self.stretch.unchanged(draw) for draw in DRAWS[: len(outcomes)]]

    def _predictions(self, outcomes: Sequence[Outcome], medians: bool) -> Iterator[Prediction]:
        unchanged = self._unchanged(outcomes)
        for tenant, name in enumerate(self.history.replica.tenants):
            for metric in (TTFT, ITL):
                recorded = self._waits(self._recorded, tenant, metric)
                if not len(recorded):
                    continue
                before = [self._waits(one.requests, tenant, metric) for one in unchanged]
                after = [self._waits(one.requests, tenant, metric) for one in outcomes]
                tail = 0.99 if len(recorded) >= TAIL_REQUESTS else 0.9
                for quantile in (MEDIAN, tail) if medians else (tail,):
                    predicted = [_quantile(waits, quantile) for waits in after]
                    yield Prediction(
                        name,
                        METRICS[metric],
                        quantile,
                        len(recorded),
                        _quantile(recorded, quantile),
                        float(np.mean([_quantile(waits, quantile) for waits in before])),
                        float(np.mean(predicted)),
                        min(predicted),
                        max(predicted),
                    )

    def _waits(self, outcomes: pd.DataFrame, tenant: int, metric: int) -> Floats:
        """Of the tenant's requests that arrived in the window."""
        arrival = outcomes["arrival"].to_numpy(np.int64)
        mine = (outcomes["tenant"].to_numpy() == tenant) & (arrival >= self.window.start) & (arrival <= self.window.end)
        return waits_of(outcomes[mine & (outcomes["arrived"].to_numpy() >= 0)], metric)


def _quantile(waits: Floats, quantile: float) -> float:
    """In seconds; 0 of nothing."""
    return float(np.quantile(waits, quantile, method="higher")) / 1e9 if len(waits) else 0.0


def _throughput(before: Outcome, after: Outcome) -> float:
    """Output tokens made in a replay over those made in another, of the requests that both have."""
    codes = np.intersect1d(before.requests["code"], after.requests["code"])
    codes = codes[codes >= 0]
    made = [float(one.requests.loc[one.requests["code"].isin(codes), "output_tokens"].sum()) for one in (before, after)]
    return made[1] / max(made[0], 1.0)
