"""The recording that is looked at: read and diagnosed in the background, its replicas and views kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from stallscope.asking import Asked
from stallscope.diagnosis.incidents import Waits, measure_waits
from stallscope.diagnosis.model import Diagnosis
from stallscope.diagnosis.replica import Replica, replica_of
from stallscope.errors import StallscopeError, UsageError
from stallscope.trace import Trace
from stallscope.views.waterfall import find_request
from stallscope_dash.jobs import Jobs

Given = ParamSpec("Given")
Made = TypeVar("Made")
Advance = Callable[[str, float], None]  # is told what is done, and the share of it that is done, in [0, 1]
Diagnose = Callable[[Trace, Advance], Diagnosis]

_REPLICAS_KEPT = 4  # tables of a million steps take some 200 MB
_VIEWS_KEPT = 256
_OURS = "an error of stallscope's own; the terminal that the dashboard was started from says more"


class Stage(StrEnum):
    """How far a recording has got: charts can be drawn from ``CHARTS`` on, a verdict is there from ``VERDICT`` on, and
    with ``DONE`` it is the last word."""

    READING = "reading"
    CHARTS = "charts"
    VERDICT = "verdict"
    DONE = "done"
    FAILED = "failed"

    @property
    def is_final(self) -> bool:
        return self in (Stage.DONE, Stage.FAILED)


@dataclass(frozen=True)
class Progress:
    """The stage, what is being done and the share of it (0..1), and what went wrong ("" where nothing did)."""

    stage: Stage
    doing: str = ""
    share: float = 0.0
    error: str = ""


class NotReadyError(StallscopeError):
    """What was asked for is not there yet."""


class Kept:
    """Results by what they were made of: the last ``most`` of them. Two who ask for the same wait for one making."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: OrderedDict[Hashable, object] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """What was kept for the key, made now where there is nothing."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._made:
                    self._made.move_to_end(key)
                    return self._made[key]  # type: ignore[return-value]
            made = make()
            with self._lock:
                self._made[key] = made
                while len(self._made) > self._most:
                    self._making.pop(self._made.popitem(last=False)[0], None)
            return made


class Recording:
    """A trace, its replicas, and its diagnosis.

    ``opened`` reads the trace, then each of ``diagnoses`` says what was wrong in it, surer than the one before; all run
    in a thread. ``asked``: which part of the trace it is; ``jobs`` answers what takes longer than a look.
    """

    def __init__(
        self,
        path: Path,
        asked: Asked,
        jobs: Jobs,
        opened: Callable[[Advance], Trace],
        diagnoses: Sequence[Diagnose],
    ) -> None:
        self.path, self.asked, self.jobs = path, asked, jobs
        self._opened, self._diagnoses = opened, diagnoses
        self._progress = Progress(Stage.READING)
        self._trace: Trace | None = None
        self._names: tuple[str, ...] = ()
        self._diagnosis: Diagnosis | None = None
        self._replicas = Kept(_REPLICAS_KEPT)
        self._views = Kept(_VIEWS_KEPT)
        threading.Thread(target=self._open, name="opening", daemon=True).start()

    @property
    def progress(self) -> Progress:
        return self._progress

    @property
    def trace(self) -> Trace:
        """Raises NotReadyError while it is being read, UsageError where it can't be."""
        if self._trace is None:
            if self._progress.stage is Stage.FAILED:
                raise UsageError(self._progress.error)
            raise NotReadyError(f"{self.path}: still being read")
        return self._trace

    @property
    def names(self) -> tuple[str, ...]:
        """Of the replicas that have steps."""
        return self._names

    @property
    def diagnosis(self) -> Diagnosis | None:
        """None while nobody knows yet."""
        return self._diagnosis

    def replica(self, name: str) -> Replica:
        """Raises UsageError where there is none of this name."""
        trace = self.trace
        if name not in self._names:
            raise UsageError(f"{trace.source}: no replica {name!r}; it has {', '.join(self._names[:5]) or 'none'}")
        return self._replicas.get(name, lambda: replica_of(trace, name))

    def waits(self, name: str) -> Waits:
        """All waits of a replica's requests, and their charges."""
        replica = self.replica(name)
        return self._views.get(("waits", name), lambda: measure_waits(replica, self.asked.slos))

    def view(self, make: Callable[Given, Made], *given: Given.args, **named: Given.kwargs) -> Made:
        """What ``make`` makes of these arguments, a replica the first of them: once, and then kept."""
        key = (make, *(one.name if isinstance(one, Replica) else one for one in given), *named.items())
        return self._views.get(key, lambda: make(*given, **named))

    def holder_of(self, request: str) -> str:
        """The replica that had a request. Raises UsageError where none had."""
        trace = self.trace
        return self._views.get(("request", request), lambda: find_request(trace, request))

    def _open(self) -> None:
        stage = Stage.READING
        try:
            trace = self._opened(partial(self._tell, stage))
            column = trace.columns("steps", ["replica"])["replica"].cast(pa.string())
            self._names = tuple(sorted(pc.unique(column).drop_null().to_pylist()))
            self._trace = trace
            stage = Stage.CHARTS
            for diagnose in self._diagnoses:
                self._diagnosis = diagnose(trace, partial(self._tell, stage))
                stage = Stage.VERDICT
            self._tell(Stage.DONE)
        except StallscopeError as error:
            self._progress = Progress(Stage.FAILED, error=str(error))
        finally:
            if not self._progress.stage.is_final:
                self._progress = Progress(Stage.FAILED, error=f"{self.path}: {_OURS}")

    def _tell(self, stage: Stage, doing: str = "", share: float = 0.0) -> None:
        self._progress = Progress(stage, doing, share)
