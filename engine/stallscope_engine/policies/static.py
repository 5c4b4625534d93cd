"""Static batches: what serving was before continuous batching (Orca, OSDI 2022), for comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stallscope_engine.config import EngineConfig
from stallscope_engine.policies.base import Policy
from stallscope_engine.request import Request
from stallscope_telemetry.records import WaitReason

if TYPE_CHECKING:
    from stallscope_engine.scheduler import Batch, Scheduler


class StaticBatches(Policy):
    """A batch is filled from the queue, prefilled, and decoded until its last request is done; nobody joins it.

    Each request reserves KV blocks for its prompt and ``max_tokens``, since such systems lay the cache out beforehand.
    Two things are kinder than they were: a slot whose request is done costs no computation, and a token is delivered
    when it is made, not at the end of the batch.
    """

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self._filling = True

    @property
    def closed(self) -> bool:
        return not self._filling

    def compose(self, scheduler: Scheduler, batch: Batch) -> None:
        if not scheduler.running:
            self._filling = True
        scheduler.go_on(batch, [request for request in scheduler.running if request.prefills])
        if self._filling:
            # Only the budget of this step was short: the batch goes on filling in the next one.
            self._filling = scheduler.admit(batch) is WaitReason.BUDGET
        if not batch.requests:
            scheduler.go_on(batch)

    def room_tokens(self, request: Request) -> int:
        return request.info.prompt_tokens + request.info.max_tokens

    def held_tokens(self, request: Request, tokens: int) -> int:
        return request.info.prompt_tokens + request.info.max_tokens
