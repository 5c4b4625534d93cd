"""Runs a scenario on the bundled engine: its traffic arrives, and telemetry goes to a file (and an OTLP endpoint)."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import stallscope
from stallscope.errors import UsageError
from stallscope.workloads.draws import stream
from stallscope.workloads.scenario import Scenario
from stallscope.workloads.traffic import PlannedPause, PlannedRequest, plan, plan_pauses
from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Clock, Engine, Executor, Recorder, VirtualClock, WallClock
from stallscope_engine.executors.virtual import VirtualExecutor, cost_for
from stallscope_engine.models.configs import random_prompt
from stallscope_engine.request import Request
from stallscope_telemetry.emitter import Emitter, exporters_from_environment
from stallscope_telemetry.files import OtlpFileExporter
from stallscope_telemetry.records import RequestInfo, RequestRecord, StepRecord
from stallscope_telemetry.spans import EngineDescription, resource_attributes

ExecutorName = Literal["torch", "virtual"]
Prompts = Callable[[PlannedRequest], Sequence[int]]

REPLICA = "engine-0"  # says nothing of the scenario: its name would be the answer
VIRTUAL_START_NS = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000_000
MOST_DRAIN_S = 30.0  # after the last arrival; who is not done then stays open in the trace
_PROGRESS_STEP = 0.01
_WARM_UP_TOKENS = ((100, 8), (30, 4), (200, 4), (100, 6))  # prompt, output


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

    @property
    def open(self) -> int:
        """Requests that had not finished when recording ended."""
        return self.requests - self.finished


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


class Pauses:
    """Holds the engine's host up when a step would begin within a pause (``Engine.run``'s ``before_step``).

    A pause that passes while a batch is in flight ends with it unnoticed, as on real hardware.
    """

    def __init__(self, clock: Clock, start_ns: int, pauses: Sequence[PlannedPause]) -> None:
        self._clock = clock
        self._pauses = [(start_ns + pause.start_ns, start_ns + pause.end_ns) for pause in pauses]

    def __call__(self) -> None:
        for begin_ns, end_ns in self._pauses:
            if begin_ns <= self._clock.now_ns() < end_ns:
                self._clock.wait_until(end_ns)


def simulate(scenario: Scenario, seed: int, inject: bool = True) -> Simulation:
    """Runs the scenario in virtual time, without a file. Raises UsageError where its model has no cost profile."""
    simulation = Simulation()
    engine = _virtual_engine(scenario.engine, seed, simulation)
    _run(engine, scenario, seed, inject)
    return simulation


def record(
    scenario: Scenario,
    out: Path,
    *,
    seed: int,
    executor: ExecutorName,
    inject: bool = True,
    force: bool = False,
    progress: Callable[[float], None] | None = None,
) -> RecordingSummary:
    """Runs the scenario on ``executor`` and writes its trace to ``out``; without ``inject``, the usual traffic alone.

    In virtual time the same scenario and seed give the same bytes. ``progress`` hears the share that is done, in
    [0, 1]. Raises UsageError where ``out`` exists (unless ``force``) or can't be written, or the executor can't run
    the scenario's model.
    """
    if out.exists() and not force:
        raise UsageError(f"{out} exists: choose another name, or overwrite it with --force")
    if executor == "torch":
        engine, prompts = _torch_engine(scenario, seed, inject)
    else:
        engine, prompts = _virtual_engine(scenario.engine, seed), _no_prompt
    try:
        if force:
            out.unlink(missing_ok=True)
        file = OtlpFileExporter(out)
    except (OSError, ValueError) as error:
        raise UsageError(f"{out} can't be written: {error}") from error
    emitter = Emitter(
        resource_attributes(describe(scenario.engine, executor)),
        [file, *exporters_from_environment()],
        random.Random(f"{scenario.name}/{seed}/{inject}") if executor == "virtual" else random.Random(),
        background=executor == "torch",
    )
    with emitter:
        engine.recorder = emitter
        start_ns, requests, finished = _run(engine, scenario, seed, inject, prompts=prompts, progress=progress)
        end_ns = engine.clock.now_ns()
    return RecordingSummary(out, requests, finished, engine.steps, start_ns, end_ns, emitter.dropped)


def _no_prompt(_: PlannedRequest) -> Sequence[int]:
    return ()


def _run(
    engine: Engine,
    scenario: Scenario,
    seed: int,
    inject: bool,
    *,
    prompts: Prompts = _no_prompt,
    progress: Callable[[float], None] | None = None,
) -> tuple[int, int, int]:
    """Lets the planned traffic arrive; returns the start, how many requests came, and how many finished."""
    planned = [(one, prompts(one)) for one in plan(scenario, seed, inject)]
    start_ns = engine.clock.now_ns()
    arrivals = [_request(handle, one, start_ns, prompt) for handle, (one, prompt) in enumerate(planned, start=1)]
    pauses = Pauses(engine.clock, start_ns, plan_pauses(scenario, seed)) if inject else None
    until_ns = start_ns + round((scenario.duration_s + MOST_DRAIN_S) * 1e9)
    finished = 0
    told = 0.0

    def after_step(done: list[Request]) -> None:
        nonlocal finished, told
        finished += len(done)
        if progress is not None:
            share = min((engine.clock.now_ns() - start_ns) / (scenario.duration_s * 1e9), 1.0)
            if share >= told + _PROGRESS_STEP:
                told = share
                progress(share)

    engine.run(arrivals, until_ns, before_step=pauses, after_step=after_step)
    if progress is not None:
        progress(1.0)
    return start_ns, len(arrivals), finished


def _request(handle: int, planned: PlannedRequest, start_ns: int, prompt: Sequence[int]) -> Request:
    info = RequestInfo(
        handle,
        planned.request_id,
        start_ns + planned.offset_ns,
        planned.prompt_tokens,
        planned.output_tokens,
        planned.tenant,
        "scenario",
        planned.priority,
    )
    return Request(info, prompt)


def describe(config: EngineConfig, executor: ExecutorName) -> EngineDescription:
    """The replica as its spans' Resource names it."""
    return EngineDescription(
        replica=REPLICA,
        model=config.model,
        engine_version=stallscope.__version__,
        executor=executor,
        block_size=config.block_size,
        total_blocks=config.kv_blocks,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        chunked_prefill=config.chunked_prefill,
        policy=config.policy,
        watermark=config.watermark,
    )


def _virtual_engine(config: EngineConfig, seed: int, recorder: Recorder | None = None) -> Engine:
    try:
        cost = cost_for(config.model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    clock = VirtualClock(VIRTUAL_START_NS)
    executor = VirtualExecutor(clock, cost, seed)
    return Engine(config, executor, clock, recorder, executor.spend_host_time)


def time_prefill(config: EngineConfig, tokens: int) -> float:
    """Seconds that a prompt of ``tokens`` tokens takes on the torch executor of this machine, once it is warm."""
    executor, prompts = _torch_executor(config, 0)
    _warm_up(config, executor, prompts, tokens)
    started = time.perf_counter()
    _run_alone(config, executor, prompts, PlannedRequest(0, "", tokens, 1, "timed"))
    return time.perf_counter() - started


def _torch_engine(scenario: Scenario, seed: int, inject: bool) -> tuple[Engine, Prompts]:
    """An engine that computes, warm, and the token ids of each prompt."""
    config = scenario.engine
    executor, prompts = _torch_executor(config, seed)
    longest = max((one.prompt_tokens for one in plan(scenario, seed, inject)), default=1)
    _warm_up(config, executor, prompts, longest)
    return Engine(config, executor, WallClock()), prompts


def _torch_executor(config: EngineConfig, seed: int) -> tuple[Executor, Prompts]:
    """An executor and the token ids of each prompt."""
    try:
        import torch

        from stallscope_engine.executors.torch_cpu import TorchExecutor
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the torch executor needs {error.name}: pip install 'stallscope[engine]', or use --executor virtual"
        ) from error
    # Threads work in step, so one that another program holds up stalls the whole step: a tenth of a second in every
    # decode on two busy cores. Half of the cores are left to whatever else runs.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
    try:
        executor = TorchExecutor(config, config.model, seed=seed)
    except ValueError as error:
        raise UsageError(str(error)) from error

    def prompt(one: PlannedRequest) -> list[int]:
        drawn = int(stream(seed, "token_ids", one.request_id).integers(2**63))
        return random_prompt(executor.model_config, one.prompt_tokens, drawn)

    return executor, prompt


def _warm_up(config: EngineConfig, executor: Executor, prompts: Prompts, longest_tokens: int) -> None:
    """Runs requests nobody records, so that first allocations and compilations are no stall of the recording's."""
    engine = Engine(config, executor, WallClock())
    for handle, (prompt_tokens, output_tokens) in enumerate(_WARM_UP_TOKENS, start=1):
        planned = PlannedRequest(0, "", prompt_tokens, output_tokens, f"warm-up-{handle}")
        engine.submit(_request(handle, planned, 0, prompts(planned)))
    while engine.scheduler.has_work:
        engine.step()
    _run_alone(config, executor, prompts, PlannedRequest(0, "", longest_tokens, 1, "warm-up-longest"))


def _run_alone(config: EngineConfig, executor: Executor, prompts: Prompts, planned: PlannedRequest) -> None:
    engine = Engine(config, executor, WallClock())
    engine.submit(_request(1, planned, 0, prompts(planned)))
    while engine.scheduler.has_work:
        engine.step()
