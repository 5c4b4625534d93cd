"""Stalls of recordings in virtual time: whom a watch blames while they go on, when, and whom never."""

from __future__ import annotations

from dataclasses import dataclass
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
STORIES = ("chunked_flood", "kv_pinning", "head_of_line", "culprit_and_victim", "engine_pause", "healthy")


@dataclass(frozen=True)
class Story:
    """``samples``: what a scraper saw; ``first_ns``: when each tenant's first request came; ``used_block_s``: KV blocks
    in use, times seconds, as the steps say themselves."""

    samples: Samples
    first_ns: dict[str, int]
    used_block_s: float


@cache
def watched(story: str) -> Story:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "story.otlp.jsonl"
        record(load_scenario(str(SCENARIOS / f"{story}.yaml")), path, seed=SEED, executor="virtual")
        samples = watch_spans(Reader(Findings()).read(find_sources(path)))
        trace = read_trace(path)
        first: dict[str, int] = {}
        for row in trace.requests.to_pylist():
            first[row["tenant"]] = min(first.get(row["tenant"], row["arrival"]), row["arrival"])
        ready, used = (trace.steps[name].to_numpy() for name in ("ready", "kv_used"))
        passed_ns = np.diff(ready, prepend=trace.steps["dispatched"][0].as_py())
        return Story(samples, first, float((used * passed_ns).sum()) / 1e9)


def last(samples: Samples, family: Family, *by: str) -> dict[tuple[str, ...], float]:
    """Each series' last value, added up by these labels; those that are zero are left out."""
    found: dict[tuple[str, ...], float] = {}
    for labels, values in samples.of(family.name):
        key = tuple(labels[name] for name in by)
        found[key] = found.get(key, 0.0) + float(values[-1])
    return {key: value for key, value in found.items() if value}


@pytest.mark.parametrize("name", STORIES[:3])
def test_a_newcomer_that_stalls_others_is_blamed_within_half_a_minute_and_nobody_else(name: str) -> None:
    story = watched(name)
    samples = story.samples
    blamed = last(samples, families.BLAME, "culprit")
    assert set(blamed) == {("ember",)}
    rises = [np.flatnonzero(np.nan_to_num(values) > 0) for _, values in samples.of(families.BLAME.name)]
    seen_ns = min(int(samples.times_ns[one[0]]) for one in rises if len(one))
    stalled = [np.flatnonzero(np.nan_to_num(values) > 1.0) for _, values in samples.of(families.STALLED.name)]
    begins_ns = max(story.first_ns["ember"], min(int(samples.times_ns[one[0]]) for one in stalled if len(one)))
    assert seen_ns <= begins_ns + 30 * 10**9


def test_who_stalls_itself_as_well_is_not_blamed_for_that() -> None:
    samples = watched("culprit_and_victim").samples
    assert set(last(samples, families.BLAME, "culprit")) == {("amber",)}
    assert ("amber", "amber") not in last(samples, families.BLAME, "victim", "culprit")
    assert last(samples, families.STALLED, "victim")["amber",] > 5


def test_an_engine_that_pauses_is_nobodys_fault() -> None:
    samples = watched("engine_pause").samples
    assert last(samples, families.BLAME, "culprit") == {}
    judged = last(samples, families.JUDGED, "verdict")
    assert judged["engine_stall",] > 0.8 * sum(last(samples, families.STALLED, "victim").values())
    assert last(samples, families.INCIDENTS, "verdict")["engine_stall",] >= 1


def test_healthy_traffic_is_nobodys_fault() -> None:
    samples = watched("healthy").samples
    assert last(samples, families.BLAME, "culprit") == {}
    assert set(last(samples, families.INCIDENTS, "verdict")) <= {("overload",)}


@pytest.mark.parametrize("story", STORIES)
def test_blame_and_judgement_never_exceed_what_was_lost(story: str) -> None:
    samples = watched(story).samples
    stalled, blamed = (last(samples, family, "victim") for family in (families.STALLED, families.BLAME))
    for victim, seconds in blamed.items():
        assert seconds <= stalled[victim] + 1e-6
    assert sum(last(samples, families.JUDGED, "verdict").values()) <= sum(stalled.values()) + 1e-6


@pytest.mark.parametrize("story", STORIES)
def test_no_counter_falls(story: str) -> None:
    samples = watched(story).samples
    for (name, labels), values in samples.values.items():
        if name.endswith(("_total", "_bucket", "_count", "_sum")):
            there = values[~np.isnan(values)]
            assert (np.diff(there) >= 0).all(), (name, labels)
            assert there[0] == 0, "a series begins at zero, so that its first rise counts"


@pytest.mark.parametrize("story", STORIES)
def test_tenants_hold_the_kv_blocks_that_are_used_and_spend_no_more_time_than_steps_took(story: str) -> None:
    samples = watched(story).samples
    held = sum(last(samples, families.KV, "tenant").values())
    assert 0.98 * watched(story).used_block_s < held < 1.001 * watched(story).used_block_s
    spent, busy = (sum(last(samples, family).values()) for family in (families.STEP_TIME, families.BUSY))
    assert 0 < spent < busy
