"""Recordings as poorer telemetry has them: what is left, what it is called, and decoys that hurt nobody."""

from pathlib import Path

import pytest

from stallscope.bench.cache import Made, make
from stallscope.bench.cases import SCENARIOS, make_case
from stallscope.bench.degrade import ELSEWHERE, degrade
from stallscope.diagnosis import diagnose
from stallscope.trace import Trace, read_trace


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(make_case(SCENARIOS / "chunked_flood.yaml", 0), tmp_path_factory.mktemp("cache"), "virtual")


def degraded(made: Made, fidelity: int, folder: Path, kept: float = 1.0) -> Trace:
    return read_trace(degrade(made.trace, fidelity, made.truth, folder / "degraded.otlp.jsonl.zst", kept))


def test_at_fidelity_2_the_sums_of_steps_are_left_and_at_1_nothing_of_them(made: Made, tmp_path: Path) -> None:
    whole, sums, requests = read_trace(made.trace), degraded(made, 2, tmp_path), degraded(made, 1, tmp_path)
    replica = whole.steps["replica"][0].as_py()
    fidelities = [
        dict(zip(*(t.coverage[c].to_pylist() for c in ("replica", "fidelity")), strict=True)) for t in (sums, requests)
    ]
    assert [one[replica] for one in fidelities] == [2, 1]
    ready = [row["ready"] for row in sums.steps.to_pylist() if row["replica"] == replica]
    assert ready == whole.steps["ready"].to_pylist()
    for trace in (sums, requests):
        assert trace.requests["handle"].null_count == len(trace.requests)
        assert set(trace.requests["tenant_source"].to_pylist()) == {"claim:tracestate"}
        assert set(trace.requests["tenant"].to_pylist()) <= set(whole.requests["tenant"].to_pylist())


def test_decoys_are_elsewhere_or_too_late_and_of_innocent_tenants(made: Made, tmp_path: Path) -> None:
    trace = degraded(made, 1, tmp_path)
    rows = {row["request"]: row for row in trace.requests.to_pylist() if row["request"].startswith("decoy")}
    assert rows["decoy-1"]["replica"] == ELSEWHERE
    harm = made.truth.harm
    assert harm is not None
    assert rows["decoy-2"]["arrival"] > made.truth.start_ns + harm.to_s * 1e9
    assert not {row["tenant"] for row in rows.values()} & {*made.truth.culprits, harm.tenant}


def test_the_culprit_is_named_from_requests_alone(made: Made, tmp_path: Path) -> None:
    found = diagnose(degraded(made, 1, tmp_path))
    assert {one.tenant for one in found.incidents[0].culprits} == set(made.truth.culprits)
    assert found.confidence == "low"


def test_where_requests_are_missing_from_sums_nobody_is_named(made: Made, tmp_path: Path) -> None:
    trace = degraded(made, 2, tmp_path, kept=0.3)
    (share,) = [row["sampled_share"] for row in trace.coverage.to_pylist() if row["replica"] != ELSEWHERE]
    assert share == pytest.approx(0.3, abs=0.15)
    assert not [culprit for incident in diagnose(trace).incidents for culprit in incident.culprits]
