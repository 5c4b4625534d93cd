"""What would have helped: each remedy replayed on the incident, those first that can be had tonight.

Which are tried depends on the mechanism. How one is had depends on the engine that the trace names: a flag with its
exact spelling, a rule at the gateway, or a change of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from stallscope.diagnosis.model import Intervention, InterventionKind
from stallscope.diagnosis.partition import Mechanism
from stallscope.diagnosis.replay.interventions import Effect, IncidentReplays
from stallscope_engine.config import EngineConfig

LEAST_HELP = 0.1  # share of the victims' excess below which a remedy is not worth a line
_SMALL_BUDGET = 512
_TRIED_BUDGET = 2048
_QUARTER = 0.25

# Flags by engine, as of vLLM 0.32 (vllm/engine/arg_utils.py) and `stallscope serve --help`.
_FLAGS = {
    "vllm": {
        "max_num_batched_tokens": "--max-num-batched-tokens {}",
        "long_prefill_token_threshold": "--long-prefill-token-threshold {}",
        "max_num_seqs": "--max-num-seqs {}",
        "chunked_prefill": "--enable-chunked-prefill",
    },
    "stallscope": {
        "max_num_batched_tokens": "--max-num-batched-tokens {}",
        "long_prefill_token_threshold": "--long-prefill-token-threshold {}",
        "max_num_seqs": "--max-num-seqs {}",
        "chunked_prefill": "--chunked-prefill",
        "tenant_kv_share": "--tenant-kv-share {}",
        "tenant_token_share": "--tenant-token-share {}",
        "policy": "--policy {}",
        "preemption": "--preemption {}",
    },
}
_PREFILL = {
    str(one)
    for one in (
        Mechanism.PREFILL_INTERFERENCE,
        Mechanism.STEP_BOUNDARY,
        Mechanism.PREFILL_QUEUE,
        Mechanism.PREFILL_PRIORITY,
    )
}
_KV = {
    str(one)
    for one in (
        Mechanism.KV_PINNING,
        Mechanism.PREEMPTION,
        Mechanism.RECOMPUTE,
        Mechanism.HEAD_OF_LINE,
        Mechanism.CACHE_EVICTION,
    )
}
_SLOTS = {str(Mechanism.SLOT_EXHAUSTION)}


@dataclass(frozen=True, slots=True)
class _Remedy:
    what: str
    how: str
    tonight: bool
    replay: Callable[[], Effect]


def try_remedies(replays: IncidentReplays, culprits: Sequence[int], mechanism: str | None) -> tuple[Intervention, ...]:
    """Remedies for an incident, sorted: what can be done tonight first, then by what they restore of the excess."""
    found = []
    for remedy in [*_settings(replays, mechanism, culprits), *_gateway(replays, culprits), _another_replica(replays)]:
        effect = remedy.replay()
        if effect.mean >= LEAST_HELP:
            shown = replays.describe(InterventionKind.REMEDY, remedy.what, culprits, effect, remedy.how)
            found.append(replace(shown, tonight=remedy.tonight))
    return tuple(sorted(found, key=lambda one: (not one.tonight, -one.restored)))


def _settings(replays: IncidentReplays, mechanism: str | None, culprits: Sequence[int]) -> list[_Remedy]:
    """Other settings of the same engine."""
    config = replays.history.config
    budget = config.max_num_batched_tokens
    changes: list[dict[str, object]] = []
    if mechanism in _PREFILL:
        if not config.chunked_prefill:
            # Cut up, a prompt still takes every step's whole budget until it is done, unless that is limited too.
            chunked: dict[str, object] = {"chunked_prefill": True, "max_num_batched_tokens": min(budget, _TRIED_BUDGET)}
            changes += [chunked, chunked | {"long_prefill_token_threshold": _SMALL_BUDGET}]
        else:
            if budget > _SMALL_BUDGET:
                changes.append({"max_num_batched_tokens": max(_SMALL_BUDGET, budget // 4)})
            changes.append({"long_prefill_token_threshold": max(config.block_size, budget // 8)})
            changes.append({"max_num_batched_tokens": budget * 4})
        changes.append({"tenant_token_share": _QUARTER})
    if mechanism in _KV:
        changes.append({"tenant_kv_share": 0.5})
    if mechanism in _SLOTS:
        changes.append({"max_num_seqs": config.max_num_seqs * 2})
    if config.policy != "fair":
        changes.append({"policy": "fair"})
    engine = str(replays.history.replica.settings.get("engine") or "")
    flags = _FLAGS.get(engine, {})
    remedies = []
    for settings in changes:
        try:
            changed = replace(config, **settings)  # type: ignore[arg-type]
        except ValueError:
            continue  # two settings that don't go together
        if replays.rejected_by(changed):
            continue
        can_be_set = all(name in flags for name in settings)
        how = (
            " ".join(flags[name].format(value) for name, value in settings.items())
            if can_be_set
            else (f"needs a change of {engine or 'the engine'}")
        )
        what = ", ".join(f"{name}={value}" for name, value in settings.items())
        remedies.append(_Remedy(what, how, can_be_set, _configured(replays, changed, culprits)))
    return remedies


def _configured(replays: IncidentReplays, config: EngineConfig, culprits: Sequence[int]) -> Callable[[], Effect]:
    return lambda: replays.configured(config, culprits)


def _gateway(replays: IncidentReplays, culprits: Sequence[int]) -> list[_Remedy]:
    """Rules that a gateway before the engine can have: a cap on the culprits, long prompts elsewhere."""
    if not culprits:
        return []
    replica, window = replays.history.replica, replays.window
    names = ", ".join(replica.tenants[tenant] for tenant in culprits)
    whose = f"{names}'s requests" if len(culprits) == 1 else f"the requests of each of {names}"
    present = replica.requests[
        (replica.requests["arrival"] <= window.end) & (replica.requests["seen_until"] >= window.start)
    ]
    theirs = present["tenant"].isin(list(culprits)).to_numpy()
    remedies = [
        _Remedy(
            f"at most {cap} of {whose} at once",
            "a concurrency limit by tenant at the gateway",
            True,
            _capped(replays, dict.fromkeys(culprits, cap)),
        )
        for cap in (1, 4)
    ]
    longest_other = present.loc[~theirs, "prompt_tokens"].max() if (~theirs).any() else 0
    limit = int(max(float(longest_other), 1024.0))
    arrival = replica.requests["arrival"]
    near = (arrival >= replays.stretch.plan.start_ns) & (arrival <= replays.stretch.plan.until_ns)
    long_ones = np.flatnonzero((near & (replica.requests["prompt_tokens"] > limit)).to_numpy())
    if len(long_ones):
        remedies.append(
            _Remedy(
                f"prompts above {limit:,} tokens on a replica of their own",
                "a route by prompt length at the gateway",
                True,
                lambda: replays.without_requests(long_ones.tolist()),
            )
        )
    return remedies


def _capped(replays: IncidentReplays, most_at_once: dict[int, int]) -> Callable[[], Effect]:
    return lambda: replays.capped(most_at_once, draws=(0,))


def _another_replica(replays: IncidentReplays) -> _Remedy:
    codes = replays.stretch.plan.requests["code"].to_numpy(np.int64)
    elsewhere = codes[codes % 2 == 1].tolist()
    return _Remedy(
        "one more replica, half of all requests each",
        "scale out by one",
        True,
        lambda: replays.without_requests(elsewhere, apart=()),
    )
