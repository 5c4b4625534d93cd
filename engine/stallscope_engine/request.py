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
    that compute tokens; a virtual one leaves them empty. ``stop_after`` is where the answer ends by itself, as at an
    end-of-sequence token (0: not before ``max_tokens``); the scheduler does not look ahead at it.
    ``block_hashes`` name the content of the first full blocks of its tokens, for prefix caching: made from the token
    ids where there are any, else given by who knows the content.
    """

    info: RequestInfo
    prompt_token_ids: Sequence[int] = ()
    sampling: Sampling = Sampling()
    stop_after: int = 0
    block_hashes: list[bytes] = field(default_factory=list)
    output_token_ids: list[int] = field(default_factory=list)

    state: RequestState = RequestState.WAITING
    computed_tokens: int = 0  # in the KV cache once all steps in flight are done
    output_tokens: int = 0
    pending_tokens: int = 0  # output tokens that steps in flight will bring
    cached_tokens: int = 0  # of its prompt, found in the prefix cache when it was first admitted
    cached_now: int = 0  # of its tokens, found there when it was last admitted
    preemptions: int = 0
    blocks: list[int] = field(default_factory=list)
    kept_blocks: int = 0  # of its first ones, known to the prefix cache by their content
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
        return self.info.prompt_tokens + self.output_tokens + self.pending_tokens

    @property
    def remaining_tokens(self) -> int:
        """Tokens to compute until the next output token."""
        return self.info.prompt_tokens + self.output_tokens + self.pending_tokens - self.computed_tokens

    @property
    def prefills(self) -> bool:
        """Whether it fills its KV cache still: prompt, or what a preemption threw away, from its admission on."""
        made = self.output_tokens + self.pending_tokens
        computed = self.computed_tokens
        return computed + 1 < self.info.prompt_tokens + made or computed == self.cached_now or not made

    @property
    def all_scheduled(self) -> bool:
        """Whether steps in flight bring its last token."""
        return self.output_tokens + self.pending_tokens >= self.info.max_tokens

    @property
    def tokens_to_go(self) -> int:
        """Tokens that are still to compute if it makes as many as it may."""
        return self.info.prompt_tokens + self.info.max_tokens - self.computed_tokens
