"""The hook for vLLM: its own scheduler, watched from within and left as it is.

    vllm serve MODEL --scheduler-cls stallscope_telemetry.vllm.StallscopeAsyncScheduler

``StallscopeScheduler`` is its twin for ``--no-async-scheduling``; vLLM turns asynchronous scheduling off where it gets
that one. Where telemetry goes to is for the environment to say (``settings``). Made for vLLM 0.32.

An error of the hook's own turns telemetry off with a line in vLLM's log (``watch``): serving never knows.
"""

from __future__ import annotations

from typing import Any

__all__ = ["StallscopeAsyncScheduler", "StallscopeScheduler"]


def __getattr__(name: str) -> Any:
    # vLLM is imported only by who asks for a scheduler, which only vLLM itself does.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from stallscope_telemetry.vllm import schedulers

    return getattr(schedulers, name)
