"""Work in the background: a function in a process of its own, which tells how far it is and can be ended.

Flow: ``Jobs.ask`` -> a ``Job`` -> its process, which says through a pipe what it does, and at last its answer -> what a
page looks at now and then: ``state``, ``progress``, and ``result``.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar, TypeVarTuple, cast

from stallscope.asking import Stages
from stallscope.errors import StallscopeError

_NICENESS = 10
_GRACE_S = 1.0  # for a process to end by itself, before it is killed
_SPAWN = get_context("spawn")  # a dashboard has threads: a fork could inherit a lock that is held

Result = TypeVar("Result")
Arguments = TypeVarTuple("Arguments")


class State(StrEnum):
    """What has become of a job; ``WAITING``: for others, which run."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self not in (State.WAITING, State.RUNNING)


@dataclass(frozen=True, slots=True)
class Progress:
    """What a job does now, "" before it says so, and the share of that which is done, in [0, 1]."""

    stage: str = ""
    share: float = 0.0


class Job(Generic[Result]):
    """A function in a process of its own. It gets ``Stages`` after its arguments, to tell its progress by.

    Function and arguments are pickled, and so is what is returned. Every method may be called from any thread.
    """

    def __init__(self, function: Callable[[*Arguments, Stages], Result], *arguments: *Arguments) -> None:
        self._function: Callable[..., Result] = function
        self._arguments: tuple[object, ...] = arguments
        self._changed = threading.Condition()
        self._state = State.WAITING
        self._progress = Progress()
        self._result: Result | None = None
        self._error: StallscopeError | None = None
        self._process: SpawnProcess | None = None
        self._lifeline: Connection | None = None
        self._thread: threading.Thread | None = None

    @property
    def state(self) -> State:
        return self._state

    @property
    def progress(self) -> Progress:
        return self._progress

    def start(self, ended: Callable[[], None] = lambda: None) -> bool:
        """Begins it, if it is waiting; ``ended`` is called when its process is gone. Says whether it has begun."""
        with self._changed:
            if self._state is not State.WAITING:
                return False
            self._state = State.RUNNING
            self._thread = threading.Thread(target=self._run, args=(ended,), name="stallscope-job", daemon=True)
            self._thread.start()
        _STARTED.add(self)
        return True

    def result(self) -> Result:
        """What the function has returned; waits for it. Raises StallscopeError, of one line, where there is none."""
        with self._changed:
            self._changed.wait_for(lambda: self._state.is_final)
        if self._error is not None:
            raise self._error.with_traceback(None)  # which else grows with each call
        return cast(Result, self._result)

    def cancel(self) -> None:
        """Ends it, unless it has ended. None of its processes is left then."""
        if not self._end(State.CANCELLED, error=StallscopeError("it was cancelled")) or self._thread is None:
            return
        with self._changed:
            if self._lifeline is not None:
                self._lifeline.close()
        if self._process is not None and not wait([self._process.sentinel], _GRACE_S):
            _kill(self._process)
        self._thread.join()

    def _end(self, state: State, result: Result | None = None, error: StallscopeError | None = None) -> bool:
        with self._changed:
            if self._state.is_final:
                return False
            self._state, self._result, self._error = state, result, error
            self._changed.notify_all()
            return True

    # --- the thread that waits for the process --------------------------------------------------------------------

    def _run(self, ended: Callable[[], None]) -> None:
        try:
            self._run_process()
        except OSError as error:
            self._end(State.FAILED, error=StallscopeError(f"no process can be started: {error.strerror}"))
        finally:
            self._end(State.FAILED, error=StallscopeError("it can't be run; the log says why"))
            ended()

    def _run_process(self) -> None:
        told, tells = _SPAWN.Pipe(duplex=False)
        held, lifeline = _SPAWN.Pipe(duplex=False)
        with told, tells, held, lifeline:
            # No daemon, which could have no processes itself: portions of a dataset have.
            process = _SPAWN.Process(target=_work, args=(tells, held, self._function, self._arguments), daemon=False)
            resource_tracker.ensure_running()  # to begin it unblocks signals
            # The process inherits it: an interrupt of the terminal is not for it, from the first line on that it runs.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            with self._changed:
                if self._state.is_final:
                    return
                process.start()
                self._process, self._lifeline = process, lifeline
            _yield_to_looks(process)
            tells.close()
            held.close()
            try:
                self._listen(told)
                wait([process.sentinel], _GRACE_S)
            finally:
                _kill(process)
                with self._changed:
                    self._lifeline = None
            while process.exitcode is None:  # where another thread that starts a process just looks after this one
                process.join()
        self._end(State.FAILED, error=StallscopeError(_why(process.exitcode)))

    def _listen(self, told: Connection) -> None:
        """Hears what it says, until it has no more to say."""
        with suppress(EOFError, OSError):
            while isinstance(message := told.recv(), Progress):
                self._progress = message
            if isinstance(message, StallscopeError):
                self._end(State.FAILED, error=message)
            elif isinstance(message, _Answer):
                self._end(State.DONE, message.result)


class Jobs:
    """Jobs of a dashboard, at most so many at a time; the others wait in the order in which they were asked for."""

    def __init__(self, most_at_once: int = 1, most_kept: int = 32) -> None:
        """``most_kept``: of those that have ended, which then are no longer known, the oldest first."""
        self._most_at_once, self._most_kept = most_at_once, most_kept
        self._lock = threading.Lock()
        self._jobs: dict[Hashable, Job[Any]] = {}
        self._running = 0  # processes, though their jobs may have been cancelled
        self._ended_so_far = 0

    def ask(
        self, function: Callable[[*Arguments, Stages], Result], *arguments: *Arguments, version: Hashable = None
    ) -> Job[Result]:
        """The job of a question: begun as soon as may be, or the one of an earlier call, whatever has become of it.

        A question is a function and its arguments, all hashable, and its ``version``: who asks again, as it failed or
        what it reads has changed, gives another one.
        """
        key = (function, arguments, version)
        with self._lock:
            job = self._jobs.get(key)
            if job is None:
                job = self._jobs[key] = Job(function, *arguments)
                ended = [one for one, known in self._jobs.items() if known.state.is_final]
                for one in ended[: max(len(ended) - self._most_kept, 0)]:
                    del self._jobs[one]
                self._start_waiting()
        return job

    @property
    def ended(self) -> int:
        """How many have ended so far: where it has grown, there is news."""
        return self._ended_so_far

    def unfinished(self) -> list[Job[Any]]:
        """Those that run or wait, in the order in which they were asked for."""
        with self._lock:
            return [job for job in self._jobs.values() if not job.state.is_final]

    def _start_waiting(self) -> None:
        for job in self._jobs.values():
            if self._running < self._most_at_once and job.start(self._ended):
                self._running += 1

    def _ended(self) -> None:
        with self._lock:
            self._ended_so_far += 1
            self._running -= 1
            self._start_waiting()


_STARTED: weakref.WeakSet[Job[Any]] = weakref.WeakSet()


@atexit.register  # later than multiprocessing, and so before it, which would wait for the processes
def _cancel_all() -> None:
    for job in list(_STARTED):
        job.cancel()


def _yield_to_looks(process: SpawnProcess) -> None:
    """Whoever looks at what is there already does not wait for it."""
    assert process.pid is not None
    with suppress(OSError):  # it is over
        os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)


def _kill(process: SpawnProcess) -> None:
    """Ends what is left of a process and of those that it has started."""
    assert process.pid is not None
    with suppress(OSError):  # none is left
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not yet have a group


def _why(exit_code: int | None) -> str:
    """Why there is no answer."""
    if exit_code is not None and exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"its process was ended from outside ({name}), most likely for want of memory; try a part of the trace"
    return f"its process broke off (exit code {exit_code}); the log says why"


# --- the process ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answer(Generic[Result]):
    result: Result


def _work(tells: Connection, held: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    os.setsid()  # so that all that it starts can be ended with it
    threading.Thread(target=_end_with, args=(held,), daemon=True).start()
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        tells.send(_Answer(function(*arguments, partial(_stage, tells))))
    except StallscopeError as error:
        from stallscope.views.words import printable

        tells.send(type(error)(printable(str(error))))  # a tenant's name in it may hold a line break
    except (KeyboardInterrupt, BrokenPipeError):
        atexit.register(os.killpg, 0, signal.SIGKILL)  # nobody waits for it, or for what else it has started


@contextmanager
def _stage(tells: Connection, name: str) -> Iterator[Callable[[float], None]]:
    tells.send(Progress(name))
    yield lambda share: tells.send(Progress(name, share))


def _end_with(lifeline: Connection) -> None:
    """Ends this process, and what it has started, when nobody holds the other end: it is cancelled, or left alone."""
    with suppress(EOFError, OSError):
        lifeline.recv()
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    time.sleep(_GRACE_S)
    os.killpg(0, signal.SIGKILL)
