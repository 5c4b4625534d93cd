"""What a scraper saw of a watch: one value for each series and scrape."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Labels = tuple[tuple[str, str], ...]  # by name
Series = tuple[str, Labels]  # the name of a sample, as in PromQL: a histogram's ends in _bucket, _sum or _count


@dataclass(frozen=True, eq=False)
class Samples:
    """``times_ns``: of the scrapes, ascending; ``values``: of each series one a scrape, NaN where it had none."""

    times_ns: npt.NDArray[np.int64]
    values: Mapping[Series, npt.NDArray[np.float64]]

    def of(self, name: str) -> Iterator[tuple[dict[str, str], npt.NDArray[np.float64]]]:
        """Labels and values of all series of a name."""
        return ((dict(labels), values) for (found, labels), values in self.values.items() if found == name)


def samples_of(scrapes: Sequence[tuple[int, Mapping[Series, float]]]) -> Samples:
    """Samples of scrapes: when (ns), and what was exposed then."""
    values: dict[Series, npt.NDArray[np.float64]] = {}
    for number, (_, exposed) in enumerate(scrapes):
        for series, value in exposed.items():
            if series not in values:
                values[series] = np.full(len(scrapes), np.nan)
            values[series][number] = value
    return Samples(np.array([when for when, _ in scrapes], dtype=np.int64), values)
