"""Replicas for the tests of views: small scenarios recorded once in virtual time."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from stallscope.diagnosis import Diagnosis, diagnose
from stallscope.diagnosis.incidents import Waits, measure_waits
from stallscope.diagnosis.replica import Replica
from stallscope.trace import Trace, read_trace
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario
from tests.diagnosis.runs import only_replica


@cache
def recorded(scenario: str = "kv_pinning", variant: str = "sample", seed: int = 1000) -> Trace:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recorded.otlp.jsonl"
        record(load_scenario(scenario, variant), path, seed=seed, executor="virtual")
        return read_trace(path)


@cache
def diagnosed(scenario: str = "kv_pinning") -> Diagnosis:
    return diagnose(recorded(scenario))


@cache
def replica(scenario: str = "kv_pinning") -> Replica:
    return only_replica(recorded(scenario))


@cache
def waits(scenario: str = "kv_pinning") -> Waits:
    return measure_waits(replica(scenario))
