"""From a checked batch to an acknowledgement: once on disk, in one commit with all that came meanwhile.

While a commit's fsync runs, batches gather; the next commit takes them all. So the more senders there are, the more of
them share an fsync, and a sender waits for at most two.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256

from stallscope.live.bodies import Batch, batch_of, plain
from stallscope.live.refusals import Overloaded, Refusal, Unavailable
from stallscope.live.segments import framed_size
from stallscope.live.store import Store

log = logging.getLogger(__name__)

QUICK_BYTES = 1 << 18  # a body that is parsed sooner than it is handed to a thread
REMEMBERED = 1 << 16  # requests that are known again when they are sent again
REMEMBERED_SEGMENTS = 4  # the same after a restart: those of the latest segments
MOST_RETRY_S = 30
DISK_RETRY_S = 10  # a full disk does not have room again in a second
_LOOK_S = 1.0  # how often a segment's age is looked at

Listener = Callable[[Sequence[Batch]], None]


@dataclass(slots=True)
class Counts:
    """Since the start. A request that was sent again counts in ``requests`` and ``repeated``, its spans not again."""

    requests: int = 0
    spans: int = 0
    bytes: int = 0  # of messages written
    repeated: int = 0
    refused: int = 0  # requests of which nothing was taken
    refused_spans: int = 0  # of requests that were taken otherwise
    commits: int = 0


class Room:
    """Bytes that one request holds in memory, out of what all may hold together (``take`` says whether they may)."""

    def __init__(self, take: Callable[[int], None]) -> None:
        self._take = take
        self._taken = 0

    def take(self, amount: int) -> None:
        """More of them. Raises Overloaded where there is not so much left, and Unavailable where the collector ends."""
        self._take(amount)
        self._taken += amount

    def hold(self, amount: int) -> None:
        """So many of them instead. Raises as ``take``, and holds none then."""
        taken, self._taken = self._taken, 0
        self._take(-taken)
        self.take(amount)

    def hand_over(self) -> None:
        """They are somebody else's to give back."""
        self._taken = 0


@dataclass(eq=False, slots=True)
class _Waiting:
    batch: Batch
    digest: bytes
    done: asyncio.Future[Refusal | None]


class Intake:
    """Takes batches on the event loop; one thread writes them.

    ``listeners`` are called with the batches of each commit once they are durable, in the order in which they stand on
    disk, on the event loop: they must be quick, and an error of theirs is only logged. Batches that were sent again
    are told once.
    """

    def __init__(self, store: Store, most_held_bytes: int, listeners: Sequence[Listener] = ()) -> None:
        self.counts = Counts()
        self.held_bytes = 0
        self.is_ending = False
        self._store = store
        self._most_held_bytes = most_held_bytes
        self._listeners = listeners
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._writer = ThreadPoolExecutor(1, "stallscope-write")
        self._decoder = ThreadPoolExecutor(1, "stallscope-decode")
        self._known: dict[bytes, _Waiting | None] = {}  # by digest, oldest first; None: durable
        self._commit_s = 0.0  # how long the last one took
        self._can_write = True
        for message in store.latest_messages(REMEMBERED_SEGMENTS):
            self._remember(_digest(message), None)

    # --- for requests -----------------------------------------------------------------------------------------------

    @contextmanager
    def room(self) -> Iterator[Room]:
        """What a request takes room from while it reads its body and waits; counts a refusal that comes of it."""
        room = Room(self._take)
        try:
            yield room
        except Refusal:
            self.counts.refused += 1
            raise
        finally:
            room.hold(0)

    def _take(self, amount: int) -> None:
        if amount > 0 and self.is_ending:
            raise Unavailable("the collector is ending", retry_s=DISK_RETRY_S)
        if amount > 0 and self.held_bytes + amount > self._most_held_bytes:
            retry_s = min(MOST_RETRY_S, 1 + math.ceil(self._commit_s))
            raise Overloaded(f"{self.held_bytes:,} bytes wait to be written; try again in {retry_s} s", retry_s)
        self.held_bytes += amount

    async def receive(self, body: bytes, content_type: str, encoding: str, room: Room) -> Batch:
        """Takes a body, for whose bytes ``room`` was taken; returns once what it holds is on disk.

        ``content_type`` and ``encoding`` as in ``bodies``. Raises Wrong, TooLarge, Overloaded and Unavailable.
        """
        most = self._store.limits.message_bytes
        if encoding == "identity" and len(body) <= QUICK_BYTES:
            batch = batch_of(body, content_type)
        else:
            # One at a time, so that no more than one of them takes the memory that parsing it does.
            work = partial(_decode, body, content_type, encoding, most)
            batch = await asyncio.get_running_loop().run_in_executor(self._decoder, work)
        room.hold(len(batch.message))
        if batch.spans:
            await self._accept(batch, room)
        self.counts.requests += 1
        self.counts.refused_spans += batch.refused
        return batch

    async def _accept(self, batch: Batch, room: Room) -> None:
        """Returns once the batch is on disk.

        One with the same bytes as one before waits for that one and is not written again. A sender that goes away
        does not stop what it began, so the bytes that wait are held by the writer, not by the sender's request.
        """
        digest = _digest(batch.message)
        if digest in self._known:
            waiting = self._known[digest]
            self.counts.repeated += 1
        else:
            waiting = _Waiting(batch, digest, asyncio.get_running_loop().create_future())
            self._remember(digest, waiting)
            self._waiting.append(waiting)
            self._arrived.set()
            room.hand_over()
        refusal = await asyncio.shield(waiting.done) if waiting is not None else None
        if refusal is not None:
            raise refusal

    def _remember(self, digest: bytes, waiting: _Waiting | None) -> None:
        self._known[digest] = waiting
        while len(self._known) > REMEMBERED:
            del self._known[next(iter(self._known))]

    # --- the writer -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Commits what arrives, until ``end``."""
        while self._waiting or not self.is_ending:
            if not self._waiting:
                self._arrived.clear()
                try:
                    await asyncio.wait_for(self._arrived.wait(), _LOOK_S)
                except TimeoutError:
                    await self._rotate_if_old()
                continue
            await self._commit(list(self._next_group()))
        self._writer.shutdown()
        self._decoder.shutdown()

    def end(self) -> None:
        """No more batches; those that wait are still written."""
        self.is_ending = True
        self._arrived.set()

    def _next_group(self) -> Iterator[_Waiting]:
        """Those that wait, in order, as many as one commit may have; at least one."""
        size = 0
        while self._waiting:
            size += framed_size(self._waiting[0].batch.message)
            if size > self._store.limits.segment_bytes:
                if size == framed_size(self._waiting[0].batch.message):
                    yield self._waiting.popleft()
                return
            yield self._waiting.popleft()

    async def _commit(self, group: Sequence[_Waiting]) -> None:
        loop = asyncio.get_running_loop()
        messages = [one.batch.message for one in group]
        start = loop.time()
        refusal = None
        try:
            await loop.run_in_executor(self._writer, self._store.append, messages)
        except Exception as error:  # whatever it is, senders must hear that nothing was written
            refusal = self._refusal(error)
        self._commit_s = loop.time() - start
        for one in group:
            self.held_bytes -= len(one.batch.message)
            if refusal is None:
                self.counts.spans += one.batch.spans
                self.counts.bytes += len(one.batch.message)
                if one.digest in self._known:
                    self._known[one.digest] = None
            else:
                self._known.pop(one.digest, None)
            one.done.set_result(refusal)
        if refusal is None:
            self.counts.commits += 1
            if not self._can_write:
                log.warning("%s can be written again", self._store.folder)
            self._can_write = True
            self._tell([one.batch for one in group])

    def _refusal(self, error: Exception) -> Refusal:
        reason = error.strerror if isinstance(error, OSError) else repr(error)
        if self._can_write or not isinstance(error, OSError):
            log.error("%s can't be written (%s): senders are told to come again", self._store.folder, reason)
        self._can_write = False
        return Unavailable(f"the spans can't be written: {reason}", retry_s=DISK_RETRY_S)

    async def _rotate_if_old(self) -> None:
        try:
            await asyncio.get_running_loop().run_in_executor(self._writer, self._store.rotate_if_old)
        except OSError as error:
            log.warning("%s: a segment can't be closed: %s", self._store.folder, error.strerror)

    def _tell(self, batches: Sequence[Batch]) -> None:
        for listener in self._listeners:
            try:
                listener(batches)
            except Exception:  # spans are safe, whatever becomes of those who watch them
                log.exception("a listener failed")


def _decode(body: bytes, content_type: str, encoding: str, most_bytes: int) -> Batch:
    return batch_of(plain(body, encoding, most_bytes), content_type)


def _digest(message: bytes) -> bytes:
    return sha256(message).digest()
