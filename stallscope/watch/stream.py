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

_MOST_FORGOTTEN = 2_000  # requests that have left are forgotten when there are as many
_RESTARTED_NS = 1_000_000_000  # a step with a lower index that is as much later is another life's


@dataclass(frozen=True, eq=False)
class Window:
    """What one replica did in the steps (n) that came since the last window. Times are int64 ns.

    ``columns`` of steps are those of ``trace.decode``. Slice k runs from ``begin[k]`` to ``ready[k]``; ``gap_ns`` is
    the time between two tokens of who decodes in both steps, -1 where the step before was not seen; ``host_ns`` of it
    is host gap. ``rows``: what each request did, by position in ``requests``; first and last are positions of steps.
    ``known``: steps whose batch is known. ``lost``: steps missing before or among these.
    """

    columns: dict[str, Ints]
    begin: Ints
    gap_ns: Ints
    host_ns: Ints
    known: Mask
    lost: int
    rows: Stretches
    phase: Ints  # of each row
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
    _told: int = 0  # requests of the machine that were in a window before

    def __post_init__(self) -> None:
        self._machine = Machine(self.name, self._findings)

    def advance(self, steps: Steps) -> Window | None:
        """What these steps, in any order, add; None where they are none that are new."""
        steps = self._new(steps)
        if not len(steps):
            return None
        self._findings = self._machine.findings = Findings()  # they are for readers of traces
        index, ready = steps.columns["step"], steps.columns["ready"]
        before = np.append(self.last_step, index[:-1])
        follows = index == before + 1
        started = self.last_step < 0
        known = np.zeros(len(steps), dtype=np.bool_)
        self._run(steps, follows, started, known)
        rows = self._machine.cut(int(index[-1]))
        requests = self._machine.rebuilt.requests
        since = np.maximum.accumulate(
            np.append(self.last_ready if not started else steps.columns["scheduled"][0], ready)
        )
        dispatched = steps.columns["scheduled"] + steps.columns["dispatch_delay"]
        begin = np.minimum(np.maximum(since[:-1], dispatched), ready)
        host = np.where(follows & ~(started & (np.arange(len(steps)) == 0)), begin - since[:-1], 0)
        table, phase = _rows(rows, index)
        window = Window(
            steps.columns,
            begin,
            np.where(follows, ready - since[:-1], -1),
            np.maximum(host - steps.columns["idle_ns"], 0),
            known,
            0 if started else int((index - before - 1).sum()),
            table,
            phase,
            requests,
            requests[self._told :],
            [one for one in requests if one.left_step is not None],
        )
        self.last_step, self.last_ready = int(index[-1]), int(since[-1])
        return window

    def done(self) -> None:
        """The window is over: who has left may be forgotten."""
        requests = self._machine.rebuilt.requests
        if len(requests) - len(self._machine.alive) > 0:
            self._machine.forget_left()
        self._told = len(self._machine.rebuilt.requests)

    @property
    def alive(self) -> list[SeenRequest]:
        """Who is there now."""
        return list(self._machine.alive)

    def _new(self, steps: Steps) -> Steps:
        """Those after the last one, in order, each once; all of them where the process began again."""
        columns = steps.columns
        steps = steps.take(np.lexsort((columns["ready"], columns["step"])))
        columns = steps.columns
        late = columns["step"] <= self.last_step
        restarted = late & (columns["scheduled"] > self.last_ready + _RESTARTED_NS)
        if restarted.any():
            steps = steps.take(columns["scheduled"] > self.last_ready)
            self._machine = Machine(self.name, self._findings)
            self.lives, self.last_step, self._told = self.lives + 1, -1, 0
        else:
            steps = steps.take(~late)
        fresh = np.diff(steps.columns["step"], prepend=-1) != 0
        return steps.take(fresh)

    def _run(self, steps: Steps, follows: Mask, started: bool, known: Mask) -> None:
        """Runs the state machine; ``known`` becomes True where it knows the batch."""
        machine, index, scheduled = self._machine, steps.columns["step"].tolist(), steps.columns["scheduled"].tolist()
        telling = np.array([one is not None for one in steps.composition])
        unknown = np.array([one is not None and one.get(names.KEYFRAME) is False for one in steps.composition])
        if started and index[0] == 0 and telling[0] and not unknown[0]:
            machine.known = True  # a process that is seen from its first step on starts empty
        breaks = np.flatnonzero((~follows | unknown) & ~(started & (np.arange(len(index)) == 0)))
        last = 0
        for position in np.flatnonzero(telling | ~follows | unknown).tolist():
            known[last:position] = machine.known
            last = position
            if position in breaks:
                machine.end_stretch(index[position - 1] if position else self.last_step)
            composition = steps.composition[position]
            if composition is not None:
                machine.advance(index[position], scheduled[position], composition)
        known[last:] = machine.known


def _rows(rows: Sequence[Row], steps: Ints) -> tuple[Stretches, Ints]:
    """The state machine's rows with positions of these steps in place of their numbers, by first step; and phases."""
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
    return stretches, phase


def duration_ns(window: Window) -> Floats:
    """Of each step's slice."""
    duration: Floats = (window.ready - window.begin).astype(np.float64)
    return duration
