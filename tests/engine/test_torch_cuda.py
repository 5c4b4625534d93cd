"""The GPU executor's numbers, order and packing; on a CPU through the same code, its kernels and graphs on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stallscope_engine.config import EngineConfig
from stallscope_engine.executors.choice import find_device, fit_to_device, make_executor
from stallscope_engine.executors.cuda.memory import block_bytes, fitting_blocks, weight_bytes
from stallscope_engine.models.configs import NAMED, ModelConfig, random_prompt
from stallscope_engine.request import Request, Sampling
from stallscope_engine.scheduler import Batch, Scheduler
from stallscope_telemetry.records import FinishReason, RequestInfo, RequestState

torch = pytest.importorskip("torch", reason="torch is not installed (extra: engine)")
pytest.importorskip("transformers", reason="transformers is not installed (extra: dev)")

from stallscope_engine.executors import torch_cuda  # noqa: E402
from stallscope_engine.executors.cuda.decode_graphs import DecodeGraphs, batch_sizes, context_sizes  # noqa: E402
from stallscope_engine.executors.cuda.sampling import draw_chances, sample  # noqa: E402
from stallscope_engine.executors.cuda.step_buffer import GROUPS, StepBuffer, StepShape  # noqa: E402
from stallscope_engine.executors.torch_cpu import TorchExecutor  # noqa: E402
from stallscope_engine.executors.torch_cuda import TorchCudaExecutor  # noqa: E402
from stallscope_engine.models.cuda.attention import (  # noqa: E402
    GatheredAttention,
    VarlenAttention,
    choose_attention,
    make_group,
)
from stallscope_engine.models.cuda.decoder import (  # noqa: E402
    DecoderInputs,
    DeviceDecoder,
    PlainLinear,
    _gated,
    _rotate,
)
from stallscope_engine.models.weights import LayerWeights, Weights, random_weights  # noqa: E402
from tests.engine.references import MODELS, TINY, Reference, save  # noqa: E402

GREEDY = Sampling()
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA GPU here")
# Grouped heads of a size that FlashAttention has; contexts of several blocks of 256.
GPU_MODEL = replace(TINY, hidden_size=256, head_dim=64, num_attention_heads=8, vocab_size=2048)
GPU_CONFIG = EngineConfig(max_num_seqs=20, max_num_batched_tokens=600, block_size=256, kv_blocks=80)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Reference]:
    return {name: save(config, tmp_path_factory.mktemp("model")) for name, config in MODELS.items()}


def on_cpu(config: EngineConfig, reference: Reference) -> TorchCudaExecutor:
    return TorchCudaExecutor(config, reference.folder, "float32", device="cpu")


def make_request(
    handle: int, prompt: int, output: int, sampling: Sampling = GREEDY, model: ModelConfig = TINY
) -> Request:
    info = RequestInfo(handle, f"r{handle}", 0, prompt, output)
    return Request(info, random_prompt(model, prompt, seed=handle), sampling)


def serve(executor: TorchCudaExecutor, config: EngineConfig, requests: list[Request]) -> list[Batch]:
    """Runs the requests to their end, a step at a time; returns the batches."""
    scheduler = Scheduler(config)
    for request in requests:
        scheduler.add(request)
    batches = []
    while scheduler.has_work:
        batch = scheduler.schedule(len(batches))
        assert batch is not None
        executor.dispatch(batch)
        scheduler.complete(batch, len(batches), executor.collect(batch).stopped)
        batches.append(batch)
    return batches


# --- numbers ------------------------------------------------------------------------------------------------------


@st.composite
def workloads(draw: st.DrawFn) -> tuple[EngineConfig, list[tuple[int, int]]]:
    """An engine, and requests (prompt tokens, output tokens) that it accepts."""
    shapes = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=8))
    longest = max(prompt + output for prompt, output in shapes)
    block_size = draw(st.sampled_from([1, 3, 16]))
    least = -(-longest // block_size)
    config = EngineConfig(
        max_num_seqs=draw(st.integers(1, 8)),
        max_num_batched_tokens=draw(st.integers(1, 40)),
        block_size=block_size,
        kv_blocks=draw(st.integers(least, 2 * least)),
    )
    return config, shapes


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(workload=workloads(), name=st.sampled_from(sorted(MODELS)))
def test_greedy_tokens_are_those_of_transformers_whatever_the_batches(
    references: dict[str, Reference], workload: tuple[EngineConfig, list[tuple[int, int]]], name: str
) -> None:
    config, shapes = workload
    requests = [make_request(handle, *shape) for handle, shape in enumerate(shapes)]
    serve(on_cpu(config, references[name]), config, requests)
    for request in requests:
        assert len(request.output_token_ids) == request.info.max_tokens
        references[name].check_greedy(request)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers_for_chunks_beside_decodes(
    references: dict[str, Reference], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def keep(logits: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        seen.append(logits.clone())
        return sample(logits, *others)

    monkeypatch.setattr(torch_cuda, "sample", keep)
    config = EngineConfig(max_num_seqs=5, max_num_batched_tokens=33, block_size=4, kv_blocks=100)
    requests = [make_request(handle, tokens, 12) for handle, tokens in enumerate((1, 70, 9, 40, 25))]
    batches = serve(on_cpu(config, references[name]), config, requests)
    kinds = [{tokens > 1 for tokens in batch.num_tokens} for batch in batches]
    assert {True, False} in kinds and {False} in kinds  # noqa: PT018 - one claim: both kinds of batch were there
    given_of = {request: iter(references[name].logits(sequence(request))[-13:-1]) for request in requests}
    logits = iter([row for step in seen for row in step])
    for batch in batches:
        parts = list(zip(batch.requests, batch.num_tokens, batch.starts, batch.samples, strict=True))
        parts.sort(key=lambda part: 2 if part[1] == 1 else min(part[2], 1))
        for request, _, _, samples in parts:
            if samples:
                torch.testing.assert_close(next(logits), next(given_of[request]), rtol=1e-4, atol=1e-4)
    assert next(logits, None) is None


def test_bfloat16_is_near_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(NAMED["tiny-qwen3"], num_hidden_layers=2)
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=50, kv_blocks=60)
    steps: dict[str, list[torch.Tensor]] = {"float32": [], "bfloat16": []}
    for dtype, seen in steps.items():

        def keep(logits: torch.Tensor, *_: object, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(logits.float())
            return torch.full((len(logits),), 5)  # so that both go the same way

        monkeypatch.setattr(torch_cuda, "sample", keep)
        executor = TorchCudaExecutor(config, model, dtype, device="cpu")
        weights = random_weights(model, torch.float32, 0, partial(as_dtype, executor.dtype))
        executor._decoder._weights = rounded(weights, executor.dtype)
        serve(executor, config, [make_request(handle, 60 * handle + 7, 4, model=model) for handle in range(4)])
    exact, rough = (torch.cat(seen) for seen in steps.values())
    assert (exact - rough).square().mean().sqrt() < 0.03 * exact.std()


def as_dtype(
    dtype: torch.dtype, weight: torch.Tensor, bias: torch.Tensor | None = None, silu: bool = False
) -> PlainLinear:
    return PlainLinear(weight.to(dtype), bias, silu)


def rounded(weights: Weights[PlainLinear], dtype: torch.dtype) -> Weights[PlainLinear]:
    """The same numbers in another data type: what is drawn in it differs."""
    layers = tuple(
        replace(
            layer,
            input_norm=layer.input_norm.to(dtype),
            mlp_norm=layer.mlp_norm.to(dtype),
            qk_norm=None if layer.qk_norm is None else layer.qk_norm.to(dtype),
        )
        for layer in weights.layers
    )
    return replace(weights, embedding=weights.embedding.to(dtype), layers=layers, norm=weights.norm.to(dtype))


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
def test_a_gpus_attention_takes_what_the_decoder_gives_it(name: str) -> None:
    """Nothing is computed: on torch's meta device only shapes and data types go through the network."""
    model, kind, meta = NAMED[name], torch.bfloat16, torch.device("meta")
    shapes = rounded(random_weights(model, torch.float32, 0, partial(as_dtype, kind)), kind)
    weights = replace(
        shapes,
        embedding=shapes.embedding.to(meta),
        norm=shapes.norm.to(meta),
        head=as_dtype(kind, shapes.embedding.to(meta)),
        layers=tuple(on_meta(layer) for layer in shapes.layers),
    )
    cache = torch.empty(4, 2, 9, 256, model.num_key_value_heads, model.head_dim, dtype=kind, device=meta)
    decoder = DeviceDecoder(model, weights, cache, VarlenAttention(splits=True))
    groups, first = [], 0
    for spans in ([(300, 300), (2, 2)], [(5, 400)], [(1, 1), (1, 600), (1, 9)]):
        group = make_group(first, spans, torch.zeros(len(spans), 3, dtype=torch.int32))
        on_device = {name: getattr(group, name).to(meta) for name in ("starts", "contexts", "context_starts", "table")}
        groups.append(replace(group, **on_device))
        first += group.rows
    words = torch.empty(first, dtype=torch.int32, device=meta)
    with torch.inference_mode():
        logits = decoder.forward(DecoderInputs(words, words, words.long(), groups, words[:4]))
        tokens = sample(logits, torch.empty(4, device=meta), words[:4])
    assert (logits.shape, logits.dtype, tokens.shape, tokens.dtype) == ((4, 2048), kind, (4,), torch.int64)


def on_meta(layer: LayerWeights[PlainLinear]) -> LayerWeights[PlainLinear]:
    moved = {}
    for name in layer.__dataclass_fields__:
        value = getattr(layer, name)
        if isinstance(value, PlainLinear):
            moved[name] = PlainLinear(value._weight.t().to("meta"))
        else:
            moved[name] = None if value is None else value.to("meta")
    return LayerWeights(**moved)


def sequence(request: Request) -> list[int]:
    return [*request.prompt_token_ids, *request.output_token_ids]


@pytest.mark.parametrize("block_size", [1, 16])
def test_preempted_requests_go_on_where_they_were(references: dict[str, Reference], block_size: int) -> None:
    config = EngineConfig(max_num_seqs=6, max_num_batched_tokens=50, block_size=block_size, kv_blocks=160 // block_size)
    requests = [make_request(handle, 20 + handle, 40) for handle in range(8)]
    serve(on_cpu(config, references["Qwen3"]), config, requests)
    assert sum(request.preemptions for request in requests) >= 3
    assert sum(references["Qwen3"].check_greedy(request) for request in requests) > 0.9 * 8 * 40


def test_requests_share_the_blocks_of_a_common_beginning(references: dict[str, Reference]) -> None:
    reference = references["grouped"]
    config = EngineConfig(max_num_seqs=2, block_size=4, kv_blocks=20)
    first, second = make_request(0, 11, 5), make_request(1, 14, 5)
    second.prompt_token_ids = [*first.prompt_token_ids[:8], *second.prompt_token_ids[8:]]
    first.blocks, second.blocks = [7, 3, 12, 5, 1], [7, 3, 9, 0, 19]
    executor = on_cpu(config, reference)
    run_in_turns(executor, steps_of((first, 0, 11)), lag=0)
    run_in_turns(executor, steps_of((second, 8, 6), (first, 15, 1)), lag=0)
    assert reference.check_greedy(first) == len(first.output_token_ids) == 10
    assert reference.check_greedy(second) == 5


# --- order --------------------------------------------------------------------------------------------------------


def steps_of(*parts: tuple[Request, int, int], steps: int = 5) -> Iterator[Batch]:
    """Each request prefills (start, tokens) at once and then decodes, in ``steps`` batches, whatever its tokens are."""
    at = [(request, start, tokens) for request, start, tokens in parts]
    for _ in range(steps):
        batch = Batch(0)
        for request, start, tokens in at:
            request.state = RequestState.RUNNING
            batch.requests.append(request)
            batch.starts.append(start)
            batch.num_tokens.append(tokens)
            batch.samples.append(True)
        yield batch
        at = [(request, start + tokens, 1) for request, start, tokens in at]


def run_in_turns(executor: TorchCudaExecutor, batches: Iterator[Batch], lag: int) -> None:
    """Collects each batch when ``lag`` more have been dispatched."""
    in_flight: list[Batch] = []
    for batch in batches:
        executor.dispatch(batch)
        in_flight.append(batch)
        if len(in_flight) > lag:
            executor.collect(in_flight.pop(0))
    for batch in in_flight:
        executor.collect(batch)


def outputs_in_turns(make: Callable[[], TorchCudaExecutor], lag: int, model: ModelConfig = TINY) -> list[list[int]]:
    size = make().config.block_size
    drawn = Sampling(temperature=1.0, seed=4)
    requests = [make_request(0, 2 * size + 1, 99, model=model), make_request(1, 5, 99, drawn, model)]
    requests[0].blocks, requests[1].blocks = [5, 2, 9, 0], [1, 7]
    run_in_turns(make(), steps_of((requests[0], 0, 2 * size + 1), (requests[1], 0, 5), steps=12), lag)
    for request in requests:
        request.finish_reason = FinishReason.LENGTH
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize("lag", [1, 3])
def test_tokens_are_the_same_when_a_step_is_dispatched_before_the_last_is_collected(
    references: dict[str, Reference], lag: int
) -> None:
    executor = on_cpu(EngineConfig(max_num_seqs=3, kv_blocks=12), references["Qwen3"])
    one_by_one = outputs_in_turns(lambda: executor, 0)
    assert outputs_in_turns(lambda: executor, lag) == one_by_one
    assert [len(outputs) for outputs in one_by_one] == [12, 12]


def test_a_request_that_ended_while_its_step_was_in_flight_gets_no_token(references: dict[str, Reference]) -> None:
    executor = on_cpu(EngineConfig(max_num_seqs=3, kv_blocks=12), references["grouped"])
    gone, stays = make_request(0, 5, 9), make_request(1, 6, 9)
    gone.blocks, stays.blocks = [3], [4]
    first, second = steps_of((gone, 0, 5), (stays, 0, 6), steps=2)
    executor.dispatch(first)
    executor.dispatch(second)
    executor.collect(first)
    gone.finish_reason = FinishReason.ABORT
    executor.collect(second)
    assert (len(gone.output_token_ids), len(stays.output_token_ids)) == (1, 2)


def test_a_batch_that_was_passed_over_is_lost(references: dict[str, Reference]) -> None:
    executor = on_cpu(EngineConfig(max_num_seqs=3, kv_blocks=12), references["grouped"])
    request = make_request(0, 5, 9)
    request.blocks = [3]
    first, second = steps_of((request, 0, 5), steps=2)
    executor.dispatch(first)
    executor.dispatch(second)
    executor.collect(second)
    assert len(request.output_token_ids) == 1
    with pytest.raises(ValueError, match="never dispatched, or is lost"):
        executor.collect(first)


def test_an_executor_outlives_many_more_requests_than_it_has_lines(references: dict[str, Reference]) -> None:
    config = EngineConfig(max_num_seqs=3, kv_blocks=9)
    executor = on_cpu(config, references["grouped"])
    for handle in range(12):
        request = make_request(handle, 20, 8)
        serve(executor, config, [request])
        assert references["grouped"].check_greedy(request) > 0


def test_more_changes_of_the_block_table_than_a_step_has_room_for_are_sent_before_it(
    references: dict[str, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_cuda, "MOST_CHANGES", 3)
    config = EngineConfig(max_num_seqs=6, max_num_batched_tokens=90, block_size=2, kv_blocks=80)
    requests = [make_request(handle, 20 + handle, 20) for handle in range(6)]
    serve(on_cpu(config, references["grouped"]), config, requests)
    assert sum(references["grouped"].check_greedy(request) for request in requests) > 0.9 * 6 * 20


def test_an_end_of_text_token_ends_a_request_unless_it_is_ignored(references: dict[str, Reference]) -> None:
    config = EngineConfig(kv_blocks=40)
    executor = on_cpu(config, references["grouped"])

    def run(ignore_eos: bool) -> Request:
        request = make_request(0, 12, 200, Sampling(temperature=5.0, seed=3, ignore_eos=ignore_eos))
        serve(executor, config, [request])
        return request

    whole, stopped = run(ignore_eos=True), run(ignore_eos=False)
    assert 2 in whole.output_token_ids[:-1]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.output_token_ids == whole.output_token_ids[: whole.output_token_ids.index(2) + 1]


# --- what graphs read ---------------------------------------------------------------------------------------------


class ReplayedWithoutGraphs(DecodeGraphs):
    """Graphs of a device without any: a replay runs the same work on the same places, kernel by kernel."""

    def __init__(self, executor: TorchCudaExecutor, most_context: int) -> None:
        self._sizes = batch_sizes(executor.config.max_num_seqs)
        self._contexts = context_sizes(most_context)
        self._forward = executor._decode_buffer
        self.replayed: list[tuple[int, int]] = []

    def replay(self, size: int, context: int) -> None:
        self.replayed.append((size, context))
        self._forward(size, context)


def test_a_padded_batch_of_decodes_has_the_tokens_of_an_exact_one(references: dict[str, Reference]) -> None:
    reference = references["Qwen3"]
    config = EngineConfig(max_num_seqs=20, max_num_batched_tokens=90, block_size=4, kv_blocks=500)
    executor = on_cpu(config, reference)
    graphs = executor._graphs = ReplayedWithoutGraphs(executor, 60)
    # Ones that end early leave 11, then 3; some go past the largest bound, and are computed without a graph.
    requests = [make_request(handle, 7 + handle, 30 if handle < 3 else 12 + handle % 2) for handle in range(18)]
    requests.append(make_request(18, 58, 9))
    serve(executor, config, requests)
    assert {size for size, _ in graphs.replayed} >= {4, 20}
    judged = sum(reference.check_greedy(request) for request in requests)
    assert judged > 0.9 * sum(request.info.max_tokens for request in requests)


def test_sizes_of_graphs_cover_every_batch_and_context() -> None:
    assert batch_sizes(1) == [1]
    assert batch_sizes(6) == [1, 2, 4, 6]
    assert batch_sizes(20) == [1, 2, 4, 8, 16, 20]
    assert context_sizes(1500) == [1500]
    assert context_sizes(9000) == [2048, 4096, 8192, 9000]


def test_a_steps_inputs_arrive_as_they_were_written_and_where_they_were_before() -> None:
    buffer = StepBuffer(StepShape(40, 8, 30), torch.device("cpu"))
    drawn = np.random.default_rng(0)
    places = []
    for changes in (0, 17, 30):
        shape = StepShape(21, 5, changes)
        host = buffer.write(shape)
        written = {}
        for name in host.__dataclass_fields__:
            array = getattr(host, name)
            array[:] = drawn.integers(0, 2**31, len(array))
            written[name] = array.copy()
        device = buffer.send(shape)
        for name, values in written.items():
            assert np.array_equal(getattr(device, name).numpy().view(values.dtype), values), name
        assert len(device.starts) == 5 + GROUPS
        places.append([getattr(device, name).data_ptr() for name in written if name not in {"changed", "blocks"}])
    assert places[0] == places[1] == places[2]  # the inputs of one shape lie in one place, whatever changed


def test_what_is_written_next_leaves_what_was_just_sent() -> None:
    buffer = StepBuffer(StepShape(4, 2, 0), torch.device("cpu"))
    shape = StepShape(4, 2, 0)
    first = buffer.write(shape)
    assert not np.shares_memory(first.token_ids, buffer.write(shape).token_ids)
    assert np.shares_memory(first.token_ids, buffer.write(shape).token_ids)


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_functions_between_products_can_be_traced_whole(rows: int) -> None:
    heads, gate, up = torch.randn(rows, 3, 8), torch.randn(rows, 16), torch.randn(rows, 16)
    angles = torch.randn(rows, 1, 4)
    for function, inputs in ((_rotate, (heads, angles.cos(), angles.sin())), (_gated, (gate, up))):
        traced = torch.compile(function, dynamic=True, fullgraph=True, backend="eager")
        torch.testing.assert_close(traced(*inputs), function(*inputs))


# --- sampling -----------------------------------------------------------------------------------------------------


def test_a_drawn_token_depends_on_its_seed_and_not_on_its_batch_mates(references: dict[str, Reference]) -> None:
    config = EngineConfig(max_num_batched_tokens=64, kv_blocks=40)

    def outputs(mates: int, seed: int) -> list[int]:
        sampled = make_request(0, 15, 30, Sampling(temperature=1.0, seed=seed))
        others = [make_request(mate, 30, 30, Sampling(temperature=mate % 3, seed=mate)) for mate in range(1, mates)]
        serve(on_cpu(config, references["grouped"]), config, [sampled, *others])
        return sampled.output_token_ids

    alone = outputs(mates=1, seed=5)
    assert outputs(mates=14, seed=5) == alone
    assert outputs(mates=1, seed=6) != alone


def test_drawn_tokens_follow_the_softmax_at_their_temperature() -> None:
    draws = 20_000
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 3
    for temperature in (0.5, 2.0):
        chances = torch.from_numpy(draw_chances(list(range(draws)), [3] * draws).view(np.int32))
        tokens = sample(logits.expand(draws, -1), torch.full((draws,), temperature), chances)
        expected = draws * torch.softmax(logits / temperature, -1)
        counted = torch.bincount(tokens, minlength=40)
        # Each count is binomial; five standard deviations and one draw for rare tokens.
        assert ((counted - expected).abs() <= 5 * expected.sqrt() + 1).all()


def test_temperature_zero_is_greedy_beside_requests_that_draw() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    tokens = sample(logits, torch.tensor([0.0, 100.0, 0.0]), torch.tensor([-1, -1, 0], dtype=torch.int32))
    assert tokens[[0, 2]].equal(logits[[0, 2]].argmax(-1))
    assert tokens[1] == 49  # a chance of nearly one lies above all tokens but the last


def test_chances_are_uniform_over_seeds_and_over_positions() -> None:
    for seeds, indices in ((list(range(4096)), [1] * 4096), ([-7] * 4096, list(range(4096))), ([2**70] * 9, [0] * 9)):
        chances = draw_chances(seeds, indices)
        assert np.array_equal(chances, draw_chances(seeds, indices))
        if len(chances) > 9:
            counted = np.bincount(chances >> 28, minlength=16)
            assert abs(counted - 256).max() < 5 * 16
            assert abs(np.corrcoef(chances[1:], chances[:-1])[0, 1]) < 0.08


# --- memory and choice --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-qwen3"])
def test_weights_take_the_memory_that_was_reckoned(name: str) -> None:
    made: list[torch.Tensor] = []

    def keep(weight: torch.Tensor, bias: torch.Tensor | None = None, silu: bool = False) -> None:
        made.append(weight)

    weights = random_weights(NAMED[name], torch.bfloat16, 0, keep)
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in (*made, weights.embedding)}
    assert sum(tensors.values()) == weight_bytes(NAMED[name], 2)


def test_published_shapes_have_their_published_size() -> None:
    assert weight_bytes(NAMED["llama-8b"], 1) == pytest.approx(8.03e9, rel=0.001)
    assert block_bytes(256, NAMED["llama-8b"], 2) == 256 * 131072


def test_kv_blocks_that_fit_leave_room_for_the_largest_step() -> None:
    model = NAMED["llama-8b"]
    config = EngineConfig(max_num_seqs=64, max_num_batched_tokens=8192, block_size=256)
    free = 60 * 2**30
    blocks = fitting_blocks(config, model, free, 2)
    assert 0.75 * free < blocks * block_bytes(256, model, 2) < 0.92 * free
    assert fitting_blocks(replace(config, max_num_batched_tokens=65536), model, free, 2) < blocks
    assert fitting_blocks(config, model, 10**9, 2) == 0


def test_a_device_is_found_or_named_as_missing() -> None:
    assert find_device("cpu") == "cpu"
    assert find_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match="device must be one of auto, cpu, cuda, not 'tpu'"):
        find_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_cuda_is_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^device cuda: torch .*; install a CUDA build and a driver, or use [^\n]*$"):
        make_executor(EngineConfig(kv_blocks=8), TINY, "cuda")


def test_the_cpu_keeps_its_executor_and_its_blocks() -> None:
    config = EngineConfig(kv_blocks=8)
    assert isinstance(make_executor(config, TINY, "cpu"), TorchExecutor)
    assert fit_to_device(config, TINY, "cpu") == config


def test_an_unknown_dtype_and_a_prompt_without_token_ids_are_refused(references: dict[str, Reference]) -> None:
    config = EngineConfig(kv_blocks=40)
    with pytest.raises(ValueError, match="dtype must be one of bfloat16, float32, not 'float8'"):
        TorchCudaExecutor(config, TINY, "float8", device="cpu")
    with pytest.raises(ValueError, match="request r0: 0 prompt token ids, but prompt_tokens is 5"):
        serve(on_cpu(config, references["grouped"]), config, [Request(RequestInfo(0, "r0", 0, 5, 2))])


# --- on a GPU -----------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("name", ["tiny-llama", "llama-8b", "qwen3-8b"])
def test_paged_attention_follows_blocks_of_256_tokens(name: str) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("FlashAttention needs compute capability 8.0")
    device = torch.device("cuda")
    assert isinstance(choose_attention(NAMED[name], 256, torch.bfloat16, device), VarlenAttention)
    assert isinstance(choose_attention(NAMED[name], 16, torch.bfloat16, device), GatheredAttention)


@needs_gpu
def test_a_gpus_tokens_are_those_of_transformers(references: dict[str, Reference]) -> None:
    config = EngineConfig(max_num_seqs=6, max_num_batched_tokens=50, block_size=16, kv_blocks=20)
    requests = [make_request(handle, 20 + handle, 20) for handle in range(8)]
    serve(TorchCudaExecutor(config, references["Qwen3"].folder, "float32"), config, requests)
    assert sum(references["Qwen3"].check_greedy(request) for request in requests) > 0.8 * 8 * 20


@needs_gpu
def test_graphs_compute_what_kernels_one_by_one_do(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []

    def keep(logits: torch.Tensor, *others: torch.Tensor | None) -> torch.Tensor:
        seen.append(logits.float().cpu())
        return torch.zeros(len(logits), dtype=torch.int64, device=logits.device)  # so that both go the same way

    monkeypatch.setattr(torch_cuda, "sample", keep)
    steps = []
    for graphs in (True, False):
        executor = TorchCudaExecutor(GPU_CONFIG, GPU_MODEL, seed=1, graphs=graphs)
        assert (executor._graphs is not None) == graphs
        requests = [make_request(handle, 40 * handle + 1, 12, model=GPU_MODEL) for handle in range(13)]
        serve(executor, GPU_CONFIG, requests)
        steps.append(seen[:])
        seen.clear()
    for with_graph, without in zip(*steps, strict=True):
        assert (with_graph - without).square().mean().sqrt() < 0.03 * without.std()


@needs_gpu
def test_on_a_gpu_too_a_step_may_be_dispatched_before_the_last_is_collected() -> None:
    executor = TorchCudaExecutor(GPU_CONFIG, GPU_MODEL, seed=1)
    one_by_one = outputs_in_turns(lambda: executor, 0, GPU_MODEL)
    assert outputs_in_turns(lambda: executor, 1, GPU_MODEL) == one_by_one


@needs_gpu
def test_a_step_on_a_gpu_says_how_long_the_device_took_and_never_waits_for_it() -> None:
    executor = TorchCudaExecutor(GPU_CONFIG, GPU_MODEL, seed=1)
    request = make_request(0, 5, 9, Sampling(temperature=1.0), GPU_MODEL)
    request.blocks = [3]
    first, second = steps_of((request, 0, 5), steps=2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        executor.dispatch(first)
        executor.dispatch(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert executor.collect(first).device_ns > 0
    assert executor.collect(second).device_ns > 0


@needs_gpu
def test_as_many_blocks_as_fit_a_gpu_are_accepted_by_its_executor() -> None:
    config = fit_to_device(replace(GPU_CONFIG, block_size=16), GPU_MODEL, "cuda")
    assert config.block_size == 256
    request = make_request(0, 300, 9, model=GPU_MODEL)
    serve(make_executor(config, GPU_MODEL, "cuda"), config, [request])
    assert len(request.output_token_ids) == 9


@needs_gpu
def test_more_kv_blocks_than_fit_are_refused_with_the_number_that_would() -> None:
    with pytest.raises(ValueError, match=r"kv_blocks=\d+ need .* GiB, but .* has room for \d+: lower kv_blocks"):
        TorchCudaExecutor(replace(GPU_CONFIG, kv_blocks=10**8), GPU_MODEL)


def test_plain_linear_is_a_product_with_the_transpose() -> None:
    weight, bias, inputs = torch.randn(6, 4), torch.randn(6), torch.randn(3, 4)
    exact = torch.nn.functional.linear(inputs, weight, bias)
    torch.testing.assert_close(PlainLinear(weight, bias)(inputs), exact)
    residual = torch.randn(3, 6)
    added = residual + inputs @ weight.T
    torch.testing.assert_close(PlainLinear(weight).add_to(residual, inputs), added)
