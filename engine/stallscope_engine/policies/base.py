"""What a policy decides, with first come, first served as the answer to everything that it leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stallscope_engine.config import EngineConfig
from stallscope_engine.policies.queues import ArrivalQueue, WaitingQueue
from stallscope_engine.request import Request
from stallscope_telemetry.records import WaitReason

if TYPE_CHECKING:
    from stallscope_engine.scheduler import Batch, Scheduler


class Policy:
    """Decisions of one replica's scheduler. A policy may keep counts of its own, but changes no request."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.waiting: WaitingQueue = ArrivalQueue()

    def compose(self, scheduler: Scheduler, batch: Batch) -> None:
        """Fills a step: calls ``scheduler.go_on`` (those that run) and ``scheduler.admit`` in the order it wants."""
        raise NotImplementedError

    def victim(self, running: Sequence[Request]) -> Request:
        """Who of ``running`` (by admission, not empty) loses its blocks."""
        if self.config.preemption == "least_work":
            return min(reversed(running), key=lambda request: request.computed_tokens)
        return running[-1]

    def put_back(self, victim: Request) -> None:
        """Queues a request that was preempted."""
        self.waiting.push_back(victim)

    def room_tokens(self, request: Request) -> int:
        """Tokens for which KV blocks must be free before ``request`` is admitted; never more than it may hold.

        At least its whole input, as in vLLM: half-admitted prompts would fill the cache and preempt one another.
        """
        return request.total_tokens

    def held_tokens(self, request: Request, tokens: int) -> int:
        """Tokens for which a request that is to hold ``tokens`` is given blocks."""
        return tokens

    def headroom_blocks(self, running: Sequence[Request]) -> int:
        """Free blocks that admission leaves alone; 0 where nothing runs, or nobody could ever be admitted."""
        return self.config.watermark_blocks if running else 0

    def reason_behind(self, head: Request, request: Request) -> WaitReason:
        """Why ``request``, which would fit, waits behind ``head``, which does not."""
        return WaitReason.HEAD

    @property
    def closed(self) -> bool:
        """Whether nobody is admitted now, however much room there is."""
        return False

    # --- what happened ----------------------------------------------------------------------------------------

    def queued(self, request: Request) -> None:
        """A new request is about to be queued."""

    def admitted(self, request: Request) -> None:
        """``request`` has just been admitted, for the first time or again."""

    def computed(self, request: Request, tokens: int, is_decode: bool) -> None:
        """``request`` takes ``tokens`` tokens of a step."""
