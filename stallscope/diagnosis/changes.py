"""When a tenant did what it usually does not: a scan of each one's arrivals for stretches that chance does not make.

What hurts others may be small beside what an engine's usual ups and downs do, and a burst that chance made is nobody's
doing. So who changed is asked of the arrivals alone, without a look at the stalls; what it did to others is for charges
and replays to say.

The method is a scan statistic (Kulldorff, "A spatial scan statistic", 1997) over stretches of several lengths: in each,
the requests of a tenant whose prompt or answer is above a level are counted, and so are all of them. Two questions are
asked of a count. Was it as high for its rate at other times? Given both counts that is a binomial probability, made
milder where the tenant's arrivals are burstier than a Poisson process. And where it sent nothing above that level at
other times: how likely is that of a log-logistic distribution of the tenant's sizes, whose tail is as heavy as that of
real prompts? What all tenants have grown by is expected of each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Ints

CHANCE = -6.0  # log10 of the probability below which a stretch is no work of chance: some thousand are looked at
LOOKS_NS, LOOKS_TENANTS = 300_000_000_000, 20  # in a trace of this length, with so many tenants; longer ones: more
SHORTEST_NS, LONGER = 5_000_000_000, 1.4  # stretches: the shortest one, and each next one by this factor
POSSIBLE = -4.0  # above, it is nothing but chance, whatever came of it
MOST_OF_TRACE = 0.6  # beyond, what is usual and what is not can't be told apart
LARGEST = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233)  # so many of a tenant's requests are above a level
LEAST_DEVIATION = 0.25
LEAST_GROWTH = 1.5
COMMON_CHANCE, LEAST_COMMON_GROWTH = -3.3, 1.1  # of all together: asked of the time of a stall only, and accuses nobody
LOGISTIC = 1.702  # scales a logistic distribution to a normal one's deviation
FEW = 0.1  # share of a tenant's requests up to which the others tell its usual sizes
FEWEST_TO_COMPARE = 20  # requests of a tenant whose growth says something of everybody's
_BIN_NS = 5_000_000_000  # of the counts that tell how bursty arrivals are
_BOUND = 2.0  # log10 of the most by which a probability lies below Chernoff's bound
_MANY, _MOST_STARTS = 1_000, 4_000  # stretches of one length and level
_LIKELIEST = 20  # stretches of one level and length that are looked at closely
_MOST_CHANGES = 8  # of a tenant
_MOST_LOOKED_AT = 200
_CLOSER_LOOK = 1.0  # what is this near to a change at first sight is compared with other times only
_SETTLES_NS = 5_000_000_000  # who was there before has been seen by then
_ADJACENT_NS = 5_000_000_000


@dataclass(frozen=True, eq=False)
class Arrivals:
    """One tenant's requests by time (ns): when they came, until when they were there, and their ``sizes`` by name."""

    at: Ints
    until: Ints
    sizes: dict[str, Floats]

    def without(self, start: int, end: int) -> Arrivals:
        """Those that did not come between two times."""
        left = (self.at < start) | (self.at > end)
        return Arrivals(self.at[left], self.until[left], {of: size[left] for of, size in self.sizes.items()})


@dataclass(frozen=True, slots=True)
class Change:
    """A stretch (ns, by arrival) in which a tenant sent more than usual: ``count`` requests where ``expected`` were.

    ``of``: "requests", "prompt tokens" or "output tokens"; ``above``: those with more of that counted. ``chance``:
    log10 of the probability that it is one, more of it where more was looked at. ``until``: when the last of its
    requests was seen last.
    """

    tenant: int
    start: int
    end: int
    until: int
    of: str
    above: float
    count: int
    expected: float
    chance: float
    newcomer: bool = False


@dataclass(frozen=True, eq=False)
class Changes:
    """All changes of a replica's tenants, ordered by time.

    ``common``: stretches (ns) in which there was more of all together, whoever sent it. ``possible``: what chance makes
    now and then; a change only if it did more harm than chance does.
    """

    found: tuple[Change, ...]
    common: tuple[tuple[int, int], ...] = ()
    possible: tuple[Change, ...] = ()

    def of(self, tenant: int) -> list[Change]:
        return [change for change in self.found if change.tenant == tenant]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """From when to when (ns) changed requests were there; changes that overlap are one."""
        joined: list[tuple[int, int]] = []
        for change in self.found:
            if joined and change.start <= joined[-1][1]:
                joined[-1] = (joined[-1][0], max(joined[-1][1], change.until))
            else:
                joined.append((change.start, change.until))
        return joined

    def all_grew(self, start: int, end: int) -> bool:
        """Whether there was more of all together between two times."""
        return any(since <= end and until >= start for since, until in self.common)

    def during(self, start: int, end: int) -> dict[int, Change]:
        """By tenant, the least likely of its changes whose requests were there between two times."""
        there: dict[int, Change] = {}
        for change in self.found:
            if change.start <= end and change.until >= start:
                known = there.get(change.tenant)
                there[change.tenant] = change if known is None or change.chance < known.chance else known
        return there


NO_CHANGES = Changes(())


def find_changes(replica: Replica) -> Changes:
    """The changes of a replica's tenants. What its clients tried again does not count: stalls make them do so."""
    requests, timeline = replica.requests, replica.timeline
    if not len(timeline):
        return Changes(())
    first, last = int(timeline.before[0]), int(timeline.end[-1])
    counted = replica.first_tries & (requests["arrival"].to_numpy(np.int64) >= first)
    arrival = requests["arrival"].to_numpy(np.int64)[counted]
    sizes = {f"{of} tokens": requests[f"{of}_tokens"].to_numpy(np.float64)[counted] for of in ("prompt", "output")}
    tenant_of = replica.tenant_of_request[counted]
    until = requests["seen_until"].to_numpy(np.int64)[counted]
    tenants = []
    for tenant in range(len(replica.tenants)):
        mine = np.flatnonzero(tenant_of == tenant)
        mine = mine[np.argsort(arrival[mine], kind="stable")]
        tenants.append(Arrivals(arrival[mine], until[mine], {of: size[mine] for of, size in sizes.items()}))
    return scan(tenants, first, last)


def scan(tenants: Sequence[Arrivals], first: int, last: int) -> Changes:
    """The changes of tenants (codes: their places) whose arrivals were seen between two times.

    What comes after the last arrival of all is no time in which one sent nothing: the traffic had ended.
    """
    last = min(last, max((int(one.at[-1]) for one in tenants if len(one.at)), default=last))
    each = _Scan(tenants, first, last, LEAST_GROWTH)
    every = sorted(
        (change for tenant in range(len(tenants)) for change in each.changes_of(tenant, CHANCE, POSSIBLE)), key=_by_time
    )
    together = _Scan([_together(tenants)], first, last, LEAST_COMMON_GROWTH)
    common = [
        (change.start, change.until)
        for change in together.changes_of(0, COMMON_CHANCE)
        if each.common_growth(change.start, change.end - change.start) >= LEAST_COMMON_GROWTH
    ]
    found, possible = (
        tuple(change for change in every if (change.chance <= CHANCE) == certain) for certain in (True, False)
    )
    return Changes(found, tuple(common), possible)


def _by_time(change: Change) -> tuple[int, int]:
    return change.start, change.tenant


def _together(tenants: Sequence[Arrivals]) -> Arrivals:
    """All tenants as one, without sizes: a few large requests of one tenant are no growth of all."""
    if not tenants:
        return Arrivals(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64), {})
    at = np.concatenate([one.at for one in tenants])
    order = np.argsort(at, kind="stable")
    until = np.concatenate([one.until for one in tenants])
    return Arrivals(at[order], until[order], {})


@dataclass(frozen=True, slots=True)
class _Stretch:
    """A count: ``count`` of ``all`` requests between two times are above the level, and ``others`` at other times."""

    of: str
    above: float
    start: int
    end: int
    length: int
    count: int
    all: int
    others: int
    chance: float


class _Scan:
    def __init__(self, tenants: Sequence[Arrivals], first: int, last: int, growth: float) -> None:
        self._tenants = tenants
        self._least_growth = growth
        self._first, self._last = first, last
        self._span = max(last - first, 1)
        # Bonferroni's correction, beyond the traces that ``CHANCE`` was set on.
        self._looks = np.log10(max(self._span / LOOKS_NS, 1.0)) + np.log10(max(len(tenants) / LOOKS_TENANTS, 1.0))

    def changes_of(self, tenant: int, chance: float, possible: float = -np.inf) -> list[Change]:
        """The least likely stretch of a tenant, then that of what is left without it, and so on, up to a chance
        (log10); those that touch are one. Then those up to ``possible``.
        """
        mine = self._tenants[tenant]
        if not len(mine.at):
            return []
        if (newcomer := self._newcomer(tenant)) is not None:
            return [newcomer]
        found: list[Change] = []
        span = self._span
        stretches: list[_Stretch] | None = None
        for most in (chance, possible):
            while len(found) < _MOST_CHANGES:
                if stretches is None:
                    every = self._stretches(mine, span, max(chance, possible) + _CLOSER_LOOK)
                    stretches = sorted(every, key=lambda one: one.chance)
                change = self._least_likely(tenant, mine, span, most, stretches)
                if change is None:
                    break
                found.append(change)
                mine = mine.without(change.start, change.end)
                span -= change.end - change.start
                stretches = None
        certain = sorted((change for change in found if change.chance <= chance), key=_by_time)
        return [*_joined(certain), *(change for change in found if change.chance > chance)]

    def _least_likely(
        self, tenant: int, mine: Arrivals, span: int, most: float, stretches: list[_Stretch]
    ) -> Change | None:
        for stretch in stretches[:_MOST_LOOKED_AT]:
            if stretch.chance > most + _CLOSER_LOOK:
                break
            if (change := self._confirmed(tenant, mine, span, stretch, most)) is not None:
                return change
        return None

    def _newcomer(self, tenant: int) -> Change | None:
        """One that was not there before, and for a good part of the trace not at all."""
        mine = self._tenants[tenant]
        start, end = int(mine.at[0]), int(mine.at[-1])
        if end - start > MOST_OF_TRACE * self._span or start < self._first + min(_SETTLES_NS, self._span // 20):
            return None
        count = len(mine.at)
        return Change(tenant, start, end, int(mine.until.max()), "requests", 0.0, count, 0.0, -np.inf, newcomer=True)

    def _stretches(self, mine: Arrivals, span: int, most: float) -> Iterator[_Stretch]:
        """Those that look like no chance at first sight, by level and length."""
        lengths = _lengths(span)
        if not len(lengths):
            return
        for of, above, tail in _levels(mine):
            at = mine.at if above <= 0 else mine.at[mine.sizes[of] >= above]
            begin, length = _starts(len(at), lengths, span)
            end = np.searchsorted(at, at[begin] + length, side="right")
            count, share = end - begin, length / span
            others = len(at) - count
            likely = _likelihood(count, others, share)
            # By Chernoff's bound, what is less likely than so is no less likely by chance, but for a small factor.
            grown = count >= self._least_growth * others * share / (1 - share)
            worth = np.flatnonzero(grown & ((likely >= -np.log(10) * (most - self._looks + _BOUND)) | (others == 0)))
            worth = worth[_likeliest(likely[worth], length[worth])]
            start = at[begin[worth]]
            every = np.searchsorted(mine.at, start + length[worth]) - np.searchsorted(mine.at, start)
            chance = _chance(count[worth], others[worth], share[worth], every, tail) + self._looks
            for one in np.flatnonzero(chance <= most).tolist():
                place = int(worth[one])
                yield _Stretch(
                    of,
                    above,
                    int(start[one]),
                    int(at[end[place] - 1]),
                    int(length[place]),
                    int(count[place]),
                    int(every[one]),
                    int(others[place]),
                    float(chance[one]),
                )

    def _confirmed(self, tenant: int, mine: Arrivals, span: int, one: _Stretch, most: float) -> Change | None:
        """The stretch as a change, if it is one beside what is usual at other times, and beside everybody's growth."""
        inside = (mine.at >= one.start) & (mine.at <= one.end)
        counted = mine.at if one.above <= 0 else mine.at[mine.sizes[one.of] >= one.above]
        tail = None
        if one.above > 0:
            # Without its largest ones, a tenant's usual sizes would look less different than they are.
            few = one.count <= FEW * len(mine.at) and (~inside).sum() >= FEWEST_TO_COMPARE // 2
            sizes = mine.sizes[one.of]
            tail = _tail(one.above, _shape(sizes[~inside] if few else sizes))
        common = self.common_growth(one.start, one.length, tenant)
        share = one.length / span
        bursts = self._burstiness(counted, one)
        count, others, every = (np.array([number]) for number in (one.count, one.others, one.all))
        chance = float(_chance(count, others, np.array([share]), every, tail, bursts, common)[0] + self._looks)
        expected = one.others * share / (1 - share)
        if chance > most or one.count < self._least_growth * common * expected:
            return None
        until = int(mine.until[inside].max())
        return Change(tenant, one.start, one.end, until, one.of, one.above, one.count, expected, chance)

    def common_growth(self, start: int, length: int, but: int = -1) -> float:
        """The lower median of the tenants' growth in number in a stretch (without tenant ``but``), at least 1."""
        rest = self._span - length
        growth = []
        for other, arrivals in enumerate(self._tenants):
            if other == but or len(arrivals.at) < FEWEST_TO_COMPARE:
                continue
            first, end = np.searchsorted(arrivals.at, [start, start + length])
            outside = len(arrivals.at) - int(end - first)
            if rest > 0:
                # Who sent nothing at other times grew, too: as if it had sent one.
                growth.append(float(end - first) / max(length, 1) / (max(outside, 1) / rest))
        growth.sort()
        return max(1.0, growth[(len(growth) - 1) // 2]) if growth else 1.0

    def _burstiness(self, at: Ints, one: _Stretch) -> float:
        """Variance over mean of the counts of bins outside of the stretch; at least 1, which a Poisson process has."""
        edges = np.arange(self._first, self._last, _BIN_NS)
        if len(edges) < 6:
            return 1.0
        counts = np.diff(np.searchsorted(at, edges))
        outside = counts[(edges[1:] < one.start) | (edges[:-1] > one.end)]
        if len(outside) < 5 or not outside.any():
            return 1.0
        return max(1.0, float(outside.var(ddof=1) / outside.mean()))


def _lengths(span: int) -> Ints:
    """Of the stretches that are looked at (ns), as long as what is usual can be told from them."""
    count = int(np.log(max(MOST_OF_TRACE * span / SHORTEST_NS, 1e-9)) / np.log(LONGER)) + 1
    return (SHORTEST_NS * LONGER ** np.arange(max(count, 0))).astype(np.int64)


def _starts(requests: int, lengths: Ints, span: int) -> tuple[Ints, Ints]:
    """With which of so many requests stretches begin, and how long each is."""
    # Of many, those that are an eighth of the length apart are enough.
    apart = requests * lengths // (8 * span) if requests > _MANY else np.zeros_like(lengths)
    apart = np.maximum(apart, max(1, requests // _MOST_STARTS))
    begin = [np.arange(0, requests, step) for step in apart.tolist()]
    return np.concatenate(begin), np.repeat(lengths, [len(one) for one in begin])


def _likeliest(likely: Floats, length: Ints) -> Ints:
    """Of each length the places of the ``_LIKELIEST`` ones that are least like chance."""
    order = np.lexsort((-likely, length))
    first = np.searchsorted(length[order], length[order])
    return order[np.arange(len(order)) - first < _LIKELIEST]


def _levels(mine: Arrivals) -> Iterator[tuple[str, float, float | None]]:
    """What is counted: all requests, and those whose prompt or answer is as long as one of the longest ones; and the
    ``_tail`` of that."""
    if not len(mine.at):
        return
    yield "requests", 0.0, None
    for of, sizes in mine.sizes.items():
        descending, shape = np.sort(sizes)[::-1], _shape(sizes)
        # Where many are of one size, as answers are that always reach their limit, that is no large one.
        half = descending[len(sizes) // 2]
        above = {float(descending[count - 1]) for count in LARGEST if count <= len(sizes) // 2}
        yield from ((of, level, _tail(level, shape)) for level in sorted(above) if level > max(half, 0.0))


def _shape(sizes: Floats) -> tuple[float, float]:
    """Median and deviation of the logarithm of sizes, by their quartiles: a few that are other don't bend them."""
    low, middle, high = np.quantile(np.log(np.maximum(sizes, 1.0)), [0.25, 0.5, 0.75])
    return float(middle), max(float(high - low) / 1.349, LEAST_DEVIATION)


def _tail(above: float, shape: tuple[float, float]) -> float:
    """Probability that a request of a tenant whose sizes have this shape is above a level."""
    middle, deviation = shape
    return float(1.0 / (1.0 + np.exp(min(LOGISTIC * (np.log(max(above, 1.0)) - middle) / deviation, 700.0))))


def _likelihood(count: Ints, others: Ints, share: Floats) -> Floats:
    """Log likelihood ratio of a higher rate inside (Kulldorff), to choose the stretches worth a closer look."""
    inside, outside = np.maximum(count, 1).astype(np.float64), np.maximum(others, 1).astype(np.float64)
    total = count + others
    ratio = count * np.log(inside / (total * share)) + others * np.log(outside / (total * (1 - share)))
    found: Floats = np.where(count > total * share, ratio, 0.0)
    return found


def _chance(
    count: Ints, others: Ints, share: Floats, every: Ints, tail: float | None, bursts: float = 1.0, common: float = 1.0
) -> Floats:
    """Log10 of the probability of so high a count in a stretch that is this ``share`` of the trace, of each.

    ``tail``: probability that one of the tenant's requests is above the level, for where none was at other times.
    """
    from scipy.special import betainc

    inside = share * common / (share * common + 1 - share)
    probability = betainc(count / bursts, others / bursts + 1.0, inside)
    if tail is not None:
        by_size = betainc(count, np.maximum(every - count, 0) + 1.0, tail)
        probability = np.where(others == 0, np.minimum(probability, by_size), probability)
    found: Floats = np.log10(np.maximum(probability, 1e-300))
    return found


def _joined(changes: list[Change]) -> list[Change]:
    """Changes that follow one another at once are one, as its least likely part shows it."""
    joined: list[Change] = []
    for change in changes:
        if not joined or change.start > joined[-1].end + _ADJACENT_NS:
            joined.append(change)
            continue
        last = joined[-1]
        most = min(last, change, key=lambda one: one.chance)
        end, until = max(last.end, change.end), max(last.until, change.until)
        joined[-1] = replace(most, start=last.start, end=end, until=until)
    return joined
