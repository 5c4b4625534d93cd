"""Who held what in each step: running totals by holder over time, from which any stretch's charges can be read off.

A holder is a group of requests: a tenant, or a single request under suspicion. Per holder there are a few cumulative
functions of time (``Timeline.knots``): accumulated once over all steps, then evaluated only where a victim's segment
begins or ends, so the work is O(holders * steps + segments), never victims times steps.

In each slice, the model's cost is scaled down where the step was faster than predicted; where it was slower, the rest
is unexplained. So: duration = fixed + sum of marginal costs + unexplained, none of them negative.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stallscope.diagnosis.cost_model import fit_cost_model
from stallscope.diagnosis.timeline import Floats, Ints, Timeline


@dataclass(frozen=True, eq=False)
class Stretches:
    """Residency rows of one replica as arrays (one entry a row).

    ``first`` and ``last`` are positions in the timeline (inclusive), ``first_step`` the step number; ``request`` and
    ``tenant`` are codes; ``tokens`` a step; ``context`` before the first step. Flags say what the request does there.
    """

    request: Ints
    tenant: Ints
    first: Ints
    last: Ints
    first_step: Ints
    tokens: Ints
    context: Ints
    prefill: NDArray[np.bool_]
    decode: NDArray[np.bool_]
    paused: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.request)

    @cached_property
    def resident(self) -> NDArray[np.bool_]:
        """Holds a slot and KV blocks."""
        return self.prefill | self.decode | self.paused


class StepSums:
    """Sums over the stretches active in each step of values that are linear in the step number."""

    def __init__(self, stretches: Stretches, steps: Ints) -> None:
        self._stretches = stretches
        self._steps = steps.astype(np.float64)

    def total(self, chosen: NDArray[np.bool_] | Ints, level: Floats, slope: Floats | None = None) -> Floats:
        """Per step: sum over chosen stretches of ``level + slope * (step - first_step)``; arrays as long as chosen."""
        s = self._stretches
        first, last, first_step = s.first[chosen], s.last[chosen], s.first_step[chosen]
        if slope is None:
            return self._spread(first, last, level)
        constant = level - slope * first_step
        return np.maximum(self._spread(first, last, constant) + self._spread(first, last, slope) * self._steps, 0.0)

    def _spread(self, first: Ints, last: Ints, value: Floats) -> Floats:
        n = len(self._steps)
        change = np.bincount(first, value, n + 1) - np.bincount(last + 1, value, n + 1)
        # Where nothing was chosen, bincount gives integers.
        return np.cumsum(change.astype(np.float64))[:n]


class Ledger:
    """Costs of one replica's steps and the cumulative functions that charges are read from (all in ns)."""

    def __init__(self, timeline: Timeline, stretches: Stretches) -> None:
        self.timeline = timeline
        self.stretches = stretches
        self._sums = StepSums(stretches, timeline.step)
        features = self._features()
        self.features = features
        # A step whose batch is not fully known (after lost telemetry) would teach the model nonsense.
        self.known = features[:, 1:].any(axis=1)
        self.model = fit_cost_model(features[self.known], timeline.duration.astype(np.float64)[self.known])
        predicted = self.model.predict(features)
        duration = timeline.duration.astype(np.float64)
        self._scale = np.minimum(1.0, np.divide(duration, predicted, out=np.ones_like(duration), where=predicted > 0))
        # In a step of which nobody is known (after lost telemetry), nothing can be told from its duration.
        known = self._sums.total(np.arange(len(stretches)), np.ones(len(stretches))) > 0
        fixed = np.where(known, self._scale * self.model.coefficients[0], 0.0)
        self._marginal = np.where(known, np.maximum(self._scale * predicted - fixed, 0.0), 0.0)
        unexplained = np.where(known, np.maximum(duration - fixed - self._marginal, 0.0), 0.0)
        self.predicted = predicted
        self.fixed = timeline.over_slices(fixed)
        self.marginal = timeline.over_slices(self._marginal)
        self.unexplained = timeline.over_slices(unexplained)
        self.unobserved = timeline.unobserved + timeline.over_slices(np.where(known, 0.0, duration))
        self.unexplained_per_step = unexplained
        self._scale_sum = timeline.over_slices(self._scale)
        self._scaled_step_sum = timeline.over_slices(self._scale * (timeline.step - timeline.step[0]))

    def _features(self) -> Floats:
        """Step features (n x 5) in the order of ``cost_model.FEATURES``."""
        s = self.stretches
        tokens, context = s.tokens.astype(np.float64), s.context.astype(np.float64)
        p, d = s.prefill, s.decode
        return np.stack(
            [
                np.ones(len(self.timeline)),
                self._sums.total(p, tokens[p]),
                self._sums.total(p, tokens[p] * (context[p] + tokens[p] / 2), tokens[p] ** 2),
                self._sums.total(d, np.ones(d.sum())),
                self._sums.total(d, context[d], tokens[d]),
            ],
            axis=1,
        )

    def _cost_lines(self) -> tuple[Floats, Floats]:
        """Each stretch's marginal cost in a step, unscaled, as level at its first step and slope a step."""
        s = self.stretches
        _, b1, b2, b3, b4 = self.model.coefficients
        tokens, context = s.tokens.astype(np.float64), s.context.astype(np.float64)
        level = np.where(s.prefill, b1 * tokens + b2 * tokens * (context + tokens / 2), b3 + b4 * context)
        slope = np.where(s.prefill, b2 * tokens**2, b4 * tokens)
        active = s.prefill | s.decode
        return np.where(active, level, 0.0), np.where(active, slope, 0.0)

    @cached_property
    def cost_lines(self) -> tuple[Floats, Floats]:
        return self._cost_lines()

    def own_cost(self, stretch: Ints, begin: Ints, end: Ints) -> Floats:
        """Marginal cost of each given stretch's own request between two times within it."""
        level, slope = self.cost_lines
        s = self.stretches
        at = self.timeline.at
        steps = at(self._scale_sum, end) - at(self._scale_sum, begin)
        weighted = at(self._scaled_step_sum, end) - at(self._scaled_step_sum, begin)
        first = (s.first_step[stretch] - self.timeline.step[0]).astype(np.float64)
        cost: Floats = np.maximum(level[stretch] * steps + slope[stretch] * (weighted - first * steps), 0.0)
        return cost

    def step_cost(self, chosen: NDArray[np.bool_]) -> Floats:
        """Marginal cost of the chosen stretches in each step, ns."""
        level, slope = self.cost_lines
        return self._scale * self._sums.total(chosen, level[chosen], slope[chosen])

    def holder(self, members: NDArray[np.bool_]) -> Holder:
        """The cumulative functions of the group of stretches ``members``."""
        return Holder(self, members)

    # --- totals that shares are taken of --------------------------------------------------------------------

    def tokens(self, chosen: NDArray[np.bool_]) -> Floats:
        return self._sums.total(chosen, self.stretches.tokens[chosen].astype(np.float64))

    def kv_tokens(self, chosen: NDArray[np.bool_]) -> Floats:
        """Tokens that the chosen stretches hold in the KV cache, the step's own included."""
        s = self.stretches
        held = (s.context + s.tokens)[chosen].astype(np.float64)
        return self._sums.total(chosen, held, s.tokens[chosen].astype(np.float64))

    def slots(self, chosen: NDArray[np.bool_]) -> Floats:
        return self._sums.total(chosen, np.ones(int(chosen.sum())))

    @cached_property
    def all_tokens(self) -> Floats:
        return self.tokens(self.stretches.prefill | self.stretches.decode)

    @cached_property
    def all_kv_tokens(self) -> Floats:
        return self.kv_tokens(self.stretches.resident)

    @cached_property
    def all_slots(self) -> Floats:
        return self.slots(self.stretches.resident)

    def share_of_marginal(self, amount: Floats, of: Floats) -> Floats:
        """Cumulative function: each slice's marginal cost, times a holder's share in a resource."""
        share = np.divide(amount, of, out=np.zeros_like(amount), where=of > 0)
        return self.timeline.over_slices(self._marginal * np.minimum(share, 1.0))


@dataclass(frozen=True, eq=False)
class Holder:
    """One group's part of each slice, as cumulative functions at ``Timeline.knots`` (ns)."""

    ledger: Ledger
    members: NDArray[np.bool_]

    @cached_property
    def prefill(self) -> Floats:
        """Marginal cost of its prefills."""
        chosen = self.members & self.ledger.stretches.prefill
        return self.ledger.timeline.over_slices(self.ledger.step_cost(chosen))

    @cached_property
    def decode(self) -> Floats:
        """Marginal cost of its decodes."""
        chosen = self.members & self.ledger.stretches.decode
        return self.ledger.timeline.over_slices(self.ledger.step_cost(chosen))

    @cached_property
    def budget(self) -> Floats:
        """Marginal cost of all, by its share of the step's tokens."""
        s = self.ledger.stretches
        amount = self.ledger.tokens(self.members & (s.prefill | s.decode))
        return self.ledger.share_of_marginal(amount, self.ledger.all_tokens)

    @cached_property
    def kv(self) -> Floats:
        """Marginal cost of all, by its share of the KV cache."""
        amount = self.ledger.kv_tokens(self.members & self.ledger.stretches.resident)
        return self.ledger.share_of_marginal(amount, self.ledger.all_kv_tokens)

    @cached_property
    def slots(self) -> Floats:
        """Marginal cost of all, by its share of the slots."""
        amount = self.ledger.slots(self.members & self.ledger.stretches.resident)
        return self.ledger.share_of_marginal(amount, self.ledger.all_slots)

    def head(self, is_head: NDArray[np.bool_]) -> Floats:
        """Marginal cost of all in the steps (n booleans) in which it stands at the head of the queue."""
        ledger = self.ledger
        return ledger.share_of_marginal(is_head.astype(np.float64), np.ones(len(is_head)))


def read_stretches(residency: pd.DataFrame, timeline: Timeline) -> Stretches:
    """Arrays of one replica's residency rows; ``request`` and ``tenant`` columns must be integer codes."""
    phase = residency["phase"].astype(str).to_numpy()
    first_step = residency["first_step"].to_numpy(np.int64)
    return Stretches(
        residency["request"].to_numpy(np.int64),
        residency["tenant"].to_numpy(np.int64),
        timeline.position(first_step),
        timeline.position(residency["last_step"].to_numpy(np.int64)),
        first_step,
        residency["tokens"].fillna(0).to_numpy(np.int64),
        residency["context_start"].fillna(0).to_numpy(np.int64),
        phase == "prefill",
        phase == "decode",
        phase == "paused",
    )
