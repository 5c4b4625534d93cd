"""What a step should cost: an additive model, fitted on the trace itself, that lets a step be shared out.

duration = b0 + b1 prefill tokens + b2 sum(chunk * context) + b3 decode requests + b4 sum(decode context)

Additive so that each request's marginal cost is its own; accuracy for replay comes elsewhere (``replay.step_cost``).
Coefficients are not negative. The fit minimises the error relative to the measured duration, which bounds what one
stalled step can weigh, and then again without the steps that took far longer than the model says (iterated Huber
weights). A trace has a hundred small decode steps for each large prefill, and stalls are made of the latter: steps
weigh less the more of their like there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FEATURES = ("fixed", "prefill_tokens", "prefill_attention", "decode_requests", "decode_context")
_HUBER = 0.1  # relative error up to which a step counts in full
_ROUNDS = 8


@dataclass(frozen=True)
class CostModel:
    """Coefficients in ns per unit of ``FEATURES``; ``error``: median relative error on the steps it was fitted on."""

    coefficients: tuple[float, float, float, float, float]
    error: float
    steps: int

    def predict(self, features: Floats) -> Floats:
        """Duration in ns of steps with ``features`` (n x 5)."""
        duration: Floats = features @ np.asarray(self.coefficients)
        return duration


def fit_cost_model(features: Floats, duration_ns: Floats, weight: Floats | None = None) -> CostModel:
    """Fits the coefficients on ``features`` (n x 5, in the order of ``FEATURES``) and durations (n, ns).

    ``weight`` of each step (n) in place of how rare its like is.
    """
    used = duration_ns > 0
    x, y = features[used], duration_ns[used]
    if not len(y):
        return CostModel((0.0, 0.0, 0.0, 0.0, 0.0), 0.0, 0)
    relative = x / y[:, None]
    # Columns differ by ten orders of magnitude: scale them, or the solver's tolerance swallows the small ones.
    scale = np.sqrt((relative**2).sum(axis=0))
    scale[scale == 0] = 1.0
    scaled = relative / scale
    importance = _rarity(x) if weight is None else weight[used]
    trust: Floats = np.ones(len(y))
    solution = np.zeros(x.shape[1])
    for _ in range(_ROUNDS):
        solution = _least_squares_not_negative(scaled, importance * trust)
        residual = np.abs(1.0 - scaled @ solution)
        trust = np.minimum(1.0, _HUBER / np.maximum(residual, 1e-12))
    b0, b1, b2, b3, b4 = (float(value) for value in solution / scale)
    error = float(np.median(np.abs(1.0 - scaled @ solution)))
    return CostModel((b0, b1, b2, b3, b4), error, len(y))


def typical_of_kind(features: Floats, duration_ns: Floats) -> tuple[Floats, Floats, Floats]:
    """Of each kind of step one (k x 5, k, k): mean features, the median of how long it took, and of all that time its
    share.

    For steps whose times and batches are estimates: then it takes many of a kind to tell how long one takes, and of the
    few large prefills, on which all depends, none may be left out as an outlier.
    """
    group, count = _kinds(features)
    means = np.stack([np.bincount(group, column) / count for column in features.T], axis=1)
    order = np.lexsort((duration_ns, group))
    middle = np.cumsum(count) - count + count // 2
    typical = duration_ns[order[middle]]
    return means, typical, typical * count / max(float(typical @ count), 1.0)


def _rarity(features: Floats) -> Floats:
    """Weights of steps: the root of how rare their like is; 1 on average."""
    group, count = _kinds(features)
    weight: Floats = count.astype(np.float64)[group] ** -0.5
    weight /= weight.mean()
    return weight


def _kinds(features: Floats) -> tuple[Ints, Ints]:
    """Of each step its kind, by powers of two of each feature, and how many there are of each."""
    magnitude = np.log2(1.0 + features[:, 1:]).astype(np.int64)
    key = magnitude @ (64 ** np.arange(magnitude.shape[1]))
    _, group, count = np.unique(key, return_inverse=True, return_counts=True)
    return group, count


def _least_squares_not_negative(x: Floats, weight: Floats) -> Floats:
    """Coefficients, none negative, that minimise ``sum(weight * (x @ c - 1)^2)``.

    The optimum is an unconstrained one on the coefficients that are not zero; with five there are 31 such sets to try,
    which is exact, and spares every start of the command line the import of an optimiser.
    """
    root = np.sqrt(weight)
    q, r = np.linalg.qr(x * root[:, None])
    target = q.T @ root
    best, least = np.zeros(x.shape[1]), float(target @ target)
    for size in range(1, x.shape[1] + 1):
        for chosen in combinations(range(x.shape[1]), size):
            columns = list(chosen)
            part = np.linalg.lstsq(r[:, columns], target, rcond=None)[0]
            if (part < 0).any():
                continue
            error = float(((r[:, columns] @ part - target) ** 2).sum())
            if error < least:
                best, least = np.zeros(x.shape[1]), error
                best[columns] = part
    return best
