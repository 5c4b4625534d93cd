"""One replica's steps as they come, to what happened in each window: the first stop of a live diagnosis.

The state machine is the one that reads traces (``trace.rebuild``); at each window's end its rows are cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from stallscope.diagnosis.ledger import Stretches, stable_order
from stallscope.diagnosis.timeline import Floats, Ints, Mask
from stallscope.trace.decode import Steps
from stallscope.trace.findings import Findings
from stallscope.trace.rebuild import Machine, Phase, Row, SeenRequest
from stallscope_telemetry import names

_RESTARTED_NS = 1_000_000_000  # a step with a lower index that is as much later is another life's
_BACK_NS = 1_000_000_000  # all steps of a window so much before the last one: the clock was set, or a time damaged
_JUMP_NS = 3_600_000_000_000  # from one step to the next: it is the clock that was set, or damage
_MOST_ALIVE = 100_000  # no engine has so many: who joins has not been told to leave


@dataclass(frozen=True, eq=False)
class Window:
    """What one replica did in the steps (n) that came since the last window. Times are int64 ns.

    ``columns`` of steps are those of ``trace.decode``. Slice k runs from ``begin[k]`` to ``ready[k]``; ``gap_ns`` is
    the time between two tokens of who decodes in both steps, -1 where the step before was not seen; ``host_ns`` of it
    is host gap. ``rows``: what each request did, by position in ``requests``; first and last are positions of steps.
    ``known``: steps whose batch is known. ``lost``: steps missing before or among these. ``since_ns``: when the step
    before these was ready.

    Of each row, ``samples``: it is a prefill whose last step sampled a token; ``recomputed``: tokens of it that a
    preemption had thrown away. ``preempted``: how often each of ``requests`` was, in this window.
    """

    columns: dict[str, Ints]
    begin: Ints
    gap_ns: Ints
    host_ns: Ints
    known: Mask
    lost: int
    since_ns: int
    rows: Stretches
    samples: Mask
    recomputed: Ints
    preempted: Ints
    requests: Sequence[SeenRequest]
    joined: Sequence[SeenRequest]
    left: Sequence[SeenRequest]

    @property
    def ready(self) -> Ints:
        return self.columns["ready"]

    def ready_of(self, step: int) -> int:
        """When a step of this window was ready, ns."""
        return int(self.ready[np.searchsorted(self.columns["step"], step)])

    def has(self, step: int | None) -> bool:
        """Whether a step is one of these."""
        index = self.columns["step"]
        return step is not None and int(index[0]) <= step <= int(index[-1])


@dataclass(eq=False, slots=True)
class Stream:
    """A replica between two windows."""

    name: str
    lives: int = 1
    last_step: int = -1
    last_ready: int = -1
    _machine: Machine = field(init=False)
    _findings: Findings = field(default_factory=Findings)
    _later: Steps | None = None  # of another life, which the next window begins with
    _behind: Steps | None = None  # those after a step that is missing, which may come with the next window
    _waited: int = -1  # up to this step no missing one is waited for any more
    _told: int = 0  # requests of the machine that were in a window before
    _preempted: dict[int, int] = field(default_factory=dict)  # by handle: how often by the end of the window before
    _reached: dict[int, int] = field(default_factory=dict)  # by handle: tokens up to this one were computed once

    def __post_init__(self) -> None:
        self._machine = Machine(self.name, self._findings)

    def advance(self, steps: Steps) -> Window | None:
        """What these steps, in any order, add; None where they are none that are new."""
        steps = self._new(steps)
        if not len(steps):
            return None
        self._findings = self._machine.findings = Findings()  # they are for readers of traces
        index, scheduled, ready = (steps.columns[name] for name in ("step", "scheduled", "ready"))
        before = np.append(self.last_step, index[:-1])
        started = self.last_step < 0
        if ready.max() < self.last_ready - _BACK_NS:
            self.last_ready = int(scheduled[0])
        since = np.maximum.accumulate(np.append(scheduled[0] if started else self.last_ready, ready))
        is_next = index == before + 1
        known = np.zeros(len(steps), dtype=np.bool_)
        self._run(steps, is_next, started, known)
        requests = self._machine.rebuilt.requests
        table, samples = _rows(self._machine.cut(int(index[-1])), index)
        begin = np.minimum(np.maximum(since[:-1], scheduled + steps.columns["dispatch_delay"]), ready)
        follows = is_next & (scheduled - since[:-1] < _JUMP_NS)
        follows[0] &= not started
        host = np.where(follows, begin - since[:-1], 0)
        window = Window(
            steps.columns,
            begin,
            np.where(follows, np.maximum(ready - since[:-1], -1), -1),
            np.maximum(host - steps.columns["idle_ns"], 0),
            known,
            int((index - before - 1)[started:].sum()),
            int(since[0]),
            table,
            samples,
            self._recomputed(table),
            np.array([one.preemptions - self._preempted.get(one.info.handle, 0) for one in requests], dtype=np.int64),
            requests,
            requests[self._told :],
            [one for one in requests if one.left_step is not None],
        )
        self.last_step, self.last_ready = int(index[-1]), int(since[-1])
        return window

    def done(self) -> None:
        """The window is over: who has left is forgotten."""
        if len(self._machine.alive) > _MOST_ALIVE:
            self._machine = Machine(self.name, self._findings)
        self._machine.forget_left()
        self._told = len(self._machine.alive)
        self._preempted = {one.info.handle: one.preemptions for one in self._machine.alive if one.preemptions}
        self._reached = {one.info.handle: self._reached.get(one.info.handle, 0) for one in self._machine.alive}

    @property
    def has_later(self) -> bool:
        """Whether there are steps that the next window begins with."""
        return self._later is not None or self._behind is not None

    @property
    def alive(self) -> list[SeenRequest]:
        """Who is there now."""
        return list(self._machine.alive)

    def _new(self, steps: Steps) -> Steps:
        """Those after the last one, in order, each once. Where the process began again, what it did before comes
        first, and the rest with the next window."""
        if self._behind is not None:
            steps, self._behind = _joined(self._behind, steps), None
        if self._later is not None:
            self._begin_again()
            steps, self._later = _joined(self._later, steps), None
        columns = steps.columns
        late = (columns["step"] <= self.last_step) & (columns["scheduled"] <= self.last_ready + _RESTARTED_NS)
        steps = steps.take(~late)
        columns = steps.columns
        steps = steps.take(np.lexsort((columns["ready"], columns["step"], columns["scheduled"])))
        again = self._restart(steps)
        if again == 0:
            self._begin_again()
            again = self._restart(steps)
        if again is not None:
            steps, self._later = steps.take(np.arange(again)), steps.take(np.arange(again, len(steps)))
        columns = steps.columns
        steps = steps.take(np.lexsort((columns["ready"], columns["step"])))
        columns = steps.columns
        fresh = np.diff(columns["step"], prepend=-1) != 0
        scheduled = columns["scheduled"]
        for back in np.flatnonzero(columns["ready"][:-1] - scheduled[1:] >= _JUMP_NS).tolist():
            far = np.abs(scheduled[back : back + 2] - int(np.median(scheduled)))
            fresh[back + int(np.argmax(far))] = False  # of the two its time is damaged
        return self._up_to_missing(steps.take(fresh))

    def _up_to_missing(self, steps: Steps) -> Steps:
        """Those before a step that is missing: senders that send side by side overtake one another. The others wait for
        it until the next window, once."""
        index = steps.columns["step"]
        before = np.append(self.last_step if self.last_step >= 0 else index[:1] - 1, index[:-1])
        gaps = np.flatnonzero((index != before + 1) & (index > self._waited))
        if self._later is not None or not len(gaps):
            return steps
        self._waited = int(index[-1])
        self._behind = steps.take(np.arange(gaps[0], len(steps)))
        return steps.take(np.arange(gaps[0]))

    def _restart(self, steps: Steps) -> int | None:
        """Where in steps, by time, the process has begun again."""
        index, scheduled = steps.columns["step"], steps.columns["scheduled"]
        most = np.maximum.accumulate(np.append(self.last_step, index))[:-1]
        latest = np.maximum.accumulate(np.append(self.last_ready, steps.columns["ready"]))[:-1]
        found = np.flatnonzero((index <= most) & (scheduled > latest + _RESTARTED_NS))
        return int(found[0]) if len(found) else None

    def _begin_again(self) -> None:
        self._machine = Machine(self.name, self._findings)
        self.lives, self.last_step, self._told = self.lives + 1, -1, 0
        self._preempted, self._reached, self._waited = {}, {}, -1

    def _recomputed(self, rows: Stretches) -> Ints:
        """Of each row of a prefill, the tokens that were computed before."""
        recomputed = np.zeros(len(rows), dtype=np.int64)
        requests = self._machine.rebuilt.requests
        top = np.array([self._reached.get(one.info.handle, 0) for one in requests], dtype=np.int64)
        end = rows.context + rows.tokens * (rows.last - rows.first + 1)
        computes = rows.prefill | rows.decode
        reached = dict(enumerate(top.tolist()))
        for row in np.flatnonzero(computes & np.isin(rows.request, rows.request[rows.prefill])).tolist():
            request, to = int(rows.request[row]), int(end[row])
            if rows.prefill[row]:
                recomputed[row] = max(min(to, reached[request]) - int(rows.context[row]), 0)
            reached[request] = max(to, reached[request])
        np.maximum.at(top, rows.request[computes], end[computes])
        self._reached = {one.info.handle: most for one, most in zip(requests, top.tolist(), strict=True)}
        return recomputed

    def _run(self, steps: Steps, is_next: Mask, started: bool, known: Mask) -> None:
        """Runs the state machine; ``known`` becomes True where it knows the batch. ``is_next``: no step is missing
        before these."""
        machine, index, scheduled = self._machine, steps.columns["step"].tolist(), steps.columns["scheduled"].tolist()
        telling = np.array([one is not None for one in steps.composition])
        unknown = np.array([one is not None and one.get(names.KEYFRAME) is False for one in steps.composition])
        if started and index[0] == 0 and telling[0] and not unknown[0]:
            machine.known = True  # a process that is seen from its first step on starts empty
        breaks = set(np.flatnonzero(~is_next | unknown).tolist()) - ({0} if started else set())
        last = 0
        for position in np.flatnonzero(telling | ~is_next | unknown).tolist():
            known[last:position] = machine.known
            last = position
            if position in breaks:
                machine.end_stretch(index[position - 1] if position else self.last_step)
            composition = steps.composition[position]
            if composition is not None:
                machine.advance(index[position], scheduled[position], composition)
        known[last:] = machine.known


def _joined(one: Steps, other: Steps) -> Steps:
    columns = {name: np.concatenate([column, other.columns[name]]) for name, column in one.columns.items()}
    return Steps(columns, one.composition + other.composition)


def _rows(rows: Sequence[Row], steps: Ints) -> tuple[Stretches, Mask]:
    """The state machine's rows with positions of these steps in place of their numbers, by first step; and which of
    them sampled."""
    table = np.array(rows, dtype=np.int64).reshape(len(rows), len(Row._fields))
    column = {name: table[:, number] for number, name in enumerate(Row._fields)}
    first = np.searchsorted(steps, column["first_step"])
    order = stable_order(first) if len(first) else np.zeros(0, dtype=np.int64)
    first = first[order]
    last = np.searchsorted(steps, column["last_step"][order], side="right") - 1
    phase = column["phase"][order]
    stretches = Stretches(
        column["request"][order],
        first,
        last,
        column["tokens"][order],
        column["context_start"][order],
        phase == Phase.PREFILL,
        phase == Phase.DECODE,
        phase == Phase.PAUSED,
    )
    return stretches, column["samples"][order] > 0


def duration_ns(window: Window) -> Floats:
    """Of each step's slice."""
    duration: Floats = (window.ready - window.begin).astype(np.float64)
    return duration
