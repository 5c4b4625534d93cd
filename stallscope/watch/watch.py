"""A watch: spans in, scores out. Closes a window every few seconds, and looks into stalls while they go on.

Flow: batches -> spans by replica (``trace.decode``) -> windows (``stream``) -> what each tenant spent and waited
(``tally``) -> stalls (``usual``, ``replica``)
-> a diagnosis of the latest minutes (``memory``, ``case``) -> the ``scores``.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from stallscope.diagnosis.metrics import ITL as GAP
from stallscope.diagnosis.metrics import METRICS
from stallscope.diagnosis.metrics import TTFT as FIRST
from stallscope.diagnosis.slo import Slo
from stallscope.trace.decode import Collected, GpuSpan, ReplicaSpans, collect
from stallscope.trace.findings import Findings
from stallscope.trace.otlp import SpanGroup
from stallscope.watch import families
from stallscope.watch.case import USUAL, Case
from stallscope.watch.changes import Score
from stallscope.watch.plain import PlainRequest, plain_requests
from stallscope.watch.replica import WatchedReplica
from stallscope.watch.tally import Waited
from stallscope_telemetry import names

log = logging.getLogger(__name__)

MOST_REPLICAS = 2_000
FORGOTTEN_NS = 900_000_000_000  # a replica without steps for so long has ended
_QUIET_NS = 60_000_000_000  # and after so long it makes room, where there are too many
_MOST_RESOURCES = 64  # of a replica, from which on they are numbered anew
_MOST_DEVICES = 10_000
_SAMPLE_S = 10.0  # a GPU sample says nothing of more time than this
_THROTTLES = ("thermal", "power")
_NO_THROTTLE = ("idle", "application", "sync", "display")

Look = Callable[[WatchedReplica], None]


class Watch:
    """All replicas whose spans come in. ``take`` spans, ``close_window`` every ``families.WINDOW_S``."""

    def __init__(self, scores: Score, slos: Sequence[Slo] = ()) -> None:
        self.scores = scores
        self.replicas: dict[str, WatchedReplica] = {}
        self._slos = tuple(slos)
        self._collected = Collected()
        self._findings = Findings()
        self._sampled: dict[tuple[str, str], int] = {}
        self._dropped: dict[str, int] = {}
        self._waited: set[str] = set()  # tenants whose oldest wait is told

    def take(self, groups: Iterable[SpanGroup]) -> None:
        """Spans that have come, in any order within a window."""
        collect(groups, self._findings, self._collected)
        self._collected.clients.clear()

    def close_window(self, now_ns: int, may_look: Callable[[], bool] = lambda: True) -> None:
        """Counts what came since the last window; looks into stalls, the costliest first, while ``may_look``.

        ``now_ns``: by the clock of whoever watches.
        """
        self._findings = Findings()
        self._make_room(now_ns)
        for name, spans in list(self._collected.replicas.items()):
            new = spans.taken()
            self._count_throttling(name, new.samples)
            if name in self.replicas or (new.rows and len(self.replicas) < MOST_REPLICAS):
                try:
                    self._advance(name, new, now_ns)
                except Exception:  # it begins anew with the next window, and the others are watched on
                    log.exception("replica %r: what it sent can't be watched", name)
                    self._forget(name)
            else:
                self._count_requests(plain_requests(new.requests), waits=True)
                del self._collected.replicas[name]
            if len(new.resources) > _MOST_RESOURCES and name in self._collected.replicas:
                self._collected.replicas[name].resources = {}
        self._count_ages(now_ns)
        due = [one for one in self.replicas.values() if one.wants_look]
        for replica in sorted(due, key=_urgency):
            if not may_look():
                break
            try:
                replica.look()
            except Exception:  # of one replica nobody is named, and the others are watched on
                log.exception("replica %r: its stall can't be diagnosed", replica.name)
                replica.skip_look()
        for replica in list(self.replicas.values()):
            self._judge(replica)
            if now_ns > replica.heard_ns + FORGOTTEN_NS:
                self._forget(replica.name)

    # --- windows ------------------------------------------------------------------------------------------------------

    def _make_room(self, now_ns: int) -> None:
        """Where there are too many, those that have been silent for a while go."""
        if len(self.replicas) >= MOST_REPLICAS:
            for replica in list(self.replicas.values()):
                if now_ns > replica.heard_ns + _QUIET_NS:
                    self._forget(replica.name)

    def _advance(self, name: str, spans: ReplicaSpans, now_ns: int) -> None:
        replica = self.replicas.get(name)
        if replica is None:
            replica = self.replicas[name] = WatchedReplica(name, self._slos)
        known = len(replica.tenants.names)
        replica.advance(spans, now_ns)
        for tenant in replica.tenants.names[known:]:
            self.scores.admit(tenant, replica.tenants.names)
        if replica.window is not None:
            self._count_steps(replica)
            self._count_spent(replica)
            self._count_waits(replica)
            for victim, seconds in replica.stalled_s.items():
                self.scores.add(families.STALLED, (victim,), seconds)
        if not replica.tells_batches:
            self._count_requests(plain_requests(spans.requests))

    def _count_requests(self, requests: Sequence[PlainRequest], *, waits: bool = False) -> None:
        """Of a replica whose steps do not tell them: what their own spans say; ``waits`` of one that has no steps."""
        for one in requests:
            self.scores.add(families.REQUESTS, (one.tenant,), 1)
            if waits and one.ttft_s is not None:
                self._observe_one(families.TTFT, one.tenant, one.ttft_s)
            self._observe_one(families.E2E, one.tenant, one.e2e_s)

    def _count_steps(self, replica: WatchedReplica) -> None:
        window, scores, name = replica.window, self.scores, replica.name
        assert window is not None
        columns = window.columns
        scores.add(families.STEPS, (name,), len(window.ready))
        scores.add(families.STEPS_LOST, (name,), window.lost)
        scores.add(families.BUSY, (name,), float((window.ready - window.begin).sum()) / 1e9)
        scores.add(families.HOST_GAP, (name,), float(window.host_ns.sum()) / 1e9)
        scores.add(families.UNEXPLAINED, (name,), replica.costs.unexplained_ns(window) / 1e9)
        dropped = int(columns["dropped"][-1])  # since its process began: before it was watched does not count
        before = self._dropped.get(name, dropped)
        scores.add(families.DROPPED, (name,), dropped - before if dropped >= before else dropped)
        self._dropped[name] = dropped
        scores.set(families.COVERAGE, (name,), replica.coverage)
        scores.set(families.RUNNING, (name,), float(columns["running"][-1]))
        scores.set(families.WAITING, (name,), float(columns["waiting"][-1]))
        scores.set(families.KV_USED, (name,), float(columns["kv_used"][-1]))
        scores.set(families.KV_TOTAL, (name,), float(replica.kv_total))
        scores.set(families.LAST_SEEN, (name,), replica.now_ns / 1e9)

    def _count_ages(self, now_ns: int) -> None:
        """How long somebody waits now, and how late this is, over all replicas."""
        new = [one for one in self.replicas.values() if one.window is not None]
        if new:
            self.scores.set(families.LAG, (), max(max(now_ns - one.now_ns, 0) for one in new) / 1e9)
        oldest: dict[str, float] = {}
        for replica in self.replicas.values():
            for tenant, age in replica.oldest_waits_s(now_ns).items():
                oldest[tenant] = max(oldest.get(tenant, 0.0), age)
        for tenant in self._waited | oldest.keys():
            self.scores.set(families.OLDEST_WAIT, (tenant,), oldest.get(tenant, 0.0))
        self._waited = set(oldest)

    def _count_spent(self, replica: WatchedReplica) -> None:
        spent, scores, window = replica.spent, self.scores, replica.window
        assert spent is not None
        assert window is not None
        for code, tenant in enumerate(replica.tenants.names):
            if not spent.kv_block_ns[code] and not spent.prefill_tokens[code]:
                continue
            scores.add(families.TOKENS, (tenant, "prefill"), float(spent.prefill_tokens[code]))
            scores.add(families.TOKENS, (tenant, "decode"), float(spent.decode_tokens[code]))
            scores.add(families.RECOMPUTED, (tenant,), float(spent.recomputed_tokens[code]))
            scores.add(families.STEP_TIME, (tenant,), float(spent.step_ns[code]) / 1e9)
            scores.add(families.KV, (tenant,), float(spent.kv_block_ns[code]) / 1e9)
        for code, count in Counter(map(replica.tenants.code, window.joined)).items():
            scores.add(families.REQUESTS, (replica.tenants.names[code],), count)
        for number in np.flatnonzero(window.preempted).tolist():
            tenant = replica.tenants.names[replica.tenants.code(window.requests[number])]
            scores.add(families.PREEMPTIONS, (tenant,), int(window.preempted[number]))

    def _count_waits(self, replica: WatchedReplica) -> None:
        waited, window = replica.waited, replica.window
        assert waited is not None
        assert window is not None
        for metric, family in ((FIRST, families.TTFT), (GAP, families.ITL)):
            self._observe(replica, waited, metric, family)
        for one in window.left:
            if one.output_tokens and one.left_step is not None:
                length = max(window.ready_of(one.left_step) - one.info.arrival_ns, 0) / 1e9
                self._observe_one(families.E2E, replica.tenants.names[replica.tenants.code(one)], length)

    def _observe_one(self, family: families.Family, tenant: str, length_s: float) -> None:
        bounds = self.scores.bounds[family.name]
        counts = np.zeros(len(bounds) + 1, dtype=np.int64)
        counts[bisect_left(bounds, length_s)] = 1
        self.scores.observe(family, (tenant,), counts, length_s)

    def _observe(self, replica: WatchedReplica, waited: Waited, metric: int, family: families.Family) -> None:
        bounds = np.array(self.scores.bounds[family.name])
        mine = np.flatnonzero((waited.kind % len(METRICS) == metric) & ~waited.open)
        if not len(mine):
            return
        length, weight, tenant = waited.length[mine] / 1e9, waited.weight[mine], waited.tenant[mine]
        size = len(bounds) + 1
        counts = np.bincount(
            tenant * size + np.searchsorted(bounds, length), weight, len(replica.tenants.names) * size
        ).astype(np.int64)
        totals = np.bincount(tenant, weight * length, len(replica.tenants.names))
        for code, row in enumerate(counts.reshape(-1, size)):
            if row.any():
                self.scores.observe(family, (replica.tenants.names[code],), row, float(totals[code]))

    def _forget(self, name: str) -> None:
        """It has ended, or was never ours."""
        self.replicas.pop(name, None)
        self._collected.replicas.pop(name, None)
        self._dropped.pop(name, None)
        self.scores.forget_replica(name)

    # --- judgement ----------------------------------------------------------------------------------------------------

    def _judge(self, replica: WatchedReplica) -> None:
        case = replica.case
        if case is None:
            return
        if case.attribution is not None and not case.counted:
            case.counted = True
            self.scores.add(families.INCIDENTS, (case.attribution.verdict.value,), 1)
        closed = replica.closed()
        verdict = case.attribution.verdict.value if case.attribution else USUAL
        if case.attribution is not None or closed is not None:
            self.scores.add(families.JUDGED, (replica.name, verdict), sum(case.waiting.values()))
        for victim, culprit, mechanism, seconds in case.judged(replica.now_ns, replica.is_here):
            self.scores.blame(victim, culprit, mechanism, seconds)

    def _count_throttling(self, replica: str, samples: Sequence[GpuSpan]) -> None:
        if len(self._sampled) > _MOST_DEVICES:
            self._sampled.clear()
        for one in sorted(samples, key=lambda sample: sample.time):
            before = self._sampled.get((replica, one.device), one.time)
            self._sampled[replica, one.device] = one.time
            told = one.attributes.get(names.GPU_THROTTLE)
            reasons = [word for word in str(told or "").split("|") if word]
            passed = min((one.time - before) / 1e9, _SAMPLE_S)
            for reason in {_throttle(word) for word in reasons} - {""}:
                self.scores.add(families.THROTTLED, (replica, one.device, reason), max(passed, 0.0))


def _throttle(word: str) -> str:
    """The kind of reason for which clocks are held down; "" where it is none that slows work."""
    if any(part in word for part in _NO_THROTTLE):
        return ""
    return next((kind for kind in _THROTTLES if kind in word), "other")


def _urgency(replica: WatchedReplica) -> float:
    """The costliest first, of those that nobody has looked into before the others."""
    case: Case | None = replica.case
    if case is None:
        return 0.0
    return -sum(case.waiting.values()) / (1 + case.looks)
