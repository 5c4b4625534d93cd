"""Runs a scenario on the bundled engine: its traffic arrives, and telemetry goes to a file (and an OTLP endpoint)."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import blake2b
from itertools import count
from pathlib import Path

from stallscope.errors import UsageError
from stallscope.workloads.closed_loop import clients_of
from stallscope.workloads.draws import stream
from stallscope.workloads.engine_clients import EngineClients
from stallscope.workloads.faults import Collector, EngineFaults, FaultPlan, SlowDelivery, plan_faults, slowdown
from stallscope.workloads.replica import (
    ExecutorName,
    describe,
    gpu_sampling,
    serve_all,
    torch_executor,
    warm_up,
)
from stallscope.workloads.scenario import Scenario
from stallscope.workloads.traffic import PlannedRequest, plan
from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, Recorder, VirtualClock, WallClock
from stallscope_engine.executors.virtual import StepCost, VirtualExecutor, cost_for
from stallscope_engine.models.configs import random_prompt
from stallscope_engine.request import Request
from stallscope_telemetry.emitter import Emitter, exporters_from_environment
from stallscope_telemetry.files import OtlpFileExporter
from stallscope_telemetry.records import RequestInfo, RequestRecord, StepRecord
from stallscope_telemetry.spans import resource_attributes

Prompts = Callable[[PlannedRequest], Sequence[int]]

VIRTUAL_START_NS = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000_000
MOST_DRAIN_S = 30.0  # after the last arrival; who is not done then stays open in the trace
_PROGRESS_STEP = 0.01


@dataclass(frozen=True, slots=True)
class RecordingSummary:
    """What was recorded. ``end_ns`` is when the last request finished or draining was given up."""

    path: Path
    requests: int
    finished: int
    steps: int
    start_ns: int
    end_ns: int
    dropped: int  # telemetry records lost to a full queue
    given_up: int = 0  # by clients who lost patience

    @property
    def open(self) -> int:
        """Requests that had not ended when recording ended."""
        return self.requests - self.finished - self.given_up


@dataclass(slots=True)
class Simulation:
    """A run in virtual time, kept in memory: a Recorder without telemetry."""

    steps: list[StepRecord] = field(default_factory=list)
    requests: list[RequestRecord] = field(default_factory=list)

    def wants_keyframe(self, step: int) -> bool:
        return False

    def step(self, record: StepRecord) -> None:
        self.steps.append(record)

    def request(self, record: RequestRecord) -> None:
        self.requests.append(record)


def simulate(scenario: Scenario, seed: int, inject: bool = True, cost: StepCost | None = None) -> Simulation:
    """Runs the scenario in virtual time, without a file, where steps cost what their model's do or ``cost``.

    Raises UsageError where the model has no cost profile.
    """
    simulation = Simulation()
    faults = plan_faults(scenario, seed, inject)
    engine = _virtual_engine(scenario.engine, seed, faults, simulation, cost)
    _run(engine, scenario, seed, inject, faults)
    return simulation


def record(
    scenario: Scenario,
    out: Path,
    *,
    seed: int,
    executor: ExecutorName,
    device: str = "auto",
    inject: bool = True,
    force: bool = False,
    progress: Callable[[float], None] | None = None,
) -> RecordingSummary:
    """Runs the scenario on ``executor`` and writes its trace to ``out``; without ``inject``, the usual traffic alone.

    In virtual time the same scenario and seed give the same bytes. ``progress`` hears the share that is done, in
    [0, 1]. Raises UsageError where ``out`` exists (unless ``force``) or can't be written, or the executor can't run
    the scenario's model or do what it injects.
    """
    if out.exists() and not force:
        raise UsageError(f"{out} exists: choose another name, or overwrite it with --force")
    faults = plan_faults(scenario, seed, inject)
    if executor == "torch":
        if faults.throttles:
            raise UsageError(f"{scenario.name}: a throttle needs virtual time; record it with --executor virtual")
        engine, prompts = _torch_engine(scenario, seed, inject, device)
    else:
        engine, prompts = _virtual_engine(scenario.engine, seed, faults), _no_prompt
    try:
        if force:
            out.unlink(missing_ok=True)
        file = OtlpFileExporter(out)
    except (OSError, ValueError) as error:
        raise UsageError(f"{out} can't be written: {error}") from error
    collector = Collector(faults, engine.clock)
    emitter = Emitter(
        resource_attributes(describe(engine.config, executor)),
        collector.exporters([file, *exporters_from_environment()], blocking=executor == "torch"),
        random.Random(f"{scenario.name}/{seed}/{inject}") if executor == "virtual" else random.Random(),
        background=executor == "torch",
    )
    with emitter, collector, gpu_sampling(engine, emitter):
        engine.recorder = emitter if executor == "torch" else collector.recorder(emitter)
        run = _run(engine, scenario, seed, inject, faults, collector, prompts=prompts, progress=progress)
        end_ns = engine.clock.now_ns()
    return RecordingSummary(
        out, run.requests, run.finished, engine.steps, run.start_ns, end_ns, emitter.dropped, run.given_up
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """When a run began, and how many requests came, finished, and were given up."""

    start_ns: int
    requests: int
    finished: int
    given_up: int


def _no_prompt(_: PlannedRequest) -> Sequence[int]:
    return ()


def _run(
    engine: Engine,
    scenario: Scenario,
    seed: int,
    inject: bool,
    faults: FaultPlan,
    collector: Collector | None = None,
    *,
    prompts: Prompts = _no_prompt,
    progress: Callable[[float], None] | None = None,
) -> _Run:
    """Lets the planned traffic arrive, and the clients of closed loops live."""
    planned = [(one, prompts(one)) for one in plan(scenario, seed, inject)]
    start_ns = engine.clock.now_ns()
    arrivals = deque(
        _request(handle, one, start_ns, prompt, engine.config) for handle, (one, prompt) in enumerate(planned, start=1)
    )
    handles = count(len(arrivals) + 1)
    clients = EngineClients(
        engine,
        clients_of(scenario, seed),
        arrivals,
        start_ns,
        lambda one: _request(next(handles), one, start_ns, prompts(one), engine.config),
    )
    host = EngineFaults(faults, engine, start_ns)
    if faults.slow_clients and engine.recorder is not None:
        engine.recorder = SlowDelivery(engine.recorder, faults, start_ns)
    if collector is not None:
        collector.begin(start_ns)
    until_ns = start_ns + round((scenario.duration_s + MOST_DRAIN_S) * 1e9)
    finished = 0
    told = 0.0

    def before_step() -> None:
        host.before_step()
        clients.give_up()

    def after_step(done: list[Request]) -> None:
        nonlocal finished, told
        finished += len(done)
        clients.take(done)
        if progress is not None:
            share = min((engine.clock.now_ns() - start_ns) / (scenario.duration_s * 1e9), 1.0)
            if share >= told + _PROGRESS_STEP:
                told = share
                progress(share)

    engine.run(arrivals, until_ns, before_step=before_step, after_step=after_step)
    if progress is not None:
        progress(1.0)
    return _Run(start_ns, len(planned) + clients.sent, finished, clients.given_up)


def _request(
    handle: int, planned: PlannedRequest, start_ns: int, prompt: Sequence[int], config: EngineConfig
) -> Request:
    info = RequestInfo(
        handle,
        planned.request_id,
        start_ns + planned.offset_ns,
        planned.prompt_tokens,
        planned.max_tokens or planned.output_tokens,
        planned.tenant,
        "scenario",
        planned.priority,
        planned.session,
        planned.predecessor,
        planned.retry_of,
    )
    # Where another limit is asked for, the answer ends by itself at the length that was drawn.
    stop_after = planned.output_tokens if planned.max_tokens else 0
    # Without token ids the engine must be told what prompts have in common.
    known = config.prefix_caching and not prompt
    return Request(
        info, prompt, stop_after=stop_after, block_hashes=_block_hashes(planned, config.block_size) if known else []
    )


def _block_hashes(planned: PlannedRequest, block_size: int) -> list[bytes]:
    """Names for the full blocks of a prompt, the same where prompts begin alike (``PlannedRequest.prompt_parts``)."""
    own, _ = planned.prompt_parts[-1]
    shared = planned.prefix_tokens // block_size
    return [
        blake2b(f"{planned.prefix_key if block < shared else own}/{block}".encode(), digest_size=16).digest()
        for block in range(planned.prompt_tokens // block_size)
    ]


def _virtual_engine(
    config: EngineConfig,
    seed: int,
    faults: FaultPlan,
    recorder: Recorder | None = None,
    cost: StepCost | None = None,
) -> Engine:
    try:
        cost = cost or cost_for(config.model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    clock = VirtualClock(VIRTUAL_START_NS)
    executor = VirtualExecutor(clock, cost, seed, slowdown(faults, VIRTUAL_START_NS) if faults.throttles else None)
    return Engine(config, executor, clock, recorder, executor.spend_host_time)


def time_prefill(config: EngineConfig, tokens: int) -> float:
    """Seconds that a prompt of ``tokens`` tokens takes on the torch executor of this machine, once it is warm."""
    config, executor = torch_executor(config, device="cpu")
    warm_up(config, executor, tokens)
    request = _request(
        1, PlannedRequest(0, "", tokens, 1, "timed"), 0, random_prompt(executor.model_config, tokens, 0), config
    )
    started = time.perf_counter()
    serve_all(config, executor, [request])
    return time.perf_counter() - started


def _torch_engine(scenario: Scenario, seed: int, inject: bool, device: str) -> tuple[Engine, Prompts]:
    """An engine that computes, warm, and the token ids of each prompt."""
    config, executor = torch_executor(scenario.engine, device=device, seed=seed)
    lengths = [one.prompt_tokens for one in plan(scenario, seed, inject)]
    lengths += [client.longest_prompt_tokens for client in clients_of(scenario, seed)]
    warm_up(config, executor, max(lengths, default=1))

    def prompt(one: PlannedRequest) -> list[int]:
        parts = [(int(stream(seed, "token_ids", key).integers(2**63)), tokens) for key, tokens in one.prompt_parts]
        return [token for drawn, size in parts for token in random_prompt(executor.model_config, size, drawn)]

    return Engine(config, executor, WallClock()), prompt
