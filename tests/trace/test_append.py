"""Several processes that add to one dataset: all are in it, whoever dies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from stallscope.errors import UsageError
from stallscope.trace import Trace, append_parquet, lock, read_trace, write_parquet
from stallscope.trace.lock import only_writer
from stallscope.trace.rename import renamed
from stallscope.trace.schema import TABLES
from tests.trace.recording import read, steady
from tests.trace.test_parquet import cut, over_hours, rows, same

PROCESSES = multiprocessing.get_context("spawn")


def named(replica: str) -> Trace:
    return renamed(read(steady(3, output=20).lines()), {"replica": lambda _: replica})


def add(folder: Path, replica: str, together: Barrier) -> None:
    trace = named(replica)
    together.wait(60)
    append_parquet(trace, folder)


def die_while_writing(folder: Path) -> None:
    """All files are there, but not the list of them."""
    from stallscope.trace import append

    append.write_metadata = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    append_parquet(named("r-dead"), folder)


def test_processes_that_add_at_the_same_time_all_do(tmp_path: Path) -> None:
    write_parquet(named("r0"), tmp_path / "data")
    together = PROCESSES.Barrier(4)
    workers = [PROCESSES.Process(target=add, args=(tmp_path / "data", f"r{n}", together)) for n in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0] * 4
    both = read_trace(tmp_path / "data")
    assert sorted(both.steps["replica"].unique().to_pylist()) == [f"r{n}" for n in range(5)]
    assert both.validate() == []


def test_a_writer_that_is_killed_leaves_the_dataset_as_it_was_and_no_lock(tmp_path: Path) -> None:
    write_parquet(named("r0"), tmp_path / "data")
    worker = PROCESSES.Process(target=die_while_writing, args=(tmp_path / "data",))
    worker.start()
    worker.join(120)
    assert worker.exitcode == -signal.SIGKILL
    assert list((tmp_path / "data").rglob("replica=r-dead"))  # it had begun
    assert same(read_trace(tmp_path / "data"), named("r0"))
    append_parquet(named("r1"), tmp_path / "data")
    files = [str(file) for file in (tmp_path / "data").rglob("*.parquet")]
    assert files
    assert not [file for file in files if "r-dead" in file]  # others read the folder without our list


def test_what_others_read_of_the_folder_has_no_row_twice(tmp_path: Path) -> None:
    first, second = cut(over_hours(), 100)
    write_parquet(first, tmp_path / "data")
    append_parquet(second, tmp_path / "data")
    from pyarrow import dataset

    for table in TABLES:
        if (tmp_path / "data" / table).is_dir():
            found = dataset.dataset(tmp_path / "data" / table, format="parquet", partitioning="hive")
            assert found.count_rows() == len(rows(read_trace(tmp_path / "data").tables[table]))


def test_who_waits_too_long_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_S", 0.2)
    write_parquet(named("r0"), tmp_path / "data")
    with only_writer(tmp_path / "data"), pytest.raises(UsageError, match="another process"):
        append_parquet(named("r1"), tmp_path / "data")
    append_parquet(named("r1"), tmp_path / "data")


def test_who_waited_for_a_folder_that_was_replaced_gets_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    inside = threading.Event()

    def wait() -> None:
        with only_writer(tmp_path / "data"):
            (tmp_path / "data" / "mine").touch()
            inside.set()

    with only_writer(tmp_path / "data"):
        thread = threading.Thread(target=wait)
        thread.start()
        (tmp_path / "data").rename(tmp_path / "old")
        (tmp_path / "data").mkdir()
    assert inside.wait(30)
    thread.join()
    assert (tmp_path / "data" / "mine").exists()
