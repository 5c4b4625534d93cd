"""What an engine is set to: all that the telemetry contract's Resource lists and a replay needs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one replica. Names are vLLM's where the meaning is the same.

    Without ``chunked_prefill`` a prompt enters the batch whole or not at all, so every request must fit the
    budget: prompt plus ``max_tokens`` (a preempted request recomputes both) within ``max_num_batched_tokens``.
    """

    model: str = "tiny-llama"
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    chunked_prefill: bool = True
    block_size: int = 16  # tokens
    kv_blocks: int = 4096
    watermark: float = 0.0  # share of blocks kept free when admitting beside running requests
    policy: str = "fcfs"

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "kv_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark must be in [0, 1), not {self.watermark}")
        if self.policy != "fcfs":
            raise ValueError(f"policy must be fcfs, not {self.policy!r}")

    @property
    def watermark_blocks(self) -> int:
        return int(self.watermark * self.kv_blocks)
