"""Percentiles of numbers that come in parts: exact while they are few, within half a percent where they are many.

Fixed bins whose bounds grow by a factor, as in DDSketch (Masson, Rim, Lee, 2019): adding up counts merges them exactly,
in any order, which sketches that choose their own bins can't promise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stallscope.diagnosis.timeline import Floats, Ints

EXACT = 4096  # as many numbers are kept as they are
GROWTH = 1.01  # of a bin's upper bound over its lower one: its middle is within 0.5% of all in it


@dataclass(frozen=True, eq=False)
class Sketch:
    """Numbers from 0 on: ``few`` (ascending) while there are at most ``EXACT``, and ``counts`` of the ``bins`` that
    hold any (ascending)."""

    few: Ints
    bins: Ints
    counts: Ints

    @staticmethod
    def of(values: Ints) -> Sketch:
        exponent: Floats = np.log(np.maximum(values, 1)) / np.log(GROWTH)
        bins, counts = np.unique(np.floor(exponent).astype(np.int64), return_counts=True)
        return Sketch(_if_few(np.sort(values), len(values)), bins, counts)

    @property
    def count(self) -> int:
        return int(self.counts.sum())

    def merged(self, other: Sketch) -> Sketch:
        """That of both together."""
        bins, place = np.unique(np.concatenate([self.bins, other.bins]), return_inverse=True)
        counts = np.zeros(len(bins), dtype=np.int64)
        np.add.at(counts, place, np.concatenate([self.counts, other.counts]))
        return Sketch(_if_few(np.sort(np.concatenate([self.few, other.few])), int(counts.sum())), bins, counts)

    def quantile(self, share: float) -> float:
        """The lowest of the numbers that ``share`` of them don't exceed, as NumPy's method "higher" finds it."""
        rank = int(np.ceil(share * (self.count - 1)))
        if len(self.few):
            return float(self.few[rank])
        place = int(np.searchsorted(np.cumsum(self.counts), rank, side="right"))
        return float(GROWTH ** (float(self.bins[place]) + 0.5))


def _if_few(values: Ints, count: int) -> Ints:
    return values if count <= EXACT else values[:0]
