"""First come, first served with mixed batches, as vLLM V1 schedules by default."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stallscope_engine.policies.base import Policy

if TYPE_CHECKING:
    from stallscope_engine.scheduler import Batch, Scheduler


class FirstComeFirstServed(Policy):
    """Those that run come first, in the order of admission; what is left of the budget goes to the queue.

    A step that had to preempt admits nobody (``vllm/v1/core/sched/scheduler.py``, 0.32).
    """

    def compose(self, scheduler: Scheduler, batch: Batch) -> None:
        scheduler.go_on(batch)
        if not batch.preempts:
            scheduler.admit(batch)
