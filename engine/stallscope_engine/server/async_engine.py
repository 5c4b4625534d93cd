"""The engine in a thread of its own: requests go in through an inbox, tokens come out on the server's event loop.

Between ``app`` and ``stallscope_engine.engine``. No lock is held while a batch runs; the loop hears of a step once,
whatever the number of requests in it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

from stallscope_engine.engine import Engine
from stallscope_engine.request import Request
from stallscope_engine.scheduler import RequestRejected
from stallscope_engine.server.delivery import DeliveryRecorder
from stallscope_engine.server.errors import ApiError, wrong
from stallscope_engine.server.metrics import Metrics
from stallscope_telemetry.records import FinishReason

log = logging.getLogger(__name__)

MOST_FAILURES = 3  # batches that fail in a row; then the engine itself is broken, and runs no more
RATE_WINDOW_NS = 30_000_000_000  # of finished requests: how fast the queue has moved of late
STOP_S = 30.0  # how long a last step may take


class Stream:
    """One request's way back: what the engine has made and its client has not taken. Lives on the event loop.

    With ``each_step``, ``take`` returns as soon as there is a token, and at most ``most_pending`` tokens may lie
    here untaken; without, it returns when the request has ended.
    """

    def __init__(self, request: Request, each_step: bool, most_pending: int) -> None:
        self.request = request
        self.each_step = each_step
        self.finish_reason: FinishReason | None = None  # set with, or after, the last token
        self.error: ApiError | None = None  # ended, and why
        self.published = 0  # tokens that the engine's thread has sent on; nobody else looks at it
        self._most_pending = most_pending
        self._pending: list[int] = []
        self._news = asyncio.Event()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come than what lies here."""
        return self.finish_reason is not None or self.error is not None

    async def take(self) -> list[int]:
        """The tokens that came since the last call; [] only if the request has ended."""
        await self._news.wait()
        self._news.clear()
        taken, self._pending = self._pending, []
        return taken

    def feed(self, token_ids: list[int], finish_reason: FinishReason | None) -> bool:
        """Takes what a step made; False if the client has left more than it may lying here."""
        if self.has_ended:
            return True
        self._pending += token_ids
        self.finish_reason = finish_reason
        if self.each_step or finish_reason is not None:
            self._news.set()
        return finish_reason is not None or not self.each_step or len(self._pending) <= self._most_pending

    def fail(self, error: ApiError) -> None:
        """Ends the stream, unless it has ended."""
        if not self.has_ended:
            self.error = error
        self._news.set()


class AsyncEngine:
    """Runs ``engine`` in a thread from ``start`` to ``stop``. All public methods are for the event loop's thread."""

    def __init__(self, engine: Engine, model: str) -> None:
        self.metrics = Metrics(model, self)
        self.config = engine.config
        self.is_dead = False
        self._engine = engine
        self._delivery = DeliveryRecorder(engine.recorder) if engine.recorder is not None else None
        engine.recorder = self._delivery
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="stallscope-engine", daemon=True)
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._is_stopping = False
        self._open: dict[Request, Stream] = {}  # on the engine's thread
        self._streams: set[Stream] = set()  # on the loop: submitted, and not delivered
        self._finish_times_ns: deque[int] = deque(maxlen=1000)  # on the loop
        self._failures = 0

    # --- on the event loop ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the thread; to be called on the loop that will hear from it."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the step that it is in, and passes on the records that are held."""
        self._tell(self._stop)
        self._thread.join(STOP_S)
        if self._thread.is_alive():
            log.warning("the engine's last step takes more than %g s; it is left alone", STOP_S)
        elif self._delivery is not None:
            self._delivery.flush()

    def now_ns(self) -> int:
        """Time on the engine's clock."""
        return self._engine.clock.now_ns()

    @property
    def running(self) -> int:
        return len(self._engine.scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self._engine.scheduler.waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV blocks that is held."""
        blocks = self._engine.scheduler.blocks
        return blocks.used_blocks / blocks.num_blocks

    @property
    def open_requests(self) -> int:
        """Requests whose answers have not been delivered."""
        return len(self._streams)

    @property
    def queue_length(self) -> int:
        """Requests beyond those that run or could run at once; negative by as many as could."""
        could_run = self.running if self.waiting else self.config.max_num_seqs
        return sum(not stream.has_ended for stream in self._streams) - could_run

    def drain_rate(self) -> float:
        """Requests that finished per second of late; 0 if none did."""
        times, now_ns = self._finish_times_ns, self.now_ns()
        while times and times[0] < now_ns - RATE_WINDOW_NS:
            times.popleft()
        return len(times) / ((now_ns - times[0]) / 1e9 + 1) if times else 0.0

    def submit(self, request: Request, *, each_step: bool, most_pending: int) -> Stream:
        """Queues ``request`` for the next step. Raises ApiError if the engine is dead.

        The stream must be handed to ``delivered`` in the end, whatever becomes of it.
        """
        if self.is_dead:
            raise _dead()
        stream = Stream(request, each_step, most_pending)
        self._streams.add(stream)
        self._tell(partial(self._add, stream))
        return stream

    def abort(self, stream: Stream, reason: FinishReason, counted_as: str = "abort") -> None:
        """Ends a request before the next step, and frees its blocks; no-op if it has ended."""
        self._tell(partial(self._abort, stream, reason, counted_as))

    def delivered(self, stream: Stream) -> None:
        """The last of an answer was written, or nobody waits for it; what the engine still makes of it is in vain."""
        now_ns = self.now_ns()
        self._streams.discard(stream)
        self._finish_times_ns.append(now_ns)
        if not stream.has_ended:
            self.abort(stream, FinishReason.ABORT)
        if self._delivery is not None:
            self._tell(partial(self._delivery.delivered, stream.request.info.handle, now_ns))

    def abort_all(self) -> None:
        """Ends every request, as a server does that won't wait any longer."""
        for stream in self._streams:
            stream.fail(_shut_down())
            self.abort(stream, FinishReason.ABORT)

    def _tell(self, command: Callable[[], None]) -> None:
        self._inbox.append(command)
        self._wake.set()

    def _deliver(self, news: list[tuple[Stream, list[int], FinishReason | None]]) -> None:
        for stream, token_ids, finish_reason in news:
            if not stream.feed(token_ids, finish_reason):
                stream.fail(_slow())
                self.abort(stream, FinishReason.ABORT)

    # --- on the engine's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_stopping:
            self._wake.clear()  # before the inbox is looked at: what comes after that wakes the wait below
            while self._inbox:
                self._inbox.popleft()()
            if self._engine.has_work and not self.is_dead:
                self._step()
            elif not self._is_stopping:
                began_ns = self._engine.clock.now_ns()
                self._wake.wait()
                self._engine.note_idle(self._engine.clock.now_ns() - began_ns)

    def _stop(self) -> None:
        self._is_stopping = True

    def _add(self, stream: Stream) -> None:
        if self.is_dead:
            self._call(stream.fail, _dead())
            return
        try:
            self._engine.submit(stream.request)
        except RequestRejected as error:
            self._call(stream.fail, wrong(None, str(error)))
        else:
            self._open[stream.request] = stream

    def _abort(self, stream: Stream, reason: FinishReason, counted_as: str) -> None:
        if self._open.pop(stream.request, None) is None:
            return
        self._engine.abort(stream.request, reason)
        self.metrics.finished(stream.request, counted_as)
        self._call(self._deliver, [(stream, [], reason)])

    def _step(self) -> None:
        # The one place that catches everything: whatever a batch runs into, its requests must be answered and the
        # others served.
        try:
            self._engine.step()
        except Exception:
            self._failures += 1
            log.exception("the engine failed on a batch")
            self._fail_batch()
        else:
            self._failures = 0
            self._publish()

    def _publish(self) -> None:
        """Tells the loop, in one call, what the step has brought."""
        news: list[tuple[Stream, list[int], FinishReason | None]] = []
        for request, stream in self._open.items():
            published, made = stream.published, request.output_tokens
            if made == published and request.finish_reason is None:
                continue
            stream.published = made
            news.append((stream, request.output_token_ids[published:made], request.finish_reason))
            if made > published:
                self.metrics.tokens(request, made - published)
        for stream, _, finish_reason in news:
            if finish_reason is not None:
                del self._open[stream.request]
                self.metrics.finished(stream.request, finish_reason.name.lower())
        if news:
            self._call(self._deliver, news)

    def _fail_batch(self) -> None:
        """Ends all that ran; where that fails too, or does not help, ends everything."""
        try:
            for request in [*self._engine.scheduler.running]:
                self._engine.abort(request, FinishReason.ERROR)
                self._fail(request, _broken())
        except Exception:
            log.exception("the engine could not be mended")
            self._failures = MOST_FAILURES
        if self._failures >= MOST_FAILURES:
            log.error("the engine stops: %d batches failed in a row", self._failures)
            self.is_dead = True
            for request in [*self._open]:
                self._fail(request, _dead())

    def _fail(self, request: Request, error: ApiError) -> None:
        stream = self._open.pop(request, None)
        if stream is not None:
            if request.finish_reason is not None:
                self.metrics.finished(request, "error")
            self._call(stream.fail, error)

    def _call(self, call: Callable[..., object], *arguments: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(call, *arguments)


def _broken() -> ApiError:
    return ApiError(500, "the engine failed on a batch that had this request in it; send it again", code="engine_error")


def _dead() -> ApiError:
    return ApiError(503, "the engine has stopped after failing several times; the server must be restarted")


def _slow() -> ApiError:
    return ApiError(500, "the answer was not read fast enough, so the server gave it up", code="slow_reader")


def _shut_down() -> ApiError:
    return ApiError(503, "the server shut down before the answer was done; send it to another", code="shut_down")
