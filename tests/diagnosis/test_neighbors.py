"""Whom a change hurt: named where it moved somebody else's percentile, and only who did."""

from __future__ import annotations

from pathlib import Path

import pytest

import stallscope.bench
from stallscope.bench.cache import make
from stallscope.bench.cases import make_case
from stallscope.diagnosis import Diagnosis, Verdict, diagnose
from stallscope.diagnosis.incidents import find_episodes, find_windows, measure_waits
from stallscope.diagnosis.model import Confidence
from stallscope.trace import read_trace
from tests.diagnosis.replay.recorded import PLAIN, only_replica, recorded

USUAL = """
name: usual
duration_s: 80
engine: {ENGINE}
tenants:
  chat: {arrivals: {poisson_per_s: 6}, prompt_tokens: {uniform: [40, 400]}, output_tokens: {uniform: [20, 80]}}
  search: {arrivals: {poisson_per_s: 2}, prompt_tokens: {uniform: [400, 900]}, output_tokens: {uniform: [5, 15]}}
  idle: {arrivals: {poisson_per_s: 1}, prompt_tokens: {uniform: [10, 20]}, output_tokens: {uniform: [2, 4]}}
"""
SCENARIOS = Path(stallscope.bench.__file__).parent / "scenarios"
PROMPTS = "{tenant: batch, from_s: 30, to_s: 55, poisson_per_s: 0.7, prompt_tokens: 6000, output_tokens: 10}"
GROWTH = "{tenant: idle, from_s: 28, to_s: 57, grow: 6}"
SLIVERS = ", ".join(
    f"{{tenant: sliver-{one}, from_s: 30, to_s: 55, poisson_per_s: 0.2, prompt_tokens: 5000, output_tokens: 10}}"
    for one in range(5)
)


def diagnosis(*injected: str, seed: int = 0) -> Diagnosis:
    return diagnose(recorded(f"{USUAL}inject: [{', '.join(injected)}]", PLAIN, seed))


def named(found: Diagnosis) -> set[str]:
    return {
        culprit.tenant
        for incident in found.incidents
        if incident.verdict is Verdict.NOISY_NEIGHBOR
        for culprit in incident.culprits
    }


@pytest.mark.parametrize("seed", range(3))
def test_who_grew_beside_a_culprit_and_hurt_nobody_is_not_named(seed: int) -> None:
    found = diagnosis(PROMPTS, GROWTH, seed=seed)
    assert found.verdict is Verdict.NOISY_NEIGHBOR
    assert named(found) == {"batch"}


@pytest.mark.parametrize("seed", range(3))
def test_who_grew_and_hurt_nobody_is_no_incident(seed: int) -> None:
    assert diagnosis(GROWTH, seed=seed).verdict is Verdict.HEALTHY


@pytest.mark.parametrize("seed", range(3))
def test_many_that_act_alike_are_named_together(seed: int) -> None:
    trace = recorded(f"{USUAL}inject: [{SLIVERS}]", PLAIN, seed)
    found = diagnose(trace)
    assert named(found) == {tenant for tenant in only_replica(trace).tenants if tenant.startswith("sliver")}
    assert found.incidents[0].group


def test_a_harm_is_told_without_a_stall_that_would_open_an_incident(tmp_path: Path) -> None:
    """Nobody waits far beyond the usual, and yet a percentile has moved, as the paired run says too."""
    made = make(make_case(SCENARIOS / "kv_pinning.yaml", 4), tmp_path, "virtual")
    trace = read_trace(made.trace)
    replica = only_replica(trace)
    waits = measure_waits(replica)
    assert find_windows(waits, find_episodes(waits), replica) == []
    assert made.truth.is_harmful
    assert named(diagnose(trace)) == set(made.truth.culprits)


def test_the_reason_says_what_was_sent_and_what_would_have_been() -> None:
    (incident,) = diagnosis(PROMPTS).incidents
    assert incident.reasons[0].startswith("batch sent ")
    assert "with batch as usual, " in incident.reasons[1]
    assert " would have been " in incident.reasons[1]


# --- without a replay ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_where_most_batches_are_lost_the_only_one_that_changed_is_named_without_much_confidence(seed: int) -> None:
    found = diagnosis(PROMPTS, "{telemetry: aggregate}", seed=seed)
    assert not any(check.trusted for check in found.replays)
    assert named(found) == {"batch"}
    assert found.incidents[0].confidence is not Confidence.HIGH


def test_where_most_batches_are_lost_nobody_is_named_that_did_not_change() -> None:
    assert named(diagnosis("{telemetry: aggregate}")) == set()


@pytest.mark.parametrize("seed", range(3))
def test_charges_name_the_culprit_and_not_who_grew_beside_it(seed: int) -> None:
    trace = recorded(f"{USUAL}inject: [{PROMPTS}, {GROWTH}]", PLAIN, seed)
    assert named(diagnose(trace, replay=False)) == {"batch"}
