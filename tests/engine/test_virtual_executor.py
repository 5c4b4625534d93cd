"""Virtual time: what a step costs, that noise belongs to the time and not to the requests, and who moves the clock."""

from __future__ import annotations

from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, VirtualClock
from stallscope_engine.executors.virtual import MODEL_PROFILES, PROFILES, Noise, VirtualExecutor, cost_for
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch
from stallscope_telemetry.records import RequestInfo, RequestRecord, StepRecord

START_NS = 1_767_225_600_000_000_000
MS = 1_000_000


def request(handle: int, prompt: int = 10, output: int = 3, arrival_ns: int = START_NS) -> Request:
    return Request(RequestInfo(handle, f"chat-{handle}", arrival_ns, prompt, output, "chat"))


def batch_of(*chunks: tuple[int, int]) -> Batch:
    """A batch of (tokens, computed before); one token after some is a decode."""
    batch = Batch(START_NS)
    for handle, (tokens, start) in enumerate(chunks):
        batch.requests.append(request(handle))
        batch.num_tokens.append(tokens)
        batch.starts.append(start)
        if tokens == 1 and start:
            batch.decode_tokens += 1
        else:
            batch.prefill_tokens += tokens
    return batch


class Records:
    """A recorder that keeps steps."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    def wants_keyframe(self, step: int) -> bool:
        return False

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def request(self, record: RequestRecord) -> None:
        pass


@pytest.mark.parametrize(
    ("model", "chunks", "least_ms", "most_ms"),
    [
        ("tiny-llama", [(1, 150)] * 3, 2.5, 3.5),
        ("tiny-llama", [(1, 250)] * 32, 4, 6),
        ("tiny-llama", [(2048, 0)], 60, 90),
        ("tiny-llama", [(15_000, 0)], 1000, 1500),
        ("8b", [(1, 500)], 7.5, 8.5),
        ("8b", [(1, 800)] * 64, 10, 13),
        ("8b", [(28_000, 0)], 2300, 2700),
        ("llama-1b", [(1, 500)], 1.2, 1.8),
        ("llama-1b", [(28_000, 0)], 400, 500),
    ],
)
def test_profiles_cost_what_their_hardware_does(
    model: str, chunks: list[tuple[int, int]], least_ms: float, most_ms: float
) -> None:
    assert least_ms <= cost_for(model).step_ns(batch_of(*chunks)) / MS <= most_ms


def test_a_model_without_profile_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="'70b'; there is tiny-llama, 8b"):
        cost_for("70b")


def test_every_named_model_has_hardware() -> None:
    assert set(MODEL_PROFILES.values()) <= PROFILES.keys()


def test_compute_comes_in_tiles_where_it_decides() -> None:
    cost = cost_for("tiny-llama")
    within = cost.step_ns(batch_of((1025, 0))), cost.step_ns(batch_of((1056, 0)))
    beyond = cost.step_ns(batch_of((1057, 0)))
    attention_ns = cost.pair_ns * (1056 * 1057 - 1025 * 1026) / 2
    assert within[1] - within[0] == pytest.approx(attention_ns)
    assert beyond - within[1] > cost.tile_tokens * cost.token_ns


def test_a_decode_hidden_behind_compute_costs_less_than_it_does_alone() -> None:
    cost = cost_for("tiny-llama")
    prefill, decode = batch_of((2040, 0)), batch_of((1, 2000))
    both = batch_of((2040, 0), (1, 2000))
    assert cost.step_ns(both) - cost.step_ns(prefill) < 0.1 * cost.step_ns(decode)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 5000)), min_size=2, max_size=20))
def test_one_more_request_never_makes_a_step_cheaper(chunks: list[tuple[int, int]]) -> None:
    cost = cost_for("tiny-llama")
    assert cost.step_ns(batch_of(*chunks)) >= cost.step_ns(batch_of(*chunks[:-1]))


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 5000)), min_size=1, max_size=20))
def test_attention_counts_each_token_against_all_before_it(chunks: list[tuple[int, int]]) -> None:
    cost = cost_for("tiny-llama")
    batch = batch_of(*chunks)
    tokens = sum(count for count, _ in chunks)
    pairs = sum(position + 1 for count, start in chunks for position in range(start, start + count))
    compute_ns = -(-tokens // cost.tile_tokens) * cost.tile_tokens * cost.token_ns + pairs * cost.pair_ns
    memory_ns = cost.weights_ns + sum(count + start for count, start in chunks) * cost.kv_token_ns
    assert cost.step_ns(batch) == pytest.approx(max(compute_ns, memory_ns) + cost.launch_ns)


@given(st.integers(0, 1000), st.lists(st.integers(START_NS, START_NS + 10**12), min_size=1, max_size=20))
def test_noise_depends_on_seed_and_time_alone(seed: int, times: list[int]) -> None:
    asked_often, asked_once = Noise(seed), Noise(seed)
    for time_ns in sorted(times):
        asked_often.at(time_ns)
    assert asked_often.at(times[0]) == asked_once.at(times[0])


def test_noise_is_centred_with_a_heavy_tail() -> None:
    noise = Noise(0)
    factors = [noise.at(START_NS + index * 10 * MS) for index in range(50_000)]
    assert median(factors) == pytest.approx(1, rel=0.01)
    assert fmean(factor > 1.5 for factor in factors) == pytest.approx(0.01 * 1.5**-2.5, rel=0.3)
    assert 3 < max(factors) < 12


def test_noise_differs_by_seed_and_slice_of_time() -> None:
    noise = Noise(1)
    assert noise.at(START_NS) == noise.at(START_NS + 10 * MS - 1)
    assert len({noise.at(START_NS), noise.at(START_NS + 10 * MS), Noise(2).at(START_NS)}) == 3


def run(requests: list[Request], seed: int = 0) -> tuple[Engine, Records]:
    clock, records = VirtualClock(START_NS), Records()
    executor = VirtualExecutor(clock, cost_for("tiny-llama"), seed)
    engine = Engine(EngineConfig(), executor, clock, records, executor.spend_host_time)
    engine.run(requests)
    return engine, records


def test_the_clock_moves_by_the_cost_of_each_batch_and_nothing_is_computed() -> None:
    requests = [request(1, prompt=500, output=4), request(2, prompt=100, output=2)]
    engine, records = run(requests)
    noise, cost = Noise(0), cost_for("tiny-llama")
    first = records.steps[0]
    expected_ns = int(cost.step_ns(batch_of((500, 0), (100, 0))) * noise.at(first.dispatched_ns))
    assert first.ready_ns - first.dispatched_ns == expected_ns
    assert engine.clock.now_ns() == records.steps[-1].ready_ns
    assert [one.output_tokens for one in requests] == [4, 2]
    assert not any(one.output_token_ids for one in requests)


def test_host_time_lies_before_the_dispatch() -> None:
    _, records = run([request(1), request(2)])
    cost, noise = cost_for("tiny-llama"), Noise(0)
    for step in records.steps:
        host_ns = int((cost.host_ns + step.batch_size * cost.host_request_ns) * noise.at(step.scheduled_ns))
        assert step.sched_ns == step.dispatched_ns - step.scheduled_ns == host_ns


def test_steps_follow_without_a_gap_unless_the_engine_idles() -> None:
    late_ns = START_NS + 10**9
    _, records = run([request(1), request(2, arrival_ns=late_ns)])
    previous_ns = START_NS
    for step in records.steps:
        assert step.scheduled_ns - previous_ns == step.idle_ns
        previous_ns = step.ready_ns
    assert [step.scheduled_ns for step in records.steps if step.idle_ns] == [late_ns]


def test_the_same_seed_gives_the_same_run_and_another_one_does_not() -> None:
    def times(seed: int) -> list[int]:
        return [step.ready_ns for step in run([request(1), request(2)], seed)[1].steps]

    assert times(3) == times(3) != times(4)
