"""What a watch knows of waits where batches are unknown: as much as with them, once the requests have ended."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import pytest

import stallscope.bench
from stallscope.trace.findings import Findings
from stallscope.trace.otlp import Reader, Span, SpanGroup, find_sources
from stallscope.watch import families
from stallscope.watch.rehearsal import watch_spans
from stallscope.watch.samples import Samples
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario
from stallscope_telemetry import names
from tests.watch.spans import START_NS, WINDOW_NS, S, Watched, group, joining, request, step

SCENARIOS = Path(stallscope.bench.__file__).parent / "scenarios"
SEED = 4
SUMS = {names.STEP, names.DISPATCH_DELAY, names.SCHED, names.PREFILL_TOKENS, names.DECODE_TOKENS, names.BATCH_SIZE}
SUMS |= {names.RUNNING, names.WAITING, names.KV_USED, names.IDLE}

Change = Callable[[Span], Span | None]


def as_it_was(span: Span) -> Span | None:
    return span


def without_batches(span: Span) -> Span | None:
    if span.name != names.STEP_SPAN:
        return span
    return msgspec.structs.replace(
        span, attributes={name: value for name, value in span.attributes.items() if name in SUMS}
    )


def without_token_times(span: Span) -> Span | None:
    span = without_batches(span) or span
    return msgspec.structs.replace(
        span, attributes={name: one for name, one in span.attributes.items() if name != names.TOKEN_TIMES}
    )


def some_steps_lost(share: float) -> Change:
    draws = random.Random(SEED)
    return lambda span: None if span.name == names.STEP_SPAN and draws.random() < share else span


@cache
def recorded(story: str) -> tuple[SpanGroup, ...]:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "story.otlp.jsonl"
        record(load_scenario(str(SCENARIOS / f"{story}.yaml")), path, seed=SEED, executor="virtual")
        return tuple(Reader(Findings()).read(find_sources(path)))


def watched(story: str, change: Change) -> Samples:
    def changed() -> Iterator[SpanGroup]:
        for one in recorded(story):
            yield replace(one, spans=[span for each in one.spans if (span := change(each)) is not None])

    return watch_spans(changed())


def last(samples: Samples, name: str, by: str = "tenant") -> dict[str, float]:
    found: dict[str, float] = {}
    for labels, values in samples.of(name):
        found[labels[by]] = found.get(labels[by], 0.0) + float(values[-1])
    return {key: value for key, value in found.items() if value}


@pytest.mark.parametrize("story", ["chunked_flood", "kv_pinning"])
@pytest.mark.parametrize("change", [without_batches, some_steps_lost(0.002), some_steps_lost(0.03)])
def test_every_wait_is_counted_once_however_little_is_known_of_batches(story: str, change: Change) -> None:
    whole, poorer = watched(story, as_it_was), watched(story, change)
    for family in (families.TTFT, families.ITL):
        counts, seconds = (last(whole, family.name + suffix) for suffix in ("_count", "_sum"))
        assert last(poorer, family.name + "_count") == pytest.approx(counts, rel=0.01)
        assert last(poorer, family.name + "_sum") == pytest.approx(seconds, rel=0.01)


@pytest.mark.parametrize("story", ["chunked_flood", "kv_pinning"])
@pytest.mark.parametrize("change", [without_batches, without_token_times, some_steps_lost(0.02)])
def test_who_stalls_others_is_named_and_nobody_else(story: str, change: Change) -> None:
    blamed = last(watched(story, change), families.BLAME.name, "culprit")
    assert set(blamed) == {"ember"}


@pytest.mark.parametrize("story", ["healthy", "engine_pause"])
@pytest.mark.parametrize("change", [without_batches, some_steps_lost(0.02)])
def test_nobody_is_blamed_where_nobody_is_at_fault(story: str, change: Change) -> None:
    assert last(watched(story, change), families.BLAME.name, "culprit") == {}


def test_a_span_that_overtakes_its_steps_waits_for_them() -> None:
    it = Watched()
    spans = [joining(0, START_NS, [0], ["t"])]
    spans += [step(number, START_NS + number * S // 10, R_HANDLE=[]) for number in range(1, 40)]
    tokens = ",".join(["20000000", *["100000000"] * 39])
    ended = request("request-0", START_NS, spans[-1].end, TOKEN_TIMES=tokens, TENANT="t", HANDLE=0)
    it.window(group("r", [*spans[:10], ended]))
    it.window(group("r", spans[10:]))
    it.window(group("r", [step(40, START_NS + WINDOW_NS)]))
    assert it.total(families.ITL, "_count", tenant="t") in (39, 40)
