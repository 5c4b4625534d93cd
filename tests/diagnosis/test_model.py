"""The result of an analysis becomes JSON and back; what does not fit says so in one line."""

from __future__ import annotations

import json
from typing import cast

import pytest

from stallscope.diagnosis.model import (
    SCHEMA_VERSION,
    Charge,
    Confidence,
    Coverage,
    Culprit,
    Diagnosis,
    Incident,
    Quantile,
    SuspectRequest,
    TenantSummary,
    Verdict,
    Victim,
)

P90 = Quantile("ttft", 0.9, 1.25, 40)
INCIDENT = Incident(
    replica="engine-0",
    start_ns=1_790_000_000_000_000_001,
    end_ns=1_790_000_003_000_000_000,
    verdict=Verdict.NOISY_NEIGHBOR,
    confidence=Confidence.MEDIUM,
    mechanism="kv_pinning",
    culprits=(
        Culprit(
            "archive", "api_key", "kv_pinning", 2.5, 0.8, 0.7, 0.0, "KV cache",
            (SuspectRequest("a-1", 1_790_000_000_000_000_000, 7400, 700, 2.5, 1.0),), None,
        ),
    ),
    victims=(Victim("chat", 12, 40, 3.125, (P90,), (), "c-7"),),
    lost_s=3.125,
    charged_s=3.0,
    charges=(Charge("archive", "kv_pinning", 2.5, 0.8, False), Charge("(engine)", "step_fixed", 0.625, 0.2, False)),
    runner_up=None,
    runner_up_share=0.0,
    reasons=("archive took 70% of the KV cache; outside incidents it takes none",),
)  # fmt: skip
DIAGNOSIS = Diagnosis(
    source="trace.otlp.jsonl",
    start_ns=1_790_000_000_000_000_000,
    end_ns=1_790_000_060_000_000_000,
    verdict=Verdict.NOISY_NEIGHBOR,
    confidence=Confidence.MEDIUM,
    coverage=Coverage(3, 900, 2, 5, 70, 1, 0, 0.98, 1.0, 0.031),
    incidents=(INCIDENT,),
    tenants=(TenantSummary("chat", "api_key", 60, (P90,), 0.5, 0.25, 0.125),),
    notes=("steps came twice (engine-0 step 7, 1 times)",),
)


def as_json(diagnosis: Diagnosis) -> dict[str, object]:
    return cast("dict[str, object]", json.loads(json.dumps(diagnosis.to_dict())))


def test_a_diagnosis_survives_json_to_the_nanosecond() -> None:
    read = Diagnosis.from_dict(as_json(DIAGNOSIS))
    assert read == DIAGNOSIS
    assert isinstance(read.incidents[0].verdict, Verdict)
    assert isinstance(read.confidence, Confidence)


def test_an_empty_diagnosis_survives_json() -> None:
    empty = Diagnosis("t", 0, 0, Verdict.HEALTHY, Confidence.LOW, DIAGNOSIS.coverage, (), (), ())
    assert Diagnosis.from_dict(as_json(empty)) == empty


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, None, "1"])
def test_another_schema_version_is_refused(version: object) -> None:
    with pytest.raises(ValueError, match=f"schema version {version!r} is not {SCHEMA_VERSION}"):
        Diagnosis.from_dict(as_json(DIAGNOSIS) | {"schema_version": version})


def test_a_missing_field_is_named_with_what_lacks_it() -> None:
    document = as_json(DIAGNOSIS)
    del document["verdict"], document["notes"]
    with pytest.raises(ValueError, match=r"^Diagnosis lacks verdict, notes$"):
        Diagnosis.from_dict(document)
    document = as_json(DIAGNOSIS)
    incident = cast("list[dict[str, object]]", document["incidents"])[0]
    del incident["lost_s"]
    with pytest.raises(ValueError, match=r"^Incident lacks lost_s$"):
        Diagnosis.from_dict(document)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("coverage", [1, 2], "Coverage must be an object"),
        ("coverage", None, "Coverage must be an object"),
        ("incidents", {"0": {}}, "expected a list"),
        ("incidents", ["none"], "Incident must be an object"),
        ("notes", "a note", "expected a list"),
        ("verdict", "guilty", "'guilty' is not a valid Verdict"),
    ],
)
def test_a_field_of_another_shape_is_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Diagnosis.from_dict(as_json(DIAGNOSIS) | {field: value})
