"""Verdicts on recorded virtual runs: who is named where somebody did it, and nobody where nobody did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from stallscope.diagnosis import Diagnosis, Verdict, diagnose
from stallscope.diagnosis.model import Confidence, Incident
from stallscope.trace import read_trace
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import Scenario, load_scenario

SEEDS = (1000, 1001)

USUAL = """
name: NAME
duration_s: 40
engine: {max_num_seqs: 32, max_num_batched_tokens: 2048, kv_blocks: 4096}
tenants:
  chat: {arrivals: {poisson_per_s: 6}, prompt_tokens: {uniform: [40, 200]}, output_tokens: {uniform: [20, 60]}}
  search: {arrivals: {poisson_per_s: 1}, prompt_tokens: {uniform: [200, 600]}, output_tokens: {uniform: [5, 15]}}
  reports: {arrivals: {poisson_per_s: 0.5}, prompt_tokens: {uniform: [900, 1500]}, output_tokens: {uniform: [40, 80]}}
"""
PAUSE = "inject: [{engine: pause, at_s: 22, for_s: 2}]"
# Prompts fill four fifths of each second, so that what a pause holds up takes long to work off.
NEARLY_FULL = """
name: NAME
duration_s: 40
engine: {max_num_seqs: 32, max_num_batched_tokens: 2048, kv_blocks: 4096}
tenants:
  chat: {arrivals: {poisson_per_s: 27}, prompt_tokens: {uniform: [700, 900]}, output_tokens: 4}
  search: {arrivals: {poisson_per_s: 1}, prompt_tokens: {uniform: [200, 600]}, output_tokens: {uniform: [5, 15]}}
"""
EVERYONE_GROWS = """
inject:
  - {tenant: chat, from_s: 18, to_s: 30, arrivals: {poisson_per_s: FACTOR6}}
  - {tenant: search, from_s: 18, to_s: 30, arrivals: {poisson_per_s: FACTOR1}}
  - {tenant: reports, from_s: 18, to_s: 30, arrivals: {poisson_per_s: FACTOR0.5}}
"""
# The other tenant comes only every nine seconds, and never into the burst.
ALONE_IN_A_BURST = """
name: NAME
duration_s: 40
tenants:
  nightly: {arrivals: {poisson_per_s: 4}, prompt_tokens: {uniform: [50, 200]}, output_tokens: {uniform: [10, 20]}}
  chat: {arrivals: {every_s: 9}, prompt_tokens: 60, output_tokens: 10}
inject:
  - {tenant: nightly, at_s: 20, count: 12, prompt_tokens: 4000, output_tokens: 5}
"""


@cache
def diagnosed(scenario: Scenario, seed: int, inject: bool = True) -> Diagnosis:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recorded.otlp.jsonl"
        record(scenario, path, seed=seed, executor="virtual", inject=inject)
        return replace(diagnose(read_trace(path)), source="recorded")


def shipped(name: str) -> Scenario:
    return load_scenario(name, "sample")


@pytest.fixture
def story(tmp_path: Path) -> Callable[..., Scenario]:
    """A scenario from YAML below the usual traffic."""

    def load(inject: str = "", usual: str = USUAL) -> Scenario:
        path = tmp_path / "story.yaml"
        path.write_text(usual + inject, encoding="utf-8")
        return load_scenario(path)

    return load


def everyone_grows(factor: float) -> str:
    text = EVERYONE_GROWS
    for rate in (6, 1, 0.5):
        text = text.replace(f"FACTOR{rate}}}", f"{rate * factor}}}")
    return text


def named(diagnosis: Diagnosis) -> set[str]:
    """Tenants named as anybody's culprit, in any incident."""
    return {culprit.tenant for incident in diagnosis.incidents for culprit in incident.culprits}


def worst(diagnosis: Diagnosis) -> Incident:
    return diagnosis.incidents[0]


# --- somebody did it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["reasoning_prompt", "kv_pinning", "batch_flood"])
def test_the_injected_tenant_and_nobody_else_is_named_by_the_right_mechanism(name: str, seed: int) -> None:
    scenario = shipped(name)
    assert scenario.expect is not None
    diagnosis = diagnosed(scenario, seed)
    assert diagnosis.verdict is Verdict.NOISY_NEIGHBOR
    assert diagnosis.confidence is Confidence.HIGH
    assert named(diagnosis) == set(scenario.expect.culprits)
    assert worst(diagnosis).mechanism in scenario.expect.mechanism


@pytest.mark.parametrize("seed", SEEDS)
def test_huge_prompts_are_named_as_the_requests_that_did_it(seed: int) -> None:
    for incident in diagnosed(shipped("reasoning_prompt"), seed).incidents:
        (culprit,) = incident.culprits
        for request in culprit.requests:
            assert request.prompt_tokens == 15_000
            assert request.arrival_ns < incident.end_ns
        # Where one stall runs into the next, several prompts did it, and none of them alone.
        alone = [request.request for request in culprit.requests if request.share >= 0.5]
        assert [culprit.dominating_request] == (alone or [None])
        assert alone or len(culprit.requests) > 1


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["reasoning_prompt", "kv_pinning", "batch_flood"])
def test_victims_are_those_who_were_there_before_and_lost_time(name: str, seed: int) -> None:
    diagnosis = diagnosed(shipped(name), seed)
    assert {victim.tenant for victim in worst(diagnosis).victims} >= {"chat"}
    for incident in diagnosis.incidents:
        assert all(victim.lost_s > 0 and victim.stalled_requests <= victim.requests for victim in incident.victims)
        assert sum(victim.lost_s for victim in incident.victims) == pytest.approx(incident.lost_s)
        assert incident.charged_s <= incident.lost_s * (1 + 1e-9)
        assert sum(charge.seconds for charge in incident.charges) == pytest.approx(incident.lost_s)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tenants_own_burst_is_nobody_elses_fault(story: Callable[..., Scenario], seed: int) -> None:
    diagnosis = diagnosed(story(usual=ALONE_IN_A_BURST), seed)
    assert diagnosis.verdict in {Verdict.SELF_INFLICTED, Verdict.OVERLOAD}
    assert {victim.tenant for incident in diagnosis.incidents for victim in incident.victims} == {"nightly"}
    assert named(diagnosis) <= {"nightly"}


# --- nobody did it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_healthy_traffic_is_healthy(seed: int) -> None:
    diagnosis = diagnosed(shipped("healthy"), seed)
    assert diagnosis.verdict is Verdict.HEALTHY
    assert diagnosis.incidents == ()


@pytest.mark.parametrize("name", ["reasoning_prompt", "kv_pinning", "batch_flood"])
def test_without_the_injection_nobody_is_named(name: str) -> None:
    diagnosis = diagnosed(shipped(name), SEEDS[0], inject=False)
    assert diagnosis.verdict is Verdict.HEALTHY
    assert named(diagnosis) == set()


@pytest.mark.parametrize("seed", SEEDS)
def test_an_engine_that_pauses_is_blamed_itself(story: Callable[..., Scenario], seed: int) -> None:
    diagnosis = diagnosed(story(PAUSE), seed)
    assert diagnosis.verdict is Verdict.ENGINE_STALL
    assert named(diagnosis) == set()
    assert worst(diagnosis).mechanism == "host_gap"


@pytest.mark.parametrize(
    ("factor", "seed"), [(2.0, 1000), (2.0, 1001), (3.0, 1000), (3.0, 1001), (8.0, 1000), (8.0, 1001)]
)
def test_when_everyone_has_grown_nobody_is_named(story: Callable[..., Scenario], factor: float, seed: int) -> None:
    diagnosis = diagnosed(story(everyone_grows(factor)), seed)
    assert diagnosis.verdict in {Verdict.OVERLOAD, Verdict.HEALTHY}
    assert named(diagnosis) == set()


def test_too_few_requests_are_too_little_to_tell(story: Callable[..., Scenario]) -> None:
    sparse = USUAL.replace("40\n", "10\n", 1)
    for rate in ("6", "1", "0.5"):
        sparse = sparse.replace(f"poisson_per_s: {rate}}}", "poisson_per_s: 0.3}")
    diagnosis = diagnosed(story(usual=sparse), SEEDS[0])
    assert diagnosis.coverage.requests < 20
    assert diagnosis.verdict is Verdict.INSUFFICIENT_DATA
    assert diagnosis.confidence is Confidence.LOW


# --- where the answer comes from ----------------------------------------------------------------------------------


def test_the_scenarios_own_answer_plays_no_part() -> None:
    scenario = shipped("reasoning_prompt")
    assert scenario.expect is not None
    lying = replace(scenario, name="other", about="", expect=replace(scenario.expect, culprits=("search",)))
    assert diagnosed(lying, SEEDS[0]) == diagnosed(scenario, SEEDS[0])


@pytest.mark.parametrize("seed", SEEDS)
def test_the_backlog_of_a_pause_does_not_make_it_an_overload(story: Callable[..., Scenario], seed: int) -> None:
    incident = diagnosed(story(PAUSE, NEARLY_FULL), seed).incidents[0]
    queued = sum(charge.share for charge in incident.charges if charge.mechanism == "prefill_queue")
    assert queued > 0.35
    assert (incident.verdict, incident.culprits) == (Verdict.ENGINE_STALL, ())
    assert "backlog" in incident.reasons[-1]


def test_a_recording_in_which_everybody_waits_from_the_first_second_on_is_not_called_healthy(
    story: Callable[..., Scenario],
) -> None:
    crowded = story(
        usual=USUAL.replace("max_num_seqs: 32", "max_num_seqs: 2").replace("poisson_per_s: 6", "poisson_per_s: 20")
    )
    said = diagnosed(crowded, SEEDS[0])
    assert (said.verdict, said.confidence, said.incidents) == (Verdict.INSUFFICIENT_DATA, Confidence.LOW, ())
    assert "no calm stretch says what is usual here" in said.notes[-1]
