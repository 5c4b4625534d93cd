"""Makes a replica of the bundled engine ready, for a recording or a server: executor, warm-up, description."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

import stallscope
from stallscope.errors import UsageError
from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, Executor, WallClock
from stallscope_engine.models.configs import random_prompt
from stallscope_engine.request import Request
from stallscope_telemetry.emitter import Emitter
from stallscope_telemetry.gpu import GpuSampler
from stallscope_telemetry.records import RequestInfo
from stallscope_telemetry.spans import EngineDescription

if TYPE_CHECKING:
    from stallscope_engine.executors.torch_cpu import TorchExecutor
    from stallscope_engine.executors.torch_cuda import TorchCudaExecutor

ExecutorName = Literal["torch", "virtual"]

REPLICA = "engine-0"  # says nothing of what happens to it: its name would be the answer
_WARM_UP_TOKENS = ((100, 8), (30, 4), (200, 4), (100, 6))  # prompt, output


def describe(config: EngineConfig, executor: ExecutorName) -> EngineDescription:
    """The replica as its spans' Resource names it."""
    return EngineDescription(
        replica=REPLICA,
        model=config.model,
        engine_version=stallscope.__version__,
        executor=executor,
        block_size=config.block_size,
        total_blocks=config.kv_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        chunked_prefill=config.chunked_prefill,
        policy=config.policy,
        watermark=config.watermark,
        prefix_caching=config.prefix_caching,
        async_scheduling=config.async_scheduling,
        preemption=config.preemption,
        long_prefill_token_threshold=config.long_prefill_token_threshold,
        tenant_kv_share=config.tenant_kv_share,
        tenant_token_share=config.tenant_token_share,
    )


def torch_executor(
    config: EngineConfig, *, device: str, threads: int | None = None, seed: int = 0, fill_memory: bool = False
) -> tuple[EngineConfig, TorchExecutor | TorchCudaExecutor]:
    """The configuration as it fits the device ("auto", "cpu", "cuda"), and an executor for it.

    ``threads`` of a CPU; None: half of the cores. ``fill_memory`` of a GPU: with as many KV blocks as fit, instead of
    those configured. Raises UsageError where PyTorch, the device or the model can't be had.
    """
    try:
        import torch

        from stallscope_engine.executors.choice import find_device, fit_to_device, make_executor
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the torch executor needs {error.name}: pip install 'stallscope[engine]', or use --executor virtual"
        ) from error
    # Threads work in step, so one that another program holds up stalls the whole step: a tenth of a second in every
    # decode on two busy cores. Half of the cores are left to whatever else runs.
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // 2))
    try:
        found = find_device(device)
        fitting = fit_to_device(config, config.model, found, fill_memory)
        return fitting, make_executor(fitting, config.model, found, seed=seed)
    except ValueError as error:
        raise UsageError(str(error)) from error


def gpu_sampling(engine: Engine, emitter: Emitter) -> AbstractContextManager[object]:
    """Samples the GPUs while it is open, on the engine's clock; does nothing where the engine computes on none."""
    device = getattr(engine.executor, "device", None)  # only an executor for devices has one
    if device is None or device.type != "cuda":
        return nullcontext()
    return GpuSampler(emitter, now_ns=engine.clock.now_ns)


def warm_up(config: EngineConfig, executor: TorchExecutor | TorchCudaExecutor, longest_tokens: int = 1) -> None:
    """Runs requests nobody records, so that first allocations and compilations are nobody's stall.

    The last one, alone, has a prompt of ``longest_tokens`` tokens.
    """
    most = config.kv_blocks * config.block_size
    if not config.chunked_prefill:
        most = min(most, config.max_num_batched_tokens)
    together = [lengths for lengths in _WARM_UP_TOKENS if sum(lengths) <= most]
    for lengths in (together, [(min(longest_tokens, most - 1), 1)]):
        serve_all(
            config,
            executor,
            [
                Request(
                    RequestInfo(handle, f"warm-up-{handle}", 0, prompt, output),
                    random_prompt(executor.model_config, prompt, handle),
                )
                for handle, (prompt, output) in enumerate(lengths, start=1)
            ],
        )


def serve_all(config: EngineConfig, executor: Executor, requests: list[Request]) -> None:
    """Runs ``requests`` to their end on an engine of their own that nobody records."""
    engine = Engine(config, executor, WallClock())
    for request in requests:
        engine.submit(request)
    while engine.has_work:
        engine.step()
