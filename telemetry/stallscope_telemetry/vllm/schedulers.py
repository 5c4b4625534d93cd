"""vLLM's own schedulers, with a ``Watch`` beside each: every argument is passed through, whatever vLLM adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from stallscope_telemetry.vllm.watch import Watch, now_ns, watch

if TYPE_CHECKING:
    from pathlib import Path


class _Watched:
    """Beside a vLLM scheduler: what it does is told to a ``Watch``, before or after it has done it."""

    _watch: Watch | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._watch = watch(self)

    def record_to(self, path: str | Path) -> None:
        """Writes a trace to a new file from now on, whatever the environment says. Needs an engine without requests."""
        if self._watch is not None:
            self._watch.close()
        self._watch = watch(self, path)

    def add_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        added = super().add_request(request, *args, **kwargs)  # type: ignore[misc]
        if self._watch is not None:
            self._watch.joined(request)
        return added

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        began_ns = now_ns()
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        if self._watch is not None:
            self._watch.scheduled(output, began_ns)
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        ready_ns = now_ns()
        outputs = super().update_from_output(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        if self._watch is not None:
            self._watch.delivered(scheduler_output, outputs, ready_ns)
        return outputs

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        finished = super().finish_requests(*args, **kwargs)  # type: ignore[misc]
        if self._watch is not None:
            self._watch.aborted(finished)
        return finished

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        done = super()._preempt_request(request, *args, **kwargs)  # type: ignore[misc]
        if self._watch is not None:
            self._watch.preempted(request)
        return done

    def shutdown(self, *args: Any, **kwargs: Any) -> Any:
        if self._watch is not None:
            self._watch.close()
        return super().shutdown(*args, **kwargs)  # type: ignore[misc]


class StallscopeScheduler(_Watched, Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, with a span for each step and each request."""


class StallscopeAsyncScheduler(_Watched, AsyncScheduler):  # type: ignore[misc]
    """vLLM's scheduler for steps that are scheduled while the last one runs, with a span for each."""
