"""Requests and their inter-token gaps: what the steps saw, completed by the request spans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.trace import reconstruct
from stallscope.trace.decode import LATEST, MOST, UNKNOWN, Ints, RequestSpan
from stallscope.trace.findings import Findings
from stallscope.trace.plain_spans import Stations, stations
from stallscope.trace.rebuild import Phase, Rebuilt, SeenRequest
from stallscope.trace.residency import ResidencyColumns
from stallscope.trace.schema import TABLES
from stallscope.trace.tables import Column, names_at, plain_table, same
from stallscope_telemetry import names
from stallscope_telemetry.records import FinishReason

# A gap of four typical steps is one that a user of a streaming answer can notice and an analysis must keep; the usual
# ones only shape percentiles, for which a few bins do. Below 1 ms nobody notices any gap.
GAP_FLOOR_STEPS = 4
LEAST_GAP_FLOOR_NS = 1_000_000
_SAID_BY_ABSENCE = ("queued", "scheduled", "first_token")  # a span of ours has what the request got to
_FINISH_REASONS = frozenset(reason.name.lower() for reason in FinishReason)
_UNFINISHED = ("open", "lost")
# 16 digits are 115 days of ns: a gap beyond is damage.
_TOKEN_TIMES = r"^[0-9]{1,16}(,[0-9]{1,16})*$"
_GAPS = r"^-?[0-9]{1,16}(,[0-9]{1,16}){2}(,-?[0-9]{1,16}(,[0-9]{1,16}){2})*$"


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
    for span in sorted(spans, key=lambda span: (span.arrival, span.end, span.request_id, repr(span.attributes))):
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

    def scheduled_at(self, step: int | None) -> int | None:
        return None if step is None else int(self.scheduled[np.searchsorted(self.steps, step)])

    def ready_at(self, step: int | None) -> int | None:
        return None if step is None else int(self.ready[np.searchsorted(self.steps, step)])


def request_table(
    replica: str, known: Sequence[KnownRequest], models: Sequence[str], times: StepTimes, tokens: TokenTimes
) -> pa.Table:
    """One row a request; ``models`` is parallel to ``known``."""
    firsts = np.flatnonzero(np.diff(tokens.request, prepend=-1))
    first_token = dict(zip(tokens.request[firsts].tolist(), tokens.time[firsts].tolist(), strict=True))
    rows = []
    for position, one in enumerate(known):
        row: dict[str, object] = {} if one.seen is None else _seen_part(one.seen, times)
        if one.span is not None:
            part = _span_part(one.span)
            part["first_token"] = first_token.get(position, part["first_token"])
            ours = one.span.integer(names.HANDLE) is not None
            said = part.keys() if one.span.is_whole else _SAID_BY_ABSENCE if ours else ()
            row |= {name: value for name, value in part.items() if value is not None or name in said}
        names_of = {"replica": replica, "request": one.name, "tenant": one.tenant, "model": models[position] or None}
        rows.append(row | names_of)
    columns = {name: [row.get(name) for row in rows] for name in TABLES["requests"].names}
    return plain_table("requests", columns, len(rows))


def _seen_part(seen: SeenRequest, times: StepTimes) -> dict[str, object]:
    info, reason = seen.info, seen.finish_reason
    left_before = reason not in (None, FinishReason.STOP, FinishReason.LENGTH)
    alive = "lost" if seen.lost else "open"
    return {
        "handle": info.handle,
        "tenant_source": info.tenant_source or None,
        "priority": info.priority,
        "session": info.session or None,
        "predecessor": info.predecessor or None,
        "retry_of": info.retry_of or None,
        "arrival": info.arrival_ns,
        "queued": times.scheduled_at(seen.queued_step),
        "scheduled": times.scheduled_at(seen.scheduled_step),
        "first_token": times.ready_at(seen.first_token_step),
        "end": times.scheduled_at(seen.left_step) if left_before else times.ready_at(seen.left_step),
        "prompt_tokens": info.prompt_tokens,
        "cached_tokens": seen.cached_tokens,
        "max_tokens": info.max_tokens,
        "output_tokens": seen.output_tokens,
        "preemptions": seen.preemptions,
        "state": alive if seen.left_step is None else "finished",
        "finish_reason": None if reason is None else reason.name.lower(),
        "trace_id": f"{info.trace_id:032x}" if info.trace_id else None,
    }


def _span_part(span: RequestSpan) -> dict[str, object]:
    """What the span tells; None where it does not. A span with our handle leaves out what is 0."""
    ours = span.is_whole or span.integer(names.HANDLE) is not None
    absent = 0 if ours and not span.is_whole else None
    reason = span.text(names.FINISH_REASON)
    state = span.text(names.STATE) if span.text(names.STATE) in _UNFINISHED else "finished"
    least = -MOST if span.is_whole else 0
    queued, scheduled, delivered = (
        span.integer(name, least) for name in (names.QUEUED, names.SCHEDULED, names.DELIVERED)
    )
    # Ours says its times in ns, all of them; another engine's span says some in seconds.
    told = Stations(None, None, None) if ours else stations(span.attributes, span.arrival)
    return {
        "handle": span.integer(names.HANDLE),
        "tenant_source": span.text(names.TENANT_SOURCE) or span.claim[1] or None,
        "priority": _or(span.integer(names.PRIORITY, -MOST), absent),
        "session": span.text(names.SESSION) or None,
        "predecessor": span.text(names.PREDECESSOR) or None,
        "retry_of": span.text(names.RETRY_OF) or None,
        "adapter": span.text(names.ADAPTER) or None,
        "arrival": span.arrival,
        "queued": told.queued if queued is None else span.arrival + queued,
        "scheduled": told.scheduled if scheduled is None else span.arrival + scheduled,
        "first_token": told.first_token,
        "end": span.end if state == "finished" else None,
        "delivered": None if delivered is None and absent is None else span.end + (delivered or 0),
        "prompt_tokens": span.integer(names.USAGE_PROMPT),
        "cached_tokens": _or(span.integer(names.CACHED_TOKENS), absent),
        "prefix": span.integer(names.PREFIX),
        "max_tokens": span.integer(names.REQUEST_MAX_TOKENS),
        "output_tokens": span.integer(names.USAGE_COMPLETION),
        "preemptions": _or(span.integer(names.PREEMPTIONS), absent),
        "state": state,
        "finish_reason": reason if reason in _FINISH_REASONS else None,
        "trace_id": span.trace_id or None,
    }


def _or(value: int | None, otherwise: int | None) -> int | None:
    return otherwise if value is None else value


# --- token times and gaps -----------------------------------------------------------------------------------


_NONE: Ints = np.zeros(0, dtype=np.int64)
Gaps = tuple[Ints, Ints, Ints, Ints]  # request, start, length, count


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """When output tokens were ready, ordered by request and time.

    ``request``: position of the request; ``time``: ns; ``count``: tokens ready at once; ``stretch``: gaps are known
    only between tokens of the same stretch. The requests at the positions ``whole`` have ``gaps`` instead, all there
    are, as the table has them.
    """

    request: Ints
    time: Ints
    count: Ints
    stretch: Ints
    whole: Ints = field(default_factory=lambda: _NONE)
    gaps: Gaps = (_NONE, _NONE, _NONE, _NONE)

    def untold(self, requests: int) -> npt.NDArray[np.bool_]:
        """Of which of so many requests nothing is told."""
        untold = np.ones(requests, dtype=np.bool_)
        untold[self.request] = False
        untold[self.whole] = False
        return untold


NO_TOKENS = TokenTimes(_NONE, _NONE, _NONE, _NONE)
NO_STEPS = StepTimes(_NONE, _NONE, _NONE)


def told_token_times(replica: str, known: Sequence[KnownRequest], findings: Findings) -> TokenTimes:
    """Token times that request spans carry. Those that are no list of durations are left out."""
    request, durations, unsound = _numbers(known, names.TOKEN_TIMES, _TOKEN_TIMES)
    within = np.bincount(request, weights=durations, minlength=len(known)) < LATEST
    unsound += int(np.count_nonzero(~within))
    text = f"values of {names.TOKEN_TIMES} are no list of durations and count as absent"
    findings.add("unsound_value", replica, f" {names.TOKEN_TIMES}", text, unsound)
    request, durations = request[within[request]], durations[within[request]]

    arrivals = np.array([one.arrival for one in known], dtype=np.int64)
    elapsed = np.cumsum(durations)
    before = np.concatenate([[0], elapsed])[np.searchsorted(request, request)]
    ones = np.ones(len(request), dtype=np.int64)
    whole = np.flatnonzero([one.span is not None and one.span.is_whole for one in known])
    gaps = _told_gaps(replica, known, arrivals, findings)
    return TokenTimes(request, arrivals[request] + elapsed - before, ones, np.zeros_like(ones), whole, gaps)


def _told_gaps(replica: str, known: Sequence[KnownRequest], arrivals: Ints, findings: Findings) -> Gaps:
    """Gaps that request spans carry as the table has them."""
    request, numbers, unsound = _numbers(known, names.GAPS, _GAPS)
    text = f"values of {names.GAPS} are no list of starts, durations and counts, and count as absent"
    findings.add("unsound_value", replica, f" {names.GAPS}", text, unsound)
    start, length, count = numbers.reshape(-1, 3).T
    return request[::3], arrivals[request[::3]] + start, length, count


def _numbers(known: Sequence[KnownRequest], name: str, form: str) -> tuple[Ints, Ints, int]:
    """The comma-separated numbers of an attribute of this form, the positions of the requests that each is of, and how
    many of the attributes have another form."""
    texts = pa.array([one.span.text(name) or None if one.span else None for one in known], pa.string())
    sound = pc.match_substring_regex(texts, form).fill_null(False)
    lists = pc.split_pattern(pc.if_else(sound, texts, None), ",")
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    numbers = pc.list_flatten(lists).cast(pa.int64()).to_numpy(zero_copy_only=False)
    unsound = len(known) - texts.null_count - int(np.count_nonzero(lengths))
    return np.repeat(np.arange(len(known)), lengths), numbers, unsound


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


def mean_gaps(requests: pa.Table, told: TokenTimes) -> Gaps:
    """Of requests whose tokens have no times: all gaps as long as they were on average."""
    first, end, count = (requests[name].fill_null(-1).to_numpy() for name in ("first_token", "end", "output_tokens"))
    some = (first >= 0) & (end >= first) & (count > 1) & told.untold(len(count))
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
    parts = [*([] if means is None else [means]), *map(_gaps_between, tokens)]
    request, start, length, count = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    steps = np.median(times.ready - times.scheduled) if len(times.steps) else 0
    floor = max(LEAST_GAP_FLOOR_NS, GAP_FLOOR_STEPS * int(steps))
    long = length >= floor

    octave = np.log2(np.maximum(length[~long], 1)).astype(np.int64) + (length[~long] > 0)
    octaves = int(octave.max(initial=0)) + 1
    key, inverse = np.unique(request[~long] * octaves + octave, return_inverse=True)
    binned_count = np.bincount(inverse, count[~long], len(key)).astype(np.int64)
    total = np.bincount(inverse, count[~long] * length[~long], len(key))
    earliest = np.full(len(key), LATEST)
    np.minimum.at(earliest, inverse, start[~long])

    mean = np.rint(total / np.maximum(binned_count, 1)).astype(np.int64)
    parts = [
        (request[long], start[long], length[long], count[long]),
        (key // octaves, earliest, mean, binned_count),
        *(one.gaps for one in tokens),
    ]
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
