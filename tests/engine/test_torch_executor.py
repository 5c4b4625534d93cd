"""The torch executor computes what a plain Llama or Qwen computes, whatever the scheduler does to its requests."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, VirtualClock
from stallscope_engine.models.configs import random_prompt
from stallscope_engine.request import Request, Sampling
from stallscope_telemetry.records import FinishReason, RequestInfo

torch = pytest.importorskip("torch", reason="torch is not installed (extra: engine)")
pytest.importorskip("transformers", reason="transformers is not installed (extra: dev)")

from stallscope_engine.executors.torch_cpu import TorchExecutor  # noqa: E402
from tests.engine.references import MODELS, TINY, Reference, save  # noqa: E402

GREEDY = Sampling()


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return {name: save(config, tmp_path_factory.mktemp("model")) for name, config in MODELS.items()}


def make_request(handle: int, prompt: int, output: int, arrival_ns: int = 0, sampling: Sampling = GREEDY) -> Request:
    info = RequestInfo(handle, f"r{handle}", arrival_ns, prompt, output)
    return Request(info, random_prompt(TINY, prompt, seed=handle), sampling)


def serve(executor: TorchExecutor, config: EngineConfig, requests: list[Request]) -> None:
    """Runs the requests to their end; one that arrives at n ns joins before step n."""
    clock = VirtualClock(0)
    engine = Engine(config, executor, clock)
    waiting = sorted(requests, key=lambda request: request.info.arrival_ns)
    for step in itertools.count():
        clock.wait_until(step)
        while waiting and waiting[0].info.arrival_ns <= step:
            engine.submit(waiting.pop(0))
        engine.step()
        if not waiting and not engine.scheduler.has_work:
            return


@st.composite
def workloads(draw: st.DrawFn) -> tuple[EngineConfig, list[tuple[int, int, int]]]:
    """An engine, and requests (prompt tokens, output tokens, step of arrival) that it accepts."""
    shapes = draw(
        st.lists(st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(0, 20)), min_size=1, max_size=8)
    )
    longest = max(prompt + output for prompt, output, _ in shapes)
    block_size = draw(st.sampled_from([1, 3, 4, 16]))
    least = -(-longest // block_size)
    chunked = draw(st.booleans())
    budget = draw(st.integers(1, 40) if chunked else st.integers(longest, longest + 40))
    config = EngineConfig(
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=budget,
        chunked_prefill=chunked,
        block_size=block_size,
        kv_blocks=draw(st.integers(least, 2 * least)),
        watermark=draw(st.sampled_from([0.0, 0.1])),
    )
    return config, shapes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(workload=workloads(), name=st.sampled_from(sorted(MODELS)))
def test_greedy_tokens_are_those_of_transformers_whatever_the_batches(
    references: dict[str, Reference], workload: tuple[EngineConfig, list[tuple[int, int, int]]], name: str
) -> None:
    config, shapes = workload
    reference = references[name]
    requests = [make_request(handle, *shape) for handle, shape in enumerate(shapes)]
    serve(TorchExecutor(config, reference.folder, dtype="float32"), config, requests)
    for request in requests:
        assert len(request.output_token_ids) == request.info.max_tokens
        reference.check_greedy(request)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("block_size", [1, 16])
def test_preempted_requests_go_on_where_they_were(references: dict[str, Reference], name: str, block_size: int) -> None:
    config = EngineConfig(max_num_seqs=6, max_num_batched_tokens=50, block_size=block_size, kv_blocks=160 // block_size)
    requests = [make_request(handle, 20 + handle, 40) for handle in range(8)]
    serve(TorchExecutor(config, references[name].folder, dtype="float32"), config, requests)
    assert sum(request.preemptions for request in requests) >= 3
    judged = sum(references[name].check_greedy(request) for request in requests)
    assert judged > 0.9 * 8 * 40  # near ties are rare: the comparison is not empty


def test_a_prompt_longer_than_a_tile_and_decodes_of_very_different_contexts_are_exact(
    references: dict[str, Reference],
) -> None:
    reference = references["grouped"]
    for budget in (600, 150):
        config = EngineConfig(max_num_batched_tokens=budget, kv_blocks=500, block_size=5)
        requests = [make_request(0, 413, 12), *(make_request(handle, 3 * handle, 20) for handle in range(1, 20))]
        requests.append(make_request(20, 300, 9, arrival_ns=4))
        serve(TorchExecutor(config, reference.folder, dtype="float32"), config, requests)
        judged = sum(reference.check_greedy(request) for request in requests)
        assert judged > 0.9 * sum(request.info.max_tokens for request in requests)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_weights_of_a_saved_model_are_read(tmp_path: Path, tied: bool, shard_size: str) -> None:
    reference = save(replace(TINY, tie_word_embeddings=tied), tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "20KB")
    config = EngineConfig(kv_blocks=20)
    request = make_request(0, 10, 20)
    serve(TorchExecutor(config, tmp_path, dtype="float32"), config, [request])
    assert reference.check_greedy(request) >= 10


def test_a_drawn_token_depends_on_its_seed_and_not_on_its_batch_mates(references: dict[str, Reference]) -> None:
    config = EngineConfig(max_num_batched_tokens=64, kv_blocks=40)

    def outputs(mates: int, seed: int) -> list[int]:
        sampled = make_request(0, 15, 30, sampling=Sampling(temperature=1.0, seed=seed))
        others = [make_request(mate, 30, 30, sampling=Sampling(temperature=2.0, seed=mate)) for mate in range(1, mates)]
        serve(TorchExecutor(config, references["grouped"].folder, dtype="float32"), config, [sampled, *others])
        return sampled.output_token_ids

    alone = outputs(mates=1, seed=5)
    assert outputs(mates=14, seed=5) == alone
    assert outputs(mates=1, seed=6) != alone


def test_drawn_tokens_follow_the_softmax_at_their_temperature(references: dict[str, Reference]) -> None:
    reference, temperature, draws = references["grouped"], 2.0, 400
    config = EngineConfig(max_num_seqs=draws, max_num_batched_tokens=4000, kv_blocks=draws)
    prompt = random_prompt(TINY, 9, seed=0)
    requests = [
        Request(RequestInfo(seed, f"r{seed}", 0, 9, 1), prompt, Sampling(temperature, seed)) for seed in range(draws)
    ]
    serve(TorchExecutor(config, reference.folder, dtype="float32"), config, requests)
    expected = torch.softmax(reference.logits(prompt)[-1] / temperature, -1)
    counted = torch.bincount(torch.tensor([request.output_token_ids[0] for request in requests]), minlength=128)
    # Each count is binomial; five standard deviations and one draw for rare tokens.
    assert ((counted - draws * expected).abs() <= 5 * (draws * expected * (1 - expected)).sqrt() + 1).all()


def test_an_end_of_text_token_ends_a_request_unless_it_is_ignored(references: dict[str, Reference]) -> None:
    config = EngineConfig(kv_blocks=40)
    executor = TorchExecutor(config, references["grouped"].folder, dtype="float32")

    def run(ignore_eos: bool) -> Request:
        request = make_request(0, 12, 200, sampling=Sampling(temperature=5.0, seed=1, ignore_eos=ignore_eos))
        serve(executor, config, [request])
        return request

    whole, stopped = run(ignore_eos=True), run(ignore_eos=False)
    assert whole.finish_reason is FinishReason.LENGTH
    assert 2 in whole.output_token_ids
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.output_token_ids == whole.output_token_ids[: whole.output_token_ids.index(2) + 1]


def test_an_executor_outlives_many_more_requests_than_it_has_lines(references: dict[str, Reference]) -> None:
    config = EngineConfig(max_num_seqs=3, kv_blocks=9)
    executor = TorchExecutor(config, references["grouped"].folder, dtype="float32")
    for handle in range(12):
        request = make_request(handle, 20, 8)
        serve(executor, config, [request])
        assert references["grouped"].check_greedy(request) > 0


def test_a_prompt_without_its_token_ids_is_refused(references: dict[str, Reference]) -> None:
    config = EngineConfig(kv_blocks=40)
    executor = TorchExecutor(config, references["grouped"].folder)
    with pytest.raises(ValueError, match="request r0: 0 prompt token ids, but prompt_tokens is 5"):
        serve(executor, config, [Request(RequestInfo(0, "r0", 0, 5, 2))])


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float32, not 'float8'"):
        TorchExecutor(EngineConfig(), TINY, dtype="float8")
