"""Requests and their inter-token gaps: what the steps saw, completed by the request spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.trace import reconstruct
from stallscope.trace.decode import LATEST, UNKNOWN, Ints, RequestSpan
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
    uses = Counter(order)
    keys = [(*key, repr(span.attributes) if uses[key] > 1 else "") for key, span in zip(order, spans, strict=True)]
    return [spans[position] for position in sorted(range(len(keys)), key=keys.__getitem__)]


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
    firsts = np.flatnonzero(np.diff(tokens.request, prepend=-1))
    first_token = dict(zip(tokens.request[firsts].tolist(), tokens.time[firsts].tolist(), strict=True))
    seen_parts = iter(_seen_parts([one.seen for one in known if one.seen is not None], times))
    rows = []
    for position, one in enumerate(known):
        row: dict[str, object] = {} if one.seen is None else next(seen_parts)
        if one.span is not None:
            part = _span_part(one.span)
            part["first_token"] = first_token.get(position, part["first_token"])
            said = _SAID_BY_ABSENCE if one.span.integer(names.HANDLE) is not None else ()
            row |= {name: value for name, value in part.items() if value is not None or name in said}
        names_of = {"replica": replica, "request": one.name, "tenant": one.tenant, "model": models[position] or None}
        rows.append(row | names_of)
    columns = {name: [row.get(name) for row in rows] for name in TABLES["requests"].names}
    return plain_table("requests", columns, len(rows))


def _seen_parts(requests: Sequence[SeenRequest], times: StepTimes) -> Iterator[dict[str, object]]:
    """What the steps tell of each."""
    stations = zip(
        requests,
        times.scheduled_at(one.queued_step for one in requests),
        times.scheduled_at(one.scheduled_step for one in requests),
        times.ready_at(one.first_token_step for one in requests),
        times.scheduled_at(one.left_step for one in requests),
        times.ready_at(one.left_step for one in requests),
        strict=True,
    )
    for seen, queued, scheduled, first_token, before, after in stations:
        left_before = seen.finish_reason not in (None, FinishReason.STOP, FinishReason.LENGTH)
        passed = {"queued": queued, "scheduled": scheduled, "first_token": first_token}
        yield _seen_part(seen) | passed | {"end": before if left_before else after}


def _seen_part(seen: SeenRequest) -> dict[str, object]:
    info, reason = seen.info, seen.finish_reason
    alive = "lost" if seen.lost else "open"
    return {
        "handle": info.handle,
        "tenant_source": info.tenant_source or None,
        "priority": info.priority,
        "session": info.session or None,
        "predecessor": info.predecessor or None,
        "retry_of": info.retry_of or None,
        "arrival": info.arrival_ns,
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
    absent = None if span.integer(names.HANDLE) is None else 0
    reason = span.text(names.FINISH_REASON)
    queued, scheduled, delivered = map(span.integer, (names.QUEUED, names.SCHEDULED, names.DELIVERED))
    # Ours says its times in ns, all of them; another engine's span says some in seconds.
    told = stations(span.attributes, span.arrival) if absent is None else Stations(None, None, None)
    return {
        "handle": span.integer(names.HANDLE),
        "tenant_source": span.text(names.TENANT_SOURCE) or span.claim[1] or None,
        "priority": _or(span.integer(names.PRIORITY), absent),
        "session": span.text(names.SESSION) or None,
        "predecessor": span.text(names.PREDECESSOR) or None,
        "retry_of": span.text(names.RETRY_OF) or None,
        "arrival": span.arrival,
        "queued": told.queued if queued is None else span.arrival + queued,
        "scheduled": told.scheduled if scheduled is None else span.arrival + scheduled,
        "first_token": told.first_token,
        "end": span.end,
        "delivered": None if delivered is None and absent is None else span.end + (delivered or 0),
        "prompt_tokens": span.integer(names.USAGE_PROMPT),
        "cached_tokens": _or(span.integer(names.CACHED_TOKENS), absent),
        "prefix": span.integer(names.PREFIX),
        "max_tokens": span.integer(names.REQUEST_MAX_TOKENS),
        "output_tokens": span.integer(names.USAGE_COMPLETION),
        "preemptions": _or(span.integer(names.PREEMPTIONS), absent),
        "state": "finished",
        "finish_reason": reason if reason in _FINISH_REASONS else None,
        "trace_id": span.trace_id or None,
    }


def _or(value: int | None, otherwise: int | None) -> int | None:
    return otherwise if value is None else value


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
    request = np.repeat(np.arange(len(known)), lengths)
    within = np.bincount(request, weights=durations, minlength=len(known)) < LATEST
    unsound = len(known) - texts.null_count - int(np.count_nonzero((lengths > 0) & within))
    text = f"values of {names.TOKEN_TIMES} are no list of durations and count as absent"
    findings.add("unsound_value", replica, f" {names.TOKEN_TIMES}", text, unsound)
    request, durations = request[within[request]], durations[within[request]]

    arrivals = np.array([one.arrival for one in known], dtype=np.int64)
    elapsed = np.cumsum(durations)
    before = np.concatenate([[0], elapsed])[np.searchsorted(request, request)]
    ones = np.ones(len(request), dtype=np.int64)
    return TokenTimes(request, arrivals[request] + elapsed - before, ones, np.zeros_like(ones))


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
    parts = [*([] if means is None else [means]), *map(_gaps_between, tokens)]
    request, start, length, count = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    steps = np.median(times.ready - times.scheduled) if len(times.steps) else 0
    floor = max(LEAST_GAP_FLOOR_NS, GAP_FLOOR_STEPS * int(steps))
    long = length >= floor

    octave = np.frexp(length[~long].astype(np.float64))[1]
    used = np.flatnonzero(np.bincount(octave))  # a few: bins are counted without sorting the gaps
    column = np.searchsorted(used, np.arange(octave.max(initial=0) + 1))
    bins = request[~long] * len(used) + column[octave]
    size = len(names_of) * len(used)
    binned_count = np.bincount(bins, count[~long], size)
    total = np.bincount(bins, count[~long] * length[~long], size)
    earliest = np.full(size, LATEST)
    np.minimum.at(earliest, bins, start[~long])
    some = np.flatnonzero(binned_count)
    mean = np.rint(total[some] / binned_count[some]).astype(np.int64)

    request = np.concatenate([some // max(len(used), 1), request[long]])
    start = np.concatenate([earliest[some], start[long]])
    length = np.concatenate([mean, length[long]])
    count = np.concatenate([binned_count[some].astype(np.int64), count[long]])
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
