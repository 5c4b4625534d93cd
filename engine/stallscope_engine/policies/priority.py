"""Priority scheduling: the lowest number goes first, as in vLLM."""

from __future__ import annotations

from collections.abc import Sequence

from stallscope_engine.config import EngineConfig
from stallscope_engine.policies.fcfs import FirstComeFirstServed
from stallscope_engine.policies.queues import SortedQueue
from stallscope_engine.request import Request
from stallscope_telemetry.records import WaitReason


class PriorityFirst(FirstComeFirstServed):
    """The queue is ordered by (priority, arrival); blocks are taken from the least important of those that run."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.waiting = SortedQueue(lambda request: request.info.priority)

    def victim(self, running: Sequence[Request]) -> Request:
        least = max(request.info.priority for request in running)
        return super().victim([request for request in running if request.info.priority == least])

    def reason_behind(self, head: Request, request: Request) -> WaitReason:
        return WaitReason.PRIORITY if head.info.priority < request.info.priority else WaitReason.HEAD
