"""One replay: requests arrive as planned, the engine's scheduler makes batches, and time passes as their cost says."""

from __future__ import annotations

import dataclasses
from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise

import numpy as np
import pandas as pd

from stallscope.diagnosis.replay.disturbances import CLOCK_BIN_NS, SLICE_NS
from stallscope.diagnosis.replay.history import History, Standing, fill_cache, make_request
from stallscope.diagnosis.replay.machine import Machine
from stallscope.diagnosis.timeline import Ints
from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, StepResult, VirtualClock
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch, RequestRejected, Scheduler
from stallscope_telemetry.records import FinishReason, RequestInfo, RequestState

_NOISE_SLICES = 4096
_NOTHING = StepResult()


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to happen: ``requests`` as in ``History.requests`` with a column code (-1: drawn), ordered by arrival.

    ``follows`` are positions in it. ``standing``: who is there at ``start_ns``. Nothing arrives from ``end_ns`` on, and
    at ``until_ns`` the replay ends whoever is still there.
    """

    requests: pd.DataFrame
    standing: Sequence[Standing]
    start_ns: int
    until_ns: int


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of a plan's requests.

    ``requests``: code, tenant, arrival, prompt_tokens (as planned), arrived (ns; -1: never), first_token (-1: none),
    end (-1: none), longest_gap (ns), output_tokens, waited_until (first token, end of the replay, or when it was given
    up). ``unseen``: share of steps beyond what the step cost was learnt from.
    """

    requests: pd.DataFrame
    steps: int
    unseen: float
    end_ns: int


class ReplayExecutor:
    """Lets the clock pass by what a batch should cost, with this draw's noise and the recorded faults."""

    def __init__(self, machine: Machine, clock: VirtualClock, noise: Sequence[float]) -> None:
        self._cost = machine.cost
        self._most_tokens = machine.most_tokens
        self._free_context = machine.free_context
        self._faults = machine.disturbances
        self._clock = clock
        self._noise = noise
        self._free_at_ns = 0
        self._ready_at_ns: deque[int] = deque()
        self._stops = deque(machine.disturbances.stops)
        self._pauses = deque(machine.disturbances.pauses)
        now = clock.now_ns()
        for faults in (self._stops, self._pauses):
            while faults and faults[0][0] < now:
                faults.popleft()
        self.beyond = 0

    def host_work(self, batch: Batch) -> None:
        """The host's part of a step: the engine's ``before_dispatch``."""
        faults = self._faults
        now_ns = self._clock.now_ns()
        self._clock.wait_until(now_ns + int(faults.host_ns + faults.host_request_ns * len(batch.requests)))

    def hold_up(self) -> None:
        """Stands still where the recorded host did (``Engine.run``'s ``before_step``)."""
        pauses = self._pauses
        while pauses and pauses[0][0] <= self._clock.now_ns():
            start_ns, length_ns = pauses.popleft()
            self._clock.wait_until(start_ns + length_ns)

    def dispatch(self, batch: Batch) -> None:
        start_ns = max(self._clock.now_ns(), self._free_at_ns)
        decodes, prefill_tokens, context, attention = batch.decode_tokens, batch.prefill_tokens, sum(batch.starts), 0.0
        if prefill_tokens:
            chunks = dict(batch.chunks)
            for request, tokens, start in zip(batch.requests, batch.num_tokens, batch.starts, strict=True):
                if request.info.handle in chunks:
                    context -= start
                    attention += tokens * (start + tokens / 2)
        if self._free_context:
            context = 0
        if self._most_tokens is not None and prefill_tokens > self._most_tokens:
            attention *= self._most_tokens / prefill_tokens
            prefill_tokens = self._most_tokens
        duration_ns = self._cost.duration_ns(prefill_tokens, attention, decodes, context)
        self.beyond += self._cost.beyond(prefill_tokens, attention, decodes, context)
        duration_ns *= self._noise[start_ns // SLICE_NS % _NOISE_SLICES]
        clock = self._faults.clock
        if clock:
            index = (start_ns - self._faults.clock_start) // CLOCK_BIN_NS
            if 0 <= index < len(clock):
                duration_ns *= clock[index]
        end_ns = start_ns + int(duration_ns)
        while self._stops and self._stops[0][0] < end_ns:
            end_ns += self._stops.popleft()[1]
        self._free_at_ns = end_ns
        self._ready_at_ns.append(end_ns)

    def collect(self, batch: Batch) -> StepResult:
        self._clock.wait_until(self._ready_at_ns.popleft())
        return _NOTHING


class _Clients:
    """Those behind the requests: some ask only when another answer is there, some give up."""

    def __init__(
        self, plan: Plan, requests: list[Request], fits: list[bool], arrivals: deque[Request], engine: Engine
    ) -> None:
        self._engine = engine
        self._arrivals = arrivals
        self._requests = requests
        self._fits = fits
        standing = {one.request for one in plan.standing}
        self._stood = [code in standing for code in plan.requests["code"].to_list()]
        self._think = plan.requests["think"].to_list()
        self._retry = plan.requests["retry"].to_list()
        self._patience = plan.requests["patience"].to_list()
        self._followers: dict[int, list[int]] = {}
        for index, before in enumerate(plan.requests["follows"].to_list()):
            if before >= 0:
                self._followers.setdefault(before, []).append(index)
        self.index_of = {request: index for index, request in enumerate(requests)}
        self._deadlines: list[tuple[int, int]] = []

    def watch(self, request: Request) -> None:
        index = self.index_of[request]
        if self._patience[index]:
            heappush(self._deadlines, (request.info.arrival_ns + self._patience[index], index))

    def give_up(self) -> list[Request]:
        """Ends those whose clients have waited long enough, and returns those that the engine had."""
        aborted: list[Request] = []
        now_ns = self._engine.clock.now_ns()
        while self._deadlines and self._deadlines[0][0] <= now_ns:
            _, index = heappop(self._deadlines)
            request = self._requests[index]
            if request.finish_reason is not None:
                continue
            if request.queued_ns or self._stood[index]:
                self._engine.abort(request, FinishReason.TIMEOUT)
                if request.finish_reason is FinishReason.TIMEOUT:  # else a step in flight had ended it
                    aborted.append(request)
            else:
                # It came while the host stood still, or is held back by the gateway.
                request.finish_reason, request.end_ns = FinishReason.TIMEOUT, now_ns
                if request in self._arrivals:
                    self._arrivals.remove(request)
            self._follow(index, request.end_ns, failed=True)
        return aborted

    def finished(self, done: list[Request]) -> None:
        for request in done:
            index = self.index_of[request]
            self._follow(index, request.end_ns, failed=request.finish_reason is FinishReason.TIMEOUT)

    def _follow(self, index: int, end_ns: int, *, failed: bool) -> None:
        for follower in self._followers.pop(index, ()):
            if self._retry[follower] and not failed:
                self._follow(follower, end_ns, failed=False)  # nothing to ask again: who waited for that goes on
                continue
            if not self._fits[follower]:
                continue
            request = self._requests[follower]
            request.info = _at(request.info, end_ns + self._think[follower])
            self.watch(request)
            insort(self._arrivals, request, key=lambda one: one.info.arrival_ns)


class _Gateway:
    """Lets a tenant have only so many requests in the engine at once; the others wait before it, first come first."""

    def __init__(
        self,
        plan: Plan,
        arrivals: deque[Request],
        index_of: Mapping[Request, int],
        most_at_once: Mapping[int, int],
    ) -> None:
        self._most = most_at_once
        self._tenant = plan.requests["tenant"].to_list()
        self._index_of = index_of
        self._arrivals = arrivals
        standing = {one.request for one in plan.standing}
        inside = [t for code, t in zip(plan.requests["code"].to_list(), self._tenant, strict=True) if code in standing]
        self._inside = {tenant: inside.count(tenant) for tenant in most_at_once}
        self._outside: dict[int, deque[Request]] = {tenant: deque() for tenant in most_at_once}

    def hold_back(self, now_ns: int) -> None:
        """Takes those who arrive now and may not come in out of the arrivals."""
        if not self._most:
            return
        kept = []
        while self._arrivals and self._arrivals[0].info.arrival_ns <= now_ns:
            request = self._arrivals.popleft()
            tenant = self._tenant[self._index_of[request]]
            if tenant not in self._most:
                kept.append(request)
            elif self._inside[tenant] < self._most[tenant]:
                self._inside[tenant] += 1
                kept.append(request)
            else:
                self._outside[tenant].append(request)
        self._arrivals.extendleft(reversed(kept))

    def let_in(self, ended: list[Request]) -> None:
        """Lets in one for each that has ended."""
        if not self._most:
            return
        for request in ended:
            tenant = self._tenant[self._index_of[request]]
            if tenant not in self._most:
                continue
            self._inside[tenant] -= 1
            outside = self._outside[tenant]
            while outside and outside[0].finish_reason is not None:
                outside.popleft()  # its client has given up
            if outside:
                self._arrivals.appendleft(outside.popleft())


def _at(info: RequestInfo, arrival_ns: int) -> RequestInfo:
    return RequestInfo(
        info.handle,
        info.request_id,
        arrival_ns,
        info.prompt_tokens,
        info.max_tokens,
        info.tenant,
        info.tenant_source,
        info.priority,
    )


def replay(
    history: History,
    machine: Machine,
    plan: Plan,
    draw: int,
    config: EngineConfig | None = None,
    most_at_once: Mapping[int, int] | None = None,
) -> Outcome:
    """Runs ``plan`` in virtual time; ``draw`` seeds all that is drawn: noise, and answers whose length is not known.

    ``config``: another configuration than the recorded one. What it would reject never arrives. ``most_at_once``: of a
    tenant's requests the gateway lets so many in, the next one when one has ended.
    """
    config = config or history.config
    generator = np.random.default_rng([draw, 7])
    factors = machine.disturbances.factors
    noise = generator.choice(factors, _NOISE_SLICES).tolist() if len(factors) else [1.0] * _NOISE_SLICES
    clock = VirtualClock(plan.start_ns)
    executor = ReplayExecutor(machine, clock, noise)
    engine = Engine(config, executor, clock, None, executor.host_work)
    requests = _build(history, plan.requests, _answers(history, plan.requests, generator))
    if config.prefix_caching:
        fill_cache(engine.scheduler, _earlier_prefixes(history, plan.start_ns))
    fitting = [_fits(engine.scheduler, request) for request in requests]
    codes = plan.requests["code"].to_list()
    follows = plan.requests["follows"].to_list()
    request_of = {code: request for code, request, fits in zip(codes, requests, fitting, strict=True) if fits}
    plan = dataclasses.replace(plan, standing=[one for one in plan.standing if one.request in request_of])
    there = {one.request for one in plan.standing}
    _resume(engine, [(one, request_of[one.request]) for one in plan.standing])
    arrivals = deque(
        request
        for code, request, before, fits in zip(codes, requests, follows, fitting, strict=True)
        if code not in there and before < 0 and fits
    )
    clients = _Clients(plan, requests, fitting, arrivals, engine)
    gate = _Gateway(plan, arrivals, clients.index_of, most_at_once or {})
    for request in [*arrivals, *(request_of[one.request] for one in plan.standing)]:
        clients.watch(request)

    def before_step() -> None:
        executor.hold_up()
        gate.let_in(clients.give_up())
        gate.hold_back(clock.now_ns())

    def after_step(done: list[Request]) -> None:
        clients.finished(done)
        gate.let_in(done)

    engine.run(arrivals, plan.until_ns, before_step, after_step)
    end_ns = clock.now_ns()
    return Outcome(_outcomes(plan, requests, end_ns), engine.steps, executor.beyond / max(engine.steps, 1), end_ns)


def rejected_by(history: History, config: EngineConfig, plan: Plan) -> int:
    """How many of a plan's requests an engine with this configuration would not take."""
    scheduler = Scheduler(config)
    requests = _build(history, plan.requests, plan.requests["output_tokens"].to_numpy(np.int64))
    return sum(not _fits(scheduler, request) for request in requests)


def _build(history: History, planned: pd.DataFrame, outputs: Ints) -> list[Request]:
    columns = ("tenant", "arrival", "prompt_tokens", "limit", "priority", "prefix", "shared_tokens")
    return [
        make_request(history, handle, tenant, arrival, prompt, output, limit, priority, prefix, shared)
        for handle, (tenant, arrival, prompt, limit, priority, prefix, shared, output) in enumerate(
            zip(*(planned[name].to_list() for name in columns), outputs.tolist(), strict=True), start=1
        )
    ]


def _answers(history: History, planned: pd.DataFrame, generator: np.random.Generator) -> Ints:
    """Output tokens of each request: as recorded; where that was cut off, drawn from its tenant's that were not."""
    outputs = planned["output_tokens"].to_numpy(np.int64).copy()
    cut = np.flatnonzero(planned["censored"].to_numpy())
    whole = history.requests[~history.requests["censored"]]
    for row in cut.tolist():
        mine = whole["output_tokens"].to_numpy()[whole["tenant"].to_numpy() == planned["tenant"].iloc[row]]
        longer = mine[mine >= outputs[row]]
        if len(longer):
            outputs[row] = generator.choice(longer)
    answers: Ints = np.minimum(np.maximum(outputs, 1), planned["limit"].to_numpy(np.int64))
    return answers


def _fits(scheduler: Scheduler, request: Request) -> bool:
    try:
        scheduler.check(request)
    except RequestRejected:
        return False
    return True


def _resume(engine: Engine, standing: list[tuple[Standing, Request]]) -> None:
    running, waiting, preempted = [], [], []
    for one, request in standing:
        request.output_tokens = one.output_tokens
        request.token_times_ns = [engine.clock.now_ns()] if one.output_tokens else []
        if one.running:
            request.computed_tokens = one.computed_tokens
            running.append(request)
        elif one.preempted:
            request.state = RequestState.PREEMPTED
            preempted.append(request)
        else:
            waiting.append(request)
    engine.scheduler.resume(running, preempted + waiting)


def _earlier_prefixes(history: History, before_ns: int) -> list[tuple[int, int]]:
    """Beginnings of prompts that came before, (prefix, tokens), the latest last."""
    earlier = history.requests[history.requests["arrival"] < before_ns]
    last = earlier[earlier["shared_tokens"] > 0].drop_duplicates("prefix", keep="last")
    return list(zip(last["prefix"].to_list(), last["shared_tokens"].to_list(), strict=True))


def _outcomes(plan: Plan, requests: list[Request], end_ns: int) -> pd.DataFrame:
    standing = {one.request for one in plan.standing}
    first, ended, gap, made, arrived = [], [], [], [], []
    for code, request in zip(plan.requests["code"].to_list(), requests, strict=True):
        times = request.token_times_ns
        before = code in standing and bool(request.output_tokens) and bool(times) and times[0] == plan.start_ns
        first.append(-1 if before or not times else times[0])
        longest = max((b - a for a, b in pairwise(times)), default=0)
        if times and request.finish_reason is None:
            longest = max(longest, end_ns - times[-1])
        gap.append(longest)
        ended.append(request.end_ns if request.finish_reason is not None else -1)
        made.append(request.output_tokens)
        came = code in standing or request.queued_ns or request.finish_reason is not None
        arrived.append(request.info.arrival_ns if came else -1)
    table = plan.requests[["code", "tenant", "arrival", "prompt_tokens"]].copy()
    table["arrived"], table["first_token"], table["end"] = arrived, first, ended
    table["longest_gap"], table["output_tokens"] = gap, made
    until = np.where(table["end"] >= 0, table["end"], end_ns)
    table["waited_until"] = np.where(table["first_token"] >= 0, table["first_token"], until)
    return table
