"""What a watch remembers: the same trace as its windows' spans, and never more than its share."""

from __future__ import annotations

import random
from functools import cache

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stallscope.trace.decode import Collected, ReplicaSpans, collect
from stallscope.trace.findings import Findings
from stallscope.trace.otlp.spans import Resources
from stallscope.watch import families
from stallscope.watch.memory import Memory
from stallscope.watch.replica import REMEMBERED_NS, WatchedReplica
from stallscope_engine.config import EngineConfig
from tests.diagnosis.runs import random_run
from tests.trace.recording import Arrival, Workload, read, run
from tests.watch.spans import S, Watched
from tests.watch.streams import cut_at, groups_of

HOURS = 2


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1 << 16))
def test_what_is_remembered_is_the_trace_of_those_windows(seed: int) -> None:
    recording, rng = random_run(seed).recording, random.Random(seed)
    lines = recording.lines()
    assume(recording.steps)
    rng.shuffle(lines)
    memory, collected, resources = Memory("r0"), Collected(), Resources()
    for number, window in enumerate(cut_at(lines, [rng.randrange(len(lines)) for _ in range(5)])):
        collect(groups_of(window, resources), Findings(), collected)
        for spans in collected.replicas.values():
            memory.add(spans.taken(), number)
    assert dict(memory.trace().tables) == dict(read(lines).tables)
    assert memory.bytes > 0
    memory.forget(100)
    assert memory.bytes == 0


def test_a_replica_that_sends_too_much_is_remembered_for_less_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stallscope.watch.memory._MOST_BYTES", 20_000)
    memory, rng = Memory("r"), random.Random(0)
    for number in range(50):
        spans = ReplicaSpans("r", memory._resources)
        spans.rows = [tuple(rng.randrange(1 << 40) for _ in range(16)) for _ in range(10)]
        spans.composition = [None] * 10
        memory.add(spans, number)
        assert memory.bytes <= 20_000


@cache
def two_hours() -> list[bytes]:
    """Three requests every six seconds, some of them aborted, that preempt one another."""
    arrivals = [
        Arrival(2 * S * (number % 3), 20 + number % 7, 12, f"t{number % 3}", 3 if number % 11 == 0 else None)
        for number in range(HOURS * 1800)
    ]
    config = EngineConfig(block_size=4, kv_blocks=14, max_num_seqs=4, max_num_batched_tokens=64)
    return run(Workload(config, arrivals, 40, 1 << 30)).lines()


def test_nothing_grows_in_two_hours() -> None:
    it, resources = Watched(), Resources()
    begin = it.now_ns
    by_window: dict[int, list[bytes]] = {}
    for line in two_hours():
        (group,) = groups_of([line])
        by_window.setdefault((group.spans[0].end - begin) // (5 * S), []).append(line)
    sizes: list[dict[str, int]] = []
    for number in range(max(by_window) + 1):
        it.window(*groups_of(by_window.get(number, []), resources))
        (replica,) = it.watch.replicas.values()
        sizes.append(held_by(it, replica))
        assert replica.memory_bytes <= 1 << 20
    early, late = (
        {name: max(one[name] for one in some) for name in sizes[0]}
        for some in (sizes[len(sizes) // 4 : len(sizes) // 2], sizes[-len(sizes) // 4 :])
    )
    assert it.total(families.PREEMPTIONS) > 100
    assert sum(late.values()) < 100_000
    for name, size in late.items():
        assert size <= 1.3 * early[name] + 16, name
    assert len(sizes) * 5 * S > 10 * REMEMBERED_NS


def held_by(it: Watched, replica: WatchedReplica) -> dict[str, int]:
    """Sizes of all that a watch keeps from one window to the next."""
    stream, machine = replica._stream, replica._stream._machine
    collected = it.watch._collected.replicas[replica.name]
    return {
        "memory": replica.memory_bytes,
        "counted": len(replica._counted),
        "tokens": len(replica._waits._token_ns),
        "reached": len(stream._reached) + len(stream._preempted),
        "handles": len(machine._by_handle) + len(machine._alive),
        "rebuilt": sum(
            len(part)
            for part in (
                machine.rebuilt.requests,
                machine.rebuilt.rows,
                machine.rebuilt.evictions,
                machine.rebuilt.stretches,
                machine.rebuilt.unknown_left,
            )
        ),
        "costs": sum(map(len, replica.costs._durations)) + len(replica.costs._features),
        "resources": len(collected.resources),
        "spans": len(collected.rows) + len(collected.requests),
        "clients": len(it.watch._collected.clients),
    }
