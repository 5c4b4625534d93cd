"""A dataset diagnosed in portions: as a whole would be, on any number of processes and on a real Dask cluster."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stallscope.diagnosis import Diagnosis, diagnose
from stallscope.diagnosis.diagnose import Options
from stallscope.diagnosis.slo import parse_slo
from stallscope.errors import StallscopeError, UsageError
from stallscope.fleet import diagnose_dataset
from stallscope.fleet.cluster import DaskCluster
from stallscope.fleet.plan import Task
from stallscope.fleet.processes import Processes
from stallscope.fleet.work import Scheduler
from stallscope.reports.json import to_json
from stallscope.trace import read_trace
from stallscope.workloads.recording import VIRTUAL_START_NS
from tests.fleet.stories import ACROSS_S, FLOOD_S, THROTTLED_S

pytestmark = pytest.mark.usefixtures("hourly")
CHARGES = Options(replay=False)


def in_portions(dataset: Path, scheduler: Scheduler, options: Options = CHARGES) -> Diagnosis:
    return diagnose_dataset(read_trace(dataset), options, scheduler)


@pytest.fixture(scope="module")
def one_process(dataset: Path) -> Iterator[Diagnosis]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stallscope.fleet.plan.ENOUGH_REQUESTS", 300)
        yield in_portions(dataset, Processes(1))


def test_portions_find_what_the_whole_finds(dataset: Path, one_process: Diagnosis) -> None:
    whole = diagnose(read_trace(dataset), replay=False)
    for mine, its in zip(one_process.incidents, whole.incidents, strict=True):
        assert (mine.replica, mine.verdict, mine.mechanism) == (its.replica, its.verdict, its.mechanism)
        assert [culprit.tenant for culprit in mine.culprits] == [culprit.tenant for culprit in its.culprits]
        assert (mine.start_ns, mine.end_ns) == (its.start_ns, its.end_ns)
        assert mine.lost_s == pytest.approx(its.lost_s, rel=0.02)
    counted = one_process.coverage, one_process.start_ns, one_process.end_ns
    assert [(one.tenant, one.requests) for one in one_process.tenants] == [
        (one.tenant, one.requests) for one in whole.tenants
    ]
    # Each hour has a cost model of its own, that of a stalled one another.
    for mine, its in zip(one_process.tenants, whole.tenants, strict=True):
        assert mine.step_time_share == pytest.approx(its.step_time_share, abs=0.05)
        assert mine.kv_share == pytest.approx(its.kv_share, abs=0.05)
    assert counted[1:] == (whole.start_ns, whole.end_ns)
    for name in ("fidelity", "steps", "steps_lost", "requests", "requests_open", "requests_lost"):
        assert getattr(one_process.coverage, name) == getattr(whole.coverage, name)


def test_the_stalls_are_told_once_each(one_process: Diagnosis) -> None:
    def at(second: float) -> list[tuple[str, list[str]]]:
        time_ns = VIRTUAL_START_NS + round(second * 1e9)
        return [
            (one.replica, [culprit.tenant for culprit in one.culprits])
            for one in one_process.incidents
            if one.start_ns <= time_ns <= one.end_ns
        ]

    assert at(FLOOD_S + 4) == [("r0", ["batch"])]
    assert ("r1", ["batch"]) in at(ACROSS_S + 5)
    assert ("r0", []) in at(sum(THROTTLED_S) / 2)
    assert len(one_process.incidents) == 3


def test_two_processes_say_the_same_to_the_byte(dataset: Path, one_process: Diagnosis) -> None:
    shares: list[float] = []
    two = diagnose_dataset(read_trace(dataset), CHARGES, Processes(2), progress=shares.append)
    assert to_json(two) == to_json(one_process)
    assert shares == [0.25, 0.5, 0.75, 1.0]


def test_a_dask_cluster_says_the_same_to_the_byte(dataset: Path, one_process: Diagnosis) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        assert to_json(in_portions(dataset, DaskCluster(cluster.scheduler_address))) == to_json(one_process)
        damaged = _damaged(dataset, dataset.parent / "damaged-for-dask")
        assert in_portions(damaged, DaskCluster(cluster.scheduler_address)).coverage.requests < (
            one_process.coverage.requests
        )


def test_a_cluster_that_is_not_there_is_named(dataset: Path) -> None:
    pytest.importorskip("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stallscope.fleet.cluster._PATIENCE", "1s")
        with pytest.raises(UsageError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9;"):
            in_portions(dataset, DaskCluster("tcp://127.0.0.1:9"))


# --- what goes wrong ----------------------------------------------------------------------------------------------


def _damaged(dataset: Path, copy: Path, replica: str = "r1") -> Path:
    """A copy in which one file of an hour is cut short."""
    shutil.copytree(dataset, copy)
    file = max((copy / "residency" / f"replica={replica}").rglob("*.parquet"))
    file.write_bytes(file.read_bytes()[:100])
    return copy


def test_a_damaged_portion_is_named_and_the_rest_kept(dataset: Path, tmp_path: Path, one_process: Diagnosis) -> None:
    diagnosis = in_portions(_damaged(dataset, tmp_path / "damaged"), Processes(2))
    assert [one for one in diagnosis.incidents if one.replica == "r0"] == [
        one for one in one_process.incidents if one.replica == "r0"
    ]
    assert 0 < diagnosis.coverage.requests < one_process.coverage.requests
    left_out = [note for note in diagnosis.notes if "is left out" in note]
    assert left_out
    assert all(note.startswith("r1 ") and "residency" in note for note in left_out)


def test_where_nothing_can_be_read_that_is_an_error(dataset: Path, tmp_path: Path) -> None:
    trace = read_trace(shutil.copytree(dataset, tmp_path / "gone"))
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"none of its 4 portions can be read; r0 from 2026-01-01T01:00Z: .*/gone/"):
        diagnose_dataset(trace, CHARGES, Processes(1))


def test_an_objective_for_nobody_is_refused(dataset: Path) -> None:
    with pytest.raises(UsageError, match=r"SLO for 'chatt': the trace has no such tenant, but .*chat"):
        in_portions(dataset, Processes(1), Options((parse_slo("chatt:ttft=1s@p90"),), replay=False))


def kill_this(task: Task, options: Options) -> None:
    """As the system's out-of-memory killer would."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_is_killed_is_one_line(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stallscope.fleet.processes.diagnose_task", kill_this)
    with pytest.raises(StallscopeError, match=r"one of 2 processes was ended from outside, .*: --jobs"):
        in_portions(dataset, Processes(2))


HOURLY_CLI = "import stallscope.fleet.plan as p; p.ENOUGH_REQUESTS = 300; from stallscope.cli import main; main()"


@pytest.mark.parametrize("tell", [os.kill, os.killpg], ids=["to one", "from a terminal"])
def test_an_interrupt_ends_all_processes_without_a_word_of_theirs(
    dataset: Path, tell: Callable[[int, int], None]
) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("needs /proc to see the processes")
    command = [sys.executable, "-c", f"if __name__ == '__main__': {HOURLY_CLI}", "analyze", str(dataset)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
        start_new_session=True,
    ) as run:
        workers = _wait_for_workers(run.pid)
        tell(run.pid, signal.SIGINT)
        _, errors = run.communicate(timeout=60)
    assert run.returncode not in (0, 1)
    assert "Traceback" not in errors
    assert not [pid for pid in workers if _is_alive(pid)]


def _wait_for_workers(parent: int) -> list[int]:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        children = [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]
        spawned = [pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        if spawned:
            return spawned
        time.sleep(0.02)
    raise AssertionError("no process was started")


def _is_alive(pid: int) -> bool:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


# --- the command --------------------------------------------------------------------------------------------------


def test_the_command_takes_portions_of_a_dataset_by_itself(dataset: Path) -> None:
    command = [sys.executable, "-c", f"if __name__ == '__main__': {HOURLY_CLI}", "analyze", str(dataset), "--no-replay"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run(
        [*command, "--replica", "r0", "--until", "+1h50m", "--format", "json", "--jobs", "2"],
        check=True, capture_output=True, text=True, env=environment,
    ).stdout  # fmt: skip
    diagnosis = Diagnosis.from_dict(json.loads(out))
    assert {one.replica for one in diagnosis.incidents} == {"r0"}
    assert diagnosis.end_ns <= VIRTUAL_START_NS + 6600 * 10**9
    assert "seen in 2 portions" in str(diagnosis.incidents[0].reasons)
