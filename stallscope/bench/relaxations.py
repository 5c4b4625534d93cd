"""What-ifs of the engine itself: the same run with one resource made endless or free, which shows what it was short of.

The relaxation under which most of the harm is gone names the true mechanism.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, astuple, dataclass, replace

from stallscope.bench.policies import SKIPPING
from stallscope.workloads.scenario import Scenario
from stallscope_engine.executors.virtual import StepCost, cost_for
from stallscope_engine.scheduler import Batch

_ENDLESS = 64  # times as much of what a configuration has is as good as no limit


class _FreePrefill(StepCost):
    """Prompt tokens cost nothing, in whatever step they are."""

    def step_ns(self, batch: Batch) -> float:
        return StepCost.step_ns(self, _decodes(batch, batch.starts))


class _FreeContext(StepCost):
    """A decode costs as if nothing were before it."""

    def step_ns(self, batch: Batch) -> float:
        prefills = {handle for handle, _ in batch.chunks}
        starts = [
            start if request.info.handle in prefills else 0
            for request, start in zip(batch.requests, batch.starts, strict=True)
        ]
        return StepCost.step_ns(self, replace(batch, starts=starts))


@dataclass(frozen=True, slots=True)
class _CappedStep(StepCost):
    """What a step computes beyond ``most_tokens`` costs nothing."""

    most_tokens: int

    def step_ns(self, batch: Batch) -> float:
        left, chunks = self.most_tokens, []
        for tokens in batch.num_tokens:
            chunks.append(min(tokens, left))
            left -= chunks[-1]
        decodes = min(batch.decode_tokens, sum(chunks))
        return StepCost.step_ns(
            self, replace(batch, num_tokens=chunks, decode_tokens=decodes, prefill_tokens=sum(chunks) - decodes)
        )


def _decodes(batch: Batch, starts: list[int]) -> Batch:
    """The batch without its prompts."""
    prefills = {handle for handle, _ in batch.chunks}
    kept = [index for index, request in enumerate(batch.requests) if request.info.handle not in prefills]
    return Batch(
        num_tokens=[batch.num_tokens[index] for index in kept],
        starts=[starts[index] for index in kept],
        decode_tokens=batch.decode_tokens,
    )


@dataclass(frozen=True, slots=True)
class Relaxation:
    """``relax`` gives the scenario and the step cost to run; ``mechanisms`` are those that it takes away."""

    name: str
    mechanisms: tuple[str, ...]
    relax: Callable[[Scenario, StepCost], tuple[Scenario, StepCost]]

    def takes_away(self, expected: Collection[str]) -> bool:
        """Whether one of the ``expected`` mechanisms is its."""
        return not set(self.mechanisms).isdisjoint(expected)


def _with(scenario: Scenario, **settings: object) -> Scenario:
    return replace(scenario, engine=replace(scenario.engine, **settings))  # type: ignore[arg-type]


def _endless_kv(scenario: Scenario, cost: StepCost) -> tuple[Scenario, StepCost]:
    return _with(scenario, kv_blocks=scenario.engine.kv_blocks * _ENDLESS), cost


def _endless_slots(scenario: Scenario, cost: StepCost) -> tuple[Scenario, StepCost]:
    return _with(scenario, max_num_seqs=scenario.engine.max_num_seqs * _ENDLESS), cost


def _endless_budget(scenario: Scenario, cost: StepCost) -> tuple[Scenario, StepCost]:
    """A step takes any number of prompt tokens for the price of a full one."""
    most = scenario.engine.max_num_batched_tokens
    return _with(scenario, max_num_batched_tokens=most * _ENDLESS), _CappedStep(**asdict(cost), most_tokens=most)


def _free_prefill(scenario: Scenario, cost: StepCost) -> tuple[Scenario, StepCost]:
    return scenario, _FreePrefill(*astuple(cost))


def _free_context(scenario: Scenario, cost: StepCost) -> tuple[Scenario, StepCost]:
    return scenario, _FreeContext(*astuple(cost))


def _skip_what_does_not_fit(scenario: Scenario, cost: StepCost) -> tuple[Scenario, StepCost]:
    return _with(scenario, policy=SKIPPING), cost


def _decode_in_every_step(scenario: Scenario, cost: StepCost) -> tuple[Scenario, StepCost]:
    return _with(scenario, policy="fcfs"), cost


RELAXATIONS = (
    Relaxation("prefill is free", ("prefill_interference", "step_boundary", "prefill_priority"), _free_prefill),
    Relaxation("no token budget", ("prefill_queue",), _endless_budget),
    Relaxation("infinite KV", ("kv_pinning", "preemption", "recompute", "cache_eviction", "head_of_line"), _endless_kv),
    Relaxation("infinite slots", ("slot_exhaustion",), _endless_slots),
    Relaxation("decode context is free", ("decode_drag",), _free_context),
    Relaxation("skip what does not fit", ("head_of_line",), _skip_what_does_not_fit),
    Relaxation("decodes run in every step", ("prefill_priority",), _decode_in_every_step),
)


def worth_trying(scenario: Scenario, expected: Collection[str]) -> list[Relaxation]:
    """Those that could change how the scenario runs, first those of the ``expected`` mechanisms."""
    skips, decodes = RELAXATIONS[-2:]
    possible = [
        relaxation
        for relaxation in RELAXATIONS
        if (relaxation is not decodes or scenario.engine.policy in ("prefill_first", "two_queues"))
        and (relaxation is not skips or scenario.engine.policy == "fcfs")
    ]
    return sorted(possible, key=lambda relaxation: not relaxation.takes_away(expected))


def relaxed(scenario: Scenario, relaxation: Relaxation) -> tuple[Scenario, StepCost]:
    """Scenario and step cost under a relaxation. Raises ValueError where the model has no cost profile."""
    return relaxation.relax(scenario, cost_for(scenario.engine.model))
