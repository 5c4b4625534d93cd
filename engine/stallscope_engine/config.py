"""What an engine is set to: all that the telemetry contract's Resource lists and a replay needs."""

from __future__ import annotations

from dataclasses import dataclass

POLICIES = ("fcfs", "prefill_first", "static", "shortest_remaining", "priority", "fair")
PREEMPTION = ("latest", "least_work")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Settings of one replica. Names are vLLM's where the meaning is the same.

    Without ``chunked_prefill`` a prompt enters the batch whole or not at all, so every request must fit the
    budget: prompt plus ``max_tokens`` (a preempted request recomputes both) within ``max_num_batched_tokens``.
    ``policy`` is one of ``policies``; ``preemption`` says who loses its blocks when one that runs cannot grow: the
    latest admitted, or the one that has computed least. The shares of a tenant are quotas (``policies.quotas``).
    With ``async_scheduling`` a step is scheduled while the one before it is still computed.
    """

    model: str = "tiny-llama"
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2048
    chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0  # most prompt tokens of one request in a step; 0: no limit of its own
    block_size: int = 16  # tokens
    kv_blocks: int = 4096
    watermark: float = 0.0  # share of blocks kept free when admitting beside running requests
    prefix_caching: bool = False
    policy: str = "fcfs"
    preemption: str = "latest"
    tenant_kv_share: float = 1.0  # of the KV blocks, that one tenant may hold when its next request is admitted
    tenant_token_share: float = 1.0  # of a step's token budget, that one tenant's prompts may take
    async_scheduling: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "block_size", "kv_blocks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark must be in [0, 1), not {self.watermark}")
        for name in ("tenant_kv_share", "tenant_token_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1], not {getattr(self, name)}")
        if self.long_prefill_token_threshold < 0:
            raise ValueError(f"long_prefill_token_threshold must not be negative: {self.long_prefill_token_threshold}")
        if self.long_prefill_token_threshold and not self.chunked_prefill:
            raise ValueError("long_prefill_token_threshold cuts prompts into chunks: turn chunked_prefill on")
        for name, known in (("policy", POLICIES), ("preemption", PREEMPTION)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")

    @property
    def watermark_blocks(self) -> int:
        return int(self.watermark * self.kv_blocks)
