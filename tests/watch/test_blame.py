"""Stalls of recordings in virtual time: whom a watch blames while they go on, when, and whom never."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

import stallscope.bench
from stallscope.trace import read_trace
from stallscope.trace.findings import Findings
from stallscope.trace.otlp import Reader, find_sources
from stallscope.watch import families
from stallscope.watch.families import Family
from stallscope.watch.rehearsal import watch_spans
from stallscope.watch.samples import Samples
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario

SCENARIOS = Path(stallscope.bench.__file__).parent / "scenarios"
SEED = 3
STORIES = ("chunked_flood", "culprit_and_victim", "engine_pause", "healthy")


@cache
def watched(story: str) -> tuple[Samples, dict[str, int]]:
    """What a scraper saw of a story, and when each tenant's first request came."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "story.otlp.jsonl"
        record(load_scenario(str(SCENARIOS / f"{story}.yaml")), path, seed=SEED, executor="virtual")
        samples = watch_spans(Reader(Findings()).read(find_sources(path)))
        first: dict[str, int] = {}
        for row in read_trace(path).requests.to_pylist():
            first[row["tenant"]] = min(first.get(row["tenant"], row["arrival"]), row["arrival"])
        return samples, first


def last(samples: Samples, family: Family, *by: str) -> dict[tuple[str, ...], float]:
    """Each series' last value, added up by these labels; those that are zero are left out."""
    found: dict[tuple[str, ...], float] = {}
    for labels, values in samples.of(family.name):
        key = tuple(labels[name] for name in by)
        found[key] = found.get(key, 0.0) + float(values[-1])
    return {key: value for key, value in found.items() if value}


def test_a_newcomer_that_stalls_others_is_blamed_within_half_a_minute_and_nobody_else() -> None:
    samples, first = watched("chunked_flood")
    blamed = last(samples, families.BLAME, "culprit")
    assert set(blamed) == {("ember",)}
    rises = [np.flatnonzero(np.nan_to_num(values) > 0) for _, values in samples.of(families.BLAME.name)]
    seen_ns = min(int(samples.times_ns[one[0]]) for one in rises if len(one))
    stalled = [np.flatnonzero(np.nan_to_num(values) > 1.0) for _, values in samples.of(families.STALLED.name)]
    begins_ns = max(first["ember"], min(int(samples.times_ns[one[0]]) for one in stalled if len(one)))
    assert seen_ns <= begins_ns + 30 * 10**9


def test_who_stalls_itself_as_well_is_not_blamed_for_that() -> None:
    samples, _ = watched("culprit_and_victim")
    assert set(last(samples, families.BLAME, "culprit")) == {("amber",)}
    assert ("amber", "amber") not in last(samples, families.BLAME, "victim", "culprit")
    assert last(samples, families.STALLED, "victim")["amber",] > 5


def test_an_engine_that_pauses_is_nobodys_fault() -> None:
    samples, _ = watched("engine_pause")
    assert last(samples, families.BLAME, "culprit") == {}
    judged = last(samples, families.JUDGED, "verdict")
    assert judged["engine_stall",] > 0.8 * sum(last(samples, families.STALLED, "victim").values())
    assert last(samples, families.INCIDENTS, "verdict")["engine_stall",] >= 1


def test_healthy_traffic_is_nobodys_fault() -> None:
    samples, _ = watched("healthy")
    assert last(samples, families.BLAME, "culprit") == {}
    assert set(last(samples, families.INCIDENTS, "verdict")) <= {("overload",)}


@pytest.mark.parametrize("story", STORIES)
def test_blame_and_judgement_never_exceed_what_was_lost(story: str) -> None:
    samples, _ = watched(story)
    stalled, blamed = (last(samples, family, "victim") for family in (families.STALLED, families.BLAME))
    for victim, seconds in blamed.items():
        assert seconds <= stalled[victim] + 1e-6
    assert sum(last(samples, families.JUDGED, "verdict").values()) <= sum(stalled.values()) + 1e-6


@pytest.mark.parametrize("story", STORIES)
def test_no_counter_falls(story: str) -> None:
    samples, _ = watched(story)
    for (name, labels), values in samples.values.items():
        if name.endswith(("_total", "_bucket", "_count", "_sum")):
            there = values[~np.isnan(values)]
            assert (np.diff(there) >= 0).all(), (name, labels)
            assert there[0] == 0, "a series begins at zero, so that its first rise counts"
