"""The result of an analysis: one ``Diagnosis``, which every report, picture and test reads.

A frozen tree of dataclasses; ``to_dict`` and ``from_dict`` make it JSON and back. Times are int ns since the epoch,
amounts of time float seconds, shares in 0..1.
"""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass
from enum import StrEnum
from typing import Union, get_args, get_origin, get_type_hints

SCHEMA_VERSION = 3


class Verdict(StrEnum):
    """What an incident was; ``HEALTHY`` for a trace without one."""

    NOISY_NEIGHBOR = "noisy_neighbor"
    SELF_INFLICTED = "self_inflicted"
    OVERLOAD = "overload"
    ENGINE_STALL = "engine_stall"
    COLD_CACHE = "cold_cache"
    OUTSIDE_ENGINE = "outside_engine"
    HEALTHY = "healthy"
    INSUFFICIENT_DATA = "insufficient_data"


class Confidence(StrEnum):
    HIGH = "high"
    MEDIUM = "medium"
    LOW = "low"


@dataclass(frozen=True)
class Quantile:
    """A percentile of one metric and what is behind it: ``value_s`` over ``requests`` requests."""

    metric: str  # ttft, itl
    quantile: float  # 0.99 where 300 requests are behind it, else 0.9, else 1.0 (the worst)
    value_s: float
    requests: int


@dataclass(frozen=True)
class Victim:
    """A tenant that waited: requests stalled of all that it had then, seconds lost, percentiles then and usually."""

    tenant: str
    stalled_requests: int
    requests: int
    lost_s: float
    during: tuple[Quantile, ...]
    usual: tuple[Quantile, ...]
    worst_request: str


@dataclass(frozen=True)
class Charge:
    """Seconds that a holder cost the victims beyond what it usually costs them, by one mechanism.

    ``holder`` is a tenant, or "(engine)", "(frontend)", "(telemetry)". ``own``: it is the victim's own tenant.
    ``share`` is of the incident's ``lost_s``.
    """

    holder: str
    mechanism: str
    seconds: float
    share: float
    own: bool


@dataclass(frozen=True)
class SuspectRequest:
    """A request of a culprit: what it was, and the seconds that the victims lost to it."""

    request: str
    arrival_ns: int
    prompt_tokens: int
    output_tokens: int
    caused_s: float
    share: float  # of what its tenant caused


class InterventionKind(StrEnum):
    """What a replay changed: blame rests on ``USUAL``, ``FAIR_SHARE`` where no usual is known; the rest is what if."""

    USUAL = "usual"  # tenants as in a stretch of their own calm time; a newcomer is not there
    FAIR_SHARE = "fair_share"  # a tenant held to so many requests at once as are its fair share
    WITHOUT_TENANT = "without_tenant"
    WITHOUT_REQUEST = "without_request"
    REMEDY = "remedy"


@dataclass(frozen=True)
class Prediction:
    """One tenant's percentile as recorded, replayed unchanged, and with the intervention: the mean of its draws, and
    from ``low_s`` to ``high_s`` all of them."""

    tenant: str
    metric: str
    quantile: float
    requests: int
    recorded_s: float
    replayed_s: float
    predicted_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True)
class Intervention:
    """A replay of an incident with something changed, and what it would have done.

    ``restored``: share of the victims' excess that would have been gone (negative: it would have been worse).
    ``throughput``: output tokens made in the same time over those of the unchanged replay, of requests in both.
    ``tonight``: of a remedy, whether it needs no change of the engine. ``unseen``: share of replayed steps larger than
    any in the recording.
    """

    kind: InterventionKind
    what: str  # "reasoner as usual", "max_num_batched_tokens=512"
    how: str  # of a remedy, what to type or change
    tenants: tuple[str, ...]  # who was changed
    restored: float
    restored_low: float
    restored_high: float
    predictions: tuple[Prediction, ...]
    throughput: float
    tonight: bool
    unseen: float


@dataclass(frozen=True)
class ReplayCheck:
    """How well a replica's recording could be replayed unchanged; ``trusted``: well enough for verdicts to rest on it.

    ``forced_agreement``: of recorded steps, the share whose batch the scheduler chose from the recorded state.
    ``free_error``: median relative error of the tenants' p90s in a free run of the busiest minute; -1 where there was
    none. ``reason`` says why there was no replay, or why it is not trusted; "" where it is.
    """

    replica: str
    policy: str
    forced_agreement: float
    forced_steps: int
    free_error: float
    step_cost_error: float  # median relative error of the step cost on steps it was not fitted on; -1: none
    draws: int
    trusted: bool
    reason: str


@dataclass(frozen=True)
class Culprit:
    """A tenant to blame: what it caused, by which mechanism, through which requests, and how unusual its load was.

    ``restored``: share of the victims' excess that its return to usual restores by replay; ``shapley``: its part of
    what all culprits' return restores. Both None without a replay.
    """

    tenant: str
    tenant_source: str
    mechanism: str
    caused_s: float
    share: float  # of the incident's charged_s
    load: float  # its load in the incident, in the unit of load_of
    usual_load: float
    load_of: str  # step time, KV cache, slots (shares of the engine's)
    requests: tuple[SuspectRequest, ...]
    dominating_request: str | None
    restored: float | None = None
    shapley: float | None = None


@dataclass(frozen=True)
class Incident:
    """A stretch in which requests waited far longer than their tenants' usual.

    ``lost_s``: seconds by which its stalled waits exceeded the usual. ``charged_s``: the part of it that can be laid at
    somebody's door; the rest is what a step costs whatever is in it. ``group``: what several culprits that act alike
    have in common ("" for none). ``interventions`` are replays, those that blame rests on first; ``remedies`` are
    sorted: what can be done tonight first, then by what they restore.
    """

    replica: str
    start_ns: int
    end_ns: int
    verdict: Verdict
    confidence: Confidence
    mechanism: str | None
    culprits: tuple[Culprit, ...]
    victims: tuple[Victim, ...]
    lost_s: float
    charged_s: float
    charges: tuple[Charge, ...]
    runner_up: str | None
    runner_up_share: float  # of charged_s
    reasons: tuple[str, ...]
    group: str = ""
    interventions: tuple[Intervention, ...] = ()
    remedies: tuple[Intervention, ...] = ()


@dataclass(frozen=True)
class TenantSummary:
    """A tenant over the whole trace: its requests, percentiles, and its shares of what the engine spent."""

    tenant: str
    source: str
    requests: int
    quantiles: tuple[Quantile, ...]
    token_share: float
    step_time_share: float
    kv_share: float


@dataclass(frozen=True)
class Coverage:
    """How much of what happened the telemetry shows.

    ``fidelity``: 3 where every batch was seen; below, batches are estimates: from sums of steps (2) or from requests
    alone (1). ``kept_share``: of how many requests the spans were kept, as far as anything tells.
    """

    fidelity: int
    steps: int
    steps_lost: int
    records_dropped: int
    requests: int
    requests_open: int
    requests_lost: int
    known_tenant_share: float
    kept_share: float
    cost_model_error: float  # median relative error of the step cost model


@dataclass(frozen=True)
class Diagnosis:
    """What was wrong in a trace, whom it hit, who did it, how sure that is. Incidents: by harm, cold starts last."""

    source: str
    start_ns: int
    end_ns: int
    verdict: Verdict
    confidence: Confidence
    coverage: Coverage
    incidents: tuple[Incident, ...]
    tenants: tuple[TenantSummary, ...]
    notes: tuple[str, ...]
    replays: tuple[ReplayCheck, ...] = ()
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, object]:
        """Plain dicts, lists, strings and numbers, ready for JSON."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: dict[str, object]) -> Diagnosis:
        """The inverse of ``to_dict``; ValueError where the schema is another version's or does not fit."""
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"schema version {data.get('schema_version')!r} is not {SCHEMA_VERSION}")
        built = _build(Diagnosis, data)
        if not isinstance(built, Diagnosis):
            raise ValueError("not a diagnosis")
        return built


def _build(kind: object, value: object) -> object:
    """``value`` (of plain JSON types) as the annotated type ``kind``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ValueError(f"{kind.__name__} must be an object, not {value!r}")
        hints = get_type_hints(kind)
        missing = [field.name for field in dataclasses.fields(kind) if field.name not in value]
        if missing:
            raise ValueError(f"{kind.__name__} lacks {', '.join(missing)}")
        return kind(**{field.name: _build(hints[field.name], value[field.name]) for field in dataclasses.fields(kind)})
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"expected a list, not {value!r}")
        return tuple(_build(arguments[0], item) for item in value)
    if origin in (Union, types.UnionType):
        return None if value is None else _build(arguments[0], value)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind(str(value))
    return value
