"""A real vLLM scheduler without a model, fed with made-up outputs: what the hook's tests and its benchmark drive.

For vLLM's environment only.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import CacheConfig, DeviceConfig, LoRAConfig, ModelConfig, ParallelConfig, SchedulerConfig, VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

BLOCK = 16  # tokens
STOP = 2  # the token that ends a request
_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
}

init_none_hash(sha256)
_hasher = get_request_block_hasher(BLOCK, sha256)


@dataclass(frozen=True, slots=True)
class Room:
    """What a scheduler has to give: slots, tokens a step, KV blocks (one of which is nobody's), adapters at a time."""

    slots: int
    tokens: int
    blocks: int
    adapters: int = 0  # 0: none are served


def make_scheduler(
    kind: Callable[..., Any], room: Room, *, asynchronous: bool = False, policy: str = "fcfs", chunked: bool = True
) -> Any:
    """A scheduler of this class of vLLM's, or of one below it."""
    model_len = room.tokens if not chunked else 1024
    cache = CacheConfig(block_size=BLOCK, enable_prefix_caching=True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(_MODEL), encoding="utf-8")
        config = VllmConfig(
            scheduler_config=SchedulerConfig(
                max_num_seqs=room.slots,
                max_num_batched_tokens=room.tokens,
                max_model_len=model_len,
                enable_chunked_prefill=chunked,
                async_scheduling=asynchronous,
                policy=policy,
                is_encoder_decoder=False,
            ),
            model_config=ModelConfig(model=folder, skip_tokenizer_init=True, dtype="float32", max_model_len=model_len),
            cache_config=cache,
            parallel_config=ParallelConfig(),
            device_config=DeviceConfig("cpu"),
            lora_config=LoRAConfig(max_loras=room.adapters) if room.adapters else None,
        )
    cache.num_gpu_blocks = room.blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["layer"], spec)]
    return kind(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=room.blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=False,
    )


def make_request(
    name: str, prompt: list[int], most_tokens: int, tenant: str, *, priority: int = 0, adapter: int = 0
) -> Request:
    """A request that takes up to ``most_tokens``, and fewer where it meets ``STOP``; ``adapter`` 0: none."""
    sampling = SamplingParams(max_tokens=most_tokens, extra_args={"tenant": tenant})
    sampling.update_from_generation_config({}, STOP)
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling_params=sampling,
        pooling_params=None,
        priority=priority,
        lora_request=LoRARequest(f"adapter-{adapter}", adapter, "nowhere") if adapter else None,
        block_hasher=_hasher,
    )


def who_samples(scheduler: Any, output: Any) -> list[bool]:
    """Whether each request of a batch gets a token from it. To be asked right after ``schedule``: with asynchronous
    scheduling vLLM counts on from there."""
    requests = scheduler.requests
    return [requests[one].num_computed_tokens >= requests[one].num_tokens for one in output.num_scheduled_tokens]


def made_up(output: Any, samples: Sequence[bool], draw: Callable[[], int]) -> ModelRunnerOutput:
    """What a model might have said to a batch: a token of ``draw`` for each that samples."""
    names = list(output.num_scheduled_tokens)
    return ModelRunnerOutput(
        req_ids=names,
        req_id_to_index={one: place for place, one in enumerate(names)},
        sampled_token_ids=[[draw()] if samples_one else [] for samples_one in samples],
        logprobs=None,
        prompt_logprobs_dict={},
        pooler_output=[],
    )
