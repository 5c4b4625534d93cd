"""The budget of series: who has series of its own, and who is ``(other)``.

A tenant, a replica and a pair of victim and culprit each have a seat, which takes as many lines as they expose. Each
kind is sure of a share of the budget and may use what others leave free beyond theirs. Seats are given up late: by who
has been quiet for hours, or by the tenant that costs least, to one that costs more. Pairs that were only made ready, at
zero, go first and at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from stallscope.watch.series import Series

LATE_NS = 2 * 3600 * 10**9  # a seat is kept so long after its last use, and after it was taken
HALF_LIFE_NS = 3600 * 10**9  # of a cost
LOOK_NS = 60 * 10**9  # between looks for seats that can go
_TWICE = 2.0  # as dear a tenant must be as the one whose seat it takes
_MOST_STANDING = 4096


class Whose(Enum):
    """Whose seat it is: ``PAIR`` a victim's and a culprit's, ``CULPRIT`` a culprit's with all other victims; ``REST``
    is (other) in all labels but those that have few values anyway, ``LAST`` in all of them."""

    TENANT = auto()
    REPLICA = auto()
    PAIR = auto()
    CULPRIT = auto()
    REST = auto()
    LAST = auto()


_SURE = {Whose.TENANT: 0.30, Whose.REPLICA: 0.15, Whose.PAIR: 0.22, Whose.CULPRIT: 0.04, Whose.REST: 0.03}
_STAYS = (Whose.REST, Whose.LAST)
Key = tuple[str, ...]


@dataclass(slots=True, eq=False)
class Seat:
    """``reserved``: lines that it may expose without asking; ``lines``: that it exposes."""

    kind: Whose
    key: Key
    reserved: int
    since_ns: int
    used_ns: int
    lines: int = 0
    cost: float = 0.0
    cost_ns: int = 0
    series: list[Series] = field(default_factory=list)

    @property
    def taken(self) -> int:
        return max(self.reserved, self.lines)

    def cost_at(self, now_ns: int) -> float:
        return _decayed(self.cost, self.cost_ns, now_ns)


def _decayed(cost: float, since_ns: int, now_ns: int) -> float:
    return float(cost * 0.5 ** (max(now_ns - since_ns, 0) / HALF_LIFE_NS)) if cost else 0.0


class Seats:
    """All seats, within ``most_lines``. Seats that go are told to the caller, who takes away their series."""

    def __init__(self, most_lines: int) -> None:
        self._most = most_lines
        self._used = dict.fromkeys(_SURE, 0)
        self._sure = {kind: int(share * most_lines) for kind, share in _SURE.items()}
        self._seats: dict[tuple[Whose, Key], Seat] = {}
        self._ready: dict[Seat, None] = {}  # pairs at zero, oldest first
        self._standing: dict[str, tuple[float, int]] = {}  # costs of tenants without a seat, and when
        self._looked_ns: dict[Whose, int] = {}
        self._can_go: dict[Whose, list[Seat]] = {}

    def get(self, kind: Whose, key: Key) -> Seat | None:
        return self._seats.get((kind, key))

    def fits(self, kind: Whose, lines: int) -> bool:
        """Whether there is room for so many more lines, with every other kind's sure share left to it."""
        if kind is Whose.LAST:
            return True
        taken = sum(max(used + (lines if one is kind else 0), self._sure[one]) for one, used in self._used.items())
        return taken <= self._most

    def has_plenty(self, kind: Whose) -> bool:
        """Whether not even half of its sure share is used."""
        return self._used[kind] < self._sure[kind] / 2

    def take(self, kind: Whose, key: Key, reserved: int, now_ns: int) -> Seat:
        """A new seat; ``fits`` must have said so."""
        seat = Seat(kind, key, reserved, now_ns, now_ns)
        if kind is Whose.TENANT and key[0] in self._standing:
            seat.cost, seat.cost_ns = self._standing.pop(key[0])
        self._seats[kind, key] = seat
        if kind is not Whose.LAST:
            self._used[kind] += reserved
        if kind is Whose.PAIR:
            self._ready[seat] = None
        return seat

    def put(self, seat: Seat, series: Series) -> None:
        """A series on a seat; ``fits`` must have said so for ``more_lines``."""
        more = self.more_lines(seat, series.lines)
        seat.series.append(series)
        seat.lines += series.lines
        if seat.kind is not Whose.LAST:
            self._used[seat.kind] += more

    def remove(self, series: Series) -> None:
        """It is exposed no more; its seat stays."""
        seat = series.seat
        before = seat.taken
        seat.series.remove(series)
        seat.lines -= series.lines
        if seat.kind is not Whose.LAST:
            self._used[seat.kind] += seat.taken - before

    @staticmethod
    def more_lines(seat: Seat, lines: int) -> int:
        """What a series of so many lines takes beyond what its seat has."""
        return max(seat.reserved, seat.lines + lines) - seat.taken

    def use(self, seat: Seat, now_ns: int) -> None:
        """It is not quiet."""
        seat.used_ns = now_ns
        if self._ready:
            self._ready.pop(seat, None)

    def charge(self, tenant: str, cost: float, now_ns: int) -> None:
        """What a tenant costs, in seconds: its step time, and blame that it gave or got."""
        seat = self._seats.get((Whose.TENANT, (tenant,)))
        if seat is not None:
            seat.cost = seat.cost_at(now_ns) + cost
            seat.cost_ns = now_ns
            return
        before, when = self._standing.pop(tenant, (0.0, now_ns))
        self._standing[tenant] = (_decayed(before, when, now_ns) + cost, now_ns)
        if len(self._standing) > _MOST_STANDING:
            now_of = {name: _decayed(amount, at_ns, now_ns) for name, (amount, at_ns) in self._standing.items()}
            dearest = sorted(now_of, key=lambda name: -now_of[name])[: _MOST_STANDING // 2]
            self._standing = {name: (now_of[name], now_ns) for name in dearest}

    def leave(self, seat: Seat) -> None:
        """The seat is free."""
        del self._seats[seat.kind, seat.key]
        self._ready.pop(seat, None)
        self._used[seat.kind] -= seat.taken

    def make_room(self, kind: Whose, key: Key, lines: int, now_ns: int) -> Iterator[Seat]:
        """Seats that have left, one by one, until there is room for so many lines or nobody else who could go."""
        while not self.fits(kind, lines):
            gone = self._next_to_go(kind, key, now_ns)
            if gone is None:
                return
            self.leave(gone)
            yield gone

    def _next_to_go(self, kind: Whose, key: Key, now_ns: int) -> Seat | None:
        helps = [
            one for one, used in self._used.items() if one not in _STAYS and (one is kind or used > self._sure[one])
        ]
        if Whose.PAIR in helps:
            ready = next((seat for seat in self._ready if (seat.kind, seat.key) != (kind, key)), None)
            if ready is not None:
                return ready
        for one in sorted(helps, key=lambda one: one is not kind):
            for seat in self._can_leave(one, now_ns):
                if seat.key != key and now_ns - seat.used_ns >= LATE_NS:
                    return seat
        if kind is Whose.TENANT:
            cost, when_ns = self._standing.get(key[0], (0.0, now_ns))
            cheapest = next(iter(self._can_leave(kind, now_ns)), None)
            if cheapest is not None and _TWICE * cheapest.cost_at(now_ns) < _decayed(cost, when_ns, now_ns):
                return cheapest
        return None

    def _can_leave(self, kind: Whose, now_ns: int) -> Iterator[Seat]:
        """Seats of a kind that nothing keeps, cheapest first as of the last look."""
        return (seat for seat in self._quiet(kind, now_ns) if self._seats.get((kind, seat.key)) is seat)

    def _quiet(self, kind: Whose, now_ns: int) -> list[Seat]:
        """Seats of a kind that may go, cheapest first, as of the last look."""
        if kind not in self._can_go or now_ns - self._looked_ns[kind] >= LOOK_NS:
            self._looked_ns[kind] = now_ns
            found = [
                seat
                for (one, _), seat in self._seats.items()
                if one is kind
                and (now_ns - seat.used_ns >= LATE_NS or (kind is Whose.TENANT and now_ns - seat.since_ns >= LATE_NS))
            ]
            self._can_go[kind] = sorted(found, key=lambda seat: (seat.cost_at(now_ns), seat.used_ns))
        return self._can_go[kind]
