"""Drives an OpenAI-compatible endpoint with a scenario's traffic, and keeps what its clients saw.

Open-loop: a request is sent when it is due, whether those before it were answered or not; only the clients of a closed
loop wait. What the driver itself was
late with is measured with each request, since a slow client would be mistaken for a slow server.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

from stallscope.errors import UsageError
from stallscope.workloads.clients import (
    ABANDONED,
    OK,
    TIMEOUT,
    Figures,
    Lateness,
    Tally,
    open_file,
)
from stallscope.workloads.closed_loop import RETRY_PAUSE_NS, Client, Outcome, clients_of
from stallscope.workloads.endpoint import Answer, Endpoint, Target, connect
from stallscope.workloads.scenario import Scenario, Traffic
from stallscope.workloads.traffic import PlannedRequest, plan
from stallscope_engine.engine import WallClock
from stallscope_telemetry.clients import Caller, ClientFile, ClientRecord

MOST_DRAIN_S = 30.0  # after the last request was sent; who is not answered then is given up
LATE_S = 0.05  # a driver later than this in one request of a hundred measures itself
_LEAD_NS = 200_000_000  # from the start of the clock to the first request that may be due
_TICK_S = 0.5


@dataclass(frozen=True, slots=True)
class LoadSummary:
    """What was sent and seen. ``path`` is the trace file, where one was written; ``notes`` are for the user."""

    model: str
    tenants: tuple[Figures, ...]
    lateness: Lateness
    duration_s: float
    path: Path | None
    interrupted: bool
    notes: tuple[str, ...]

    @property
    def sent(self) -> int:
        return sum(tenant.sent for tenant in self.tenants)

    @property
    def ok(self) -> int:
        return sum(tenant.ok for tenant in self.tenants)

    @property
    def driver_was_late(self) -> bool:
        """Whether the driver could not keep to the schedule, so that its figures say little of the server."""
        return self.lateness.p99 > LATE_S


def load(
    scenario: Scenario,
    target: Target,
    *,
    seed: int,
    inject: bool = True,
    out: Path | None = None,
    force: bool = False,
    progress: Callable[[float], None] | None = None,
) -> LoadSummary:
    """Sends the scenario's requests to ``target`` and waits for their answers; ``out`` is a trace file or a folder.

    SIGINT ends the run early and keeps what there is. ``progress`` hears the share that is done, in [0, 1]. Raises
    UsageError where the endpoint can't be driven, ``out`` exists (unless ``force``) or can't be written, or the
    scenario has no requests.
    """
    planned, clients = plan(scenario, seed, inject), clients_of(scenario, seed)
    if not planned and not clients:
        raise UsageError(f"scenario {scenario.name} has no requests in its {scenario.duration_s:g} s")
    return asyncio.run(_load(scenario, planned, clients, target, seed, inject, out, force, progress))


async def _load(
    scenario: Scenario,
    planned: list[PlannedRequest],
    clients: list[Client],
    target: Target,
    seed: int,
    inject: bool,
    out: Path | None,
    force: bool,
    progress: Callable[[float], None] | None,
) -> LoadSummary:
    endpoint = await connect(target, seed, _has_priorities(planned, clients))
    file = None if out is None else open_file(out, endpoint.model, force)
    driver = _Driver(endpoint, scenario.duration_s, file)
    ticker = asyncio.create_task(driver.tick(progress or _nobody_listens))
    try:
        interrupted = await driver.run(planned, clients)
    finally:
        ticker.cancel()
        driver.close()
    return LoadSummary(
        endpoint.model,
        driver.tally.figures(),
        driver.tally.lateness(),
        driver.elapsed_s,
        None if file is None else file.path,
        interrupted,
        (*endpoint.notes, *driver.notes, *(_left_out(scenario) if inject else ())),
    )


def _has_priorities(planned: list[PlannedRequest], clients: list[Client]) -> bool:
    return any(one.priority for one in planned) or any(one.tenant.lengths.priority for one in clients)


def _nobody_listens(_: float) -> None:
    pass


def _left_out(scenario: Scenario) -> list[str]:
    """What a client can't do to an endpoint, as a note."""
    others = [one for one in scenario.inject if not isinstance(one, Traffic)]
    if not others:
        return []
    return [
        f"{len(others)} of the scenario's injections are not traffic, and are left out: a client has no hold of them"
    ]


def _outcome(answer: Answer) -> Outcome:
    return {OK: Outcome.ANSWERED, TIMEOUT: Outcome.TIMED_OUT}.get(answer.status, Outcome.FAILED)


class _Driver:
    """Sends requests when they are due and records how each ended."""

    def __init__(self, endpoint: Endpoint, duration_s: float, file: ClientFile | None) -> None:
        self.tally = Tally()
        self.notes: list[str] = []
        self._endpoint = endpoint
        self._duration_s = duration_s
        self._file = file
        self._ids = random.Random()
        self._clock = WallClock()
        self._start_ns = self._clock.now_ns() + _LEAD_NS
        self._tasks: set[asyncio.Task[None]] = set()
        self._complaints: set[str] = set()  # statuses of which the user was told one
        self._failure: BaseException | None = None

    @property
    def elapsed_s(self) -> float:
        return (self._clock.now_ns() - self._start_ns) / 1e9

    async def run(self, planned: list[PlannedRequest], clients: list[Client]) -> bool:
        """Sends everything and waits for the answers; whether it was interrupted before that."""
        interrupted = False
        try:
            for client in clients:
                self._start(self._live(client))
            for one in planned:
                self._start(self._send_once(one, await self._when_due(one)))
            await self._wait_until(self._start_ns + round(self._duration_s * 1e9) if clients else 0)
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=MOST_DRAIN_S)
        except asyncio.CancelledError:  # SIGINT, by way of asyncio.run
            interrupted = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._failure is not None:
            raise self._failure
        return interrupted

    async def _send_once(self, planned: PlannedRequest, body: bytes) -> None:
        await self._send(planned, body)

    async def _live(self, client: Client) -> None:
        """Sends what a client of a closed loop sends, one after the other."""
        planned = client.begin()
        while planned is not None:
            answer, ended_ns = await self._send(planned, await self._when_due(planned))
            pause_ns = RETRY_PAUSE_NS if answer.retry_after_s is None else round(answer.retry_after_s * 1e9)
            planned = client.after(_outcome(answer), ended_ns - self._start_ns, pause_ns)

    async def _when_due(self, planned: PlannedRequest) -> bytes:
        """Waits until a request is due; returns its body, made before."""
        body = self._endpoint.body(planned)
        await self._wait_until(self._start_ns + planned.offset_ns)
        return body

    async def tick(self, progress: Callable[[float], None]) -> None:
        """Tells the progress, and makes what was recorded so far readable."""
        while True:
            progress(min(max(self.elapsed_s / self._duration_s, 0.0), 1.0))
            self._write(ClientFile.flush)
            await asyncio.sleep(_TICK_S)

    def close(self) -> None:
        """Ends connections and trace file."""
        self._endpoint.close()
        self._write(ClientFile.close)

    def _start(self, coroutine: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and self._failure is None:
            self._failure = task.exception()

    async def _wait_until(self, time_ns: int) -> None:
        while (left_ns := time_ns - self._clock.now_ns()) > 0:
            await asyncio.sleep(left_ns / 1e9)

    async def _send(self, planned: PlannedRequest, body: bytes) -> tuple[Answer, int]:
        """Sends one request that is due now and records its answer, however it ends; the answer, and when it ended."""
        answer, caller = Answer(), Caller.draw(self._ids)
        sent_ns = ended_ns = self._clock.now_ns()
        try:
            async with asyncio.timeout(planned.timeout_ns / 1e9 or None):
                await self._endpoint.ask(planned, body, caller, self._clock.now_ns, answer)
        except TimeoutError:
            if answer.status == ABANDONED:
                answer.status = TIMEOUT
        finally:
            ended_ns = answer.end_ns if answer.status == OK else self._clock.now_ns()
            self._record(
                ClientRecord(
                    caller,
                    planned.request_id,
                    planned.tenant,
                    planned.prompt_tokens,
                    planned.output_tokens,
                    self._start_ns + planned.offset_ns,
                    sent_ns,
                    ended_ns,
                    answer.status,
                    answer.http_status,
                    answer.token_times_ns,
                    answer.output_tokens,
                    planned.priority,
                    planned.session,
                    planned.predecessor,
                    planned.retry_of,
                ),
                answer.detail,
            )
        return answer, ended_ns

    def _record(self, record: ClientRecord, detail: str) -> None:
        self.tally.add(record)
        if detail and record.status not in self._complaints:
            self._complaints.add(record.status)
            self.notes.append(f"{record.request_id} ended in {record.status}: {detail}")
        self._write(lambda file: file.write(record))

    def _write(self, what: Callable[[ClientFile], object]) -> None:
        """Does something with the trace file; a full disk costs the file, not the run."""
        if self._file is None:
            return
        try:
            what(self._file)
        except OSError as error:
            self.notes.append(f"{self._file.path} ends early: {error}")
            self._file = None
