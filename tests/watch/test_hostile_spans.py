"""Whatever arrives: a watch goes on, holds no more than it may, and serves those that are sound."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallscope.trace.decode import ReplicaSpans
from stallscope.trace.otlp.spans import Value
from stallscope.watch import families
from stallscope.watch.replica import WatchedReplica
from stallscope.watch.tally import MOST_TENANTS
from stallscope.watch.watch import FORGOTTEN_NS, MOST_REPLICAS
from stallscope_telemetry import names
from tests.watch.scoring import HOSTILE
from tests.watch.spans import START_NS, WINDOW_NS, S, Watched, group, joining, request, span, step

numbers = st.one_of(st.integers(-3, 40), st.sampled_from([-1, 1 << 31, 1 << 53, 1 << 62, -(1 << 63), 1 << 70]))
values: st.SearchStrategy[Value] = st.one_of(
    numbers,
    st.booleans(),
    st.floats(),
    st.sampled_from(["", "0", *HOSTILE]),
    st.lists(numbers, max_size=9),
    st.lists(st.sampled_from(HOSTILE), max_size=4),
)
STEP_NAMES = [one.name for one in names.ATTRIBUTES if one.on == "step"]
REQUEST_NAMES = [one.name for one in names.ATTRIBUTES if one.on in ("request", "gpu")]
times = st.one_of(
    st.integers(0, 30 * S).map(START_NS.__add__),
    st.sampled_from([0, -1, START_NS - 10**18, START_NS + 10**18, (1 << 62) - 1, 1 << 62, 1 << 64]),
)


def sound(replica: str = "sound", window: int = 0) -> list[object]:
    """Five steps, in the first of which a request joins and in the last of which it leaves."""
    begin, first = START_NS + window * WINDOW_NS, window * 5
    spans = [
        joining(first, begin, [window], ["good"]),
        *(step(first + number, begin + number * S // 10) for number in range(1, 4)),
        step(first + 4, begin + 4 * S // 10, LEFT=[window, 0]),
    ]
    return [group(replica, spans)]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_no_span_ends_a_watch_or_makes_a_number_unsound(data: st.DataObject) -> None:
    it = Watched()
    for window in range(3):
        spans = []
        for _ in range(data.draw(st.integers(0, 5))):
            kind = data.draw(st.sampled_from([names.STEP_SPAN, names.STEP_SPAN, names.REQUEST_SPAN, names.GPU_SPAN]))
            known = STEP_NAMES if kind == names.STEP_SPAN else REQUEST_NAMES
            one = joining(
                data.draw(st.integers(0, 9)), data.draw(times), [1, 2], ["a", data.draw(st.sampled_from(HOSTILE))]
            )
            attributes = dict(one.attributes) if data.draw(st.booleans()) else {names.STEP: data.draw(numbers)}
            attributes |= data.draw(st.dictionaries(st.sampled_from(known), values, max_size=4))
            spans.append(span(kind, data.draw(times), data.draw(times), attributes))
        it.window(group("hostile", spans), *sound(window=window))
    assert it.total(families.STEPS, replica="sound") == 15
    assert it.total(families.REQUESTS, tenant="good") >= 3
    for (name, _), value in it.scores.exposed().items():
        assert math.isfinite(value), name
        assert value < 1e11, "nobody's clock makes a sum of centuries"


def test_five_thousand_tenants_are_as_many_as_a_replica_may_have() -> None:
    it = Watched()
    it.window(*sound())
    for window in range(1, 11):
        handles = range(window * 500, (window + 1) * 500)
        tenants = [f"tenant-{handle}" for handle in handles]
        first = START_NS + window * WINDOW_NS
        spans = [joining(2 * window, first, handles, tenants)]
        spans.append(step(2 * window + 1, first + S, LEFT=[value for handle in handles for value in (handle, 0)]))
        it.window(group("crowded", spans), *sound(window=window))
    replica = it.watch.replicas["crowded"]
    assert len(replica.tenants.names) == MOST_TENANTS + 1
    assert it.total(families.REQUESTS) == 5_000 + 11
    assert it.total(families.REQUESTS, tenant="good") == 11
    assert len(it.scores.exposed()) <= 20_000


def test_a_replica_name_per_step_is_held_within_bounds_and_forgotten() -> None:
    it = Watched()
    it.window(*sound(), *(group(f"once-{number}", [step(0, START_NS)]) for number in range(5_000)))
    assert len(it.watch.replicas) == MOST_REPLICAS
    it.window(*sound(window=1))
    assert it.total(families.STEPS, replica="sound") == 10, "who was there before is watched on"
    for window in range(2, 16):
        it.window(*sound(window=window))
    it.window(*sound(window=16), *sound("late"))
    assert "late" in it.watch.replicas, "who has been silent makes room"
    it.window(seconds=FORGOTTEN_NS / S + 1)
    assert it.watch.replicas == {}
    assert it.watch._collected.replicas == {}


def test_a_resource_per_span_is_not_kept() -> None:
    it = Watched()
    for window in range(20):
        spans = [step(window * 50 + number, START_NS + (window * 50 + number) * S // 10) for number in range(50)]
        it.window(*(group("restless", [one], build=f"{window} {one.start}") for one in spans))
        assert len(it.watch._collected.replicas["restless"].resources) <= 64 + 50
    assert it.total(families.STEPS, replica="restless") == 1_000
    assert it.watch.replicas["restless"].memory_bytes < 1 << 16


def test_gpu_samples_and_requests_under_ever_new_names_leave_nothing_behind() -> None:
    it = Watched()
    for window in range(5):
        at_ns = START_NS + window * WINDOW_NS
        it.window(
            *(
                group(
                    f"name-{window}-{number}",
                    [
                        span(names.GPU_SPAN, at_ns, at_ns, {names.GPU_DEVICE: "0", names.GPU_THROTTLE: "thermal"}),
                        request(f"request-{number}", at_ns, at_ns + S, TENANT="many"),
                    ],
                )
                for number in range(1_000)
            )
        )
    assert it.watch.replicas == {}
    assert it.watch._collected.replicas == {}
    assert len(it.watch._sampled) <= 10_000 + 1_000
    assert it.total(families.REQUESTS, tenant="many") == 5_000


def test_a_gpus_throttling_is_counted_though_one_of_its_samples_is_of_another_century() -> None:
    it = Watched()
    told = {names.GPU_DEVICE: "0", names.GPU_THROTTLE: "hw_thermal_slowdown"}
    for window in range(4):
        samples = [START_NS + (window * 5 + second) * S for second in range(5)]
        samples += [START_NS + 10**18] if window == 1 else []
        it.window(group("r", [span(names.GPU_SPAN, at, at, dict(told)) for at in samples]), *sound("r", window))
    throttled = it.total(families.THROTTLED, replica="r", device="0")
    assert 15 <= throttled <= 30


@pytest.mark.parametrize("at", ["advance", "look"])
def test_one_replica_that_can_not_be_watched_does_not_end_the_watch(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    right = WatchedReplica.advance

    def advance(self: WatchedReplica, spans: ReplicaSpans, end_ns: int) -> None:
        if self.name == "broken":
            raise RuntimeError("a bug")
        right(self, spans, end_ns)

    if at == "advance":
        monkeypatch.setattr(WatchedReplica, "advance", advance)
    else:
        monkeypatch.setattr(WatchedReplica, "wants_look", property(lambda self: self.name == "broken"))
        monkeypatch.setattr(WatchedReplica, "look", lambda self: 1 / 0)
    it = Watched()
    for window in range(3):
        it.window(*sound("broken", window), *sound(window=window))
    assert it.total(families.STEPS, replica="sound") == 15
    assert it.total(families.REQUESTS, tenant="good") >= 3


def test_who_never_leaves_by_what_telemetry_says_is_forgotten_some_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stallscope.watch.stream._MOST_ALIVE", 1_000)
    it = Watched()
    for window in range(8):
        handles = range(window * 300, (window + 1) * 300)
        it.window(group("r", [joining(window, START_NS + window * WINDOW_NS, handles, ["t"] * 300)]))
        assert len(it.watch.replicas["r"]._stream.alive) <= 1_000


def test_steps_that_tell_no_batches_are_counted_and_their_requests_by_their_spans() -> None:
    it = Watched()
    rng = random.Random(0)
    for window in range(4):
        begin = START_NS + window * WINDOW_NS
        steps = [step(window * 50 + number, begin + number * S // 10, PREFILL_TOKENS=7) for number in range(50)]
        spans = [
            request(f"{window}-{number}", begin, begin + 2 * S, "tenant=plain", LATENCY_TTFT=0.3 + rng.random() / 10)
            for number in range(5)
        ]
        it.window(group("aggregated", [*steps, *spans]), group("vllm", spans))
    assert it.total(families.STEPS, replica="aggregated") == 200
    assert it.total(families.COVERAGE, replica="aggregated") == 0
    assert it.total(families.REQUESTS, tenant="plain") == 40
    assert it.total(families.TTFT, "_count", tenant="plain") == 40
    assert it.total(families.TTFT, "_bucket", tenant="plain", le="0.25") == 0
    assert it.total(families.TTFT, "_bucket", tenant="plain", le="0.5") == 40
    assert it.total(families.E2E, "_sum", tenant="plain") == pytest.approx(80)
    assert it.total(families.STALLED) == 0
