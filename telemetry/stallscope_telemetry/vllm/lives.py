"""What ``watch`` notes of a vLLM request between its arrival and its end, and when its tokens were made.

A request that decodes takes a token in each step, whose time is that of the step: noting each would be a loop over
everybody in each step. So what is noted is from which step to which it did, and times are looked up when it ends.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from stallscope_telemetry.records import RequestInfo, WaitReason

NEVER = sys.maxsize  # no step's number


@dataclass(eq=False, slots=True)
class Life:
    """A request from its arrival to its end, as its ``RequestRecord`` will have it."""

    request: Any
    info: RequestInfo
    queued_ns: int = 0
    scheduled_ns: int = 0
    cached_tokens: int = 0
    prefill_until: int = 0  # tokens to be computed before it decodes, from its last admission on
    preemptions: int = 0
    need_blocks: int = 0  # for its tokens, as it came to wait
    wait_reason: WaitReason | None = None
    lacking: int = 0
    events: list[tuple[str, int]] = field(default_factory=list)
    token_times_ns: list[int] = field(default_factory=list)  # of tokens that were counted one by one
    decodes_from: int = NEVER  # it takes one token in each step from this one on
    _decoded: list[tuple[int, int]] = field(default_factory=list)  # and did so from one step up to before another

    def pause(self, step: int) -> None:
        """It takes no token in ``step`` nor after it, until it decodes again."""
        if self.decodes_from < step:
            self._decoded.append((self.decodes_from, step))
        self.decodes_from = NEVER

    def skip(self, step: int) -> None:
        """It takes no token in ``step``, and one in each after it if it did before."""
        if self.decodes_from <= step:
            self.pause(step)
            self.decodes_from = step + 1

    @property
    def first_step(self) -> int:
        """Before it no step's time is needed."""
        return self._decoded[0][0] if self._decoded else self.decodes_from

    def times_ns(self, ready: ReadyTimes) -> list[int]:
        """When its tokens were ready, those of steps whose outputs are there."""
        times = self.token_times_ns
        for start, end in (*self._decoded, (self.decodes_from, NEVER)):
            times = times + ready.between(start, end)
        return times


class ReadyTimes:
    """When the outputs of each step were ready, in ns."""

    def __init__(self) -> None:
        self._first = 0
        self._times_ns: list[int] = []

    @property
    def steps(self) -> int:
        """How many steps' outputs have been there: the number of the next one."""
        return self._first + len(self._times_ns)

    def add(self, step: int, ready_ns: int) -> None:
        """Raises RuntimeError where it is another step's turn."""
        if step != self.steps:
            raise RuntimeError(f"outputs of step {step} came when those of step {self.steps} were due")
        self._times_ns.append(ready_ns)

    def between(self, start: int, end: int) -> list[int]:
        """Of the steps from ``start`` to before ``end`` that are there."""
        return self._times_ns[start - self._first : end - self._first]

    def keep_for(self, lives: Iterable[Life]) -> None:
        """Forgets what none of these requests needs."""
        unneeded = min((life.first_step for life in lives), default=NEVER) - self._first
        gone = len(self._times_ns[:unneeded])
        del self._times_ns[:gone]
        self._first += gone
