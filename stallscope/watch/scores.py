"""The score that a watch keeps: all families, within the budget of series, ready to be scraped at any time.

Flow: the rolling diagnosis → ``Scores`` → a ``Snapshot`` a scrape → ``exposition`` (a /metrics), ``otlp`` (pushed) or
plain numbers (a rehearsal in virtual time). ``seats`` says who has series of its own, ``series`` what one shows when.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stallscope.diagnosis.partition import Mechanism
from stallscope.errors import UsageError
from stallscope.watch.exposition import classic, openmetrics
from stallscope.watch.families import (
    BLAME,
    BUCKETS,
    FAMILIES,
    FOLDED,
    OTHER,
    SERIES,
    STALLED,
    STEP_TIME,
    TOKENS,
    Family,
    Kind,
)
from stallscope.watch.names import label_value
from stallscope.watch.samples import Series as SeriesName
from stallscope.watch.scrapers import UNSEEN_NS, Scrapers
from stallscope.watch.seats import Seats, Whose
from stallscope.watch.series import OPEN, Counter, Counts, Gauge, Histogram, Series, folded
from stallscope.watch.snapshot import Point, Snapshot, identity

LEAST_SERIES = 500
# Of a pair that comes together, at zero from the start: these while there is room, and those while pairs are few. What
# is not there when blame comes waits for one scrape.
LIKELY = tuple(
    one.value
    for one in (Mechanism.PREFILL_INTERFERENCE, Mechanism.PREFILL_QUEUE, Mechanism.KV_PINNING, Mechanism.HEAD_OF_LINE)
)
POSSIBLE = tuple(
    one.value
    for one in (
        Mechanism.SLOT_EXHAUSTION,
        Mechanism.STEP_BOUNDARY,
        Mechanism.DECODE_DRAG,
        Mechanism.PREEMPTION,
        Mechanism.RECOMPUTE,
        Mechanism.PREFILL_PRIORITY,
        Mechanism.CACHE_EVICTION,
    )
)
_CREATED_LINES = 2  # of the families without labels
_RETRY_NS = 60 * 10**9  # who is (other) stays it so long, but for blame
_MOST_REMEMBERED = 20_000  # folded values, and series that have left
_MOST_OF_REPLICA = 64  # by device, reason and verdict, beside those that every replica has
_MOST_ADMITTED = 4096
_OF_ONE_TENANT = [
    family for family in FAMILIES if family.labels[:1] in (("tenant",), STALLED.labels) and family is not BLAME
]
_RESTS = {TOKENS: [("prefill",), ("decode",)]}  # values of further labels that every tenant has


@dataclass(slots=True)
class _Detour:
    """Where amounts of a series go that has no room, until it asks again."""

    series: Series
    until_ns: int


class Scores:
    """State of all families; its methods may be called from any thread.

    ``most_series``: exposed at any time, each bucket, sum and count of a histogram one. ``bounds``: upper bounds of the
    histograms' buckets by family, s, without +Inf. ``clock``: ns since the epoch; of a rehearsal its virtual time.

    Counters never fall while the process lives. Each begins at zero and keeps that until it has been scraped so (see
    ``Scrapers``). A series leaves when its room is needed and it has been quiet for hours; if it returns, it goes on
    from its value. Until then new amounts of it are in ``(other)``.

    Raises UsageError where there are too few series, and ValueError for an amount that is negative or no number.
    """

    def __init__(
        self,
        *,
        most_series: int = 20_000,
        bounds: Mapping[str, Sequence[float]] = BUCKETS,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self.bounds = {name: tuple(sorted(set(edges))) for name, edges in bounds.items()}
        last = sum(self._lines(family) for family in FAMILIES) + _CREATED_LINES
        if most_series < (least := max(LEAST_SERIES, 5 * last)):
            raise UsageError(f"{most_series} series are too few: give at least {least}")
        self._clock = clock
        self._start_ns = clock()
        self._lock = threading.RLock()
        self._scrapers = Scrapers()
        self._live: dict[str, dict[tuple[str, ...], Series]] = {family.name: {} for family in FAMILIES}
        self._held: dict[Series, None] = {}
        self._detours: dict[tuple[str, tuple[str, ...]], _Detour] = {}
        self._left: dict[tuple[str, tuple[str, ...]], Series] = {}
        self._folded: dict[tuple[str, str], None] = {}
        self._beside: dict[str, set[str]] = {}  # tenants whose pairs with these are there
        self._seats = Seats(most_series - last)
        self._tenant_lines = sum(self._lines(family) * len(_RESTS.get(family, [()])) for family in _OF_ONE_TENANT)
        self._replica_lines = sum(self._lines(family) for family in FAMILIES if family.labels == ("replica",))

    # --- what the diagnosis says --------------------------------------------------------------------------------------

    def admit(self, tenant: str, beside: Iterable[str]) -> None:
        """A tenant came to a replica that these are on: what can be said of it, and of it and them, is at zero now.

        Pairs take only room that nobody else has, and give it back to who needs it.
        """
        tenant = label_value(tenant)
        others = [other for other in map(label_value, beside) if other not in (tenant, OTHER)]
        with self._lock:
            now = self._clock()
            if tenant == OTHER:
                return
            for family in _OF_ONE_TENANT:
                for rest in _RESTS.get(family, [()]):
                    if family.kind is not Kind.GAUGE:
                        self._series(family, (tenant, *rest), now)
            known = self._beside.setdefault(tenant, set())
            new = [other for other in others if other not in known]
            pairs = [pair for other in new for pair in ((tenant, other), (other, tenant))]
            if not all(self._make_ready((*pair, likely), now) for likely in LIKELY for pair in pairs):
                return
            known.update(new)
            if len(self._beside) > _MOST_ADMITTED:
                self._beside.clear()
            for labels in ((*pair, possible) for possible in POSSIBLE for pair in pairs):
                if not self._seats.has_plenty(Whose.PAIR) or not self._make_ready(labels, now):
                    return

    def _make_ready(self, labels: tuple[str, ...], now: int) -> bool:
        """Blame's series with these labels is there, if there is room."""
        return labels in self._live[BLAME.name] or self._new(BLAME, labels, now) is not None

    def blame(self, victim: str, culprit: str, mechanism: str, seconds: float) -> None:
        """Blame by what it is called in the diagnosis: both are tenants, or what stands for one."""
        self.add(BLAME, (victim, culprit, mechanism), seconds)

    def add(self, family: Family, labels: tuple[str, ...], amount: float) -> None:
        """To a counter."""
        _check(family, Kind.COUNTER, amount)
        labels = tuple(map(label_value, labels))
        with self._lock:
            now = self._clock()
            if family is BLAME:
                for tenant in dict.fromkeys(labels[:2]):
                    self._charge(tenant, amount, now)
            elif family is STEP_TIME:
                self._charge(labels[0], amount, now)
            series = self._series(family, labels, now)
            if isinstance(series, Counter) and amount:
                series.add(amount)
                self._seats.use(series.seat, now)

    def set(self, family: Family, labels: tuple[str, ...], value: float) -> None:
        """A gauge, or a counter without labels that somebody else counts."""
        if labels or family.kind is not Kind.COUNTER:
            _check(family, Kind.GAUGE)
        labels = tuple(map(label_value, labels))
        with self._lock:
            now = self._clock()
            series = self._series(family, labels, now)
            if isinstance(series, Gauge):
                series.set(labels, value)
                if value:
                    self._seats.use(series.seat, now)
            elif isinstance(series, Counter):
                series.release()
                series.value = max(series.value, value)

    def observe(self, family: Family, labels: tuple[str, ...], counts: npt.ArrayLike, total: float) -> None:
        """Observations of a histogram: ``counts`` one a bucket, the last one up to +Inf; ``total`` their sum, s."""
        more: Counts = np.asarray(counts, dtype=np.float64)
        _check(family, Kind.HISTOGRAM, *more, total)
        if len(more) != len(self.bounds[family.name]) + 1:
            raise ValueError(f"{family.name} has {len(self.bounds[family.name]) + 1} buckets, not {len(more)}")
        labels = tuple(map(label_value, labels))
        with self._lock:
            now = self._clock()
            series = self._series(family, labels, now)
            if isinstance(series, Histogram) and more.any():
                series.add(more, total)
                self._seats.use(series.seat, now)

    def forget_replica(self, replica: str) -> None:
        """It has ended: its gauges are gone; its counters stay as they are, and leave first when room is needed."""
        replica = label_value(replica)
        with self._lock:
            for family in FAMILIES:
                if family.kind is not Kind.GAUGE or "replica" not in family.labels:
                    continue
                live = self._live[family.name]
                if (series := live.get((replica,))) is not None:
                    self._take_away(series)
                    self._seats.remove(series)
                else:
                    self._leave_others(family, (replica,))
            seat = self._seats.get(Whose.REPLICA, (replica,))
            if seat is not None:
                seat.used_ns = 0

    # --- what scrapers see --------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What is exposed now. It counts as a scrape once ``seen`` is told."""
        with self._lock:
            now = self._clock()
            sequence = self._scrapers.next()
            seen, is_scraped = self._scrapers.seen_by_all(now)
            for series in list(self._held):
                if series.sequence <= seen or (not is_scraped and now - series.born_ns >= UNSEEN_NS):
                    series.release()
                    del self._held[series]
            points = [series.point() for family in FAMILIES for series in self._live[family.name].values()]
            exposed = sum(len(point.of.samples) for point in points) + 1
            points.append(Point(identity(SERIES, ()), float(exposed)))
            return Snapshot(sequence, now, self._start_ns, tuple(points), self.bounds)

    def seen(self, snapshot: Snapshot, scraper: str) -> None:
        """A scraper, by its address, has got this."""
        with self._lock:
            self._scrapers.saw(scraper, snapshot.sequence, snapshot.when_ns)

    def exposition(self, scraper: str = "") -> bytes:
        """A scrape: OpenMetrics 1.0 text."""
        return openmetrics(self._scrape(scraper))

    def exposition_classic(self, scraper: str = "") -> bytes:
        """A scrape: Prometheus' text format 0.0.4."""
        return classic(self._scrape(scraper))

    def exposed(self, scraper: str = "") -> dict[SeriesName, float]:
        """A scrape, as plain numbers."""
        return self._scrape(scraper).values()

    def _scrape(self, scraper: str) -> Snapshot:
        snapshot = self.snapshot()
        self.seen(snapshot, scraper)
        return snapshot

    # --- who has a series -----------------------------------------------------------------------------------------

    def _series(self, family: Family, labels: tuple[str, ...], now: int) -> Series:
        """The series where something with these labels is counted: its own, if there is room for it."""
        own = self._live[family.name].get(labels)
        if own is not None:
            return own
        if len(labels) != len(family.labels):
            raise ValueError(f"{family.name} has the labels {family.labels}, not {labels}")
        detour = self._detours.get((family.name, labels))
        if detour is not None and not detour.series.is_out and now < detour.until_ns:
            return detour.series
        found = next(
            series
            for names in folded(family, labels)
            if (series := self._live[family.name].get(names) or self._new(family, names, now, make_room=True))
        )
        self._seats.use(found.seat, now)  # so that what follows can't make room by it
        self._note_folded(family, labels, found.identity.labels, now)
        return found

    def _note_folded(self, family: Family, labels: tuple[str, ...], under: tuple[str, ...], now: int) -> None:
        if labels == under:
            self._detours.pop((family.name, labels), None)
            return
        if family is not BLAME:  # who is blamed asks again each time
            if len(self._detours) > _MOST_REMEMBERED:
                self._detours.clear()
            self._detours[family.name, labels] = _Detour(self._live[family.name][under], now + _RETRY_NS)
        for name, value, kept in zip(family.labels, labels, under, strict=True):
            if value != kept and (name, value) not in self._folded:
                self._folded[name, value] = None
                if len(self._folded) > _MOST_REMEMBERED:
                    del self._folded[next(iter(self._folded))]
                if family is not FOLDED:
                    self.add(FOLDED, (name,), 1)

    def _new(self, family: Family, labels: tuple[str, ...], now: int, *, make_room: bool = False) -> Series | None:
        """A series that begins, or returns; None where there is no room."""
        whose, key, reserved = self._seat_of(family, labels)
        lines = self._lines(family)
        seat = self._seats.get(whose, key)
        is_extra = whose is Whose.REPLICA and len(labels) > 1 and OTHER not in labels
        if is_extra and seat is not None and seat.lines >= seat.reserved + _MOST_OF_REPLICA:
            return None
        more = self._seats.more_lines(seat, lines) if seat is not None else max(reserved, lines)
        if not self._seats.fits(whose, more):
            if not make_room:
                return None
            for gone in self._seats.make_room(whose, key, more, now):
                for series in gone.series:
                    self._withdraw(series, now)
            if not self._seats.fits(whose, more):
                return None
        seat = seat or self._seats.take(whose, key, reserved, now)
        series = self._begin(family, labels, now)
        series.seat = seat
        self._seats.put(seat, series)
        self._live[family.name][labels] = series
        if series.is_held:
            self._held[series] = None
        return series

    def _begin(self, family: Family, labels: tuple[str, ...], now: int) -> Series:
        sequence = self._scrapers.coming
        named = identity(family, labels, self.bounds.get(family.name, ()))
        before = self._left.pop((family.name, labels), None)
        if family.kind is Kind.GAUGE:
            self._leave_others(family, labels)
            return Gauge(named, sequence, now)
        if family.kind is Kind.COUNTER:
            return Counter(named, sequence, now, before.value if isinstance(before, Counter) else 0.0)
        if isinstance(before, Histogram):
            return Histogram(named, sequence, now, before.counts, before.total)
        return Histogram(named, sequence, now, np.zeros(len(self.bounds[family.name]) + 1))

    def _withdraw(self, series: Series, now: int) -> None:
        """It leaves; what it held, which nobody has seen yet, is (other)'s."""
        self._take_away(series)
        family, labels = series.identity.family, series.identity.labels
        if series.holds:
            live, others = self._live[family.name], folded(family, labels)[1:]
            series.hand_over(next(filter(None, (live.get(one) or self._new(family, one, now) for one in others))))
        if not series.is_zero:
            self._left[family.name, labels] = series
            if len(self._left) > _MOST_REMEMBERED:
                del self._left[next(iter(self._left))]

    def _leave_others(self, family: Family, labels: tuple[str, ...]) -> None:
        """A gauge with these labels is no part of (other)'s any more."""
        for names in folded(family, labels)[1:]:
            rest = self._live[family.name].get(names)
            if isinstance(rest, Gauge) and rest.parts.pop(labels, None) is not None and not rest.parts:
                self._take_away(rest)
                self._seats.remove(rest)

    def _take_away(self, series: Series) -> None:
        series.is_out = True
        del self._live[series.identity.family.name][series.identity.labels]
        self._held.pop(series, None)

    def _seat_of(self, family: Family, labels: tuple[str, ...]) -> tuple[Whose, tuple[str, ...], int]:
        """Whose series these are, and how many lines that one takes at least."""
        if all(label == OTHER for label in labels):
            return Whose.LAST, (), 0
        named = tuple(value for name, value in zip(family.labels, labels, strict=True) if name in OPEN)
        if not named or all(name == OTHER for name in named):
            return Whose.REST, (), 0
        if family is BLAME:
            return (Whose.CULPRIT if named[0] == OTHER else Whose.PAIR), named, 0
        if family in _OF_ONE_TENANT:
            return Whose.TENANT, named, self._tenant_lines
        return Whose.REPLICA, named[:1], self._replica_lines

    def _lines(self, family: Family) -> int:
        return len(self.bounds[family.name]) + 3 if family.kind is Kind.HISTOGRAM else 1

    def _charge(self, tenant: str, cost: float, now: int) -> None:
        if tenant != OTHER:
            self._seats.charge(tenant, cost, now)


def _check(family: Family, kind: Kind, *amounts: float) -> None:
    if family.kind is not kind:
        raise ValueError(f"{family.name} is a {family.kind}, not a {kind}")
    if not all(amount >= 0 and math.isfinite(amount) for amount in amounts):
        raise ValueError(f"{family.name} can't change by {', '.join(map(str, amounts))}: it only rises")
