"""One commit for all that wait, and what those hear who watch spans live."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest

from stallscope.live.bodies import PROTOBUF, Batch
from stallscope.live.intake import Intake, Listener
from stallscope.live.refusals import Overloaded, Unavailable
from stallscope.live.segments import messages_in
from stallscope.live.store import Limits, Store
from tests.live.collecting import request, segments

LIMITS = Limits(rotate_bytes=1_000_000, rotate_s=3600.0, disk_bytes=10_000_000, message_bytes=100_000)
MESSAGES = [request(random.Random(seed), 3).SerializeToString() for seed in range(50)]


def run(folder: Path, work: Callable[[Intake], Awaitable[None]], listeners: Sequence[Listener] = ()) -> Intake:
    """Does work with an intake that writes; returns it ended."""

    async def all_of_it() -> Intake:
        store = Store(folder, LIMITS)
        intake = Intake(store, 1_000_000, listeners)
        writing = asyncio.create_task(intake.run())
        await work(intake)
        intake.end()
        await writing
        store.close()
        return intake

    return asyncio.run(all_of_it())


async def send(intake: Intake, message: bytes) -> None:
    with intake.room() as room:
        room.take(len(message))
        await intake.receive(message, PROTOBUF, "identity", room)


def stored(folder: Path) -> list[bytes]:
    return [message for path in segments(folder) for message in messages_in(path)]


def test_requests_that_come_together_share_a_commit(tmp_path: Path) -> None:
    async def work(intake: Intake) -> None:
        await asyncio.gather(*(send(intake, message) for message in MESSAGES))

    counts = run(tmp_path, work).counts
    assert counts.commits <= 2
    assert (counts.requests, counts.spans) == (50, 150)
    assert stored(tmp_path) == MESSAGES


def test_listeners_hear_of_durable_batches_once_in_order_and_their_errors_harm_nobody(tmp_path: Path) -> None:
    heard: list[Batch] = []

    def listen(batches: Sequence[Batch]) -> None:
        assert {batch.message for batch in batches} <= set(stored(tmp_path))
        heard.extend(batches)

    def fail(batches: Sequence[Batch]) -> None:
        raise RuntimeError("the dashboard is broken")

    async def work(intake: Intake) -> None:
        for message in MESSAGES[:5] * 2:
            await send(intake, message)

    counts = run(tmp_path, work, [fail, listen]).counts
    assert heard == [Batch(message, spans=3) for message in MESSAGES[:5]]
    assert (counts.requests, counts.repeated, counts.spans) == (10, 5, 15)


def test_what_a_sender_began_that_went_away_is_written_held_and_known(tmp_path: Path) -> None:
    async def work(intake: Intake) -> None:
        first = asyncio.create_task(send(intake, MESSAGES[0]))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.wait([first])
        assert intake.held_bytes == len(MESSAGES[0])
        await asyncio.gather(send(intake, MESSAGES[0]), send(intake, MESSAGES[0]))
        assert intake.held_bytes == 0
        assert stored(tmp_path) == [MESSAGES[0]]

    counts = run(tmp_path, work).counts
    assert (counts.repeated, counts.spans, counts.commits) == (2, 3, 1)


def test_room_is_given_back_whatever_happens(tmp_path: Path) -> None:
    async def work(intake: Intake) -> None:
        with intake.room() as one, intake.room() as other:
            one.take(600_000)
            with pytest.raises(Overloaded), intake.room() as third:
                third.take(500_000)
            other.take(400_000)
            one.hold(100_000)
            other.take(500_000)
            with pytest.raises(Overloaded):
                one.hold(600_000)
        assert intake.held_bytes == 0
        intake.end()
        with pytest.raises(Unavailable), intake.room() as late:
            late.take(1)

    assert run(tmp_path, work).counts.refused == 2
