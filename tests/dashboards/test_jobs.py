"""Jobs in real processes: what they return, how far they are, and that nothing is left of those that are ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.errors import InconclusiveError, StallscopeError, UsageError
from stallscope_dash import jobs
from stallscope_dash.jobs import Job, Jobs, Progress, State
from tests.dashboards import errands
from tests.dashboards.processes import eventually, is_alive, needs_proc

ROOT = Path(__file__).parents[2]


def failure(job: Job[Any]) -> StallscopeError:
    with pytest.raises(StallscopeError) as error:
        job.result()
    assert len(str(error.value).splitlines()) == 1
    return error.value


def pids_in(path: Path) -> list[int]:
    """Those that ``errands.endless`` has written."""
    assert eventually(path.exists)
    return [int(pid) for pid in path.read_text().split()]


def threads_of_jobs() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "stallscope-job"]


# --- one ----------------------------------------------------------------------------------------------------------


def test_a_job_returns_what_its_function_does() -> None:
    job = Job(errands.product, 6, 7)
    assert job.state is State.WAITING
    assert job.start()
    assert job.result() == 42
    assert job.state is State.DONE
    assert not job.start()


def test_progress_is_seen_while_it_runs(tmp_path: Path) -> None:
    job = Job(errands.half_done, tmp_path / "go on")
    assert job.progress == Progress("", 0.0)
    job.start()
    assert eventually(lambda: job.progress == Progress("counting", 0.5))
    assert job.state is State.RUNNING
    (tmp_path / "go on").touch()
    assert job.result() == "counted"


@pytest.mark.parametrize(
    ("job", "kind", "says"),
    [
        (Job(errands.refused, "no tenant 'a\nb\x1b[31m'"), UsageError, r"no tenant 'a\nb\x1b[31m'"),
        (Job(errands.not_known), InconclusiveError, "it can't be told"),
    ],
)
def test_an_error_is_one_line_and_of_its_kind(job: Job[None], kind: type[StallscopeError], says: str) -> None:
    job.start()
    error = failure(job)
    assert (type(error), str(error)) == (kind, says)
    assert job.state is State.FAILED


def test_a_mistake_of_ours_is_one_line_and_a_traceback_in_the_log(capfd: pytest.CaptureFixture[str]) -> None:
    job = Job(errands.broken)
    job.start()
    assert str(failure(job)) == "its process broke off (exit code 1); the log says why"
    assert "ZeroDivisionError: a mistake of ours" in capfd.readouterr().err


def test_what_is_killed_from_outside_has_failed_and_says_by_what() -> None:
    job = Job(errands.killed)
    job.start()
    assert "was ended from outside (SIGKILL), most likely for want of memory" in str(failure(job))
    assert job.state is State.FAILED


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_what_cannot_be_handed_over_is_a_failure() -> None:
    job: Job[int] = Job(lambda stages: 1)
    job.start()
    assert str(failure(job)) == "it can't be run; the log says why"
    assert eventually(lambda: not threads_of_jobs())


# --- ended --------------------------------------------------------------------------------------------------------


@needs_proc
@pytest.mark.parametrize("deaf", [False, True])
def test_of_a_cancelled_job_no_process_is_left(tmp_path: Path, deaf: bool, capfd: pytest.CaptureFixture[str]) -> None:
    job = Job(errands.endless, tmp_path / "pids", deaf)
    job.start()
    pids = pids_in(tmp_path / "pids")
    assert all(map(is_alive, pids))
    job.cancel()
    assert job.state is State.CANCELLED
    assert not Path(f"/proc/{pids[0]}").exists()  # not even as a zombie
    assert eventually(lambda: not is_alive(pids[1]))
    assert str(failure(job)) == "it was cancelled"
    assert capfd.readouterr().err == ""


@needs_proc
def test_of_what_is_killed_from_outside_no_process_is_left(tmp_path: Path) -> None:
    job = Job(errands.endless, tmp_path / "pids", False)
    job.start()
    pids = pids_in(tmp_path / "pids")
    os.kill(pids[0], signal.SIGKILL)
    failure(job)
    assert eventually(lambda: not any(map(is_alive, pids)))


def test_cancelling_is_no_matter_of_when(tmp_path: Path) -> None:
    """Before it begins, at once, from several threads, and after its end."""
    waiting = Job(errands.appended, tmp_path / "never")
    waiting.cancel()
    assert not waiting.start()
    assert waiting.state is State.CANCELLED

    begun = Job(errands.endless, tmp_path / "pids", False)
    begun.start()
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: begun.cancel(), range(8)))
    assert begun.state is State.CANCELLED

    done = Job(errands.product, 2, 3)
    done.start()
    assert done.result() == 6
    done.cancel()
    assert (done.state, done.result()) == (State.DONE, 6)
    assert not (tmp_path / "never").exists()


PARENT = """
import sys
from pathlib import Path
from stallscope_dash.jobs import Job
from tests.dashboards import errands

if __name__ == "__main__":
    path, deaf = Path(sys.argv[1]), sys.argv[2] == "deaf"
    Job(errands.endless, path, deaf).start()
    while not path.exists():
        pass
    print("begun", flush=True)
    sys.stdin.read()
"""


@contextmanager
def parent_of(pids: Path, hearing: str) -> Iterator[subprocess.Popen[str]]:
    """A process with an endless job; it ends when its standard input does."""
    pids.with_suffix(".py").write_text(PARENT)
    command = [sys.executable, str(pids.with_suffix(".py")), str(pids), hearing]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment, start_new_session=True
    ) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == "begun\n"
            yield parent
        finally:
            parent.kill()


@needs_proc
@pytest.mark.parametrize("hearing", ["hears", "deaf"])
def test_no_job_outlives_a_parent_that_is_killed(tmp_path: Path, hearing: str) -> None:
    with parent_of(tmp_path / "pids", hearing) as parent:
        parent.kill()
        assert eventually(lambda: not any(map(is_alive, pids_in(tmp_path / "pids"))))


@needs_proc
@pytest.mark.parametrize("hearing", ["hears", "deaf"])
def test_a_parent_that_ends_waits_for_no_job_and_leaves_none(tmp_path: Path, hearing: str) -> None:
    with parent_of(tmp_path / "pids", hearing) as parent:
        assert parent.communicate("") == ("", "")
        assert parent.returncode == 0
        assert eventually(lambda: not any(map(is_alive, pids_in(tmp_path / "pids"))))


@needs_proc
def test_an_interrupt_of_the_terminal_is_the_parents_alone(tmp_path: Path) -> None:
    with parent_of(tmp_path / "pids", "hears") as parent:
        os.killpg(parent.pid, signal.SIGINT)
        _, err = parent.communicate()
        assert err.count("Traceback") == 1
        assert "pids.py" in err
        assert eventually(lambda: not any(map(is_alive, pids_in(tmp_path / "pids"))))


# --- several ------------------------------------------------------------------------------------------------------


def test_the_same_question_is_the_same_job_whoever_asks(tmp_path: Path) -> None:
    asked = Jobs()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: asked.ask(errands.appended, tmp_path / "ran"), range(8)))
    assert len(set(map(id, found))) == 1
    assert found[0].result() == 1
    assert asked.ask(errands.appended, tmp_path / "ran") is found[0]
    assert asked.ask(errands.appended, tmp_path / "ran", version=2).result() == 2
    assert asked.ask(errands.appended, tmp_path / "other").result() == 1


def test_a_question_without_an_answer_is_asked_again_only_by_who_says_so(tmp_path: Path) -> None:
    asked = Jobs()
    failed = asked.ask(errands.not_known)
    failure(failed)
    assert asked.ask(errands.not_known) is failed
    cancelled = asked.ask(errands.half_done, tmp_path / "go on")
    cancelled.cancel()
    assert asked.ask(errands.half_done, tmp_path / "go on") is cancelled
    (tmp_path / "go on").touch()
    assert asked.ask(errands.half_done, tmp_path / "go on", version=1).result() == "counted"


def test_so_many_run_at_a_time_and_the_next_when_one_has_ended(tmp_path: Path) -> None:
    asked = Jobs(most_at_once=2)
    goes = [tmp_path / name for name in ("first", "second", "third", "fourth")]
    found = [asked.ask(errands.half_done, go) for go in goes]
    assert [job.state for job in found] == [State.RUNNING, State.RUNNING, State.WAITING, State.WAITING]
    goes[1].touch()
    assert found[1].result() == "counted"
    assert eventually(lambda: found[2].progress.share == 0.5)
    found[2].cancel()
    assert eventually(lambda: found[3].progress.share == 0.5)
    assert found[0].state is State.RUNNING
    for go in goes:
        go.touch()
    assert [found[number].result() for number in (0, 3)] == ["counted"] * 2


class Pretended:
    """A job without a process, which ends when told."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.state = State.WAITING
        self.begun = 0
        self._ended: Callable[[], None] = lambda: None

    def start(self, ended: Callable[[], None]) -> bool:
        if self.state is not State.WAITING:
            return False
        self.state, self._ended, self.begun = State.RUNNING, ended, next(Pretended.number)
        return True

    def end(self, state: State) -> None:
        was, self.state = self.state, state
        if was is State.RUNNING:
            self._ended()

    number: Iterator[int]


ENDS = st.sampled_from([State.DONE, State.FAILED, State.CANCELLED])
STEP = st.tuples(st.just("ask"), st.integers(0, 5)) | st.tuples(st.just("end"), st.integers(0, 9), ENDS)


@given(st.lists(STEP, max_size=40), st.integers(1, 3), st.integers(0, 3))
def test_jobs_run_in_order_as_many_as_may_and_the_oldest_are_forgotten(
    steps: list[tuple[Any, ...]], most_at_once: int, most_kept: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jobs, "Job", Pretended)
        Pretended.number = iter(range(1, 1000))
        asked = Jobs(most_at_once, most_kept)
        all_of_them: list[tuple[int, Pretended]] = []
        for step in steps:
            if step[0] == "ask":
                job: Any = asked.ask(errands.product, step[1], 0)
                last = next((one for question, one in reversed(all_of_them) if question == step[1]), None)
                if job is not last:
                    # The last one of this question has ended, and was forgotten for others' sake.
                    others = {question for question, one in all_of_them if one.state.is_final} - {step[1]}
                    assert last is None or (last.state.is_final and most_kept <= len(others))
                    all_of_them.append((step[1], job))
            else:
                going = [one for _, one in all_of_them if one.state is State.RUNNING or step[2] is State.CANCELLED]
                for one in going[step[1] : step[1] + 1]:
                    if not one.state.is_final:
                        one.end(step[2])
            states = [one.state for _, one in all_of_them]
            assert states.count(State.RUNNING) == min(
                most_at_once, states.count(State.RUNNING) + states.count(State.WAITING)
            )
            begun = [one.begun for _, one in all_of_them if one.begun]
            assert begun == sorted(begun)


def test_what_has_ended_is_kept_and_the_oldest_let_go() -> None:
    asked = Jobs(most_kept=2)
    first, second, third = (asked.ask(errands.product, 1, number) for number in range(3))
    assert [job.result() for job in (first, second, third)] == [0, 1, 2]
    fourth = asked.ask(errands.product, 1, 3)
    assert fourth.result() == 3
    assert asked.ask(errands.product, 1, 2) is third
    assert asked.ask(errands.product, 1, 0) is not first


def test_threads_of_jobs_end_with_them() -> None:
    asked = Jobs(most_at_once=3)
    for job in [asked.ask(errands.product, 2, number) for number in range(3)]:
        job.result()
    assert eventually(lambda: not threads_of_jobs())
