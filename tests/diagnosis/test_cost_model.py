"""The additive step cost model: it finds known costs, and a stall does not bend it."""

import numpy as np
import pytest

from stallscope.diagnosis.cost_model import fit_cost_model

TRUE = np.array([2e6, 8e3, 0.5, 9e4, 12.0])


def some_steps(count: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    prefill = np.where(rng.random(count) < 0.2, rng.integers(50, 2000, count), 0)
    decodes = rng.integers(1, 32, count)
    return np.stack(
        [
            np.ones(count),
            prefill,
            prefill * rng.integers(50, 5000, count),
            decodes,
            decodes * rng.integers(50, 800, count),
        ],
        axis=1,
    ).astype(float)


def test_known_costs_are_found() -> None:
    features = some_steps(2000, 1)
    model = fit_cost_model(features, features @ TRUE)
    assert np.allclose(model.coefficients, TRUE, rtol=1e-3)
    assert model.error < 1e-4


def test_stalled_steps_do_not_bend_the_fit() -> None:
    features = some_steps(2000, 2)
    rng = np.random.default_rng(3)
    duration = features @ TRUE * rng.lognormal(0, 0.02, 2000)
    stalled = rng.choice(2000, 60, replace=False)
    duration[stalled] += 2e9
    model = fit_cost_model(features, duration)
    healthy = np.setdiff1d(np.arange(2000), stalled)
    error = np.abs(model.predict(features)[healthy] / (features[healthy] @ TRUE) - 1)
    assert error.mean() < 0.02


def test_a_single_huge_prefill_is_explained_by_its_size() -> None:
    """The culprit's step is one of thousands: its cost must still be the model's, not an unexplained rest."""
    features = some_steps(3000, 4)
    features[:, 2] = features[:, 1] * 100
    features[1500] = [1, 15_000, 15_000 * 7_500, 5, 2000]
    duration = features @ TRUE
    model = fit_cost_model(features, duration)
    assert model.predict(features)[1500] == pytest.approx(duration[1500], rel=0.05)


def test_no_coefficient_is_negative_and_nothing_is_needed() -> None:
    rng = np.random.default_rng(5)
    model = fit_cost_model(some_steps(300, 5), rng.lognormal(15, 1, 300))
    assert min(model.coefficients) >= 0
    empty = fit_cost_model(np.zeros((0, 5)), np.zeros(0))
    assert empty.steps == 0
    assert empty.predict(np.ones((1, 5))).tolist() == [0.0]
