"""The folder of segments: what a crash may leave of a file, and what a start makes of it."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stallscope.errors import UsageError
from stallscope.live.closed import ClosedSegments
from stallscope.live.segments import framed, messages_in, new_path
from stallscope.live.store import Limits, Store
from stallscope.trace import read_trace
from tests.live.collecting import as_json, eventually, request, segments, stored
from tests.trace.recording import steady

LIMITS = Limits(rotate_bytes=1_000_000, rotate_s=3600.0, disk_bytes=10_000_000, message_bytes=100_000)
MESSAGES = [
    request(random.Random(seed), seed).SerializeToString() if seed % 2 else as_json(request(random.Random(seed), seed))
    for seed in range(1, 7)
]
COMPRESSED = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd")  # how gzip and zstd begin
OTHER = request(random.Random(99)).SerializeToString()


def all_messages(folder: Path) -> list[bytes]:
    return [message for path in segments(folder) for message in messages_in(path)]


@given(kept=st.integers(0, len(framed(MESSAGES))), garbage=st.binary(max_size=60) | st.just(bytes(4096)))
def test_whatever_a_crash_leaves_the_messages_before_it_stay_and_more_can_follow(kept: int, garbage: bytes) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        store = Store(folder, LIMITS)
        store.append(MESSAGES)
        store.close()
        (segment,) = segments(folder)
        left = segment.read_bytes()[:kept] + garbage
        assume(not left.startswith(COMPRESSED))  # such a file is whole, or not there: it took its name in one step
        segment.write_bytes(left)
        whole = [message for count, message in enumerate(MESSAGES) if len(framed(MESSAGES[: count + 1])) <= kept]
        assert all_messages(folder)[: len(whole)] == whole
        store = Store(folder, LIMITS)
        store.append([OTHER])
        assert list(store.latest_messages(4)) == all_messages(folder)
        store.close()
        found = all_messages(folder)
        assert (found[: len(whole)], found[-1]) == (whole, OTHER)
        if len(found) == len(whole) + 1:  # or else garbage happened to be a message
            ids, damage = stored(folder)
            assert damage == []
            assert ids.total() == sum(range(1, len(whole) + 1)) + 1


def test_a_folder_with_a_torn_end_is_a_trace_with_a_finding(tmp_path: Path) -> None:
    lines = steady(5, output=9).lines()
    store = Store(tmp_path, LIMITS)
    for line in lines:
        store.append([line])
    clean = read_trace(tmp_path)
    assert clean.findings == ()
    store.append([lines[-1]])
    (segment,) = segments(tmp_path)
    segment.write_bytes(segment.read_bytes()[:-9])
    torn = read_trace(tmp_path)
    assert torn.tables == clean.tables
    assert [one.kind for one in torn.findings] == ["damaged_file"]
    store.close()


def test_segments_are_closed_by_size_and_one_segment_goes_on_after_a_restart(tmp_path: Path) -> None:
    messages = [request(random.Random(seed)).SerializeToString() for seed in range(6)]
    limits = Limits(rotate_bytes=len(framed(messages[:2])), rotate_s=3600.0, disk_bytes=10**7, message_bytes=1000)
    for number, message in enumerate(messages):
        store = Store(tmp_path, limits)
        store.append([message])
        store.close()
        assert all_messages(tmp_path) == messages[: number + 1]
    assert len(segments(tmp_path)) == 3


def test_a_segment_that_was_not_compressed_before_a_crash_is_after_the_next_start(tmp_path: Path) -> None:
    store = Store(tmp_path, LIMITS)
    store.append(MESSAGES)
    store.close()
    (segment,) = segments(tmp_path)
    later = segment.with_name(segment.name.replace("00000001", "00000002"))
    later.write_bytes(framed([OTHER]))
    segment.with_name(segment.name + ".part").write_bytes(b"half")
    before = segment.stat().st_size
    store = Store(tmp_path, LIMITS)
    eventually(lambda: segment.stat().st_size != before)
    store.close()
    assert segment.stat().st_size < before
    assert all_messages(tmp_path) == [*MESSAGES, OTHER]
    assert list(tmp_path.glob("*.part")) == []


def test_a_folder_that_can_not_be_used_is_a_usage_error(tmp_path: Path) -> None:
    store = Store(tmp_path / "a" / "b", LIMITS)
    with pytest.raises(UsageError, match="another collector"):
        Store(tmp_path / "a" / "b", LIMITS)
    store.close()
    Store(tmp_path / "a" / "b", LIMITS).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        Store(tmp_path / "file", LIMITS)


# --- what the disk is told -----------------------------------------------------------------------------------------


class Disk:
    """Keeps what a power cut would: of each file what was synced, and only files whose name was synced, too.

    Everything goes through to the real disk; ``failing`` makes the next sync of a file fail.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing = False
        self._folder = folder
        self._synced: dict[str, bytes] = {}
        self._named: set[str] = set()
        self._fsync, self._fdatasync = os.fsync, os.fdatasync
        monkeypatch.setattr(os, "fsync", lambda handle: self._sync(handle, self._fsync))
        monkeypatch.setattr(os, "fdatasync", lambda handle: self._sync(handle, self._fdatasync))

    def _sync(self, handle: int, really: Callable[[int], None]) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            self._named = {one.name for one in path.iterdir()}
        elif self.failing:
            self.failing = False
            raise OSError(errno.EIO, "Input/output error")
        else:
            self._synced[path.name] = path.read_bytes()
        really(handle)

    def after_a_power_cut(self, folder: Path) -> list[bytes]:
        """The messages that are left, in another folder."""
        folder.mkdir()
        for name in self._named & self._synced.keys():
            (folder / name).write_bytes(self._synced[name])
        return all_messages(folder)


def test_what_append_returned_from_survives_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, monkeypatch)
    store = Store(tmp_path / "spans", replace(LIMITS, rotate_bytes=len(framed(MESSAGES[:2]))))
    for number, message in enumerate(MESSAGES):
        store.append([message])
        assert disk.after_a_power_cut(tmp_path / f"{number}") == MESSAGES[: number + 1]
    store.close()


def test_what_a_killed_process_had_not_synced_is_safe_before_it_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spans").mkdir()
    new_path(tmp_path / "spans", 1).write_bytes(framed(MESSAGES) + b"torn")
    disk = Disk(tmp_path, monkeypatch)
    store = Store(tmp_path / "spans", LIMITS)
    assert list(store.latest_messages(1)) == disk.after_a_power_cut(tmp_path / "cut") == MESSAGES
    store.close()


def test_after_a_failed_sync_nothing_is_added_to_that_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(tmp_path, monkeypatch)
    store = Store(tmp_path / "spans", LIMITS)
    store.append(MESSAGES[:2])
    disk.failing = True
    with pytest.raises(OSError, match="Input/output"):
        store.append([OTHER])
    store.append(MESSAGES[2:])
    store.close()
    assert len(segments(tmp_path / "spans")) == 2
    assert all_messages(tmp_path / "spans") == MESSAGES
    assert disk.after_a_power_cut(tmp_path / "cut") == MESSAGES


def test_a_segment_that_was_removed_while_it_was_compressed_stays_away(tmp_path: Path) -> None:
    big, small = (new_path(tmp_path, number) for number in (1, 2))
    big.write_bytes(bytes(10) + random.Random(0).randbytes(30_000_000))
    small.write_bytes(bytes(15_000_000))
    closed = ClosedSegments([], 40_000_000)
    closed.add(big)
    eventually(lambda: any(tmp_path.glob("*.part")))
    closed.add(small)
    closed.close()
    assert (closed.removed, closed.removed_bytes) == (1, 30_000_010)
    assert [path.name for path in tmp_path.iterdir()] == [small.name]
