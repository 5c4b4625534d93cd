"""What analysis must find in the recordings that come with the repository; nothing was tuned on them."""

from pathlib import Path

import pytest

from stallscope.diagnosis import Diagnosis, diagnose
from stallscope.diagnosis.slo import parse_slo
from stallscope.trace import Trace, read_trace
from stallscope.trace.select import select, span

FOLDER = Path(__file__).parent.parent / "sample_traces"
STALLS = [
    ("stall", "reasoner", {"step_boundary", "prefill_interference"}),
    ("flood", "batch", {"prefill_queue", "step_boundary", "prefill_interference"}),
    ("pinned", "archive", {"kv_pinning"}),
]


def sample(name: str) -> Trace:
    return read_trace(FOLDER / f"{name}.otlp.jsonl.zst")


def named(diagnosis: Diagnosis) -> set[str]:
    return {culprit.tenant for incident in diagnosis.incidents for culprit in incident.culprits}


@pytest.mark.parametrize(("name", "culprit", "mechanisms"), STALLS)
def test_a_recorded_stall_names_its_culprit_and_mechanism(name: str, culprit: str, mechanisms: set[str]) -> None:
    diagnosis = diagnose(sample(name))
    assert diagnosis.verdict == "noisy_neighbor"
    assert named(diagnosis) == {culprit}
    assert diagnosis.incidents[0].mechanism in mechanisms


@pytest.mark.parametrize(("name", "culprit", "mechanisms"), STALLS)
def test_charges_alone_name_it_too(name: str, culprit: str, mechanisms: set[str]) -> None:
    diagnosis = diagnose(sample(name), replay=False)
    assert diagnosis.verdict == "noisy_neighbor"
    assert named(diagnosis) == {culprit}


def test_a_promise_broken_all_the_time_is_an_incident() -> None:
    trace = sample("pinned")
    start_ns, end_ns = span(trace)
    # From here on there is nothing but the stall: no other time to compare it with, and no usual.
    stalled = select(trace, since=f"+{(end_ns - start_ns) // 2_000_000_000}s")
    diagnosis = diagnose(stalled, slos=[parse_slo("chat:ttft=200ms@p90")])
    assert diagnosis.incidents


def test_the_recorded_stall_is_laid_to_one_of_the_huge_prompts() -> None:
    worst = diagnose(sample("stall")).incidents[0].culprits[0].requests[0]
    assert worst.prompt_tokens == 15_000


def test_nobody_is_named_in_the_healthy_recording() -> None:
    assert named(diagnose(sample("healthy"))) == set()


@pytest.mark.parametrize("name", ["stall", "flood", "pinned", "healthy"])
def test_a_sample_is_small_and_sound(name: str) -> None:
    trace = sample(name)
    assert (FOLDER / f"{name}.otlp.jsonl.zst").stat().st_size < 1_500_000
    assert trace.findings == ()
    assert trace.validate() == []
    assert set(trace.replicas["executor"].to_pylist()) == {"torch"}
