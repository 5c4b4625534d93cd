"""Who scrapes, and what they have seen: so that nothing rises before all of them have seen it as it began."""

from __future__ import annotations

from dataclasses import dataclass

_NS = 10**9
UNSEEN_NS = 30 * _NS  # where nobody scrapes, a series begins unseen after so long
MOST_PATIENCE_NS = 300 * _NS  # a scraper that is slower than this is not waited for
_MOST_SCRAPERS = 64


@dataclass(slots=True)
class _Scraper:
    sequence: int
    when_ns: int
    interval_ns: int | None = None  # between its last two

    def is_expected(self, now_ns: int) -> bool:
        """It has come twice, and may well come again."""
        if self.interval_ns is None:
            return False
        return now_ns - self.when_ns <= min(max(2 * self.interval_ns, UNSEEN_NS), MOST_PATIENCE_NS)


class Scrapers:
    """Scrapes are numbered; ``coming`` is the number of the next one.

    There may be several: a pair of Prometheus servers for availability, one that is pushed to. One request by hand is
    not waited for a second time.
    """

    def __init__(self) -> None:
        self.coming = 0
        self._last_seen = -1
        self._scrapers: dict[str, _Scraper] = {}

    def next(self) -> int:
        """The number of the scrape that begins."""
        self.coming += 1
        return self.coming - 1

    def saw(self, scraper: str, sequence: int, when_ns: int) -> None:
        """A scraper has what was exposed in a scrape."""
        before = self._scrapers.pop(scraper, None)
        self._scrapers[scraper] = _Scraper(sequence, when_ns, when_ns - before.when_ns if before else None)
        self._last_seen = max(self._last_seen, sequence)
        if len(self._scrapers) > _MOST_SCRAPERS:
            del self._scrapers[next(iter(self._scrapers))]

    def seen_by_all(self, now_ns: int) -> tuple[int, bool]:
        """The last scrape that all have seen who are expected, or anybody where none is; and whether any is."""
        expected = [scraper.sequence for scraper in self._scrapers.values() if scraper.is_expected(now_ns)]
        return min(expected, default=self._last_seen), bool(expected)
