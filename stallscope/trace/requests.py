"""Requests and their inter-token gaps: what the steps saw, completed by the request spans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.trace import reconstruct
from stallscope.trace.decode import LATEST, MOST, UNKNOWN, Ints, RequestSpan
from stallscope.trace.findings import Findings
from stallscope.trace.otlp import Attributes
from stallscope.trace.plain_spans import Stations, stations
from stallscope.trace.rebuild import Phase, Rebuilt, SeenRequest
from stallscope.trace.residency import ResidencyColumns
from stallscope.trace.tables import Column, names_at, plain_table, same
from stallscope_telemetry import names
from stallscope_telemetry.records import FinishReason, RequestInfo

# A gap of four typical steps is one that a user of a streaming answer can notice and an analysis must keep; the usual
# ones only shape percentiles, for which a few bins do. Below 1 ms nobody notices any gap.
GAP_FLOOR_STEPS = 4
LEAST_GAP_FLOOR_NS = 1_000_000
PIECE_TOKENS = 1 << 15
_SAID_BY_ABSENCE = ("queued", "scheduled", "first_token")  # a span of ours has what the request got to
_REASON_NAMES = {reason: reason.name.lower() for reason in FinishReason}
_FINISH_REASONS = frozenset(_REASON_NAMES.values())
_NOT_TOLD = Stations(None, None, None)
# 16 digits are 115 days of ns: a gap beyond is damage.
_TOKEN_TIMES = r"^[0-9]{1,16}(,[0-9]{1,16})*$"


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
    replica: str, known: Sequence[KnownRequest], models: Sequence[str], times: StepTimes, tokens: TokenTimes
) -> pa.Table:
    """One row a request; ``models`` is parallel to ``known``."""
    seen = _seen_columns([one.seen for one in known], times)
    told = _span_columns([one.span for one in known])
    firsts = np.flatnonzero(np.diff(tokens.request, prepend=-1))
    for position, time in zip(tokens.request[firsts].tolist(), tokens.time[firsts].tolist(), strict=True):
        told["first_token"][position] = time
    ours = [handle is not None for handle in told["handle"]]
    columns: dict[str, Column] = {
        "replica": same(replica, len(known)),
        "request": [one.name for one in known],
        "tenant": [one.tenant for one in known],
        "model": [model or None for model in models],
        "prefix": told.pop("prefix"),
        "delivered": told.pop("delivered"),
    }
    for name, values in told.items():
        said = ours if name in _SAID_BY_ABSENCE else repeat(False)
        columns[name] = [
            value if value is not None or all_said else from_steps
            for value, all_said, from_steps in zip(values, said, seen[name], strict=False)
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
    """What the spans tell; None where one does not, or is None. A span with our handle leaves out what is 0."""
    attributes: list[Attributes] = [{} if one is None else one.attributes for one in spans]

    def integers(name: str) -> list[int | None]:
        values = [one.get(name) for one in attributes]
        return [value if type(value) is int and 0 <= value < MOST else None for value in values]

    def texts(name: str) -> list[str | None]:
        values = [one.get(name) for one in attributes]
        return [value if isinstance(value, str) and value else None for value in values]

    handles = integers(names.HANDLE)

    def amounts(name: str) -> list[int | None]:
        pairs = zip(integers(name), handles, strict=True)
        return [0 if value is None and handle is not None else value for value, handle in pairs]

    arrivals = [None if one is None else one.arrival for one in spans]
    ends = [None if one is None else one.end for one in spans]
    reasons = texts(names.FINISH_REASON)
    claims = [None if one is None else one.claim[1] or None for one in spans]
    # Ours says its times in ns, all of them; another engine's span says some in seconds.
    told = [
        _NOT_TOLD if one is None or handle is not None else stations(one.attributes, one.arrival)
        for one, handle in zip(spans, handles, strict=True)
    ]
    return {
        "handle": handles,
        "tenant_source": [source or claim for source, claim in zip(texts(names.TENANT_SOURCE), claims, strict=True)],
        "priority": amounts(names.PRIORITY),
        "session": texts(names.SESSION),
        "predecessor": texts(names.PREDECESSOR),
        "retry_of": texts(names.RETRY_OF),
        "arrival": arrivals,
        "queued": _after(arrivals, integers(names.QUEUED), [one.queued for one in told]),
        "scheduled": _after(arrivals, integers(names.SCHEDULED), [one.scheduled for one in told]),
        "first_token": [one.first_token for one in told],
        "end": ends,
        "delivered": _after(ends, amounts(names.DELIVERED), repeat(None)),
        "prompt_tokens": integers(names.USAGE_PROMPT),
        "cached_tokens": amounts(names.CACHED_TOKENS),
        "prefix": integers(names.PREFIX),
        "max_tokens": integers(names.REQUEST_MAX_TOKENS),
        "output_tokens": integers(names.USAGE_COMPLETION),
        "preemptions": amounts(names.PREEMPTIONS),
        "state": [None if one is None else "finished" for one in spans],
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


# --- token times and gaps -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """When output tokens were ready, ordered by request and time.

    ``request``: position of the request; ``time``: ns; ``count``: tokens ready at once; ``stretch``: gaps are known
    only between tokens of the same stretch.
    """

    request: Ints
    time: Ints
    count: Ints
    stretch: Ints


_NONE: Ints = np.zeros(0, dtype=np.int64)
NO_TOKENS = TokenTimes(_NONE, _NONE, _NONE, _NONE)
NO_STEPS = StepTimes(_NONE, _NONE, _NONE)


def told_token_times(replica: str, known: Sequence[KnownRequest], findings: Findings) -> TokenTimes:
    """Token times that request spans carry. Those that are no list of durations are left out."""
    texts = pa.array([one.span.text(names.TOKEN_TIMES) or None if one.span else None for one in known], pa.string())
    sound = pc.match_substring_regex(texts, _TOKEN_TIMES).fill_null(False)
    lists = pc.split_pattern(pc.if_else(sound, texts, None), ",")
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    durations = pc.list_flatten(lists).cast(pa.int64()).to_numpy(zero_copy_only=False)
    begins = np.cumsum(lengths) - lengths
    within = np.zeros(len(known), dtype=np.bool_)
    told = np.flatnonzero(lengths)
    within[told] = np.add.reduceat(durations, begins[told], dtype=np.float64) < LATEST
    unsound = len(known) - texts.null_count - int(np.count_nonzero((lengths > 0) & within))
    text = f"values of {names.TOKEN_TIMES} are no list of durations and count as absent"
    findings.add("unsound_value", replica, f" {names.TOKEN_TIMES}", text, unsound)
    if unsound:
        durations = durations[np.repeat(within, lengths)]
        lengths = np.where(within, lengths, 0)
        begins = np.cumsum(lengths) - lengths

    arrivals = np.array([one.arrival for one in known], dtype=np.int64)
    elapsed = np.concatenate([[0], np.cumsum(durations)])
    time = elapsed[1:] + np.repeat(arrivals - elapsed[begins], lengths)
    one, same_stretch = np.broadcast_to(np.int64(1), len(time)), np.broadcast_to(np.int64(0), len(time))
    return TokenTimes(np.repeat(np.arange(len(known)), lengths), time, one, same_stretch)


def seen_token_times(rows: ResidencyColumns, wanted: npt.NDArray[np.bool_], times: StepTimes) -> TokenTimes:
    """Token times of the wanted requests as the steps show them, for requests without a span.

    A decode's tokens are ready with each step of its row, a prefill's with its last step if that samples.
    """
    decodes = rows.phase == Phase.DECODE
    chosen = np.flatnonzero(wanted[rows.request] & (decodes | rows.samples))
    chosen = chosen[np.lexsort((rows.first_step[chosen], rows.request[chosen]))]
    decodes, last = decodes[chosen], rows.last_step[chosen]
    first = np.where(decodes, rows.first_step[chosen], last)
    lengths = last - first + 1
    row = np.repeat(np.arange(len(chosen)), lengths)
    step = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths) + first[row]
    count = np.where(decodes, rows.tokens[chosen], 1)[row]
    time = times.ready[np.searchsorted(times.steps, step)]
    return TokenTimes(rows.request[chosen][row], time, count, rows.stretch[chosen][row])


Gaps = tuple[Ints, Ints, Ints, Ints]  # request, start, length, count


def mean_gaps(requests: pa.Table, told: TokenTimes) -> Gaps:
    """Of requests whose tokens have no times: all gaps as long as they were on average."""
    first, end, count = (requests[name].fill_null(-1).to_numpy() for name in ("first_token", "end", "output_tokens"))
    some = (first >= 0) & (end >= first) & (count > 1)
    some[told.request] = False
    request = np.flatnonzero(some)
    count = count[request] - 1
    return request, first[request], (end - first)[request] // count, count


def gap_table(
    replica: str,
    names_of: Sequence[str],
    tokens: Sequence[TokenTimes],
    times: StepTimes,
    means: Gaps | None = None,
) -> pa.Table:
    """Gaps from the floor on one by one; of each request the shorter ones by octave: first start, mean and count.

    ``names_of`` the requests; ``means`` are added as they are.
    """
    steps = np.median(times.ready - times.scheduled) if len(times.steps) else 0
    floor = max(LEAST_GAP_FLOOR_NS, GAP_FLOOR_STEPS * int(steps))
    pieces = (piece for one in tokens for piece in _pieces(one))
    parts = [_binned(gaps, floor) for gaps in chain([] if means is None else [means], map(_gaps_between, pieces))]
    request, start, length, count = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.lexsort((length, start, request))
    columns: dict[str, Column] = {
        "replica": same(replica, len(order)),
        "request": names_at(names_of, request[order]),
        "start": start[order],
        "length_ns": length[order],
        "count": count[order],
    }
    return plain_table("gaps", columns, len(order))


def _pieces(tokens: TokenTimes) -> Iterator[TokenTimes]:
    """The same in pieces of whole requests that a processor's cache holds."""
    cuts = np.searchsorted(tokens.request, tokens.request[PIECE_TOKENS::PIECE_TOKENS]).tolist()
    for low, high in pairwise([0, *cuts, len(tokens.request)]):
        yield TokenTimes(
            tokens.request[low:high], tokens.time[low:high], tokens.count[low:high], tokens.stretch[low:high]
        )


def _binned(gaps: Gaps, floor: int) -> Gaps:
    """Those from the floor on as they are, and of each request one for each octave below it; requests in order."""
    request, start, length, count = gaps
    long, short = np.flatnonzero(length >= floor), np.flatnonzero(length < floor)
    if not len(short):
        return gaps
    first, last = int(request.min()), int(request.max())
    short_length, short_count = length[short], count[short]
    octave = np.frexp(short_length.astype(np.float64))[1]
    used = np.flatnonzero(np.bincount(octave))  # a few: bins are counted without sorting the gaps
    column = np.searchsorted(used, np.arange(octave.max() + 1))
    bins = (request[short] - first) * len(used) + column[octave]
    size = (last - first + 1) * len(used)
    binned_count = np.bincount(bins, short_count, size)
    total = np.bincount(bins, short_count * short_length, size)
    earliest = np.full(size, LATEST)
    np.minimum.at(earliest, bins, start[short])
    some = np.flatnonzero(binned_count)
    mean = np.rint(total[some] / binned_count[some]).astype(np.int64)
    return (
        np.concatenate([first + some // len(used), request[long]]),
        np.concatenate([earliest[some], start[long]]),
        np.concatenate([mean, length[long]]),
        np.concatenate([binned_count[some].astype(np.int64), count[long]]),
    )


def _gaps_between(tokens: TokenTimes) -> Gaps:
    """Request, start, length and count of the gaps; tokens that are ready at once have gaps of 0."""
    follows = (np.diff(tokens.request) == 0) & (np.diff(tokens.stretch) == 0)
    later = np.flatnonzero(follows) + 1
    together = np.flatnonzero(tokens.count > 1)
    return (
        np.concatenate([tokens.request[later], tokens.request[together]]),
        np.concatenate([tokens.time[later - 1], tokens.time[together]]),
        np.concatenate([tokens.time[later] - tokens.time[later - 1], np.zeros(len(together), dtype=np.int64)]),
        np.concatenate([np.ones(len(later), dtype=np.int64), tokens.count[together] - 1]),
    )


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
