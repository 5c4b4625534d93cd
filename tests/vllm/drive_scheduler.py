"""A real vLLM scheduler without a model: random requests, made-up outputs, and a trace beside what vLLM itself said.

Runs in vLLM's environment, started by ``test_hook``:

    drive_scheduler.py MODEL_FOLDER TRACE LOG.json SEED [--asynchronous] [--break-at STEP]

LOG.json holds for each batch vLLM's own ``num_scheduled_tokens``, each request's output and how often vLLM preempted
it. ``--break-at`` breaks what the hook reads, to see that vLLM goes on.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter, deque
from typing import Any

import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from stallscope_telemetry.vllm import StallscopeAsyncScheduler, StallscopeScheduler

BLOCK, BLOCKS, STOP = 16, 80, 2
REQUESTS = 60


def scheduler_of(folder: str, asynchronous: bool) -> Any:
    model = ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=1024)
    settings = SchedulerConfig(
        max_num_seqs=8,
        max_num_batched_tokens=128,
        max_model_len=1024,
        enable_chunked_prefill=True,
        async_scheduling=asynchronous,
        is_encoder_decoder=False,
    )
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    config = VllmConfig(
        scheduler_config=settings,
        model_config=model,
        cache_config=cache,
        parallel_config=ParallelConfig(),
        device_config=DeviceConfig("cpu"),
    )
    cache.num_gpu_blocks = BLOCKS
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    kind = StallscopeAsyncScheduler if asynchronous else StallscopeScheduler
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)]
        ),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "trace", "log"):
        parser.add_argument(name)
    parser.add_argument("seed", type=int)
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--break-at", type=int, default=-1)
    chosen = parser.parse_args()
    scheduler = scheduler_of(chosen.model, chosen.asynchronous)
    scheduler.record_to(chosen.trace)
    rng = random.Random(chosen.seed)
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    common = [rng.randrange(3, 1000) for _ in range(64)]
    batches: list[dict[str, int]] = []
    outputs: dict[str, int] = {}
    preempted: Counter[str] = Counter()
    in_flight: deque[Any] = deque()
    waiting = [_request(rng, number, common, hasher) for number in range(REQUESTS)]
    while waiting or scheduler.has_unfinished_requests() or in_flight:
        while waiting and rng.random() < 0.4:
            scheduler.add_request(waiting.pop(0))
        alive = [*scheduler.running, *scheduler.waiting]
        if alive and rng.random() < 0.02:
            scheduler.finish_requests(rng.choice(alive).request_id, RequestStatus.FINISHED_ABORTED)
        if len(batches) == chosen.break_at:
            scheduler._watch._pool = None
        if scheduler.has_unfinished_requests():
            output = scheduler.schedule()
            preempted.update(output.preempted_req_ids or ())
            if output.total_num_scheduled_tokens:
                batches.append(dict(output.num_scheduled_tokens))
            # Who samples is asked now: with asynchronous scheduling vLLM counts on from here.
            samples = {
                one: scheduler.requests[one].num_computed_tokens >= scheduler.requests[one].num_tokens
                for one in output.num_scheduled_tokens
            }
            in_flight.append((output, samples))
        while in_flight and (len(in_flight) > chosen.asynchronous or not scheduler.has_unfinished_requests()):
            _complete(scheduler, rng, *in_flight.popleft(), outputs)
            if chosen.asynchronous and scheduler.has_unfinished_requests():
                break
    scheduler.shutdown()
    with open(chosen.log, "w", encoding="utf-8") as file:
        json.dump({"batches": batches, "outputs": outputs, "preempted": preempted, "total_blocks": BLOCKS - 1}, file)


def _request(rng: random.Random, number: int, common: list[int], hasher: Any) -> Request:
    prompt = [rng.randrange(3, 1000) for _ in range(rng.choice([1, 5, 40, 150, 500]))]
    sampling = SamplingParams(max_tokens=rng.randint(1, 90), extra_args={"tenant": rng.choice("abc")})
    sampling.update_from_generation_config({}, STOP)
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=[*common, *prompt] if rng.random() < 0.3 else prompt,
        sampling_params=sampling,
        pooling_params=None,
        block_hasher=hasher,
    )


def _complete(
    scheduler: Any, rng: random.Random, output: Any, samples: dict[str, bool], outputs: dict[str, int]
) -> None:
    names = list(output.num_scheduled_tokens)
    tokens = [[STOP if rng.random() < 0.01 else rng.randrange(3, 1000)] if samples[one] else [] for one in names]
    done = scheduler.update_from_output(
        output,
        ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={one: place for place, one in enumerate(names)},
            sampled_token_ids=tokens,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        ),
    )
    for of_client in done.values():
        for one in of_client.outputs:
            outputs[one.request_id] = outputs.get(one.request_id, 0) + len(one.new_token_ids)


if __name__ == "__main__":
    main()
