"""Scheduling policies: who is admitted next, what a step does first, and who loses its blocks when they run out.

Each is a small class behind ``base.Policy``: the scheduler owns the mechanism (budget, slots, blocks, records), a
policy only decides. They run unchanged in the engine that serves and in the replay that answers "what if".
"""

from stallscope_engine.policies.base import Policy
from stallscope_engine.policies.fair import VirtualTokenCounters
from stallscope_engine.policies.fcfs import FirstComeFirstServed
from stallscope_engine.policies.prefill_first import PrefillFirst
from stallscope_engine.policies.priority import PriorityFirst
from stallscope_engine.policies.shortest_remaining import ShortestRemaining
from stallscope_engine.policies.static import StaticBatches

BY_NAME: dict[str, type[Policy]] = {
    "fcfs": FirstComeFirstServed,
    "prefill_first": PrefillFirst,
    "static": StaticBatches,
    "shortest_remaining": ShortestRemaining,
    "priority": PriorityFirst,
    "fair": VirtualTokenCounters,
}

__all__ = ["BY_NAME", "Policy"]
