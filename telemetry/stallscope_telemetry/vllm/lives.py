"""What ``watch`` notes of a vLLM request between its arrival and its end, and when its tokens were made.

A request that decodes takes a token in each step, whose time is that of the step: noting each would be a loop over
everybody in each step. So what is noted is from which step to which it did, and times are looked up when it ends.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, overload

from stallscope_telemetry.prefixes import PrefixGroups
from stallscope_telemetry.records import FinishReason, RequestInfo, RequestRecord, WaitReason

NEVER = sys.maxsize  # no step's number


@dataclass(eq=False, slots=True)
class Life:
    """A request from its arrival to its end, as its ``RequestRecord`` will have it.

    ``request`` is vLLM's own, until it ends: a queue of records that wait for a slow exporter must not keep prompts.
    """

    request: Any
    handle: int
    describe: Callable[[Any, int], RequestInfo]
    queued_ns: int = 0
    scheduled_ns: int = 0
    cached_tokens: int = 0
    prefill_until: int = 0  # tokens to be computed before it decodes, from its last admission on
    preemptions: int = 0
    need_blocks: int = 0  # for its tokens, from the first step on that leaves it waiting
    wait_reason: WaitReason | None = None
    lacking: int = 0
    events: tuple[tuple[str, int], ...] = ()  # of its preemptions
    token_times_ns: list[int] = field(default_factory=list)  # of tokens that were counted one by one
    decodes_from: int = NEVER  # it takes one token in each step from this one on
    reason: FinishReason = FinishReason.ERROR
    end_ns: int = 0
    _decoded: tuple[tuple[int, int], ...] = ()  # and did so from one step up to before another
    _info: RequestInfo | None = None
    _ready: SeenTimes = field(init=False)
    _prefixes: PrefixGroups = field(init=False)
    _first_block: Sequence[bytes] = ()

    @property
    def info(self) -> RequestInfo:
        """What never changes about it: looked up when it is first asked for, which the engine's thread seldom does."""
        if self._info is None:
            self._info = self.describe(self.request, self.handle)
        return self._info

    def pause(self, step: int) -> None:
        """It takes no token in ``step`` nor after it, until it decodes again."""
        if self.decodes_from < step:
            self._decoded += ((self.decodes_from, step),)
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

    def end(self, reason: FinishReason, end_ns: int, ready: ReadyTimes, prefixes: PrefixGroups) -> None:
        """From here on ``record`` may be asked for, in any thread: neither vLLM nor the next steps change it."""
        self.pause(ready.steps)
        self.reason, self.end_ns = reason, end_ns
        self._ready, self._prefixes, self._first_block = ready.seen, prefixes, self.request.block_hashes[:1]
        _ = self.info
        self.request = None

    def record(self) -> RequestRecord:
        """What it was, once it has ended."""
        times = self.token_times_ns
        for start, end in self._decoded:
            times = times + self._ready.between(start, end)
        began = [("scheduled", self.scheduled_ns)] if self.scheduled_ns else []
        events = [*began, *self.events, *(("first_token", one) for one in times[:1]), ("finished", self.end_ns)]
        return RequestRecord(
            self.info,
            self.queued_ns,
            self.scheduled_ns,
            times[0] if times else 0,
            self.end_ns,
            self.end_ns,
            self.cached_tokens,
            self.preemptions,
            self.reason,
            times,
            sorted(events, key=itemgetter(1)),
            self._prefixes.number(self._first_block),
        )


class Infos(Sequence[RequestInfo]):
    """What never changes about each of these requests, looked up when it is asked for."""

    def __init__(self, lives: Sequence[Life]) -> None:
        self._lives = lives

    @overload
    def __getitem__(self, place: int) -> RequestInfo: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[RequestInfo]: ...
    def __getitem__(self, place: int | slice) -> RequestInfo | Sequence[RequestInfo]:
        return Infos(self._lives[place]) if isinstance(place, slice) else self._lives[place].info

    def __len__(self) -> int:
        return len(self._lives)


class SeenTimes:
    """When the outputs of each step were ready, in ns, from a first one on."""

    __slots__ = ("first", "times_ns")

    def __init__(self, first: int, times_ns: list[int]) -> None:
        self.first = first
        self.times_ns = times_ns

    def between(self, start: int, end: int) -> list[int]:
        """Of the steps from ``start`` to before ``end`` that are there."""
        return self.times_ns[start - self.first : end - self.first]


class ReadyTimes:
    """When the outputs of each step were ready, for as long as a request needs it."""

    def __init__(self) -> None:
        self.seen = SeenTimes(0, [])

    @property
    def steps(self) -> int:
        """How many steps' outputs have been there: the number of the next one."""
        return self.seen.first + len(self.seen.times_ns)

    def add(self, step: int, ready_ns: int) -> None:
        """Raises RuntimeError where it is another step's turn."""
        if step != self.steps:
            raise RuntimeError(f"outputs of step {step} came when those of step {self.steps} were due")
        self.seen.times_ns.append(ready_ns)

    def keep_for(self, lives: Iterable[Life]) -> None:
        """Forgets what none of these requests needs; who has ended keeps ``seen`` as it was."""
        first, times_ns = self.seen.first, self.seen.times_ns
        gone = min(min((life.first_step for life in lives), default=NEVER) - first, len(times_ns))
        self.seen = SeenTimes(first + gone, times_ns[gone:])
