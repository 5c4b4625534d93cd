"""Spans to steps, joining requests, ended requests and GPU samples: the inverse of ``stallscope_telemetry.spans``.

Soundness is settled here: behind this module every time, index and amount is an int within bounds, and every name a
string, so that the state machine (``rebuild``) can count without looking back.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from operator import itemgetter
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

from stallscope.trace.clients import ClientSpan
from stallscope.trace.findings import Findings
from stallscope.trace.formats import sglang
from stallscope.trace.formats.registry import EXPERIMENTAL
from stallscope.trace.otlp import Attributes, Resource, Span, SpanGroup, Value
from stallscope.trace.otlp.spans import MALFORMED, MOST_LIST, MOST_NAME, is_short
from stallscope.trace.plain_spans import PREFILL_TIME, claimed_tenant, sampled_share
from stallscope.trace.reserved import UNKNOWN, tenant_name
from stallscope_telemetry import names
from stallscope_telemetry.records import RequestInfo, RequestState, WaitReason

Ints = npt.NDArray[np.int64]

MOST = 1 << 53  # above it a duration (104 days of ns) or an amount is damage; sums of such stay within 64 bits
MOST_TOKENS = 1 << 31  # the same for a handle or an amount in the composition of a batch
LEAST_KEPT = 1e-6  # share of spans
LATEST = 1 << 62  # ns since the epoch: the year 2116; adding a duration can't overflow

_SCALARS = (
    names.STEP,
    names.DISPATCH_DELAY,
    names.SCHED,
    names.PREFILL_TOKENS,
    names.DECODE_TOKENS,
    names.BATCH_SIZE,
    names.RUNNING,
    names.WAITING,
    names.KV_USED,
)
_scalars = itemgetter(*_SCALARS)
_COMPOSITION = frozenset(
    (
        names.KEYFRAME,
        names.R_HANDLE,
        names.CACHED,
        names.CHUNKS,
        names.DECODES,
        names.WAITS,
        names.PREEMPTED,
        names.EVICTED,
        names.LEFT,
    )
)
COLUMNS = (
    "scheduled",
    "ready",
    "step",
    "dispatch_delay",
    "sched_ns",
    "prefill_tokens",
    "decode_tokens",
    "batch_size",
    "running",
    "waiting",
    "kv_used",
    "idle_ns",
    "device_ns",
    "kv_cached",
    "dropped",
    "resource",
)
_TIMES = ("scheduled", "ready")
# What is kept of spans until all are read; of other attributes, which anybody may add, nothing is.
_OF_STEPS = frozenset(one.name for one in names.ATTRIBUTES if one.on == "step")
_OF_REQUESTS = frozenset((*(one.name for one in names.ATTRIBUTES if one.on in ("request", "converted")), PREFILL_TIME))
_OF_SAMPLES = frozenset(one.name for one in names.ATTRIBUTES if one.on == "gpu")
_LISTS = (names.TOKEN_TIMES, names.GAPS)
NOT_MEASURED = -1  # of device_ns

_Enum = TypeVar("_Enum", bound=IntEnum)
_Row = tuple[Value, ...]


@dataclass(frozen=True, slots=True)
class RequestSpan:
    """A request that ended, as its own span tells it. ``attributes`` are as they came.

    ``claim``: tenant and who said so, where no attribute of ours does; ``kept``: the share of spans that were kept.
    """

    request_id: str
    arrival: int
    end: int
    trace_id: str
    resource: int
    attributes: Attributes
    claim: tuple[str, str] = ("", "")
    kept: float = 1.0

    def integer(self, name: str, least: int = 0) -> int | None:
        """The attribute as an amount within bounds, else None."""
        value = self.attributes.get(name)
        return value if type(value) is int and least <= value < MOST else None

    def text(self, name: str) -> str:
        """The attribute as a string, "" where it is none."""
        value = self.attributes.get(name)
        return value if isinstance(value, str) else ""

    @property
    def is_whole(self) -> bool:
        """Whether it was written from a table, and so says all that is known of the request."""
        return names.STATE in self.attributes


@dataclass(frozen=True, slots=True)
class GpuSpan:
    """What a GPU said at ``time``. ``attributes`` are as they came."""

    device: str
    time: int
    attributes: Attributes


@dataclass(frozen=True, slots=True)
class Steps:
    """Steps of a replica as columns, with the composition of those that have one (None: nothing changed)."""

    columns: dict[str, Ints]
    composition: list[Attributes | None]

    def __len__(self) -> int:
        return len(self.composition)

    def take(self, order: Ints | npt.NDArray[np.bool_]) -> Steps:
        """The chosen rows, in that order."""
        positions = np.arange(len(self))[order]
        if len(positions) == len(self) and bool((np.diff(positions) > 0).all()):
            return self
        return Steps(
            {name: column[positions] for name, column in self.columns.items()},
            [self.composition[position] for position in positions.tolist()],
        )


@dataclass(slots=True)
class ReplicaSpans:
    """What one replica sent, in the order of reading."""

    name: str
    resources: dict[Resource, int] = field(default_factory=dict)
    rows: list[_Row] = field(default_factory=list)
    composition: list[Attributes | None] = field(default_factory=list)
    requests: list[RequestSpan] = field(default_factory=list)
    samples: list[GpuSpan] = field(default_factory=list)

    def taken(self) -> ReplicaSpans:
        """What came since the last time; resources keep their numbers."""
        new = ReplicaSpans(self.name, self.resources, self.rows, self.composition, self.requests, self.samples)
        self.rows, self.composition, self.requests, self.samples = [], [], [], []
        return new

    def steps(self, findings: Findings) -> Steps:
        """All sound steps as columns. Steps without sound times or index are left out, other values become 0."""
        columns: dict[str, Ints] = {}
        keep = np.ones(len(self.rows), dtype=np.bool_)
        by_column = list(zip(*self.rows, strict=True)) or [()] * len(COLUMNS)
        for name, values in zip(COLUMNS, by_column, strict=True):
            column, sound = _sound_column(values, LATEST if name in _TIMES else MOST, -1 if name == "device_ns" else 0)
            if name in ("scheduled", "ready", "step"):
                keep &= sound
            else:
                column[~sound] = NOT_MEASURED if name == "device_ns" else 0
                text = f"values of {name} are no sound number and count as absent"
                findings.add("unsound_value", self.name, f" {name}", text, int((~sound).sum()))
            columns[name] = column
        left_out = int((~keep).sum())
        findings.add("unsound_step", self.name, "", "steps without sound times or index are left out", left_out)
        steps = Steps(columns, self.composition)
        return steps.take(keep) if left_out else steps


def _sound_column(values: tuple[Value, ...], limit: int, least: int) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """The values as int64, and which of them are ints in [least, limit)."""
    try:
        if set(map(type, values)) <= {int}:
            column = np.array(values, dtype=np.int64)
            return column, (column >= least) & (column < limit)
    except OverflowError:
        pass
    sound = [type(value) is int and least <= value < limit for value in values]
    clean = [value if good else 0 for value, good in zip(values, sound, strict=True)]
    return np.array(clean, dtype=np.int64), np.array(sound, dtype=np.bool_)


@dataclass(slots=True)
class Collected:
    """All spans of ours, an engine's by replica, and how many others there were."""

    replicas: dict[str, ReplicaSpans] = field(default_factory=dict)
    clients: list[ClientSpan] = field(default_factory=list)
    foreign: int = 0

    @property
    def step_count(self) -> int:
        return sum(len(replica.rows) for replica in self.replicas.values())

    @property
    def request_count(self) -> int:
        return sum(len(replica.requests) for replica in self.replicas.values())


def collect(groups: Iterable[SpanGroup], findings: Findings, into: Collected | None = None) -> Collected:
    """Sorts spans by replica and takes steps, requests and samples apart; damaged spans become findings.

    ``into``: what they are added to, where spans come little by little.
    """
    collected, of_sglang = into or Collected(), sglang.Requests()
    for group in groups:
        replica = _replica_of(group.resource, collected)
        resource = replica.resources.setdefault(group.resource, len(replica.resources))
        malformed = group.malformed
        for span in group.spans:
            name, bad = span.name, span.bad
            try:
                if name == names.STEP_SPAN:
                    bad += _add_step(replica, resource, span)
                elif name == names.REQUEST_SPAN:
                    bad += _add_request(replica, resource, span)
                elif name == names.GPU_SPAN:
                    bad += _add_sample(replica, span)
                elif name == names.CLIENT_SPAN:
                    _add_client(collected.clients, group.source, span)
                else:
                    collected.foreign += not of_sglang.take(group.resource, span)
                    continue
            except MALFORMED:
                malformed += 1
                continue
            if bad:
                text = "attributes are missing, too long or of no type that OTLP allows, and are left out"
                findings.add("unsound_attribute", group.source, group.at, text, bad)
        text = "a span without sound name, times or identity is left out"
        findings.add("malformed_span", group.source, group.at, text, malformed)
    _add_sglang(collected, of_sglang, findings)
    return collected


def _add_sglang(collected: Collected, requests: sglang.Requests, findings: Findings) -> None:
    """Requests that only all spans together tell."""
    kind, text = EXPERIMENTAL
    for resource, span in requests.spans():
        replica = _replica_of(resource, collected)
        number = replica.resources.setdefault(resource, len(replica.resources))
        try:
            _add_request(replica, number, span)
        except MALFORMED:
            findings.add("malformed_span", replica.name, "", "a request of SGLang's without identity or time", 1)
            continue
        findings.add(kind, sglang.PRODUCER, "", text)


def _replica_of(resource: Resource, collected: Collected) -> ReplicaSpans:
    value = resource.attributes.get(names.REPLICA)
    name = value if isinstance(value, str) and value else UNKNOWN
    replica = collected.replicas.get(name)
    if replica is None:
        replica = collected.replicas[name] = ReplicaSpans(name)
    return replica


def _add_step(replica: ReplicaSpans, resource: int, span: Span) -> int:
    """Returns how many attributes are missing."""
    attributes, missing = span.attributes, 0
    try:
        scalars: tuple[Value, ...] = _scalars(attributes)
    except KeyError:
        if names.STEP not in attributes:
            raise
        scalars = tuple(attributes.get(name, 0) for name in _SCALARS)
        missing = sum(name not in attributes for name in _SCALARS)
    if len(attributes) == len(_SCALARS) and not missing:  # most steps say nothing else
        replica.rows.append((span.start, span.end, *scalars, 0, NOT_MEASURED, 0, 0, resource))
        replica.composition.append(None)
        return 0
    get = attributes.get
    optional = (get(names.IDLE, 0), get(names.DEVICE, NOT_MEASURED), get(names.KV_CACHED, 0), get(names.DROPPED, 0))
    replica.rows.append((span.start, span.end, *scalars, *optional, resource))
    if _COMPOSITION.isdisjoint(attributes):
        replica.composition.append(None)
        return missing
    kept, too_long = _kept(attributes, _OF_STEPS) if _needs_look(attributes) else (attributes, 0)
    replica.composition.append(kept)
    return missing + too_long


def _needs_look(step: Attributes) -> bool:
    """Whether a step's attributes may hold what is not to be kept: most have neither names nor anything unknown."""
    return names.R_HANDLE in step or not step.keys() <= _OF_STEPS


def _needs_care(value: Value) -> bool:
    return type(value) is list or (type(value) is str and len(value) > MOST_NAME)


def _kept(attributes: Attributes, known: frozenset[str]) -> tuple[Attributes, int]:
    """Those of the known attributes that are not too long, and how many are."""
    if attributes.keys() <= known and not any(map(_needs_care, attributes.values())):
        return attributes, 0  # nearly always
    mine = {name: value for name, value in attributes.items() if name in known}
    short = {name: value for name, value in mine.items() if is_short(value, MOST_LIST if name in _LISTS else MOST_NAME)}
    return short, len(mine) - len(short)


def _add_request(replica: ReplicaSpans, resource: int, span: Span) -> int:
    """Returns how many attributes are too long."""
    attributes, too_long = _kept(span.attributes, _OF_REQUESTS)
    state = span.trace_state
    request_id = attributes[names.REQUEST_ID]
    if not isinstance(request_id, str) or not request_id or not (0 <= span.start < LATEST and 0 <= span.end < LATEST):
        raise ValueError("no identity or time")
    if isinstance(told := attributes.get(names.TENANT), str):
        attributes[names.TENANT] = tenant_name(told)
    claim = ("", "") if names.TENANT in attributes else claimed_tenant(span.attributes, state)
    kept = max(sampled_share(state), LEAST_KEPT)
    replica.requests.append(
        RequestSpan(request_id, span.start, span.end, _trace_id_of(span), resource, attributes, claim, kept)
    )
    return too_long


def _trace_id_of(span: Span) -> str:
    """ "" where it was made up."""
    return "" if span.attributes.get(names.UNTRACED) is True else span.trace_id


def _add_sample(replica: ReplicaSpans, span: Span) -> int:
    """Returns how many attributes are too long."""
    attributes, too_long = _kept(span.attributes, _OF_SAMPLES)
    device = attributes[names.GPU_DEVICE]
    if not isinstance(device, str) or not device or not 0 <= span.start < LATEST:
        raise ValueError("no identity or time")
    replica.samples.append(GpuSpan(device, span.start, attributes))
    return too_long


def _add_client(clients: list[ClientSpan], source: str, span: Span) -> None:
    attributes = {
        name: value for name, value in span.attributes.items() if is_short(value) or name == names.TOKEN_TIMES
    }
    request_id, status = attributes[names.REQUEST_ID], attributes[names.CLIENT_STATUS]
    if not (isinstance(request_id, str) and request_id and isinstance(status, str) and status):
        raise ValueError("no identity or status")
    if not 0 <= span.start <= span.end < LATEST:
        raise ValueError("no sound times")
    tenant, times = attributes.get(names.TENANT, ""), attributes.get(names.TOKEN_TIMES, "")
    tokens, late = attributes.get(names.USAGE_COMPLETION), attributes.get(names.CLIENT_LATE, 0)
    clients.append(
        ClientSpan(
            request_id,
            _trace_id_of(span),
            tenant_name(tenant) if isinstance(tenant, str) else "",
            span.start,
            span.end,
            status,
            tokens if type(tokens) is int and 0 <= tokens < MOST else None,
            late if type(late) is int and 0 <= late < MOST else 0,
            times if isinstance(times, str) else "",
            source,
        )
    )


# --- composition of a step ----------------------------------------------------------------------------------


class Unsound(ValueError):
    """An attribute of a batch's composition that can't be used; the message says which and why."""


def groups_of(attributes: Attributes, name: str, size: int) -> Iterator[tuple[int, ...]]:
    """The flat array as pairs or triples. Raises Unsound where it is no such array of handles and amounts."""
    values = attributes.get(name)
    if not values:
        return iter(())
    numbers = _sound_ints(name, values, None)
    if len(numbers) % size:
        raise Unsound(f"{name} is not made of groups of {size}")
    return zip(*[iter(numbers)] * size, strict=True)


def _is_list_of(kind: type, values: Value) -> bool:
    """Lists are of one type (``otlp.Value``): the first tells of all."""
    return type(values) is list and (not values or type(values[0]) is kind)


def _sound_ints(name: str, values: Value, length: int | None, least: int = 0, limit: int = MOST_TOKENS) -> list[int]:
    if not _is_list_of(int, values):
        raise Unsound(f"{name} is no list of integers")
    numbers = cast(list[int], values)
    if length is not None and len(numbers) != length:
        raise Unsound(f"{name} has another length than {names.R_HANDLE}")
    if numbers and not (least <= min(numbers) and max(numbers) < limit):
        raise Unsound(f"{name} holds a number out of range")
    return numbers


def _sound_strings(name: str, values: Value, length: int) -> list[str]:
    if not _is_list_of(str, values):
        raise Unsound(f"{name} is no list of strings")
    words = cast(list[str], values)
    if len(words) != length:
        raise Unsound(f"{name} has another length than {names.R_HANDLE}")
    return words


def member(kind: type[_Enum], value: int) -> _Enum | None:
    """The member of an enum of the contract, None where this version knows no such number."""
    found = kind._value2member_map_.get(value)
    return cast("_Enum | None", found)


@dataclass(slots=True)
class Described:
    """The requests that a step describes, as parallel lists. ``waits``: reason, if it is known, and amount lacking, by
    handle."""

    scheduled_ns: int
    handles: list[int]
    ids: list[str]
    prompts: list[int]
    most: list[int]
    ages: list[int]
    priorities: list[int]
    tenants: list[str]
    sources: list[str]
    traces: list[str]
    sessions: list[str]
    predecessors: list[str]
    retries: list[str]
    states: list[RequestState]
    computed: list[int]
    output: list[int]
    cached: list[int]
    waits: dict[int, tuple[int, int]]

    def info(self, i: int) -> RequestInfo:
        """What never changes about request ``i``."""
        return RequestInfo(
            handle=self.handles[i],
            request_id=self.ids[i],
            arrival_ns=self.scheduled_ns - self.ages[i],
            prompt_tokens=self.prompts[i],
            max_tokens=self.most[i],
            tenant=self.tenants[i],
            tenant_source=self.sources[i],
            priority=self.priorities[i],
            session=self.sessions[i],
            predecessor=self.predecessors[i],
            retry_of=self.retries[i],
            trace_id=_trace_id(self.traces[i]),
        )


def describe_requests(attributes: Attributes, scheduled_ns: int, unsound: list[str]) -> Described:
    """The requests that a step's ``stallscope.request.*`` arrays describe.

    Raises Unsound where handles, ids or prompt lengths are not sound; of any other array that is not, ``unsound``
    gets the reason, and its values count as absent.
    """
    handles = _sound_ints(names.R_HANDLE, attributes.get(names.R_HANDLE, []), None)
    length = len(handles)
    ids = _sound_strings(names.R_ID, attributes.get(names.R_ID, []), length)
    prompts = _sound_ints(names.R_PROMPT, attributes.get(names.R_PROMPT, []), length)
    zeros, empty = [0] * length, [""] * length

    def integers(name: str, least: int = 0, limit: int = MOST_TOKENS) -> list[int]:
        if name not in attributes:
            return zeros
        try:
            return _sound_ints(name, attributes[name], length, least, limit)
        except Unsound as error:
            unsound.append(str(error))
            return zeros

    def strings(name: str) -> list[str]:
        if name not in attributes:
            return empty
        try:
            return _sound_strings(name, attributes[name], length)
        except Unsound as error:
            unsound.append(str(error))
            return empty

    try:
        waits = {
            handle: (reason, lacking)
            for handle, reason, lacking in groups_of(attributes, names.R_WAITS, 3)
            if member(WaitReason, reason) is not None
        }
    except Unsound as error:
        unsound.append(str(error))
        waits = {}
    states = [member(RequestState, state) for state in integers(names.R_STATE)]
    unsound += [f"{names.R_STATE} holds a state that is not known"] * states.count(None)
    return Described(
        scheduled_ns=scheduled_ns,
        handles=handles,
        ids=ids,
        prompts=prompts,
        most=integers(names.R_MAX),
        ages=integers(names.R_AGE, -MOST, MOST),
        priorities=integers(names.R_PRIORITY, -MOST),
        tenants=[tenant_name(told) for told in strings(names.R_TENANT)],
        sources=strings(names.R_SOURCE),
        traces=strings(names.R_TRACE),
        sessions=strings(names.R_SESSION),
        predecessors=strings(names.R_PREDECESSOR),
        retries=strings(names.R_RETRY_OF),
        states=[RequestState.WAITING if state is None else state for state in states],
        computed=integers(names.R_COMPUTED),
        output=integers(names.R_OUTPUT),
        cached=integers(names.R_CACHED),
        waits=waits,
    )


def _trace_id(text: str) -> int:
    try:
        return int(text, 16) if text else 0
    except ValueError:
        return 0
