"""A request inside the engine: what it asked for, how far it got, and the blocks it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stallscope_telemetry.records import FinishReason, RequestInfo, RequestState, WaitReason


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn: greedy at temperature 0, else from the softmax by a generator seeded per request."""

    temperature: float = 0.0
    seed: int = 0
    ignore_eos: bool = True


@dataclass(eq=False, slots=True)
class Request:
    """One request; identity is the object. The scheduler changes the counters, nobody else does.

    The scheduler works on counts alone. ``prompt_token_ids`` and ``output_token_ids`` are there for executors
    that compute tokens; a virtual one leaves them empty.
    """

    info: RequestInfo
    prompt_token_ids: Sequence[int] = ()
    sampling: Sampling = Sampling()
    output_token_ids: list[int] = field(default_factory=list)

    state: RequestState = RequestState.WAITING
    computed_tokens: int = 0  # in the KV cache
    output_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    blocks: list[int] = field(default_factory=list)
    wait_reason: WaitReason | None = None
    lacking: int = 0

    queued_ns: int = 0
    scheduled_ns: int = 0
    token_times_ns: list[int] = field(default_factory=list)
    events: list[tuple[str, int]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    end_ns: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and output so far: what must be in the KV cache before the next token can be sampled."""
        return self.info.prompt_tokens + self.output_tokens

    @property
    def remaining_tokens(self) -> int:
        """Tokens to compute until the next output token."""
        return self.total_tokens - self.computed_tokens
