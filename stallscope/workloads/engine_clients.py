"""Clients of closed loops on the bundled engine: their requests join its arrivals, what they give up is aborted."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence

from stallscope.workloads.closed_loop import Client, Outcome
from stallscope.workloads.traffic import PlannedRequest
from stallscope_engine.engine import Engine
from stallscope_engine.request import Request
from stallscope_telemetry.records import FinishReason


class EngineClients:
    """Lives beside ``Engine.run``: ``give_up`` before each step, ``take`` after it, ``pending`` as its arrivals.

    A client acts when its time comes, the engine when its step is done: what was given up during a step is aborted
    after it, and its retry has arrived meanwhile.
    """

    def __init__(
        self,
        engine: Engine,
        clients: Sequence[Client],
        pending: deque[Request],
        start_ns: int,
        make_request: Callable[[PlannedRequest], Request],
    ) -> None:
        self.sent = 0
        self.given_up = 0  # and aborted
        self._engine = engine
        self._pending = pending
        self._start_ns = start_ns
        self._make_request = make_request
        self._waiting: dict[Request, tuple[Client, PlannedRequest]] = {}
        self._deadlines: list[tuple[int, int, Request]] = []  # with a number, so that requests are never compared
        for client in clients:
            self._send(client, client.begin())

    def give_up(self) -> None:
        """Aborts what has taken longer than its client waits."""
        now_ns = self._engine.clock.now_ns()
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            self._submit_until(now_ns)  # what came during the step may have been given up within it
            deadline_ns, _, request = heapq.heappop(self._deadlines)
            waiting = self._waiting.pop(request, None)
            if waiting is not None:
                self.given_up += 1
                self._engine.abort(request, FinishReason.TIMEOUT)
                self._end(waiting[0], Outcome.TIMED_OUT, deadline_ns)

    def _submit_until(self, now_ns: int) -> None:
        while self._pending and _arrival(self._pending[0]) <= now_ns:
            self._engine.submit(self._pending.popleft())

    def take(self, finished: Sequence[Request]) -> None:
        """Hands the answers of a step to their clients; one that came too late found nobody."""
        for request in finished:
            waiting = self._waiting.pop(request, None)
            if waiting is None:
                continue
            client, planned = waiting
            deadline_ns = _deadline(request, planned)
            if deadline_ns is not None and request.end_ns > deadline_ns:
                self._end(client, Outcome.TIMED_OUT, deadline_ns)
            else:
                self._end(client, Outcome.ANSWERED, request.end_ns)

    def _end(self, client: Client, outcome: Outcome, ended_ns: int) -> None:
        self._send(client, client.after(outcome, ended_ns - self._start_ns))

    def _send(self, client: Client, planned: PlannedRequest | None) -> None:
        if planned is None:
            return
        self.sent += 1
        request = self._make_request(planned)
        self._waiting[request] = (client, planned)
        insort(self._pending, request, key=_arrival)
        deadline_ns = _deadline(request, planned)
        if deadline_ns is not None:
            heapq.heappush(self._deadlines, (deadline_ns, self.sent, request))


def _arrival(request: Request) -> int:
    return request.info.arrival_ns


def _deadline(request: Request, planned: PlannedRequest) -> int | None:
    return request.info.arrival_ns + planned.timeout_ns if planned.timeout_ns else None
