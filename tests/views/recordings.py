"""Replicas for the tests of views: small scenarios recorded once in virtual time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from stallscope.diagnosis import Diagnosis, diagnose
from stallscope.diagnosis.incidents import Waits, measure_waits
from stallscope.diagnosis.model import Confidence
from stallscope.diagnosis.replica import Replica
from stallscope.trace import Trace, read_trace
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario
from tests.diagnosis.runs import only_replica

CONFIDENCES = [Confidence.LOW, Confidence.MEDIUM, Confidence.HIGH]


@cache
def recorded(scenario: str = "kv_pinning", variant: str = "sample", seed: int = 1000) -> Trace:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recorded.otlp.jsonl"
        record(load_scenario(scenario, variant), path, seed=seed, executor="virtual")
        return read_trace(path)


@cache
def diagnosed(scenario: str = "kv_pinning") -> Diagnosis:
    """The diagnosis of a recording, as it is without a replay."""
    return without_replay(diagnose(recorded(scenario)))


def without_replay(diagnosis: Diagnosis) -> Diagnosis:
    """The diagnosis with nothing in it that a replay says."""
    incidents = tuple(
        replace(
            incident,
            confidence=min(incident.confidence, Confidence.MEDIUM, key=CONFIDENCES.index),
            culprits=tuple(replace(culprit, restored=None, shapley=None) for culprit in incident.culprits),
            interventions=(),
            remedies=(),
        )
        for incident in diagnosis.incidents
    )
    confidence = incidents[0].confidence if incidents else diagnosis.confidence
    return replace(diagnosis, confidence=confidence, incidents=incidents, replays=())


@cache
def replica(scenario: str = "kv_pinning") -> Replica:
    return only_replica(recorded(scenario))


@cache
def waits(scenario: str = "kv_pinning") -> Waits:
    return measure_waits(replica(scenario))
