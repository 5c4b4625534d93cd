"""The batch of every step, from what changed in it: a state machine over one replica's steps, in order.

Only steps in which something changed are visited. A request's row (a stretch in which its state does not change) is
open until an event closes it, so a decode of a thousand tokens costs two events. Where a step was lost, nothing is
known any more: all rows end at the last step seen, and the next keyframe opens them again.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from stallscope.trace.decode import Described, Unsound, describe_requests, groups_of, member
from stallscope.trace.findings import Findings
from stallscope.trace.otlp import Attributes
from stallscope_telemetry import names
from stallscope_telemetry.records import FinishReason, RequestInfo, RequestState, WaitReason

NOT_WAITING = (-1, -1)  # reason and amount lacking of who does not wait, or did not say why
_NO_GROUPS: list[tuple[int, ...]] = []


class Phase(IntEnum):
    """What a request does in a step; the names in lower case are the values of ``residency.phase``."""

    WAITING = 0
    PREFILL = 1
    DECODE = 2
    PAUSED = 3
    PREEMPTED = 4


class Row(NamedTuple):
    """A row of ``residency``; ``request`` and ``holder`` are positions in ``Rebuilt.requests`` (-1: nobody).

    ``samples``: a prefill whose last step sampled a token.
    """

    request: int
    phase: int
    reason: int  # -1: none
    lacking: int  # -1: none
    first_step: int
    last_step: int
    tokens: int
    context_start: int
    holder: int
    samples: bool


class Eviction(NamedTuple):
    """A row of ``evictions``; ``taker`` and ``owner`` are positions in ``Rebuilt.requests`` (-1: not known)."""

    step: int
    taker: int
    owner: int
    blocks: int


@dataclass(eq=False, slots=True)
class SeenRequest:
    """A request as the steps tell it. Fields ending in ``_step`` are step indices, None where not seen."""

    index: int
    info: RequestInfo
    state: RequestState = RequestState.WAITING
    computed_tokens: int = 0  # before the first step of the open row
    output_tokens: int = 0
    cached_tokens: int = 0
    preemptions: int = 0
    queued_step: int | None = None
    scheduled_step: int | None = None
    first_token_step: int | None = None
    left_step: int | None = None
    finish_reason: FinishReason | None = None
    lost: bool = False  # no longer there in a later keyframe, without an end

    wait: tuple[int, int] = NOT_WAITING  # why it waits now, and what it lacks
    taker: int = -1  # who took its blocks the last time
    # What preemptions threw away and is not computed again yet: (up to this token, position of who took it), the
    # lowest last. A second preemption amid a recompute owes only what had been recomputed; the rest stays the first's.
    debts: list[tuple[int, int]] = field(default_factory=list)

    # The open row.
    phase: Phase | None = None  # None where there is none
    first_step: int = 0
    tokens: int = 0
    holder: int = -1
    row_wait: tuple[int, int] = NOT_WAITING

    def progress(self, last_step: int) -> tuple[int, int, bool]:
        """Computed tokens and output tokens after ``last_step``, and whether a prefill sampled in it."""
        steps = last_step - self.first_step + 1
        computed, output = self.computed_tokens, self.output_tokens
        if self.phase is Phase.PREFILL:
            computed += steps * self.tokens
            samples = computed >= self.info.prompt_tokens + output
            return computed, output + samples, samples
        if self.phase is Phase.DECODE:
            return computed + steps * self.tokens, output + steps * self.tokens, False
        return computed, output, False


@dataclass(frozen=True, slots=True)
class Stretch:
    """Consecutive steps whose batches are all known, or what lies between two such stretches.

    ``first`` and ``last`` are positions in the list of steps seen; a gap in which none was seen has ``last`` =
    ``first`` - 1. ``lost`` counts the steps that are missing in it.
    """

    known: bool
    first: int
    last: int
    lost: int


@dataclass(slots=True)
class Rebuilt:
    """What the steps of one replica (of one life of its process) tell."""

    requests: list[SeenRequest] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    evictions: list[Eviction] = field(default_factory=list)
    stretches: list[Stretch] = field(default_factory=list)
    unknown_left: dict[int, int] = field(default_factory=dict)  # handle never described: the step that says it left


def rebuild(
    replica: str,
    steps: Sequence[int],
    scheduled: Sequence[int],
    composition: Sequence[Attributes | None],
    findings: Findings,
) -> Rebuilt:
    """Runs the state machine over steps in ascending order without duplicates.

    A replica that is seen from its step 0, and tells of batches there, starts empty and known; any other is unknown
    until its first keyframe, and again from a step on that says so.
    Steps before the first one seen do not count as lost: telemetry may have been switched on late.
    """
    machine = Machine(replica, findings)
    changed = {position: attributes for position, attributes in enumerate(composition) if attributes is not None}
    visited = list(changed)
    unknown = {position for position, attributes in changed.items() if attributes.get(names.KEYFRAME) is False}
    gap_start, lost = 0, 0  # the unknown stretch now in progress: position of its first step, steps lost in it
    for first, last in _contiguous(steps, unknown):
        if first:
            lost += steps[first] - steps[first - 1] - 1
        # A first step has somebody to tell of.
        machine.known = steps[first] == 0 and first in changed and first not in unknown
        known_from = first if machine.known else None
        for position in visited[bisect_left(visited, first) : bisect_left(visited, last + 1)]:
            machine.advance(steps[position], scheduled[position], changed[position])
            if known_from is None and machine.known:
                known_from = position
        machine.end_stretch(steps[last])
        if known_from is not None:
            if known_from > gap_start or lost:
                machine.rebuilt.stretches.append(Stretch(False, gap_start, known_from - 1, lost))
            machine.rebuilt.stretches.append(Stretch(True, known_from, last, 0))
            gap_start, lost = last + 1, 0
    if gap_start < len(steps):
        machine.rebuilt.stretches.append(Stretch(False, gap_start, len(steps) - 1, lost))
    return machine.rebuilt


def _contiguous(steps: Sequence[int], breaks: Collection[int]) -> Iterator[tuple[int, int]]:
    """First and last position of each run of consecutive step indices; at ``breaks`` another run begins."""
    first = 0
    for position in range(1, len(steps)):
        if steps[position] != steps[position - 1] + 1 or position in breaks:
            yield first, position - 1
            first = position
    if steps:
        yield first, len(steps) - 1


class Machine:
    """Who is alive and in which state, while the steps go by.

    Who watches steps as they come calls ``advance`` for each that tells something, ``end_stretch`` before a gap, and
    ``cut`` and ``forget_left`` now and then, so that nothing grows.
    """

    def __init__(self, replica: str, findings: Findings) -> None:
        self.rebuilt = Rebuilt()
        self.known = False
        self._replica = replica
        self.findings = findings
        self._by_handle: dict[int, SeenRequest] = {}
        self._alive: dict[int, SeenRequest] = {}
        # Who took a chunk, several tokens or none in the last step visited: unless the next step says so again, it
        # decodes one token there.
        self._special: list[SeenRequest] = []
        self._special_step = 0

    # --- a step ---------------------------------------------------------------------------------------------

    def advance(self, step: int, scheduled_ns: int, attributes: Attributes) -> None:
        """Applies what changed in ``step``. Steps since the last call that were not given changed nothing."""
        self._settle(step - 1)
        left = self._groups(step, attributes, names.LEFT, 2)
        preempted = self._groups(step, attributes, names.PREEMPTED, 2)
        chunks = self._groups(step, attributes, names.CHUNKS, 2)
        cached = {pair[0]: pair[1] for pair in self._groups(step, attributes, names.CACHED, 2)}
        left_before = [pair for pair in left if _ends_before_step(pair[1])]
        described = self._describe(step, scheduled_ns, attributes)
        keyframe = described if attributes.get(names.KEYFRAME) is True else None
        if (
            keyframe is not None
            and self.known
            and not self._agrees(step, keyframe, left_before, preempted, chunks, cached)
        ):
            text = "what changed in the steps before a keyframe does not lead to it; the keyframe counts from there on"
            self._note("keyframe_differs", step, text)
            self._forget(step - 1)

        joined = self._join(step, described, certainly_now=self.known or keyframe is None)
        for handle, reason in left_before:
            self._leave(handle, reason, step, step - 1)
        if keyframe is not None and not self.known:
            joined = self._adopt(keyframe)
        if self.known:
            queued = self._change_queue(step, attributes, joined, preempted)
            self._change_batch(step, attributes, queued, chunks, cached)
        for taker, owner, blocks in self._groups(step, attributes, names.EVICTED, 3):
            self.rebuilt.evictions.append(Eviction(step, self._position_of(taker), self._position_of(owner), blocks))
        for handle, reason in left:
            if not _ends_before_step(reason):
                self._leave(handle, reason, step, step)

    def end_stretch(self, last_step: int) -> None:
        """Closes all rows at the last step that is known, since the next one was lost (or there is none)."""
        self._settle(last_step)
        self._forget(last_step)

    def cut(self, last_step: int) -> list[Row]:
        """The rows since the last cut, open ones up to ``last_step``, from which they go on."""
        self._settle(last_step)
        special = set(map(id, self._special))
        for request in self._alive.values():
            phase = request.phase
            self._close(request, last_step)
            if phase is not None and id(request) not in special:
                request.phase, request.first_step = phase, last_step + 1
        rows, self.rebuilt.rows = self.rebuilt.rows, []
        return rows

    def forget_left(self) -> None:
        """Numbers those who are alive anew, and forgets all others. Rows must have been ``cut`` before."""
        alive = list(self._alive.values())
        position = {request.index: number for number, request in enumerate(alive)}
        for number, request in enumerate(alive):
            request.index = number
            request.taker, request.holder = position.get(request.taker, -1), position.get(request.holder, -1)
            request.debts = [(upto, position.get(taker, -1)) for upto, taker in request.debts]
        self._by_handle = dict(self._alive)
        self.rebuilt = Rebuilt(alive)

    @property
    def alive(self) -> Collection[SeenRequest]:
        """Who has joined and not left, as far as it is known."""
        return self._alive.values()

    def _forget(self, last_step: int) -> None:
        for request in self._alive.values():
            self._close(request, last_step)
        self._special = []
        self.known = False

    def _settle(self, last_step: int) -> None:
        """Who did something special in the last step visited decodes in the steps after it, if there were any."""
        if self._special and last_step > self._special_step:
            for request in self._special:
                self._decode(request, self._special_step + 1)
            self._special = []

    def _change_queue(
        self, step: int, attributes: Attributes, joined: list[SeenRequest], preempted: list[tuple[int, ...]]
    ) -> list[SeenRequest]:
        """Preempts, notes why requests wait, and returns all that may be waiting otherwise than before."""
        queued = [request for request in joined if request.info.handle in self._alive]
        for handle, taker in preempted:
            if (request := self._find(handle, step)) is not None:
                self._preempt(request, self._find(taker, step), step)
                queued.append(request)
        for handle, reason, lacking in self._groups(step, attributes, names.WAITS, 3):
            if (request := self._find(handle, step)) is not None:
                request.wait = (self._known_reason(reason, step), lacking)
                queued.append(request)
        return queued

    def _change_batch(
        self,
        step: int,
        attributes: Attributes,
        queued: list[SeenRequest],
        chunks: list[tuple[int, ...]],
        cached: Mapping[int, int],
    ) -> None:
        """Admits and runs who takes a chunk, several tokens or none; all else that runs decodes one token."""
        special: list[SeenRequest] = []
        for handle, tokens in chunks:
            if (request := self._find(handle, step)) is not None:
                self._prefill(request, step, tokens, cached.get(handle, 0))
                special.append(request)
        for handle, tokens in self._groups(step, attributes, names.DECODES, 2):
            if (request := self._find(handle, step)) is not None:
                self._admit(request, step)
                self._enter(request, step, Phase.DECODE if tokens else Phase.PAUSED, tokens)
                special.append(request)
        mentioned = set(map(id, special))
        for request in self._special:
            if id(request) not in mentioned:
                self._decode(request, step)
        for request in queued:
            if request.state is RequestState.WAITING:
                self._enter(request, step, Phase.WAITING, 0)
            elif request.state is RequestState.PREEMPTED:
                self._enter(request, step, Phase.PREEMPTED, 0, request.taker)
        self._special, self._special_step = special, step

    # --- requests come and go -------------------------------------------------------------------------------

    def _join(self, step: int, described: Described | None, certainly_now: bool) -> list[SeenRequest]:
        """Notes requests not known yet and returns them, waiting; ``certainly_now``: none has joined earlier."""
        if described is None:
            return []
        joined = []
        for i, (handle, name) in enumerate(zip(described.handles, described.ids, strict=True)):
            known = self._by_handle.get(handle)
            if known is not None:
                if known.info.request_id == name:
                    continue
                self._note("handle_reused", step, "a handle names another request than before; the later one counts")
                if self._alive.pop(handle, None) is not None:
                    self._close(known, step - 1)
                    known.lost = True
            request = SeenRequest(len(self.rebuilt.requests), described.info(i), cached_tokens=described.cached[i])
            request.queued_step = step if certainly_now else None
            self.rebuilt.requests.append(request)
            self._by_handle[handle] = self._alive[handle] = request
            joined.append(request)
        return joined

    def _leave(self, handle: int, reason: int, step: int, last_step: int) -> None:
        request = self._alive.pop(handle, None)
        if request is None:
            if self.known:
                self.rebuilt.unknown_left.setdefault(handle, step)
            return
        self._close(request, last_step)
        request.left_step = step
        request.finish_reason = member(FinishReason, reason)
        if request.finish_reason is None:
            self._note("unknown_finish_reason", step, "requests left for a reason that is not known")
        if not self.known and request.finish_reason is FinishReason.LENGTH:
            request.output_tokens = request.info.max_tokens

    def _adopt(self, keyframe: Described) -> list[SeenRequest]:
        """Takes everybody's state from the keyframe; all decode one token unless the step says otherwise."""
        present = set(keyframe.handles)
        for handle in [handle for handle in self._alive if handle not in present]:
            self._alive.pop(handle).lost = True
        for i, handle in enumerate(keyframe.handles):
            request = self._by_handle[handle]
            self._alive[handle] = request
            request.lost = False
            request.left_step = request.finish_reason = None
            request.state = keyframe.states[i]
            request.computed_tokens = keyframe.computed[i]
            request.output_tokens = keyframe.output[i]
            request.cached_tokens = keyframe.cached[i]
            request.wait = keyframe.waits.get(handle, NOT_WAITING)
            request.taker = -1
            request.debts.clear()
        self.known = True
        self._special = list(self._alive.values())
        return self._special

    def _agrees(
        self,
        step: int,
        keyframe: Described,
        left_before: list[tuple[int, ...]],
        preempted: list[tuple[int, ...]],
        chunks: list[tuple[int, ...]],
        cached: Mapping[int, int],
    ) -> bool:
        """Whether the keyframe shows what is known already, but for what this very step changed."""
        lost_blocks = {handle for handle, _ in preempted}
        admitted = {handle for handle, _ in chunks}
        expected = self._alive.keys() - {handle for handle, _ in left_before}
        if not expected <= set(keyframe.handles):
            return False
        told = zip(keyframe.handles, keyframe.states, keyframe.computed, keyframe.output, strict=True)
        for handle, state, told_computed, told_output in told:
            request = self._alive.get(handle)
            if request is None:  # it has just joined, or else it was missed
                if handle in self._by_handle or told_output or state is RequestState.PREEMPTED:
                    return False
                continue
            runs = handle in admitted or (request.state is RequestState.RUNNING and handle not in lost_blocks)
            computed, output, _ = request.progress(step - 1)
            if handle in lost_blocks or handle in cached:
                computed = cached.get(handle, 0)
            if (runs, computed, output) != (state is RequestState.RUNNING, told_computed, told_output):
                return False
        return True

    # --- what a request does --------------------------------------------------------------------------------

    def _admit(self, request: SeenRequest, step: int, cached: int = 0) -> None:
        if request.state is RequestState.RUNNING:
            return
        self._close(request, step - 1)
        if request.state is RequestState.WAITING:
            request.scheduled_step = step
            request.cached_tokens = cached
        request.computed_tokens = cached
        request.state = RequestState.RUNNING
        request.wait = NOT_WAITING

    def _prefill(self, request: SeenRequest, step: int, tokens: int, cached: int) -> None:
        self._admit(request, step, cached)
        position, _, _ = request.progress(step - 1)
        debts = request.debts
        while debts and debts[-1][0] <= position:
            debts.pop()
        self._enter(request, step, Phase.PREFILL, tokens, debts[-1][1] if debts else -1)

    def _decode(self, request: SeenRequest, step: int) -> None:
        if request.state is RequestState.RUNNING and request.info.handle in self._alive:
            self._enter(request, step, Phase.DECODE, 1)

    def _preempt(self, request: SeenRequest, taker: SeenRequest | None, step: int) -> None:
        request.taker = -1 if taker is None else taker.index
        request.preemptions += 1
        if request.state is RequestState.RUNNING:
            self._close(request, step - 1)
            debts, computed = request.debts, request.computed_tokens
            while debts and debts[-1][0] <= computed:
                debts.pop()
            if computed:
                debts.append((computed, request.taker))
            request.wait = NOT_WAITING
        request.computed_tokens = 0
        request.state = RequestState.PREEMPTED

    def _enter(self, request: SeenRequest, step: int, phase: Phase, tokens: int, holder: int = -1) -> None:
        """Goes on with the open row if nothing differs, else closes it and opens another."""
        if (
            request.phase is phase
            and request.tokens == tokens
            and request.holder == holder
            and request.row_wait == request.wait
        ):
            return
        self._close(request, step - 1)
        request.phase, request.first_step, request.tokens, request.holder = phase, step, tokens, holder
        request.row_wait = request.wait

    def _close(self, request: SeenRequest, last_step: int) -> None:
        phase = request.phase
        if phase is None:
            return
        if last_step >= request.first_step:
            computed, output, samples = request.progress(last_step)
            if output and not request.output_tokens and request.first_token_step is None:
                request.first_token_step = last_step if phase is Phase.PREFILL else request.first_step
            self.rebuilt.rows.append(
                Row(
                    request.index,
                    phase,
                    *request.row_wait,
                    request.first_step,
                    last_step,
                    request.tokens,
                    request.computed_tokens,
                    request.holder,
                    samples,
                )
            )
            request.computed_tokens, request.output_tokens = computed, output
        request.phase = None

    # --- reading what a step says ---------------------------------------------------------------------------

    def _describe(self, step: int, scheduled_ns: int, attributes: Attributes) -> Described | None:
        """Requests that the step describes; None where there are none, or it can't be told."""
        if names.R_HANDLE not in attributes:
            return None
        unsound: list[str] = []
        try:
            described = describe_requests(attributes, scheduled_ns, unsound)
        except Unsound as error:
            self._note("unsound_join", step, f"{error}; the requests that joined there are not known")
            return None
        for text in unsound:
            self._note("unsound_attribute", step, f"{text}; its values count as absent")
        return described

    def _groups(self, step: int, attributes: Attributes, name: str, size: int) -> list[tuple[int, ...]]:
        if name not in attributes:
            return _NO_GROUPS
        try:
            return list(groups_of(attributes, name, size))
        except Unsound as error:
            self._note("unsound_attribute", step, f"{error}; its values count as absent")
            return _NO_GROUPS

    def _position_of(self, handle: int) -> int:
        request = self._by_handle.get(handle)
        return -1 if request is None else request.index

    def _find(self, handle: int, step: int) -> SeenRequest | None:
        request = self._alive.get(handle)
        if request is None:
            self._note("unknown_handle", step, "steps name requests that never joined, or have left")
        return request

    def _known_reason(self, reason: int, step: int) -> int:
        if member(WaitReason, reason) is None:
            self._note("unknown_wait_reason", step, "requests wait for a reason that is not known")
            return -1
        return reason

    def _note(self, kind: str, step: int, text: str) -> None:
        self.findings.add(kind, self._replica, f" step {step}", text)


def _ends_before_step(reason: int) -> bool:
    return reason in (FinishReason.ABORT, FinishReason.TIMEOUT, FinishReason.ERROR)
