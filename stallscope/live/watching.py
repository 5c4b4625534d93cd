"""The watch beside a collector: a process of its own, so that a diagnosis never keeps a sender waiting.

Flow: batches that are durable -> its pipe -> ``watch.Watch`` -> every few seconds what it has to say, back through the
pipe -> ``Scores``, which /metrics shows. A watch that falls behind loses batches, which then count as lost steps, and
as unwatched batches; one that breaks is started again. The collector goes on in either case.
"""

from __future__ import annotations

import logging
import multiprocessing
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from stallscope.diagnosis.slo import Slo
from stallscope.live.bodies import Batch
from stallscope.trace.otlp.json import JsonDecoder
from stallscope.trace.otlp.protobuf import ProtobufDecoder
from stallscope.trace.otlp.spans import MALFORMED, Resources, SpanGroup
from stallscope.watch.changes import Changes
from stallscope.watch.families import LAG, UNWATCHED, WINDOW_S
from stallscope.watch.rehearsal import bounds_with
from stallscope.watch.scores import Scores
from stallscope.watch.watch import Watch

log = logging.getLogger(__name__)

MOST_PENDING_BYTES = 128 << 20  # in the pipe and before it
_RESTART_S = 5.0
_END_S = 10.0  # for what is pending at the end
_SILENT_S = 3.0 * WINDOW_S  # when nothing was heard of it for so long, it is behind
_ENDS = (signal.SIGINT, signal.SIGTERM)
_MOST_RESOURCES = 10_000  # distinct ones, from which on they are learned anew
_SPAWN = multiprocessing.get_context("spawn")  # the collector has threads: a fork could inherit a lock that is held


class Watching:
    """A listener of an ``Intake``. ``start`` begins the process; ``close`` ends it, with what it has seen so far."""

    def __init__(self, scores: Scores, slos: Sequence[Slo] = ()) -> None:
        self.lost_batches = 0
        self._scores, self._slos = scores, tuple(slos)
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._arrived = threading.Condition()
        self._is_ending = False
        self._is_gone = False  # the process
        self._process: SpawnProcess | None = None
        self._heard_s = time.monotonic()  # when it has said something last
        self._thread = threading.Thread(target=self._run, name="stallscope-watching", daemon=True)

    def start(self) -> None:
        self._scores.set(UNWATCHED, (), 0)
        self._thread.start()

    def __call__(self, batches: Sequence[Batch]) -> None:
        """Takes batches, quickly."""
        lost = 0
        with self._arrived:
            for batch in batches:
                if self._pending_bytes + len(batch.message) > MOST_PENDING_BYTES:
                    lost += 1
                    continue
                self._pending.append(batch.message)
                self._pending_bytes += len(batch.message)
            self._arrived.notify()
        if lost:
            self._lose(lost)
        silent_s = time.monotonic() - self._heard_s
        if silent_s > _SILENT_S:
            self._scores.set(LAG, (), silent_s)

    def close(self) -> None:
        with self._arrived:
            self._is_ending = True
            self._arrived.notify()
        if not self._thread.is_alive():
            return
        self._thread.join(_END_S)
        if self._process is not None:
            self._process.kill()  # it may be stopped, or far behind
        self._thread.join()

    def _lose(self, batches: int) -> None:
        if not self.lost_batches:
            log.warning("the diagnosis can't keep up: spans are kept, but not watched")
        self.lost_batches += batches
        self._scores.set(UNWATCHED, (), self.lost_batches)

    # --- the thread that feeds it --------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_ending:
            resource_tracker.ensure_running()  # to begin it unblocks signals
            # The process inherits it: the collector says when it ends, from the first line on that it runs.
            signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
            ours, its = _SPAWN.Pipe()
            self._is_gone = False
            process = _SPAWN.Process(target=_watch, args=(its, self._slos), name="stallscope-watch", daemon=True)
            process.start()
            self._process, self._heard_s = process, time.monotonic()
            its.close()
            reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
            reader.start()
            with suppress(OSError):
                self._feed(ours)
                ours.send_bytes(b"")
                process.join(timeout=_END_S)
            process.kill()
            reader.join()
            process.join()
            ours.close()
            if not self._is_ending:
                log.error("the diagnosis has ended (exit code %s): it starts again", process.exitcode)
                with self._arrived:
                    self._arrived.wait_for(lambda: self._is_ending, _RESTART_S)

    def _feed(self, pipe: Connection) -> None:
        """Hands over what arrives, until the end. Raises OSError where the process is gone."""
        while True:
            with self._arrived:
                self._arrived.wait_for(lambda: self._pending or self._is_ending or self._is_gone)
                if self._is_gone:
                    raise BrokenPipeError
                messages, self._pending = self._pending, []
            for number, message in enumerate(messages):
                try:
                    pipe.send_bytes(message)
                except OSError:
                    with self._arrived:
                        self._pending_bytes -= sum(map(len, messages[number:]))
                    self._lose(len(messages) - number)
                    raise
                with self._arrived:
                    self._pending_bytes -= len(message)
            if self._is_ending and not messages:
                return

    def _read(self, pipe: Connection) -> None:
        try:
            while True:
                changes = pipe.recv()
                assert isinstance(changes, Changes)
                changes.apply(self._scores)
                self._heard_s = time.monotonic()
        except (EOFError, OSError):
            pass
        except Exception:  # a process that says such things is better begun anew
            log.exception("what the diagnosis says can't be shown")
        finally:
            with self._arrived:
                self._is_gone = True
                self._arrived.notify()


# --- the process ------------------------------------------------------------------------------------------------------


def _watch(pipe: Connection, slos: tuple[Slo, ...]) -> None:
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the collector has ended without a word
        _watch_until_told(pipe, slos)


def _watch_until_told(pipe: Connection, slos: tuple[Slo, ...]) -> None:
    changes = Changes(bounds_with(slos))
    watch = Watch(changes, slos)
    spans = _Decoder()
    window_ends = time.monotonic() + WINDOW_S
    while True:
        left = window_ends - time.monotonic()
        if left > 0 and pipe.poll(left):
            message = pipe.recv_bytes()
            if not message:
                break
            with suppress(*MALFORMED):  # the collector has looked; what no reader of traces takes is no reason to end
                watch.take(spans.groups(message))
            continue
        window_ends = max(window_ends + WINDOW_S, time.monotonic())
        watch.close_window(time.time_ns(), partial(_is_before, window_ends))
        pipe.send(changes.taken())
    watch.close_window(time.time_ns(), lambda: False)
    pipe.send(changes.taken())


def _is_before(deadline: float) -> bool:
    return time.monotonic() < deadline


class _Decoder:
    """Messages to spans, of which resources are known again."""

    def __init__(self) -> None:
        self._resources = Resources()
        self._begin()

    def _begin(self) -> None:
        self._protobuf, self._json = ProtobufDecoder(self._resources), JsonDecoder(self._resources)

    def groups(self, message: bytes) -> list[SpanGroup]:
        if len(self._resources) > _MOST_RESOURCES:
            self._resources = Resources()
            self._begin()
        decoder = self._json if message.startswith(b"{") else self._protobuf
        return [SpanGroup(resource, spans, "", "", bad) for resource, spans, bad in decoder.groups(message)]
