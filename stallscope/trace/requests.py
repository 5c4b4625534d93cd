"""Requests: what the steps saw, completed by the request spans."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import pyarrow as pa

from stallscope.trace import reconstruct
from stallscope.trace.decode import MOST, Ints, RequestSpan
from stallscope.trace.findings import Findings
from stallscope.trace.otlp import Attributes
from stallscope.trace.plain_spans import Stations, stations
from stallscope.trace.rebuild import Rebuilt, SeenRequest
from stallscope.trace.reserved import UNKNOWN
from stallscope.trace.tables import Column, plain_table, same
from stallscope_telemetry import names
from stallscope_telemetry.records import FinishReason, RequestInfo

_SAID_BY_ABSENCE = ("queued", "scheduled", "first_token")  # a span of ours has what the request got to
_REASON_NAMES = {reason: reason.name.lower() for reason in FinishReason}
_FINISH_REASONS = frozenset(_REASON_NAMES.values())
_UNFINISHED = ("open", "lost")
_TOLD = (
    names.HANDLE,
    names.TENANT_SOURCE,
    names.PRIORITY,
    names.SESSION,
    names.PREDECESSOR,
    names.RETRY_OF,
    names.QUEUED,
    names.SCHEDULED,
    names.DELIVERED,
    names.USAGE_PROMPT,
    names.CACHED_TOKENS,
    names.PREFIX,
    names.REQUEST_MAX_TOKENS,
    names.USAGE_COMPLETION,
    names.PREEMPTIONS,
    names.FINISH_REASON,
    names.STATE,
    names.ADAPTER,
)  # what a request span says that goes into the table as it is
_NOT_TOLD = Stations(None, None, None)


@dataclass(frozen=True, slots=True)
class KnownRequest:
    """A request as steps (``seen``), its own span (``span``) or both know it; ``name`` is unique in the replica."""

    name: str
    seen: SeenRequest | None
    span: RequestSpan | None

    @property
    def arrival(self) -> int:
        if self.span is not None:
            return self.span.arrival
        return self.seen.info.arrival_ns if self.seen is not None else 0

    @property
    def handle(self) -> int | None:
        if self.seen is not None:
            return self.seen.info.handle
        return self.span.integer(names.HANDLE) if self.span is not None else None

    @property
    def tenant(self) -> str:
        told = self.span.text(names.TENANT) if self.span is not None else ""
        claimed = self.span.claim[0] if self.span is not None else ""
        return told or (self.seen.info.tenant if self.seen is not None else "") or claimed or UNKNOWN


def match_requests(
    replica: str, rebuilt: Rebuilt, spans: Sequence[RequestSpan], findings: Findings
) -> list[KnownRequest]:
    """Joins steps and spans by request id (and handle, where the span tells it), in the order of arrival.

    An id that several requests of a replica used gets " #2", " #3" in the order of their arrival.
    """
    by_id: dict[str, list[SeenRequest]] = {}
    for seen in rebuilt.requests:
        by_id.setdefault(seen.info.request_id, []).append(seen)
    known: list[tuple[SeenRequest | None, RequestSpan | None]] = []
    matched: set[int] = set()
    handles: set[int | None] = set()
    kept: set[tuple[str, int | None]] = set()
    for span in _in_order(spans):
        handle = span.integer(names.HANDLE)
        if (span.request_id, handle) in kept:
            findings.add("duplicate_request", replica, "", "request spans that came twice; the first one counts")
            continue
        kept.add((span.request_id, handle))
        handles.add(handle)
        candidates = (
            seen
            for seen in by_id.get(span.request_id, ())
            if seen.index not in matched and (handle is None or handle == seen.info.handle)
        )
        match = next(candidates, None)
        if match is not None:
            matched.add(match.index)
        known.append((match, span))
    known += [(seen, None) for seen in rebuilt.requests if seen.index not in matched]
    unknown_left = [handle for handle in rebuilt.unknown_left if handle not in handles]
    findings.add(
        "unknown_handle", replica, "", "steps name requests that never joined, or have left", len(unknown_left)
    )

    unnamed = [KnownRequest(_id_of(seen, span), seen, span) for seen, span in known]
    unnamed.sort(key=lambda one: (one.arrival, -1 if one.handle is None else one.handle, one.name))
    uses: dict[str, int] = {}
    named = []
    for one in unnamed:
        uses[one.name] = count = uses.get(one.name, 0) + 1
        named.append(one if count == 1 else KnownRequest(f"{one.name} #{count}", one.seen, one.span))
    return named


def _in_order(spans: Sequence[RequestSpan]) -> list[RequestSpan]:
    """By arrival, end and id, and by all else that they say where these are the same: whichever was read first."""
    order = [(span.arrival, span.end, span.request_id) for span in spans]
    if len(set(order)) == len(order):
        return [spans[position] for position in sorted(range(len(order)), key=order.__getitem__)]
    return sorted(spans, key=lambda span: (span.arrival, span.end, span.request_id, repr(span.attributes)))


def _id_of(seen: SeenRequest | None, span: RequestSpan | None) -> str:
    if seen is not None:
        return seen.info.request_id
    return span.request_id if span is not None else UNKNOWN


# --- requests -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Scheduled and ready times of the steps seen, found by step index."""

    steps: Ints
    scheduled: Ints
    ready: Ints

    def scheduled_at(self, steps: Iterable[int | None]) -> list[int | None]:
        return self._at(self.scheduled, steps)

    def ready_at(self, steps: Iterable[int | None]) -> list[int | None]:
        return self._at(self.ready, steps)

    def _at(self, times: Ints, steps: Iterable[int | None]) -> list[int | None]:
        """Times of these steps, None where there is none."""
        told = list(steps)
        known = np.array([step for step in told if step is not None], dtype=np.int64)
        found = iter(times[np.searchsorted(self.steps, known)].tolist())
        return [None if step is None else next(found) for step in told]


def request_table(
    replica: str,
    known: Sequence[KnownRequest],
    models: Sequence[str],
    times: StepTimes,
    first_tokens: Mapping[int, int],
) -> pa.Table:
    """One row a request; ``models`` is parallel to ``known``, ``first_tokens`` are by position, where tokens have times
    of their own."""
    seen = _seen_columns([one.seen for one in known], times)
    told = _span_columns([one.span for one in known])
    for position, time in first_tokens.items():
        told["first_token"][position] = time
    whole = [one.span is not None and one.span.is_whole for one in known]
    ours = [all_said or handle is not None for all_said, handle in zip(whole, told["handle"], strict=True)]
    columns: dict[str, Column] = {
        "replica": same(replica, len(known)),
        "request": [one.name for one in known],
        "tenant": [one.tenant for one in known],
        "model": [model or None for model in models],
        **{name: told.pop(name) for name in ("prefix", "delivered", "adapter")},  # no step tells of these
    }
    for name, values in told.items():
        said = ours if name in _SAID_BY_ABSENCE else whole
        columns[name] = [
            value if value is not None or all_said else from_steps
            for value, all_said, from_steps in zip(values, said, seen[name], strict=True)
        ]
    return plain_table("requests", columns, len(known))


_Values = list[Any]  # integers or strings, None where nothing is told


def _seen_columns(requests: Sequence[SeenRequest | None], times: StepTimes) -> dict[str, _Values]:
    """What the steps tell of each, None of those that they don't know."""
    none = SeenRequest(-1, RequestInfo(-1, "", 0, 0, 0))
    seen = [none if one is None else one for one in requests]
    infos = [one.info for one in seen]
    before = [one.finish_reason not in (None, FinishReason.STOP, FinishReason.LENGTH) for one in seen]
    left = [one.left_step for one in seen]
    ends = zip(before, times.scheduled_at(left), times.ready_at(left), strict=True)
    columns: dict[str, _Values] = {
        "handle": [info.handle for info in infos],
        "tenant_source": [info.tenant_source or None for info in infos],
        "priority": [info.priority for info in infos],
        "session": [info.session or None for info in infos],
        "predecessor": [info.predecessor or None for info in infos],
        "retry_of": [info.retry_of or None for info in infos],
        "arrival": [info.arrival_ns for info in infos],
        "queued": times.scheduled_at([one.queued_step for one in seen]),
        "scheduled": times.scheduled_at([one.scheduled_step for one in seen]),
        "first_token": times.ready_at([one.first_token_step for one in seen]),
        "end": [scheduled if left_before else ready for left_before, scheduled, ready in ends],
        "prompt_tokens": [info.prompt_tokens for info in infos],
        "cached_tokens": [one.cached_tokens for one in seen],
        "max_tokens": [info.max_tokens for info in infos],
        "output_tokens": [one.output_tokens for one in seen],
        "preemptions": [one.preemptions for one in seen],
        "state": ["finished" if one.left_step is not None else "lost" if one.lost else "open" for one in seen],
        "finish_reason": [None if one.finish_reason is None else _REASON_NAMES[one.finish_reason] for one in seen],
        "trace_id": [f"{info.trace_id:032x}" if info.trace_id else None for info in infos],
    }
    if none in seen:
        known = [one is not None for one in requests]
        columns = {
            name: [value if is_known else None for value, is_known in zip(column, known, strict=True)]
            for name, column in columns.items()
        }
    return columns


def _span_columns(spans: Sequence[RequestSpan | None]) -> dict[str, _Values]:
    """What the spans tell; None where one does not, or is None. A span with our handle leaves out what is 0, unless it
    was written from a table."""
    attributes: list[Attributes] = [{} if one is None else one.attributes for one in spans]
    whole = [one is not None and one.is_whole for one in spans]
    # All of one span, then the next: looked up name by name, each is out of the processor's cache again.
    rows = [tuple(map(one.get, _TOLD)) for one in attributes]
    told_values = dict(zip(_TOLD, zip(*rows, strict=True), strict=True)) if rows else dict.fromkeys(_TOLD, ())

    def integers(name: str, least: Iterable[int] = repeat(0)) -> list[int | None]:
        pairs = zip(told_values[name], least, strict=False)
        return [value if type(value) is int and low <= value < MOST else None for value, low in pairs]

    def texts(name: str) -> list[str | None]:
        return [value if isinstance(value, str) and value else None for value in told_values[name]]

    handles = integers(names.HANDLE)

    ours = [all_said or handle is not None for all_said, handle in zip(whole, handles, strict=True)]
    absent = [0 if mine and not all_said else None for mine, all_said in zip(ours, whole, strict=True)]
    # What was written from a table says what it said, be it before the arrival.
    least = [-MOST if all_said else 0 for all_said in whole]

    def amounts(name: str, least: Iterable[int] = repeat(0)) -> list[int | None]:
        pairs = zip(integers(name, least), absent, strict=True)
        return [otherwise if value is None else value for value, otherwise in pairs]

    arrivals = [None if one is None else one.arrival for one in spans]
    ends = [None if one is None else one.end for one in spans]
    reasons = texts(names.FINISH_REASON)
    claims = [None if one is None else one.claim[1] or None for one in spans]
    # Ours says its times in ns, all of them; another engine's span says some in seconds.
    told = [
        _NOT_TOLD if one is None or mine else stations(one.attributes, one.arrival)
        for one, mine in zip(spans, ours, strict=True)
    ]
    states = [
        None if one is None else state if state in _UNFINISHED else "finished"
        for one, state in zip(spans, texts(names.STATE), strict=True)
    ]
    return {
        "handle": handles,
        "tenant_source": [source or claim for source, claim in zip(texts(names.TENANT_SOURCE), claims, strict=True)],
        "priority": amounts(names.PRIORITY, repeat(-MOST)),
        "session": texts(names.SESSION),
        "predecessor": texts(names.PREDECESSOR),
        "retry_of": texts(names.RETRY_OF),
        "adapter": texts(names.ADAPTER),
        "arrival": arrivals,
        "queued": _after(arrivals, integers(names.QUEUED, least), [one.queued for one in told]),
        "scheduled": _after(arrivals, integers(names.SCHEDULED, least), [one.scheduled for one in told]),
        "first_token": [one.first_token for one in told],
        "end": [None if state in _UNFINISHED else end for state, end in zip(states, ends, strict=True)],
        "delivered": _after(ends, amounts(names.DELIVERED, least), repeat(None)),
        "prompt_tokens": integers(names.USAGE_PROMPT),
        "cached_tokens": amounts(names.CACHED_TOKENS),
        "prefix": integers(names.PREFIX),
        "max_tokens": integers(names.REQUEST_MAX_TOKENS),
        "output_tokens": integers(names.USAGE_COMPLETION),
        "preemptions": amounts(names.PREEMPTIONS),
        "state": states,
        "finish_reason": [reason if reason in _FINISH_REASONS else None for reason in reasons],
        "trace_id": [None if one is None else one.trace_id or None for one in spans],
    }


def _after(
    times: Iterable[int | None], durations: Iterable[int | None], otherwise: Iterable[int | None]
) -> list[int | None]:
    """The times after these durations, or else what is told ``otherwise``."""
    return [
        other if time is None or duration is None else time + duration
        for time, duration, other in zip(times, durations, otherwise, strict=False)
    ]


_NONE: Ints = np.zeros(0, dtype=np.int64)
NO_STEPS = StepTimes(_NONE, _NONE, _NONE)


# --- what requests tell of batches ----------------------------------------------------------------------------


def told_stations(requests: pa.Table) -> tuple[Ints, reconstruct.Stations]:
    """The requests (by their rows) that were scheduled and answered, and when they passed each station."""
    columns = (
        "arrival",
        "queued",
        "scheduled",
        "first_token",
        "end",
        "prompt_tokens",
        "cached_tokens",
        "output_tokens",
    )
    arrival, queued, scheduled, first, end, prompt, cached, output = (
        requests[name].fill_null(-1).to_numpy() for name in columns
    )
    arrival = np.maximum(arrival, queued)
    rows = np.flatnonzero((arrival <= scheduled) & (scheduled <= first) & (first <= end) & (prompt >= 0))
    computed = np.maximum(prompt - np.maximum(cached, 0), 1)
    chosen = (arrival, scheduled, first, end, computed, np.maximum(output, 1))
    return rows, reconstruct.Stations(*(column[rows] for column in chosen))
