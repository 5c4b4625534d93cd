"""A replica's steps, rows of residency and requests as whole numbers, and what is said in steps."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from stallscope.trace.rebuild import Phase

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Tuples = list[Any]  # of tuples of whole numbers, all as long


@dataclass(frozen=True, eq=False)
class StepRuns:
    """The n steps of a replica, in order; ``known``: whose batches are. ``run`` numbers stretches of consecutive steps
    that are all known, or all not; ``starts`` are the positions where these begin."""

    number: Ints
    known: Mask

    @cached_property
    def follows(self) -> Mask:
        """Whether the step before is in the trace."""
        return np.asarray(np.append(False, np.diff(self.number) == 1)[: len(self.number)])

    @cached_property
    def fresh(self) -> Mask:
        return np.asarray(~self.follows | np.append(True, np.diff(self.known))[: len(self.number)])

    @cached_property
    def run(self) -> Ints:
        return np.cumsum(self.fresh) - 1

    @cached_property
    def starts(self) -> Ints:
        return np.flatnonzero(self.fresh)

    def positions(self, numbers: Ints) -> Ints:
        return np.searchsorted(self.number, numbers)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of residency ordered by request and step: codes of requests (-1: none), positions of steps."""

    request: Ints
    phase: Ints
    reason: Ints
    lacking: Ints
    first: Ints
    last: Ints
    tokens: Ints
    context: Ints
    holder: Ints

    def take(self, chosen: Ints | Mask) -> Rows:
        return Rows(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    @cached_property
    def end(self) -> Ints:
        """Tokens held after the row."""
        return self.context + (self.last - self.first + 1) * self.tokens

    @cached_property
    def waits(self) -> Mask:
        return np.isin(self.phase, (Phase.WAITING, Phase.PREEMPTED))


@dataclass(frozen=True, eq=False)
class Asked:
    """What batches need of n requests: ``finish_reason`` is -1 of those that did not finish."""

    handle: Ints
    prompt_tokens: Ints
    cached_tokens: Ints
    finish_reason: Ints


@dataclass(frozen=True, eq=False)
class Events:
    """Tuples of whole numbers, ordered by the positions ``at`` of the steps that say them."""

    at: Ints
    columns: tuple[Ints, ...]

    @staticmethod
    def of(at: Ints, *columns: Ints) -> Events:
        order = np.argsort(at, kind="stable")
        return Events(at[order], tuple(column[order] for column in columns))

    def of_steps(self, begin: int, end: int) -> list[Tuples]:
        """Those of each step from position ``begin`` to before ``end``."""
        low, high = np.searchsorted(self.at, [begin, end])
        tuples = list(zip(*(column[low:high].tolist() for column in self.columns), strict=True))
        bounds = np.searchsorted(self.at[low:high], np.arange(begin, end + 1)).tolist()
        return [tuples[first:after] for first, after in pairwise(bounds)]
