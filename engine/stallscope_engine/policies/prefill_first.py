"""Prefill first with retraction, as SGLang schedules by default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stallscope_engine.config import EngineConfig
from stallscope_engine.policies.base import Policy
from stallscope_engine.request import Request

if TYPE_CHECKING:
    from stallscope_engine.scheduler import Batch, Scheduler

# SGLang 0.5's defaults: the share of max_tokens that a running request is expected to make yet starts at FIRST_SHARE
# and falls to LEAST_SHARE over DECAY_STEPS decode steps; after a retraction it is what was seen, with STEPS_AHEAD more.
FIRST_SHARE = 0.7
LEAST_SHARE = 0.7 * 0.14
DECAY_STEPS = 600
STEPS_AHEAD = 20
MOST_EXPECTED_TOKENS = 4096  # of one request


class PrefillFirst(Policy):
    """While a prompt can be admitted or is unfinished, a step is prefill alone and all decodes stand still.

    Admission is generous: it expects that requests use a part of their ``max_tokens``, and if they need more, those
    that have made the fewest tokens are retracted to the end of the queue
    (``sglang/srt/managers/schedule_batch.py``, ``retract_decode``, and ``schedule_policy.py``).
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._share = FIRST_SHARE

    def compose(self, scheduler: Scheduler, batch: Batch) -> None:
        if not scheduler.running:
            self._share = FIRST_SHARE
        scheduler.go_on(batch, [request for request in scheduler.running if request.prefills])
        if not batch.preempts:
            scheduler.admit(batch)
        if batch.requests:
            return
        decoding = list(scheduler.running)
        scheduler.go_on(batch)
        if batch.preempts:
            made = sum(request.output_tokens + STEPS_AHEAD for request in decoding)
            self._share = min(1.0, made / (sum(request.info.max_tokens for request in decoding) + 1))
        else:
            self._share = max(self._share - (FIRST_SHARE - LEAST_SHARE) / DECAY_STEPS, LEAST_SHARE)

    def victim(self, running: Sequence[Request]) -> Request:
        return min(running, key=lambda request: (request.output_tokens, -request.info.prompt_tokens))

    def put_back(self, victim: Request) -> None:
        self.waiting.push(victim)

    def room_tokens(self, request: Request) -> int:
        most = request.info.prompt_tokens + request.info.max_tokens
        return min(request.total_tokens + self._expected_tokens(request), most)

    def headroom_blocks(self, running: Sequence[Request]) -> int:
        return sum(self._expected_tokens(request) for request in running) // self.config.block_size

    def _expected_tokens(self, request: Request) -> int:
        return int(min(request.info.max_tokens - request.output_tokens, MOST_EXPECTED_TOKENS) * self._share)
