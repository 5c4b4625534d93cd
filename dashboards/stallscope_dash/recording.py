"""The recording that is looked at: read and diagnosed in the background, its replicas and views kept."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
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
from stallscope.trace.rename import REDACTED_SOURCE
from stallscope.trace.select import span
from stallscope.views.waterfall import find_request
from stallscope_dash.jobs import Jobs

Given = ParamSpec("Given")
Made = TypeVar("Made")
Advance = Callable[[str, float], None]  # is told what is done, and the share of it that is done, in [0, 1]
Diagnose = Callable[[Trace, Advance], Diagnosis]

_REPLICAS_KEPT = 4  # tables of a million steps take some 200 MB
_VIEWS_KEPT = 256
_REST = 2.0  # times as long as it took to read a growing recording again, nothing is done
OURS = "an error of stallscope's own; the terminal that the dashboard was started from says more"


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
            try:
                made = make()
            except StallscopeError:
                with self._lock:
                    self._making.pop(key, None)
                raise
            with self._lock:
                self._made[key] = made
                while len(self._made) > self._most:
                    self._making.pop(self._made.popitem(last=False)[0], None)
            return made


@dataclass(frozen=True, eq=False)
class _Read:
    """A trace as it was read once, and what has been made of it since."""

    trace: Trace
    names: tuple[str, ...]
    replicas: Kept
    views: Kept

    @staticmethod
    def of(trace: Trace) -> _Read:
        column = trace.columns("steps", ["replica"])["replica"].cast(pa.string())
        names = tuple(sorted(pc.unique(column).drop_null().to_pylist()))
        return _Read(trace, names, Kept(_REPLICAS_KEPT), Kept(_VIEWS_KEPT))


class Recording:
    """A trace, its replicas, and its diagnosis.

    ``opened`` reads the trace, then each of ``diagnoses`` says what was wrong in it, surer than the one before; all run
    in a thread. ``asked``: which part of the trace it is; ``jobs`` answers what takes longer than a look. Of a
    recording that grows, all is done again ``renew_s`` after it was done, or later where it takes long.
    """

    def __init__(
        self,
        path: Path,
        asked: Asked,
        jobs: Jobs,
        opened: Callable[[Advance], Trace],
        diagnoses: Sequence[Diagnose],
        renew_s: float | None = None,
    ) -> None:
        self.path, self.asked, self.jobs, self.renew_s = path, asked, jobs, renew_s
        self._opened, self._diagnoses = opened, diagnoses
        self._run = secrets.token_hex(4)
        self._progress = Progress(Stage.READING)
        self._read: _Read | None = None
        self._diagnosis: Diagnosis | None = None
        self._times_read = 0
        threading.Thread(target=self._follow, name="opening", daemon=True).start()

    @property
    def title(self) -> str:
        """What it is called where it is looked at: by its file's name, unless nothing may be named."""
        return self.path.name if self.asked.redact_for is None else REDACTED_SOURCE

    @property
    def moves(self) -> bool:
        """Whether it grows, and what is not of late is forgotten."""
        return self.renew_s is not None

    @property
    def progress(self) -> Progress:
        return self._progress

    @property
    def version(self) -> str:
        """Another one whenever there is something new to show; its first word is of this recording alone."""
        return f"{self._run} {self._progress.stage} {self._times_read} {self.jobs.ended}"

    @property
    def trace(self) -> Trace:
        """Raises NotReadyError while it is being read, UsageError where it can't be."""
        return self._what_was_read().trace

    @property
    def names(self) -> tuple[str, ...]:
        """Of the replicas that have steps."""
        return self._what_was_read().names

    @property
    def end_ns(self) -> int:
        """When the last step was ready."""
        return span(self._what_was_read().trace)[1]

    @property
    def diagnosis(self) -> Diagnosis | None:
        """None while nobody knows yet."""
        return self._diagnosis

    def replica(self, name: str) -> Replica:
        """Raises UsageError where there is none of this name."""
        read = self._what_was_read()
        if name not in read.names:
            known = ", ".join(read.names[:5]) or "none"
            raise UsageError(f"{read.trace.source}: no replica {name!r}; it has {known}")
        return read.replicas.get(name, lambda: replica_of(read.trace, name))

    def waits(self, name: str) -> Waits:
        """All waits of a replica's requests, and their charges."""
        replica = self.replica(name)
        return self._what_was_read().views.get(("waits", name), lambda: measure_waits(replica, self.asked.slos))

    def view(self, make: Callable[Given, Made], *given: Given.args, **named: Given.kwargs) -> Made:
        """What ``make`` makes of these arguments, a replica the first of them: once, and then kept."""
        key = (make, *(one.name if isinstance(one, Replica) else one for one in given), *named.items())
        return self._what_was_read().views.get(key, lambda: make(*given, **named))

    def holder_of(self, request: str, likely: str) -> str:
        """The replica that had a request, the ``likely`` one where several had. Raises UsageError where none had."""
        read = self._what_was_read()
        return read.views.get(("request", request, likely), lambda: find_request(read.trace, request, likely))

    def _what_was_read(self) -> _Read:
        if self._read is None:
            if self._progress.stage is Stage.FAILED:
                raise UsageError(self._progress.error)
            raise NotReadyError(f"{self.path}: still being read")
        return self._read

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        while True:
            begun = time.monotonic()
            self._open()
            if self.renew_s is None:
                return
            time.sleep(max(self.renew_s, _REST * (time.monotonic() - begun)))

    def _open(self) -> None:
        stage = Stage.READING
        try:
            read = _Read.of(self._opened(partial(self._tell, stage)))
            if not self.moves:
                self._read, stage = read, Stage.CHARTS
                self._tell(stage)
                if read.names:
                    self.replica(read.names[0])  # all that is asked for first is made of it
            for diagnose in self._diagnoses:
                found = diagnose(read.trace, partial(self._tell, stage))
                self._read, self._diagnosis, stage = read, found, Stage.VERDICT
            self._times_read += 1
            self._progress = Progress(Stage.DONE)
            if not self.moves and found.incidents:
                self._prepare(found.incidents[0].replica)
        except StallscopeError as error:
            self._progress = Progress(Stage.FAILED, error=str(error))
        finally:
            if not self._progress.stage.is_final:
                self._progress = Progress(Stage.FAILED, error=f"{self.path}: {OURS}")

    def _prepare(self, name: str) -> None:
        """Makes what takes longest of what will be asked for first: an incident's charges, and its batch."""
        with suppress(StallscopeError):  # it will be said where it is missed
            self.waits(name)
            _ = self.replica(name).steps

    def _tell(self, stage: Stage, doing: str = "", share: float = 0.0) -> None:
        if not self._times_read:  # when it is read again, what was seen before stays
            self._progress = Progress(stage, doing, share)
