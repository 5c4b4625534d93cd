"""What a batch takes, accurately enough to replay with: the additive model, corrected where a trace shows it wrong.

duration = additive * exp(f(tokens) + g(attention) + h(decode context))

The additive model can't bend, and hardware does: weights are read once whatever the batch, tiles are filled or not.
The three corrections are tables over binned features, fitted in turns as medians of what the others leave (backfitting
of an additive model, in the logarithm: Hastie and Tibshirani, Statistical Science 1(3), 1986), shrunk where few steps
are behind them. Medians, so that stalls do not bend them; tables, so that a replay pays for three look-ups a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, log

import numpy as np

from stallscope.diagnosis.cost_model import CostModel, fit_cost_model
from stallscope.diagnosis.timeline import Floats, Ints

_TOKENS_A_BIN = 8  # divides the tiles of all known kernels
_LINEAR_BINS = 128
_LINEAR_TOKENS = _TOKENS_A_BIN * _LINEAR_BINS  # beyond, bins grow with the number
_TOKEN_RATIO, _CONTEXT_RATIO = log(1.1), log(1.3)
_BINS = 256  # a table's size: more than any batch can reach
_ROUNDS = 4
_SHRINK = 3.0  # steps that a bin needs behind it before its correction counts more than half
_MOST_CORRECTION = log(20.0)
_FOLD_STEPS = 50  # neighbours share their noise: they are held out together


@dataclass(frozen=True, slots=True, eq=False)
class StepCost:
    """Duration of steps from dispatch to outputs, of one replica. ``largest``: the most of each feature that it saw.

    ``error``: median relative error, noise included, on steps that it was not fitted on.
    """

    additive: CostModel
    by_tokens: list[float]
    by_attention: list[float]
    by_context: list[float]
    largest: tuple[float, ...]
    error: float

    def duration_ns(self, prefill_tokens: int, attention: float, decodes: int, context: int) -> float:
        """Duration in ns of one step, features as in ``cost_model.FEATURES`` without the fixed one."""
        b0, b1, b2, b3, b4 = self.additive.coefficients
        tokens = prefill_tokens + decodes
        if tokens < _LINEAR_TOKENS:
            token_bin = tokens // _TOKENS_A_BIN
        else:
            token_bin = min(_LINEAR_BINS + int(log(tokens / _LINEAR_TOKENS) / _TOKEN_RATIO), _BINS - 1)
        return (b0 + b1 * prefill_tokens + b2 * attention + b3 * decodes + b4 * context) * exp(
            self.by_tokens[token_bin]
            + self.by_attention[min(int(log(1.0 + attention + context) / _CONTEXT_RATIO), _BINS - 1)]
            + self.by_context[min(int(log(1.0 + context) / _CONTEXT_RATIO), _BINS - 1)]
        )

    def predict(self, features: Floats) -> Floats:
        """Durations in ns of steps with ``features`` (n x 5)."""
        tables = (self.by_tokens, self.by_attention, self.by_context)
        correction = sum(np.asarray(table)[each] for table, each in zip(tables, _bins(features), strict=True))
        predicted: Floats = self.additive.predict(features) * np.exp(correction)
        return predicted

    def beyond(self, prefill_tokens: int, attention: float, decodes: int, context: int) -> bool:
        """Whether a step is larger, by a tenth, than any that was seen."""
        _, p, a, d, c = self.largest
        return prefill_tokens > 1.1 * p or attention > 1.1 * a or decodes > 1.1 * d or context > 1.1 * c


def fit_step_cost(features: Floats, duration_ns: Floats) -> StepCost:
    """Fits on steps with ``features`` (n x 5, in the order of ``cost_model.FEATURES``) and durations (n, ns).

    Raises ValueError where no step took any time.
    """
    used = duration_ns > 0
    x, y = features[used], duration_ns[used]
    if not len(y):
        raise ValueError("no step took any time")
    held_out = (np.arange(len(y)) // _FOLD_STEPS) % 2 == 0
    error = 0.0
    if held_out.any() and not held_out.all():
        judged = _fit(x[~held_out], y[~held_out], 0.0)
        error = float(np.median(np.abs(judged.predict(x[held_out]) / y[held_out] - 1.0)))
    return _fit(x, y, error)


def _fit(x: Floats, y: Floats, error: float) -> StepCost:
    additive = fit_cost_model(x, y)
    rest = np.log(y / np.maximum(additive.predict(x), 1.0))
    bins = _bins(x)
    tables = [np.zeros(_BINS) for _ in bins]
    fitted = np.zeros(len(y))
    for _ in range(_ROUNDS):
        for table, each in zip(tables, bins, strict=True):
            others = fitted - table[each]
            table[:] = _shrunk_medians(each, rest - others)
            fitted = others + table[each]
    by_tokens, by_attention, by_context = (np.clip(t, -_MOST_CORRECTION, _MOST_CORRECTION).tolist() for t in tables)
    return StepCost(additive, by_tokens, by_attention, by_context, tuple(x.max(axis=0).tolist()), error)


def _bins(features: Floats) -> tuple[Ints, Ints, Ints]:
    """Which entry of each table a step takes: by tokens, by attention, by decode context."""
    prefill, attention, decodes, context = features[:, 1:].T
    tokens = prefill + decodes
    beyond = np.log(np.maximum(tokens, _LINEAR_TOKENS) / _LINEAR_TOKENS) / _TOKEN_RATIO
    by_tokens = np.where(tokens < _LINEAR_TOKENS, tokens // _TOKENS_A_BIN, _LINEAR_BINS + beyond.astype(np.int64))
    return (
        np.minimum(by_tokens, _BINS - 1).astype(np.int64),
        np.minimum(np.log(1.0 + attention + context) / _CONTEXT_RATIO, _BINS - 1).astype(np.int64),
        np.minimum(np.log(1.0 + context) / _CONTEXT_RATIO, _BINS - 1).astype(np.int64),
    )


def _shrunk_medians(group: Ints, values: Floats) -> Floats:
    """Median of the values of each of ``_BINS`` groups, drawn towards 0 where there are few."""
    order = np.lexsort((values, group))
    present, first, count = np.unique(group[order], return_index=True, return_counts=True)
    medians = np.zeros(_BINS)
    medians[present] = values[order][first + count // 2] * count / (count + _SHRINK)
    return medians
