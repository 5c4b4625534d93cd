"""Who held what in a set of steps: what each group of requests costs others, read off where somebody asks.

Between two events (a row of residency begins or ends), what a group holds is linear in the step. Its running total is
therefore known everywhere once it is known at the group's own events: the work is O(rows + questions), whatever the
number of steps, and a group of which nobody is there costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stallscope.diagnosis.ledger import Ledger, Lines, stable_order
from stallscope.diagnosis.lives import Lives
from stallscope.diagnosis.timeline import Floats, Intervals, Ints, Mask, Places, at, expand, running_total


@dataclass(frozen=True, eq=False)
class Weights:
    """What one unit counts: running totals over the steps at hand of it, and of it times the step's offset."""

    one: Floats
    offset: Floats


@dataclass(frozen=True, eq=False)
class Holding:
    """Running total over the steps at hand of weight times what a group holds, which is linear in the step after each
    event (ascending indices of steps)."""

    weights: Weights
    event: Ints
    level: Floats
    rise: Floats
    total: Floats

    @staticmethod
    def of(weights: Weights, first: Ints, after: Ints, level: Floats, rise: Floats) -> Holding:
        """``first`` and ``after``: steps in which each row begins and has ended; ``level`` as of offset 0."""
        event = np.concatenate([[0], first, after])
        order = stable_order(event)
        event = event[order]
        level_now, rise_now = (np.cumsum(np.concatenate([[0.0], each, -each])[order]) for each in (level, rise))
        grown = level_now[:-1] * np.diff(weights.one[event]) + rise_now[:-1] * np.diff(weights.offset[event])
        return Holding(weights, event, level_now, rise_now, running_total(grown))

    def at(self, places: Places) -> Floats:
        last = np.searchsorted(self.event, places.position, side="right") - 1
        since = self.event[last]
        one = at(self.weights.one, places) - self.weights.one[since]
        offset = at(self.weights.offset, places) - self.weights.offset[since]
        amount: Floats = self.total[last] + self.level[last] * one + self.rise[last] * offset
        return amount

    def between(self, begin: Places, end: Places) -> Floats:
        return self.at(end) - self.at(begin)


@dataclass(frozen=True, eq=False)
class Holders:
    """Groups of requests (``group_of_request``: -1 is no group) in the steps in some ``spans`` of positions.

    Only these steps are at hand: they are counted by index, and offsets are positions less that of the first.
    """

    ledger: Ledger
    lives: Lives
    spans: Intervals
    group_of_request: Ints

    @cached_property
    def steps(self) -> Ints:
        """Positions of the steps at hand."""
        return expand(self.spans.begin, self.spans.end)

    def places(self, places: Places) -> Places:
        """Places in the steps at hand, by the index of the step."""
        return Places(np.searchsorted(self.steps, places.position), places.passed)

    def groups(self) -> Iterator[int]:
        """Those of whom somebody is there, or at the head of the queue."""
        there = np.concatenate([self._by_group[1], self._heads[1]])
        yield from np.unique(there[there >= 0]).tolist()

    def prefill(self, group: int) -> Holding:
        """Marginal cost of its prefills."""
        return self._holding(self._scale, self._of_group(group, self.ledger.stretches.prefill), self.ledger.cost_lines)

    def decode(self, group: int) -> Holding:
        """Marginal cost of its decodes."""
        return self._holding(self._scale, self._of_group(group, self.ledger.stretches.decode), self.ledger.cost_lines)

    def budget(self, group: int) -> Holding:
        """Marginal cost of all, by its share of the step's tokens."""
        return self._holding(self._per_token, self._of_group(group), self.ledger.token_lines)

    def kv(self, group: int) -> Holding:
        """Marginal cost of all, by its share of the KV cache."""
        return self._holding(self._per_kv_token, self._of_group(group), self.ledger.kv_lines)

    def slots(self, group: int) -> Holding:
        """Marginal cost of all, by its share of the slots."""
        return self._holding(self._per_slot, self._of_group(group), self.ledger.slot_lines)

    def head(self, group: int) -> Holding:
        """Marginal cost of all in the steps in which it stands at the head of the queue; group -1: nobody known."""
        steps, groups = self._heads
        mine = steps[groups == group]
        return Holding.of(self._marginal, mine, mine + 1, np.ones(len(mine)), np.zeros(len(mine)))

    # --- rows ---------------------------------------------------------------------------------------------------

    @cached_property
    def _rows(self) -> Ints:
        return self.ledger.stretches.within(self.spans)

    @cached_property
    def _by_group(self) -> tuple[Ints, Ints]:
        """Rows ordered by group, and their groups."""
        group = self.group_of_request[self.ledger.stretches.request[self._rows]]
        order = stable_order(group + 1)
        return self._rows[order], group[order]

    def _of_group(self, group: int, chosen: Mask | None = None) -> Ints:
        rows, groups = self._by_group
        mine = rows[slice(*np.searchsorted(groups, (group, group + 1)))]
        return mine if chosen is None else mine[chosen[mine]]

    @cached_property
    def _heads(self) -> tuple[Ints, Ints]:
        """Steps at hand in which somebody waits because of the head of the queue, and the head's group."""
        position, request = self.lives.head(self.spans)
        index = np.searchsorted(self.steps, position)
        here = np.append(self.steps, -1)[index] == position
        return index[here], np.append(self.group_of_request, -1)[request[here]]

    def _holding(self, weights: Weights, rows: Ints, lines: Lines) -> Holding:
        return Holding.of(weights, *self._events(rows, lines))

    def _events(self, rows: Ints, lines: Lines) -> tuple[Ints, Ints, Floats, Floats]:
        """Of rows: index of the first step and of the one after the last, level as of offset 0, rise."""
        s = self.ledger.stretches
        level, rise = lines(rows)
        first = np.searchsorted(self.steps, s.first[rows])
        after = np.searchsorted(self.steps, s.last[rows], side="right")
        return first, after, level - rise * (s.first[rows] - self.steps[0]), rise

    # --- weights ------------------------------------------------------------------------------------------------

    @cached_property
    def _scale(self) -> Weights:
        return self._weights(self.ledger.scale[self.steps + 1] - self.ledger.scale[self.steps])

    @cached_property
    def _marginal(self) -> Weights:
        return self._weights(self._marginal_cost)

    @cached_property
    def _per_token(self) -> Weights:
        return self._share_of_marginal(self.ledger.token_lines)

    @cached_property
    def _per_kv_token(self) -> Weights:
        return self._share_of_marginal(self.ledger.kv_lines)

    @cached_property
    def _per_slot(self) -> Weights:
        return self._share_of_marginal(self.ledger.slot_lines)

    @cached_property
    def _marginal_cost(self) -> Floats:
        cost: Floats = self.ledger.marginal[self.steps + 1] - self.ledger.marginal[self.steps]
        return cost

    def _share_of_marginal(self, lines: Lines) -> Weights:
        """Each step's marginal cost a unit that anybody holds."""
        first, after, level, rise = self._events(self._rows, lines)
        n = len(self.steps)
        levels, rises = (
            np.cumsum(np.bincount(first, each, n + 1) - np.bincount(after, each, n + 1))[:n] for each in (level, rise)
        )
        held = levels + rises * (self.steps - self.steps[0])
        # What rounding leaves of nobody's is far below one unit.
        return self._weights(np.divide(self._marginal_cost, held, out=np.zeros(n), where=held > 0.5))

    def _weights(self, per_step: Floats) -> Weights:
        return Weights(running_total(per_step), running_total(per_step * (self.steps - self.steps[0])))
