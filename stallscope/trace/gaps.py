"""When tokens were ready, and the gaps between them: as request spans tell it, or as the steps show it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.trace.decode import LATEST, Ints
from stallscope.trace.findings import Findings
from stallscope.trace.rebuild import Phase
from stallscope.trace.requests import KnownRequest, StepTimes
from stallscope.trace.residency import ResidencyColumns
from stallscope.trace.tables import Column, names_at, plain_table, same
from stallscope_telemetry import names

# A gap of four typical steps is one that a user of a streaming answer can notice and an analysis must keep; the usual
# ones only shape percentiles, for which a few bins do. Below 1 ms nobody notices any gap.
GAP_FLOOR_STEPS = 4
LEAST_GAP_FLOOR_NS = 1_000_000
PIECE_TOKENS = 1 << 15
# 16 digits are 115 days of ns: a gap beyond is damage.
_TOKEN_TIMES = r"^[0-9]{1,16}(,[0-9]{1,16})*$"
_GAPS = r"^-?[0-9]{1,16}(,[0-9]{1,16}){2}(,-?[0-9]{1,16}(,[0-9]{1,16}){2})*$"

Gaps = tuple[Ints, Ints, Ints, Ints]  # request, start, length, count
_NONE: Ints = np.zeros(0, dtype=np.int64)


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


def first_tokens(tokens: TokenTimes) -> dict[int, int]:
    """When the first token of each request was ready, by the request's position."""
    firsts = np.flatnonzero(np.diff(tokens.request, prepend=-1))
    return dict(zip(tokens.request[firsts].tolist(), tokens.time[firsts].tolist(), strict=True))


def told_token_times(replica: str, known: Sequence[KnownRequest], findings: Findings) -> TokenTimes:
    """Token times that request spans carry. Those that are no list of durations are left out."""
    lengths, durations, unsound = _numbers(known, names.TOKEN_TIMES, _TOKEN_TIMES)
    begins = np.cumsum(lengths) - lengths
    within = np.zeros(len(known), dtype=np.bool_)
    told = np.flatnonzero(lengths)
    within[told] = np.add.reduceat(durations, begins[told], dtype=np.float64) < LATEST
    unsound += int(np.count_nonzero((lengths > 0) & ~within))
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
    whole = np.flatnonzero([one.span is not None and one.span.is_whole for one in known])
    gaps = _told_gaps(replica, known, arrivals, findings)
    return TokenTimes(np.repeat(np.arange(len(known)), lengths), time, one, same_stretch, whole, gaps)


def _told_gaps(replica: str, known: Sequence[KnownRequest], arrivals: Ints, findings: Findings) -> Gaps:
    """Gaps that request spans carry as the table has them."""
    lengths, numbers, unsound = _numbers(known, names.GAPS, _GAPS)
    text = f"values of {names.GAPS} are no list of starts, durations and counts, and count as absent"
    findings.add("unsound_value", replica, f" {names.GAPS}", text, unsound)
    request = np.repeat(np.arange(len(known)), lengths // 3)
    start, length, count = numbers.reshape(-1, 3).T
    return request, arrivals[request] + start, length, count


def _numbers(known: Sequence[KnownRequest], name: str, form: str) -> tuple[Ints, Ints, int]:
    """Of an attribute of this form, comma-separated numbers: how many each request has, the numbers of all, and how
    many of the attributes have another form."""
    texts = pa.array([one.span.text(name) or None if one.span else None for one in known], pa.string())
    lists = pc.split_pattern(pc.if_else(pc.match_substring_regex(texts, form), texts, None), ",")
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    numbers = pc.list_flatten(lists).cast(pa.int64()).to_numpy(zero_copy_only=False)
    return lengths, numbers, len(known) - texts.null_count - int(np.count_nonzero(lengths))


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
    steps = np.median(times.ready - times.scheduled) if len(times.steps) else 0
    floor = max(LEAST_GAP_FLOOR_NS, GAP_FLOOR_STEPS * int(steps))
    pieces = (piece for one in tokens for piece in _pieces(one))
    between = chain([] if means is None else [means], map(_gaps_between, pieces))
    parts = [*(_binned(gaps, floor) for gaps in between), *(one.gaps for one in tokens)]
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
