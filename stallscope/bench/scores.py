"""How right the answers are: every score with a 95% interval, by what runs have shown and not by what was meant."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from stallscope.bench.answers import Answer, Predicted
from stallscope.bench.paired import FEWEST_REQUESTS, METRICS
from stallscope.bench.truth import Truth

_Z = 1.96
_RESAMPLES = 1000
_ENGINE, _WORKLOAD = "engine_stall", ("noisy_neighbor", "self_inflicted", "overload")


@dataclass(frozen=True, slots=True)
class Judged:
    """One case, what was right about it and what was said. ``rivals``: whom each rule of thumb names.

    ``calibration``: error of the predicted change of the worst victim's percentile, relative to the recorded one; None
    where nothing was predicted that truth knows.
    """

    case: str
    truth: Truth
    answer: Answer
    rivals: dict[str, str]
    calibration: float | None = None

    @property
    def verdict_is_right(self) -> bool:
        return self.answer.verdict in self.truth.verdicts

    @property
    def must_name(self) -> bool:
        """Whether there is a culprit to name, and telemetry enough to be held to it."""
        refuses = self.answer.verdict == "insufficient_data" and self.verdict_is_right
        return self.truth.is_scored and bool(self.truth.culprits) and not refuses

    @property
    def names_a_culprit_first(self) -> bool:
        return self.answer.culprits[:1] != () and self.answer.culprits[0] in self.truth.culprits

    @property
    def falsely_accused(self) -> tuple[str, ...]:
        fair = {*self.truth.culprits, *self.truth.excused}
        return tuple(name for name in self.answer.accused if name not in fair)

    @property
    def set_f1(self) -> float:
        named, right = set(self.answer.culprits) - set(self.truth.excused), set(self.truth.culprits)
        return 2 * len(named & right) / max(len(named) + len(right), 1)

    @property
    def mechanism_is_right(self) -> bool:
        return self.answer.mechanism in self.truth.mechanisms

    @property
    def fails(self) -> bool:
        wrong_name = self.must_name and not self.names_a_culprit_first
        return bool(self.falsely_accused) or wrong_name or (self.truth.is_scored and not self.verdict_is_right)


@dataclass(frozen=True, slots=True)
class Score:
    """A figure over ``runs`` runs and its 95% interval; NaN of none. ``goal`` is the bound it must reach, if any."""

    name: str
    value: float
    low: float
    high: float
    runs: int
    goal: float | None = None
    at_most: bool = False  # the goal is an upper bound


def score_all(judged: Sequence[Judged]) -> list[Score]:
    """All scores but those by family and of rivals (``p_at_1``)."""
    scored = [one for one in judged if one.truth.is_scored]
    named = [one for one in judged if one.must_name]
    doubled, milder = split_by_harm(judged)
    errors = [one.calibration for one in judged if one.calibration is not None]
    innocent = [one for one in judged if not one.truth.culprits]
    guilty = [one for one in judged if one.truth.culprits]
    explained = [one for one in scored if one.truth.mechanisms and (one.must_name or not one.truth.culprits)]
    return [
        proportion("right verdict", (one.verdict_is_right for one in scored), 0.97),
        proportion("  with all telemetry", (one.verdict_is_right for one in scored if one.truth.telemetry_is_whole)),
        proportion("culprit first, harm at least doubled", (one.names_a_culprit_first for one in doubled), 0.99),
        proportion("culprit first, less", (one.names_a_culprit_first for one in milder), 0.95),
        proportion("accusations that are right", (not one.falsely_accused for one in judged if one.answer.accused)),
        proportion("names nobody where there is a culprit", (not one.answer.culprits for one in named)),
        resampled("set of culprits, F1", [one.set_f1 for one in named], _mean),
        proportion("mechanism", (one.mechanism_is_right for one in explained), 0.95),
        proportion("request", (one.answer.request in one.truth.requests for one in named)),
        proportion("false accusation, no culprit", (bool(one.falsely_accused) for one in innocent), 0.01, at_most=True),
        proportion("false accusation, bystander", (bool(one.falsely_accused) for one in guilty), 0.01, at_most=True),
        resampled("calibration error, median", errors, lambda values: float(np.median(values)), 0.10, at_most=True),
        resampled("calibration error, p90", errors, lambda values: float(np.quantile(values, 0.9)), 0.25, at_most=True),
        _workload_or_engine(scored),
    ]


def score_families(judged: Sequence[Judged]) -> dict[str, Score]:
    """Right verdicts by family, over the runs that have one."""
    names = sorted({one.truth.family for one in judged})
    scored = {name: [one for one in judged if one.truth.family == name and one.truth.is_scored] for name in names}
    return {name: proportion(name, (one.verdict_is_right for one in runs), 0.9) for name, runs in scored.items()}


def split_by_harm(judged: Iterable[Judged]) -> tuple[list[Judged], list[Judged]]:
    """Runs with a culprit to name: those whose victims' percentile at least doubled, and the rest."""
    named = [one for one in judged if one.must_name and one.truth.harm is not None]
    doubles = [one.truth.harm is not None and one.truth.harm.doubles for one in named]
    return (
        [one for one, double in zip(named, doubles, strict=True) if double],
        [one for one, double in zip(named, doubles, strict=True) if not double],
    )


def score_rival(rule: str, judged: Sequence[Judged]) -> Score:
    """How often a rule names a culprit, of the runs for which it was asked."""
    asked = [one for one in judged if rule in one.rivals]
    return proportion(rule, (one.rivals[rule] in one.truth.culprits for one in asked))


def calibration_error(truth: Truth, pairs: pd.DataFrame, answer: Answer) -> float | None:
    """Of the prediction for the worst victim if the culprits, and nobody else, had been as usual."""
    known = [
        (recorded_s - without_s, abs((one.recorded_s - one.predicted_s) - (recorded_s - without_s)) / one.recorded_s)
        for one in answer.predictions
        if set(one.changed) == set(truth.culprits) and one.tenant not in truth.culprits and one.recorded_s > 0
        for recorded_s, without_s in _true_percentiles(pairs, one)
    ]
    return max(known)[1] if known and truth.is_harmful else None


def _true_percentiles(pairs: pd.DataFrame, predicted: Predicted) -> list[tuple[float, float]]:
    """With the cause and without it, over the same requests; none where they are too few to tell."""
    inside = pairs["arrival_s"].between(predicted.from_s, predicted.to_s)
    chosen = pairs[inside & (pairs["tenant"] == predicted.tenant)]
    if len(chosen) < FEWEST_REQUESTS or predicted.metric not in METRICS:
        return []
    both = [chosen[name] for name in (predicted.metric, f"{predicted.metric}_without")]
    with_s, without_s = (float(np.quantile(values, predicted.quantile, method="higher")) for values in both)
    return [(with_s, without_s)]


# --- intervals ----------------------------------------------------------------------------------------------------


def proportion(name: str, hits: Iterable[bool], goal: float | None = None, *, at_most: bool = False) -> Score:
    """A share with Wilson's interval (JASA 22(158), 1927)."""
    values = list(hits)
    n = len(values)
    if not n:
        return Score(name, math.nan, math.nan, math.nan, 0, goal, at_most)
    share = sum(values) / n
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    return Score(name, share, max(0.0, middle - half), min(1.0, middle + half), n, goal, at_most)


def resampled(
    name: str,
    values: Sequence[float] | Sequence[tuple[float, float]],
    figure: Callable[[np.ndarray], float],
    goal: float | None = None,
    *,
    at_most: bool = False,
) -> Score:
    """A figure of ``values`` (one or several columns, a row a run) with a bootstrap interval; the same every time."""
    sample = np.asarray(values, np.float64)
    n = len(sample)
    value = figure(sample) if n else math.nan
    if math.isnan(value):
        return Score(name, math.nan, math.nan, math.nan, n, goal, at_most)
    rows = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    low, high = np.nanquantile([figure(sample[chosen]) for chosen in rows], (0.025, 0.975))
    return Score(name, value, float(low), float(high), n, goal, at_most)


def _mean(values: np.ndarray) -> float:
    return float(values.mean())


def _workload_or_engine(scored: Sequence[Judged]) -> Score:
    """F1 of telling the engine's fault from the workload's, over runs that are one of the two."""
    told = [
        (float(one.truth.verdicts[0] == _ENGINE), float(one.answer.verdict == _ENGINE))
        for one in scored
        if one.truth.verdicts[0] in (_ENGINE, *_WORKLOAD) and one.truth.is_harmful
    ]

    def f1(rows: np.ndarray) -> float:
        both, either = float(rows.min(axis=1).sum()), float(rows.sum())
        return 2 * both / either if either else math.nan

    return resampled("workload or engine, F1", told, f1, 0.99)
