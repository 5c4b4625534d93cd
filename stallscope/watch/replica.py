"""One replica under watch: its stream, what is usual there, its latest minutes, and the stall that it is in, if any."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.diagnosis import diagnose
from stallscope.diagnosis.incidents import NOTICEABLE_NS
from stallscope.diagnosis.metrics import METRICS
from stallscope.diagnosis.model import Diagnosis
from stallscope.diagnosis.slo import Slo, limits_of
from stallscope.diagnosis.timeline import Floats, Mask
from stallscope.errors import UsageError
from stallscope.trace.decode import LATEST, MOST, ReplicaSpans
from stallscope.trace.findings import Findings
from stallscope.trace.model import Trace
from stallscope.watch.case import LASTING_NS, LONGEST_NS, Case
from stallscope.watch.costs import Costs
from stallscope.watch.families import WINDOW_S
from stallscope.watch.memory import Memory
from stallscope.watch.stream import Stream, Window
from stallscope.watch.tally import Spent, Tenants, Waited, Waits, spent
from stallscope.watch.told import Told
from stallscope.watch.usual import Losses, Usual
from stallscope_telemetry import names

REMEMBERED_NS = 120_000_000_000  # of calm before a stall: what a diagnosis learns the usual from
_SILENT_NS = 60_000_000_000  # without a step, it is no stall any more but an engine, or telemetry, that has stopped
_GONE_NS = 60_000_000_000  # who has computed and held nothing for so long is not there any more
_COVERED_S = 60
_BLOCK_TOKENS = 16  # where the engine does not say


class WatchedReplica:
    """Takes one window of spans after the other; says what happened in it, and when a diagnosis is due."""

    def __init__(self, name: str, slos: tuple[Slo, ...] = ()) -> None:
        self.name = name
        self.tenants = Tenants()
        self.case: Case | None = None
        self.window: Window | None = None
        self.spent: Spent | None = None
        self.waited: Waited | None = None
        self.heard_ns = 0  # when steps came last, by the clock of whoever watches
        self.stalled_s: dict[str, float] = {}  # of the latest window, by victim
        self.costs = Costs()
        self._slos = slos
        self._stream = Stream(name)
        self._waits = Waits()
        self._told = Told()
        self._usual = Usual()
        self._memory = Memory(name)
        self._counted: dict[tuple[int, int], float] = {}  # of waits that go on: by handle and kind, ns counted so far
        self._losses = Losses()
        self._active_ns: dict[str, int] = {}  # by tenant: when it held something last
        self._covered: deque[tuple[int, int]] = deque(maxlen=_COVERED_S // WINDOW_S)  # steps known and all, by window
        self._kv_total = 0
        self._tells_batches = False
        self._calm_until = 0

    @property
    def now_ns(self) -> int:
        """As far as its steps have come."""
        return self._stream.last_ready

    @property
    def kv_total(self) -> int:
        """Blocks of its KV cache; 0 where it does not say."""
        return self._kv_total

    @property
    def memory_bytes(self) -> int:
        return self._memory.bytes

    @property
    def tells_batches(self) -> bool:
        """Whether its steps have ever said who was in them."""
        return self._tells_batches

    @property
    def coverage(self) -> float:
        """Share of the last minute's steps of which the batch is known."""
        known, steps = (sum(column) for column in zip(*self._covered, strict=True))
        return float(known / steps)

    def is_here(self, tenant: str) -> bool:
        """Whether a tenant has done anything of late."""
        return self.now_ns <= self._active_ns.get(tenant, 0) + _GONE_NS

    def oldest_waits_s(self, now_ns: int) -> Mapping[str, float]:
        """Of each tenant who waits for a first token: for how long the oldest does.

        ``now_ns`` by the clock of whoever watches: an engine that hangs has no steps whose times would go on.
        """
        silent_s = max(now_ns - self.heard_ns, 0) / 1e9
        oldest: dict[str, float] = {}
        for one in self._stream.alive:
            if one.first_token_step is None and not one.output_tokens:
                name = self.tenants.names[self.tenants.code(one)]
                age = max(self.now_ns - one.info.arrival_ns, 0) / 1e9 + silent_s
                oldest[name] = max(oldest.get(name, 0.0), age)
        return oldest

    def advance(self, spans: ReplicaSpans, end_ns: int) -> None:
        """Takes what came in a window that is over at ``end_ns``, by the clock of whoever watches."""
        self._memory.add(spans, end_ns)
        if self.case is None:
            self._calm_until = end_ns
        self._memory.forget(end_ns - REMEMBERED_NS - min(end_ns - self._calm_until, LONGEST_NS))
        self.window = self.spent = self.waited = None
        self.stalled_s = {}
        has_steps = bool(spans.rows) or self._stream.has_later
        window = self._stream.advance(spans.steps(Findings())) if has_steps else None
        if window is not None:
            self.heard_ns = end_ns
            self._take(window, spans)
            self._stream.done()
        elif not self._stream.alive or end_ns > self.heard_ns + _SILENT_NS:
            self._losses.add(0.0)  # whoever is there may wait for a step that takes long

    def _take(self, window: Window, spans: ReplicaSpans) -> None:
        attributes = list(spans.resources)[int(window.columns["resource"][-1])].attributes
        block_tokens, total = (attributes.get(name) for name in (names.BLOCK_SIZE, names.KV_TOTAL))
        self._kv_total = total if type(total) is int and 0 <= total < MOST else 0
        size = block_tokens if type(block_tokens) is int and 0 < block_tokens < MOST else _BLOCK_TOKENS
        tenant = self.tenants.codes(window.requests)
        self._tells_batches |= bool(window.requests)
        self.costs.learn(window)
        told = self._told.of(spans.requests, window, self.tenants, self.costs.model)
        self.window = window
        self._covered.append((int(window.known.sum()), len(window.ready) + window.lost))
        self.spent = spent(window, tenant, len(self.tenants.names), size, self.costs.model)
        self.waited = self._waits.of(window, tenant, self.costs.model).and_also(told)
        for code in {*np.flatnonzero(self.spent.kv_block_ns).tolist(), *told.tenant.tolist()}:
            self._active_ns[self.tenants.names[code]] = self.now_ns
        self._usual.settle()
        self._count_stalled(window, self.waited)
        if self._is_calm:
            self._usual.learn(self.waited.kind, self.waited.time, self.waited.delay)

    # --- stalls -----------------------------------------------------------------------------------------------------

    def _count_stalled(self, window: Window, waited: Waited) -> None:
        delay = waited.delay
        stalled, beyond = self._beyond(waited, delay)
        going_on = set(zip(waited.handle[waited.open].tolist(), waited.kind[waited.open].tolist(), strict=True))
        rows = np.flatnonzero(stalled)
        for row in rows.tolist():
            handle, kind = int(waited.handle[row]), int(waited.kind[row])
            amount = float(beyond[row]) * int(waited.weight[row])
            if handle >= 0:
                before = self._counted.get((handle, kind), 0.0)
                amount, self._counted[handle, kind] = max(amount - before, 0.0), max(amount, before)
            victim = self.tenants.names[int(waited.tenant[row])]
            self.stalled_s[victim] = self.stalled_s.get(victim, 0.0) + amount / 1e9
        self._counted = {key: amount for key, amount in self._counted.items() if key in going_on}
        self._losses.add(sum(self.stalled_s.values()))
        if self.case is None and self._losses.is_unusual:
            start = int(min(window.begin[0], waited.time[stalled].min(initial=LATEST)))
            self.case = Case(max(start, self.now_ns - REMEMBERED_NS))
        if self._is_calm:
            self._losses.learn()
        if self.case is not None:
            for victim, seconds in self.stalled_s.items():
                self.case.waiting[victim] += seconds

    @property
    def _is_calm(self) -> bool:
        """Whether what happens may count as usual: so does a stall in which a diagnosis finds nothing."""
        return self.case is None or (self.case.is_usual and not self.wants_look)

    def _beyond(self, waited: Waited, delay: Floats) -> tuple[Mask, Floats]:
        """Which waits are stalled, and how much longer than usual, or than promised if that is more, each is (ns)."""
        bar, usual = self._usual.bars(waited.kind, waited.own), self._usual.medians(waited.kind)
        stalled, beyond = delay > np.maximum(bar, NOTICEABLE_NS), delay - usual
        for (tenant, metric), slo in limits_of(self._slos, self.tenants.names).items():
            mine = waited.kind == tenant * len(METRICS) + metric
            stalled[mine] = waited.length[mine] > slo.limit_ns
            beyond[mine] = np.maximum(beyond, waited.length - slo.limit_ns)[mine]
        return stalled, np.maximum(beyond, 0.0)

    # --- the case -----------------------------------------------------------------------------------------------------

    @property
    def wants_look(self) -> bool:
        """Whether a diagnosis is due."""
        case = self.case
        if case is None:
            return False
        unnamed = case.attribution is None and self._losses.is_over
        return unnamed or case.wants_look(self.now_ns, self._losses.of_late)

    def look(self) -> None:
        """Diagnoses what is remembered."""
        assert self.case is not None
        try:
            trace = self._memory.trace()
            slos = _of_tenants_in(trace, self._slos)
            by_charges = diagnose(trace, slos=slos, replay=False)
            # A replay costs ten times as much: it is for who may be accused, and not for what befalls busy engines.
            # While nobody knows what is usual, charges accuse nobody.
            suspects = self.case.suspects(by_charges) or self._losses.is_young
            diagnosis: Diagnosis | None = diagnose(trace, slos=slos) if suspects else by_charges
        except UsageError:  # nothing sound is remembered: there is nothing to say
            diagnosis = None
        self.case.looked(diagnosis, self.now_ns, self._losses.of_late)

    def skip_look(self) -> None:
        """There is nothing to be said."""
        if self.case is not None:
            self.case.looked(None, self.now_ns, self._losses.of_late)

    def closed(self) -> Case | None:
        """The case, if it is over and was looked into; the next window has none."""
        case = self.case
        if case is None or not case.looks:
            return None
        if self.now_ns > case.start_ns + LASTING_NS:
            self._losses = Losses()  # what goes on for so long is looked into anew, and usual if nothing is found
        elif not self._losses.is_over:
            return None
        self.case = None
        return case


def _of_tenants_in(trace: Trace, slos: tuple[Slo, ...]) -> list[Slo]:
    """Those for all, and for who was there in the minutes that are remembered."""
    there = set(pc.unique(trace.requests["tenant"].cast(pa.string())).to_pylist())
    return [slo for slo in slos if slo.tenant is None or slo.tenant in there]
