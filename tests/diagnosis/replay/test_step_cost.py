"""What a step costs: close to what it really costs, not bent by stalls, the same in a loop as in columns."""

from __future__ import annotations

import numpy as np
import pytest

from stallscope.diagnosis.ledger import features_at
from stallscope.diagnosis.replay.step_cost import fit_step_cost
from stallscope.diagnosis.timeline import Floats
from stallscope_engine.executors.virtual import PROFILES
from tests.diagnosis.replay.recorded import CHAT, FLOOD, only_replica, recorded


def steps_of(text: str, seed: int) -> tuple[Floats, Floats]:
    replica = only_replica(recorded(text, seed=seed))
    features = features_at(replica.ledger.stretches, np.arange(len(replica.timeline)))
    return features, replica.timeline.duration.astype(np.float64)


def noiseless(features: Floats) -> Floats:
    """What the virtual engine's steps cost without their noise (``StepCost.step_ns``)."""
    cost = PROFILES["cpu-tiny"]
    _, prefill, attention, decodes, context = features.T
    tokens, pairs = prefill + decodes, attention + context + decodes
    compute = np.ceil(tokens / cost.tile_tokens) * cost.tile_tokens * cost.token_ns + pairs * cost.pair_ns
    memory = cost.weights_ns + (context + tokens) * cost.kv_token_ns
    total: Floats = np.maximum(compute, memory) + cost.launch_ns
    return total


def test_steps_of_another_run_cost_what_they_really_cost_within_3_percent_on_average() -> None:
    features, duration = steps_of(CHAT + FLOOD, 0)
    cost = fit_step_cost(features, duration)
    unseen, _ = steps_of(CHAT + FLOOD, 1)
    assert np.abs(cost.predict(unseen) / noiseless(unseen) - 1.0).mean() < 0.03


def test_a_tenth_of_the_steps_stalled_bends_nothing() -> None:
    features, duration = steps_of(CHAT + FLOOD, 0)
    sound = fit_step_cost(features, duration)
    stalled = duration.copy()
    stalled[::10] += 500_000_000
    bent = fit_step_cost(features, stalled)
    assert np.median(np.abs(bent.predict(features) / sound.predict(features) - 1.0)) < 0.02


def test_a_step_alone_costs_what_it_costs_among_many() -> None:
    features, duration = steps_of(CHAT + FLOOD, 0)
    cost = fit_step_cost(features, duration)
    rows = features[:: max(len(features) // 200, 1)]
    alone = [cost.duration_ns(int(p), float(a), int(d), int(c)) for _, p, a, d, c in rows.tolist()]
    assert np.allclose(alone, cost.predict(rows))


def test_what_is_larger_than_anything_seen_is_said_to_be() -> None:
    features, duration = steps_of(CHAT, 0)
    cost = fit_step_cost(features, duration)
    _, prefill, attention, decodes, context = (int(value) for value in cost.largest)
    assert not cost.beyond(prefill, attention, decodes, context)
    assert cost.beyond(2 * prefill + 1, attention, decodes, context)


def test_steps_that_took_no_time_teach_nothing() -> None:
    with pytest.raises(ValueError, match="no step took any time"):
        fit_step_cost(np.ones((3, 5)), np.zeros(3))
