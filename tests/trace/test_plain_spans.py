"""What other engines' request spans say: times, tenants, sampling; and a capture of a real vLLM."""

from pathlib import Path

import pytest

from stallscope.diagnosis import diagnose
from stallscope.diagnosis.model import Confidence, Verdict
from stallscope.trace import read_trace
from stallscope.trace.plain_spans import PREFILL_TIME, Stations, claimed_tenant, sampled_share, stations
from stallscope_telemetry import names

CAPTURES = Path(__file__).parents[3] / "shared" / "captures" / "vllm-0.32-cpu"
S = 1_000_000_000


def test_stations_are_counted_back_from_the_first_token() -> None:
    told = {names.LATENCY_TTFT: 0.5, names.LATENCY_QUEUE: 0.1, PREFILL_TIME: 0.3}
    assert stations(told, 10 * S) == Stations(10 * S + S // 10, 10 * S + S // 5, 10 * S + S // 2)


def test_without_a_prefill_time_the_queue_is_counted_from_the_arrival() -> None:
    assert stations({names.LATENCY_QUEUE: 0.25}, S) == Stations(S, S + S // 4, None)
    assert stations({}, S) == Stations(S, None, None)


@pytest.mark.parametrize("value", [float("nan"), -1.0, float("inf"), 1e30, "0.1", True, [1]])
def test_what_is_no_duration_says_nothing(value: object) -> None:
    assert stations({names.LATENCY_TTFT: value}, S) == Stations(S, None, None)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("attributes", "state", "claim"),
    [
        ({"tenant.id": "chat"}, "", ("chat", "claim:tenant.id")),
        ({"tenant.id": " ", "enduser.id": "u"}, "tenant=x", ("u", "claim:enduser.id")),
        ({}, "ot=th:8, stallscope=chat", ("chat", "claim:tracestate")),
        ({}, "tenant=b,stallscope=a", ("a", "claim:tracestate")),
        ({}, "stallscope=first,stallscope=second", ("first", "claim:tracestate")),
        ({"tenant.id": 7}, "=,,x", ("", "")),
        ({"tenant.id": "x" * 1000}, "", ("x" * 256, "claim:tenant.id")),
    ],
)
def test_a_tenant_is_who_the_first_of_the_claims_says(
    attributes: dict[str, object], state: str, claim: tuple[str, str]
) -> None:
    assert claimed_tenant(attributes, state) == claim  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "share"),
    [
        ("", 1.0),
        ("ot=th:0", 1.0),
        ("ot=th:8", 0.5),
        ("a=b,ot=rv:1;th:c", 0.25),
        ("ot=th:fd70a4", 0.01),
        ("ot=th:zz", 1),
    ],
)
def test_a_threshold_says_what_share_of_spans_was_kept(state: str, share: float) -> None:
    assert sampled_share(state) == pytest.approx(share, rel=1e-3)


@pytest.mark.skipif(not CAPTURES.is_dir(), reason="the captures of a real vLLM are not there")
def test_a_plain_vllm_tells_who_stalled_whom_and_names_nobody_where_nobody_did() -> None:
    hog, base = (diagnose(read_trace(CAPTURES / name)) for name in ("hog", "base"))
    assert (hog.verdict, hog.confidence) == (Verdict.NOISY_NEIGHBOR, Confidence.LOW)
    assert {culprit.tenant for incident in hog.incidents for culprit in incident.culprits} == {"reasoner"}
    assert {victim.tenant for victim in hog.incidents[0].victims} >= {"chat", "search"}
    assert not [culprit for incident in base.incidents for culprit in incident.culprits]
    assert (hog.coverage.fidelity, hog.coverage.requests, hog.coverage.known_tenant_share) == (1, 141, 1.0)
