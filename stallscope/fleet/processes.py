"""Portions diagnosed by processes of this machine, one a core."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

from stallscope.diagnosis.diagnose import Options
from stallscope.diagnosis.partial import Partial, merge
from stallscope.errors import StallscopeError
from stallscope.fleet.plan import Task
from stallscope.fleet.work import Progress, diagnose_task

# Results are the same to the bit whatever the number of cores, and a core has one process.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Processes:
    """A ``Scheduler``: ``jobs`` processes, by default one for each core that this one may use."""

    jobs: int | None = None

    def __call__(self, tasks: Sequence[Task], options: Options, progress: Progress) -> Partial:
        """Raises StallscopeError where a process is ended from outside."""
        jobs = min(self.jobs or _cores(), len(tasks))
        os.environ.update(_ONE_THREAD)
        context = multiprocessing.get_context("spawn")
        others = set(multiprocessing.active_children())
        total, done = Partial(), 0
        with ProcessPoolExecutor(jobs, context, _end_at_once) as pool:
            try:
                with _uninterrupted():
                    futures = {pool.submit(diagnose_task, task, options) for task in tasks}
                for future in as_completed(futures):
                    total, done = merge(total, future.result()), done + 1
                    progress(done / len(tasks))
            except BrokenProcessPool as error:
                raise StallscopeError(
                    f"one of {jobs} processes was ended from outside, most likely for want of memory; try fewer: --jobs"
                ) from error
            except BaseException:
                for child in set(multiprocessing.active_children()) - others:
                    child.terminate()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return total


def _cores() -> int:
    """Those that this process may use, where the system says."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """An interrupt waits until all processes are started: one that is half made would complain."""
    if threading.current_thread() is not threading.main_thread():
        yield  # which no interrupt reaches
        return
    waiting: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    # Processes inherit this, until they are ready to end at once.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if waiting:
        raise KeyboardInterrupt


def _end_at_once() -> None:
    """An interrupt ends a process without a word: the one that started it has them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
