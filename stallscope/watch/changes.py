"""What a watch has to say to the score, written down: for a score that another process keeps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import numpy.typing as npt

from stallscope.watch.families import BUCKETS, FAMILIES, Family

_BY_NAME = {family.name: family for family in FAMILIES}


class Score(Protocol):
    """What a watch writes to; ``scores.Scores`` says what each call means."""

    @property
    def bounds(self) -> Mapping[str, Sequence[float]]: ...
    def admit(self, tenant: str, beside: Iterable[str]) -> None: ...
    def blame(self, victim: str, culprit: str, mechanism: str, seconds: float) -> None: ...
    def add(self, family: Family, labels: tuple[str, ...], amount: float) -> None: ...
    def set(self, family: Family, labels: tuple[str, ...], value: float) -> None: ...
    def observe(self, family: Family, labels: tuple[str, ...], counts: npt.ArrayLike, total: float) -> None: ...
    def forget_replica(self, replica: str) -> None: ...


class Changes:
    """A score that only writes down what it is told. What adds up is added up."""

    def __init__(self, bounds: Mapping[str, Sequence[float]] = BUCKETS) -> None:
        self.bounds = bounds
        self._admitted: list[tuple[str, tuple[str, ...]]] = []
        self._blamed: dict[tuple[str, str, str], float] = {}
        self._added: dict[tuple[str, tuple[str, ...]], float] = {}
        self._set: dict[tuple[str, tuple[str, ...]], float] = {}
        self._forgotten: list[str] = []
        self._observed: list[tuple[str, tuple[str, ...], npt.ArrayLike, float]] = []

    def admit(self, tenant: str, beside: Iterable[str]) -> None:
        self._admitted.append((tenant, tuple(beside)))

    def blame(self, victim: str, culprit: str, mechanism: str, seconds: float) -> None:
        self._blamed[victim, culprit, mechanism] = self._blamed.get((victim, culprit, mechanism), 0.0) + seconds

    def add(self, family: Family, labels: tuple[str, ...], amount: float) -> None:
        self._added[family.name, labels] = self._added.get((family.name, labels), 0.0) + amount

    def set(self, family: Family, labels: tuple[str, ...], value: float) -> None:
        self._set[family.name, labels] = value

    def observe(self, family: Family, labels: tuple[str, ...], counts: npt.ArrayLike, total: float) -> None:
        self._observed.append((family.name, labels, counts, total))

    def forget_replica(self, replica: str) -> None:
        self._forgotten.append(replica)

    def taken(self) -> Changes:
        """What was written down since the last time."""
        new = Changes(self.bounds)
        new.__dict__, self.__dict__ = self.__dict__, new.__dict__
        return new

    def apply(self, score: Score) -> None:
        """Tells it all to another one."""
        for tenant, beside in self._admitted:
            score.admit(tenant, beside)
        for (name, labels), amount in self._added.items():
            score.add(_BY_NAME[name], labels, amount)
        for (name, labels), value in self._set.items():
            score.set(_BY_NAME[name], labels, value)
        for name, labels, counts, total in self._observed:
            score.observe(_BY_NAME[name], labels, counts, total)
        for (victim, culprit, mechanism), seconds in self._blamed.items():
            score.blame(victim, culprit, mechanism, seconds)
        for replica in self._forgotten:
            score.forget_replica(replica)
