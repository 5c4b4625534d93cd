"""What the engine was short of: the incident again with one resource made endless or free.

A particular one that explains the harm names the mechanism, else the one that helps most; which of those that it takes
away, the charges say.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from stallscope.diagnosis.partition import Mechanism
from stallscope.diagnosis.replay.machine import Machine
from stallscope_engine.config import EngineConfig

_ENDLESS = 64  # times as much as there is, is as good as no limit
_DECODES_WAIT = ("prefill_first", "static")

Change = Callable[[EngineConfig, Machine], tuple[EngineConfig, Machine]]


@dataclass(frozen=True, slots=True)
class Relaxation:
    """``change`` gives configuration and machine; ``mechanisms`` are those that it takes away.

    ``particular``: it helps against these only. Nearly any stall is gone where prompts cost nothing, and huge
    prompts make huge contexts.
    """

    name: str
    mechanisms: tuple[Mechanism, ...]
    change: Change
    particular: bool = True


def _free_prefill(config: EngineConfig, machine: Machine) -> tuple[EngineConfig, Machine]:
    return config, replace(machine, most_tokens=0)


def _endless_budget(config: EngineConfig, machine: Machine) -> tuple[EngineConfig, Machine]:
    """A step takes any number of prompt tokens for the price of a full one."""
    most = config.max_num_batched_tokens
    return replace(config, max_num_batched_tokens=most * _ENDLESS), replace(machine, most_tokens=most)


def _endless_kv(config: EngineConfig, machine: Machine) -> tuple[EngineConfig, Machine]:
    return replace(config, kv_blocks=config.kv_blocks * _ENDLESS, tenant_kv_share=1.0), machine


def _endless_slots(config: EngineConfig, machine: Machine) -> tuple[EngineConfig, Machine]:
    return replace(config, max_num_seqs=config.max_num_seqs * _ENDLESS), machine


def _free_context(config: EngineConfig, machine: Machine) -> tuple[EngineConfig, Machine]:
    return config, replace(machine, free_context=True)


def _decodes_go_on(config: EngineConfig, machine: Machine) -> tuple[EngineConfig, Machine]:
    return replace(config, policy="fcfs"), machine


M = Mechanism
_ALWAYS = (
    Relaxation(
        "endless KV cache",
        (M.KV_PINNING, M.PREEMPTION, M.RECOMPUTE, M.CACHE_EVICTION, M.HEAD_OF_LINE),
        _endless_kv,
    ),
    Relaxation("endless slots", (M.SLOT_EXHAUSTION,), _endless_slots),
    Relaxation("contexts cost nothing", (M.DECODE_DRAG,), _free_context, particular=False),
    Relaxation("no token budget", (M.PREFILL_QUEUE,), _endless_budget, particular=False),
    Relaxation(
        "prompts cost nothing",
        (M.PREFILL_INTERFERENCE, M.STEP_BOUNDARY, M.PREFILL_PRIORITY),
        _free_prefill,
        particular=False,
    ),
)
_WHERE_DECODES_WAIT = Relaxation("decodes run in every step", (M.PREFILL_PRIORITY,), _decodes_go_on)


def relaxations(config: EngineConfig) -> tuple[Relaxation, ...]:
    """Those that could change how an engine with this configuration runs, the particular ones first."""
    return (_WHERE_DECODES_WAIT, *_ALWAYS) if config.policy in _DECODES_WAIT else _ALWAYS
