"""What each step cost, and what each request's part of it was: running totals over the steps, added up in chunks.

Kept for each step are three running totals: the factor by which the cost model was scaled, that times the step, and the
marginal cost of all. A request's own cost over any stretch follows from them, since it is linear in the step. Who held
what is looked up only where somebody waits for it (``holdings``). The work is O(steps + residency rows).

In each slice, the model's cost is scaled down where the step was faster than predicted; where it was slower, the rest
is unexplained. So: duration = fixed + sum of marginal costs + unexplained, none of them negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from stallscope.diagnosis.cost_model import CostModel, fit_cost_model, typical_of_kind
from stallscope.diagnosis.timeline import (
    Floats,
    Intervals,
    Ints,
    Mask,
    Places,
    Timeline,
    at,
    expand,
    narrow,
    running_total,
)

CHUNK = 1 << 16  # steps at hand at a time
FITTED_SPANS, FITTED_SPAN = 400, 250  # steps that the cost model is fitted on, at most: more make it no better


@dataclass(frozen=True, eq=False)
class Stretches:
    """Residency rows of one replica as arrays (one entry a row), ordered by ``first``.

    ``first`` and ``last`` are positions in the timeline (inclusive; ``last`` is one less than ``first`` where no step
    of the row was seen); ``request`` is a code; ``tokens`` a step; ``context`` before the first step. Flags say what
    the request does there.
    """

    request: Ints
    first: Ints
    last: Ints
    tokens: Ints
    context: Ints
    prefill: Mask
    decode: Mask
    paused: Mask

    def __len__(self) -> int:
        return len(self.request)

    def take(self, rows: Ints) -> Stretches:
        return Stretches(*(column[rows] for column in vars(self).values()))

    @cached_property
    def resident(self) -> Mask:
        """Holds a slot and KV blocks."""
        return self.prefill | self.decode | self.paused

    @cached_property
    def by_last(self) -> Ints:
        """Rows ordered by ``last``."""
        return stable_order(self.last)

    def within(self, spans: Intervals) -> Ints:
        """Rows with a step in one of the spans of positions."""
        begun = int(np.searchsorted(self.first, spans.end[-1]))
        rows: Ints = np.flatnonzero(self.last[:begun] >= spans.begin[0])
        span = np.searchsorted(spans.end, self.first[rows], side="right")  # the first that is not over before the row
        return rows[spans.begin[span] <= self.last[rows]]


Lines = Callable[[Ints], tuple[Floats, Floats]]  # for rows: a value in the first step of each, and its rise a step


def stable_order(key: Ints) -> Ints:
    """The order that sorts integers from 0 to 2^31; equal ones stay as they are."""
    # Packed with their position they sort several times faster than by a stable argsort.
    packed = (np.asarray(key, dtype=np.int64) << 32) | np.arange(len(key))
    packed.sort()
    packed &= 0xFFFFFFFF
    return packed.astype(np.int32)


@dataclass(frozen=True, eq=False)
class Ledger:
    """Costs of one replica's steps, as running totals (n + 1) over them (ns).

    ``scale``, ``scaled_position`` and ``marginal`` add up the factor on the model's cost, that times the step's
    position, and the marginal cost of all. ``unknown``: slices of steps of which nobody is known, nobody's time.
    """

    timeline: Timeline
    stretches: Stretches
    model: CostModel
    scale: Floats
    scaled_position: Floats
    marginal: Floats
    unknown: Intervals

    @staticmethod
    def of(timeline: Timeline, stretches: Stretches, *, estimated: bool = False) -> Ledger:
        """Fits the cost model and adds up what each step cost; ``estimated``: nobody saw the batches of these steps."""
        n = len(timeline)
        spans = Intervals(np.zeros(1, dtype=np.int64), np.full(1, n))
        if n > FITTED_SPANS * FITTED_SPAN:
            begin = np.linspace(0, n - FITTED_SPAN, FITTED_SPANS).astype(np.int64)
            spans = Intervals(begin, begin + FITTED_SPAN)
        fitted = expand(spans.begin, spans.end)
        features = features_at(stretches.take(stretches.within(spans)), fitted)
        # A step whose batch is not fully known (after lost telemetry) would teach the model nonsense.
        taught = features[:, 1:].any(axis=1)
        duration = (timeline.end[fitted] - timeline.start[fitted]).astype(np.float64)
        features, duration = features[taught], duration[taught]
        model = fit_cost_model(*(typical_of_kind(features, duration) if estimated else (features, duration)))
        totals = scale, scaled_position, marginal = np.zeros(n + 1), np.zeros(n + 1), np.zeros(n + 1)
        nobody = [np.zeros(0, dtype=np.int64)]
        for low, cost, known in _sums(stretches, n, lambda rows: cost_lines(model, stretches, rows)):
            high = low + len(cost)
            duration = (timeline.end[low:high] - timeline.start[low:high]).astype(np.float64)
            predicted = model.coefficients[0] + cost
            factor = np.minimum(1.0, np.divide(duration, predicted, out=np.ones_like(duration), where=predicted > 0))
            # In a step of which nobody is known (after lost telemetry), nothing can be told from its duration.
            factor[~known] = 0.0
            nobody.append(np.flatnonzero(~known) + low)
            for total, per_step in zip(totals, (factor, factor * np.arange(low, high), factor * cost), strict=True):
                total[low : high + 1] = total[low] + running_total(per_step)
        lost = np.concatenate(nobody)
        unknown = Intervals(timeline.start[lost], timeline.end[lost])
        return Ledger(timeline, stretches, model, scale, scaled_position, marginal, unknown)

    def cost_lines(self, rows: Ints) -> tuple[Floats, Floats]:
        """Marginal cost, unscaled, of each of the rows in a step: level in its first step and rise a step."""
        return cost_lines(self.model, self.stretches, rows)

    def own_cost(self, stretch: Ints, begin: Ints, end: Ints) -> Floats:
        """Marginal cost of each given stretch's own request between two times (ns) within it."""
        return self.own_cost_between(stretch, self.timeline.locate(begin), self.timeline.locate(end))

    def own_cost_between(self, stretch: Ints, begin: Places, end: Places) -> Floats:
        """The same between two places."""
        steps = at(self.scale, end) - at(self.scale, begin)
        weighted = at(self.scaled_position, end) - at(self.scaled_position, begin)
        return self._own_cost(stretch, steps, weighted)

    def own_cost_of(self, stretch: Ints) -> Floats:
        """The same over all of it."""
        first, after = self.stretches.first[stretch], self.stretches.last[stretch] + 1
        steps = self.scale[after] - self.scale[first]
        return self._own_cost(stretch, steps, self.scaled_position[after] - self.scaled_position[first])

    def own_work(self) -> Floats:
        """What each stretch's own request cost over all of it, with the steps' fixed cost: its own work, if it ran."""
        rows = np.arange(len(self.stretches))
        work = np.zeros(len(rows))
        for low in range(0, len(rows), CHUNK):
            some = rows[low : low + CHUNK]
            steps = self.scale[self.stretches.last[some] + 1] - self.scale[self.stretches.first[some]]
            work[low : low + CHUNK] = self.model.coefficients[0] * steps + self.own_cost_of(some)
        return work

    def _own_cost(self, stretch: Ints, steps: Floats, weighted: Floats) -> Floats:
        level, rise = self.cost_lines(stretch)
        cost: Floats = np.maximum(level * steps + rise * (weighted - self.stretches.first[stretch] * steps), 0.0)
        return cost

    def fixed(self, begin: Places, end: Places) -> Floats:
        """What the steps between two places cost whatever is in them."""
        return self.model.coefficients[0] * (at(self.scale, end) - at(self.scale, begin))

    def step_cost(self, chosen: Mask) -> Floats:
        """Marginal cost of the chosen stretches in each step, ns."""
        cost: Floats = np.diff(self.scale) * self._per_step(self.cost_lines, chosen)
        return cost

    def kv_tokens(self, chosen: Mask | None = None) -> Floats:
        """Tokens that the chosen stretches, or all, hold in the KV cache in each step."""
        return self._per_step(self.kv_lines, chosen)

    def _per_step(self, lines: Lines, chosen: Mask | None) -> Floats:
        def of_chosen(rows: Ints) -> tuple[Floats, Floats]:
            level, rise = lines(rows)
            return (level, rise) if chosen is None else (level * chosen[rows], rise * chosen[rows])

        return np.concatenate([amount for _, amount, _ in self._sums(of_chosen)])

    @cached_property
    def most_slots(self) -> float:
        """The most slots that were ever in use."""
        return self._most(self.slot_lines)

    @cached_property
    def most_kv_tokens(self) -> float:
        """The most tokens that were ever in the KV cache."""
        return self._most(self.kv_lines)

    def slot_lines(self, rows: Ints) -> tuple[Floats, Floats]:
        """Slots that each of the rows holds."""
        return self.stretches.resident[rows].astype(np.float64), np.zeros(len(rows))

    def queue_lines(self, rows: Ints) -> tuple[Floats, Floats]:
        """Requests that wait in each of the rows, preempted ones included."""
        return (~self.stretches.resident[rows]).astype(np.float64), np.zeros(len(rows))

    def kv_lines(self, rows: Ints) -> tuple[Floats, Floats]:
        """Tokens that each of the rows holds in the KV cache, the step's own included."""
        s = self.stretches
        resident, tokens = s.resident[rows], s.tokens[rows].astype(np.float64)
        return resident * (s.context[rows] + tokens), resident * tokens

    def token_lines(self, rows: Ints) -> tuple[Floats, Floats]:
        """Tokens that each of the rows computes."""
        s = self.stretches
        tokens = np.where(s.prefill[rows] | s.decode[rows], s.tokens[rows], 0).astype(np.float64)
        return tokens, np.zeros(len(rows))

    def _most(self, lines: Lines) -> float:
        return max(float(amount.max()) for _, amount, _ in self._sums(lines))

    def _sums(self, lines: Lines) -> Iterator[tuple[int, Floats, Mask]]:
        return _sums(self.stretches, len(self.timeline), lines)


def cost_lines(model: CostModel, stretches: Stretches, rows: Ints) -> tuple[Floats, Floats]:
    """Marginal cost of each of the rows in a step by the model (ns): level in its first step and rise a step."""
    _, b1, b2, b3, b4 = model.coefficients
    prefill, decode = stretches.prefill[rows], stretches.decode[rows]
    tokens, context = stretches.tokens[rows].astype(np.float64), stretches.context[rows].astype(np.float64)
    level = np.where(prefill, b1 * tokens + b2 * tokens * (context + tokens / 2), decode * (b3 + b4 * context))
    rise = np.where(prefill, b2 * tokens**2, decode * (b4 * tokens))
    return level, rise


def features_at(stretches: Stretches, positions: Ints) -> Floats:
    """Features (m x 5, in the order of ``cost_model.FEATURES``) of the steps at these positions (ascending)."""
    s = stretches
    begun = np.searchsorted(s.first, positions, side="right")
    ended = np.searchsorted(s.last[s.by_last], positions)

    def total(amount: Floats, rise: Floats | None = None) -> Floats:
        if rise is not None:
            return np.maximum(total(amount - rise * s.first) + total(rise) * positions, 0.0)
        there: Floats = running_total(amount)[begun] - running_total(amount[s.by_last])[ended]
        return there

    tokens, context = s.tokens.astype(np.float64), s.context.astype(np.float64)
    return np.stack(
        [
            np.ones(len(positions)),
            total(s.prefill * tokens),
            total(s.prefill * tokens * (context + tokens / 2), s.prefill * tokens**2),
            total(s.decode.astype(np.float64)),
            total(s.decode * context, s.decode * tokens),
        ],
        axis=1,
    )


def _sums(stretches: Stretches, steps: int, lines: Lines) -> Iterator[tuple[int, Floats, Mask]]:
    """Chunk by chunk: position of its first step, and for each step the sum of ``lines`` over the rows that are there,
    and whether there are any."""
    s = stretches
    last = s.last[s.by_last]
    carried = np.zeros(3)  # at the first step of the chunk: sum, rise, rows
    for low in range(0, steps, CHUNK):
        size = min(CHUNK, steps - low)
        opened = np.arange(*np.searchsorted(s.first, (low, low + size)))
        closed = s.by_last[slice(*np.searchsorted(last, (low - 1, low + size - 1)))]
        change = np.zeros((3, size))
        for rows, where, sign in ((opened, s.first[opened], 1), (closed, s.last[closed] + 1, -1)):
            level, rise = lines(rows)
            constant = level - rise * (s.first[rows] - low)  # as of the chunk's first step
            values = (constant, rise, np.ones(len(rows)))
            change += sign * np.stack([np.bincount(where - low, value, size) for value in values])
        sums = carried[:, None] + np.cumsum(change, axis=1)
        carried = sums[:, -1] + (sums[1, -1] * size, 0.0, 0.0)
        yield low, np.maximum(sums[0] + sums[1] * np.arange(size), 0.0), sums[2] > 0


def read_stretches(
    timeline: Timeline,
    request: Ints,
    phase: pd.Series[str],
    first_step: Ints,
    last_step: Ints,
    tokens: Ints,
    context_start: Ints,
) -> Stretches:
    """Stretches of columns of the residency table (``request`` as codes), in their order."""
    first = timeline.steps_before(first_step)
    last = np.maximum(timeline.steps_before(last_step + 1), first) - 1
    prefill, decode, paused = ((phase == name).to_numpy(bool) for name in ("prefill", "decode", "paused"))
    return Stretches(
        request, narrow(first), narrow(last), narrow(tokens), narrow(context_start), prefill, decode, paused
    )
