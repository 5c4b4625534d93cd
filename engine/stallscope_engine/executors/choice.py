"""Which executor computes a model on this machine, and with what configuration; imports torch only when asked."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stallscope_engine.config import EngineConfig
from stallscope_engine.executors.cuda.memory import fitting_blocks, weight_bytes
from stallscope_engine.models.configs import ModelConfig, load_config

if TYPE_CHECKING:
    from stallscope_engine.executors.torch_cpu import TorchExecutor
    from stallscope_engine.executors.torch_cuda import TorchCudaExecutor

DEVICES = ("auto", "cpu", "cuda")

#: Tokens in a block on a GPU: torch's paged attention takes multiples of 256 only.
CUDA_BLOCK_SIZE = 256


def find_device(device: str = "auto") -> str:
    """ "cpu" or "cuda". Raises ValueError, in one line, for "cuda" where torch finds none."""
    if device not in DEVICES:
        raise ValueError(f"device must be one of {', '.join(DEVICES)}, not {device!r}")
    if device == "cpu":
        return device
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if device == "auto":
        return "cpu"
    built = torch.version.cuda
    why = (
        f"torch {torch.__version__} is built for CUDA {built}, but finds no GPU or driver"
        if built
        else (f"torch {torch.__version__} is built without CUDA")
    )
    raise ValueError(f"device cuda: {why}; install a CUDA build and a driver, or use device cpu")


def fit_to_device(
    config: EngineConfig, model: ModelConfig | str, device: str, fill_memory: bool = True
) -> EngineConfig:
    """``config``; on a GPU with its block size, asynchronous scheduling, and as many KV blocks as fit its memory.

    Without ``fill_memory`` the cache keeps its size in tokens. Raises ValueError, in one line, where not even the
    weights fit.
    """
    if device == "cpu":
        return config
    import torch

    shape = model if isinstance(model, ModelConfig) else load_config(model)
    tokens = config.kv_blocks * config.block_size
    config = replace(config, block_size=CUDA_BLOCK_SIZE, async_scheduling=True)
    if not fill_memory:
        return replace(config, kv_blocks=-(-tokens // CUDA_BLOCK_SIZE))
    free, total = torch.cuda.mem_get_info()
    item_bytes = torch.bfloat16.itemsize
    weights = weight_bytes(shape, item_bytes)
    blocks = fitting_blocks(config, shape, free - weights, item_bytes)
    if blocks < 1:
        raise ValueError(
            f"{torch.cuda.get_device_name()} has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free, but "
            f"{config.model} needs {weights / 2**30:.1f} GiB for its weights and more for a step: free memory, take "
            f"a smaller model, or lower max_num_batched_tokens"
        )
    return replace(config, kv_blocks=blocks)


def make_executor(
    config: EngineConfig, model: ModelConfig | str, device: str = "auto", dtype: str | None = None, seed: int = 0
) -> TorchExecutor | TorchCudaExecutor:
    """The executor for ``model``, a name or a Hugging Face folder, on ``device``; ``dtype`` None: its fastest.

    Raises ValueError, in one line, for a device that is not there and a model that can't be loaded or does not fit.
    """
    if find_device(device) == "cpu":
        from stallscope_engine.executors.torch_cpu import TorchExecutor

        return TorchExecutor(config, model, dtype, seed)
    from stallscope_engine.executors.torch_cuda import TorchCudaExecutor

    return TorchCudaExecutor(config, model, dtype or "bfloat16", seed)
