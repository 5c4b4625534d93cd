"""Residency back to what changed in each step: the inverse of ``rebuild``.

All is worked out on columns, for a whole replica; only the steps that are about to be written become records. Batches
that are known begin with a keyframe, as do those that do not follow from the step before (a reader takes these from the
keyframe again, as whoever read them first did).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from stallscope.trace.rebuild import Phase
from stallscope_telemetry.records import FinishReason, RequestInfo, RequestSnapshot, RequestState, WaitReason

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Tuples = list[tuple[int, ...]]

KEYFRAME_EVERY = 200  # steps, as an engine's emitter does it
NOBODY = (1 << 31) - 1  # a handle that names no request
_NO_REASON = len(WaitReason) + 88  # a number that is none: the amount lacking is known, and the reason is not
_MOST_TOKENS = 1 << 32
_BEFORE_STEP = (FinishReason.ABORT, FinishReason.TIMEOUT, FinishReason.ERROR)
_STATES = {Phase.WAITING: RequestState.WAITING, Phase.PREEMPTED: RequestState.PREEMPTED}


@dataclass(frozen=True, eq=False)
class StepRuns:
    """The n steps of a replica, in order; ``known``: whose batches are. ``run`` numbers stretches of consecutive steps
    that are all known, or all not; ``starts`` are the positions where these begin."""

    number: Ints
    known: Mask

    @cached_property
    def follows(self) -> Mask:
        """Whether the step before is in the trace."""
        return np.append(False, np.diff(self.number) == 1)[: len(self.number)]

    @cached_property
    def fresh(self) -> Mask:
        return ~self.follows | np.append(True, np.diff(self.known))[: len(self.number)]

    @cached_property
    def run(self) -> Ints:
        return np.cumsum(self.fresh) - 1

    @cached_property
    def starts(self) -> Ints:
        return np.flatnonzero(self.fresh)

    def positions(self, numbers: Ints) -> Ints:
        return np.searchsorted(self.number, numbers)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of residency ordered by request and step: codes of requests (-1: none), positions of steps."""

    request: Ints
    phase: Ints
    reason: Ints
    lacking: Ints
    first: Ints
    last: Ints
    tokens: Ints
    context: Ints
    holder: Ints

    def take(self, chosen: Ints | Mask) -> Rows:
        return Rows(*(getattr(self, name)[chosen] for name in self.__dataclass_fields__))

    @cached_property
    def end(self) -> Ints:
        """Tokens held after the row."""
        return self.context + (self.last - self.first + 1) * self.tokens

    @cached_property
    def waits(self) -> Mask:
        return (self.phase == Phase.WAITING) | (self.phase == Phase.PREEMPTED)


@dataclass(frozen=True, eq=False)
class Asked:
    """What batches need of n requests: ``finish_reason`` is -1 of those that did not finish."""

    handle: Ints
    prompt_tokens: Ints
    cached_tokens: Ints
    finish_reason: Ints


@dataclass(frozen=True, eq=False)
class Events:
    """Tuples of whole numbers, ordered by the positions ``at`` of the steps that say them."""

    at: Ints
    columns: tuple[Ints, ...]

    @staticmethod
    def of(at: Ints, *columns: Ints) -> Events:
        order = np.argsort(at, kind="stable")
        return Events(at[order], tuple(column[order] for column in columns))

    def of_steps(self, begin: int, end: int) -> list[Tuples]:
        """Those of each step from position ``begin`` to before ``end``."""
        low, high = np.searchsorted(self.at, [begin, end])
        tuples = list(zip(*(column[low:high].tolist() for column in self.columns), strict=True))
        bounds = np.searchsorted(self.at[low:high], np.arange(begin, end + 1)).tolist()
        return [tuples[first:after] for first, after in pairwise(bounds)]


@dataclass(frozen=True, slots=True)
class Change:
    """What a step says of its batch, by the fields of ``records.StepRecord``; ``untold``: waits of a keyframe have no
    reason, by handle."""

    joined: Sequence[RequestInfo]
    keyframe: list[RequestSnapshot] | None
    cached: Tuples
    chunks: Tuples
    decodes: Tuples
    waits: Tuples
    preempted: Tuples
    evicted: Tuples
    left: Tuples
    is_unknown: bool  # who is in the batches is not known any more


class Batches:
    """Who did what in the steps of a replica. ``evictions``: positions of steps, codes of who took and who had the
    blocks (-1: not known), blocks. ``is_unknown``: nothing was ever known of the batches, but that is no estimate."""

    def __init__(
        self, steps: StepRuns, rows: Rows, asked: Asked, evictions: tuple[Ints, ...], block_size: int, is_unknown: bool
    ) -> None:
        self._steps, self._rows, self._asked = steps, rows, asked
        self._handle = np.append(asked.handle, NOBODY)
        self._block_size = block_size
        self._described = self._first_seen(evictions)
        touches = self._touches()
        forced = self._forced(touches)
        starts = steps.starts[steps.known[steps.starts]]
        self._adopting = np.union1d(starts[steps.number[starts] != 0], forced)  # keyframes that a reader starts from
        self._output = self._output_before(touches)
        self._keyframes = np.union1d(np.union1d(starts, forced), self._regular_keyframes(starts))
        unknown = steps.starts[~steps.known[steps.starts]]
        ends = steps.follows[unknown] | (steps.number[unknown] == 0) | ((unknown == 0) & is_unknown)
        self._unknown = set(unknown[ends].tolist())
        self._joined = self._joins(touches, evictions)
        self._cached = self._admissions(touches)
        self._waits = self._reasons()
        self._preempted = self._preemptions(touches)
        self._left = self._leaves(touches)
        at, taker, owner, blocks = evictions
        self._evicted = Events.of(at, self._handle[taker], self._handle[owner], blocks)

    # --- how a request's rows follow each other -------------------------------------------------------------------

    def _first_seen(self, evictions: tuple[Ints, ...]) -> Ints:
        """Position of the step that tells first of each request."""
        first = np.full(len(self._asked.handle), len(self._steps.number))
        np.minimum.at(first, self._rows.request, self._rows.first)
        at, taker, owner, _ = evictions
        for who in (taker, owner):
            # In a step whose batch is known, whoever is named is there already.
            some = (who >= 0) & ~self._steps.known[at]
            np.minimum.at(first, who[some], at[some])
        return first

    def _touches(self) -> Mask:
        """Whether a row goes on where the same request's row before has ended."""
        rows, run = self._rows, self._steps.run
        touches = np.zeros(len(rows.request), dtype=np.bool_)
        touches[1:] = (
            (np.diff(rows.request) == 0)
            & (rows.first[1:] == rows.last[:-1] + 1)
            & (run[rows.first[1:]] == run[rows.last[:-1]])
        )
        return touches

    def _forced(self, touches: Mask) -> Ints:
        """Where steps do not follow from those before: only a keyframe can say so."""
        rows, steps = self._rows, self._steps
        before = rows.take(np.maximum(np.arange(len(touches)) - 1, 0))
        starts_run = steps.fresh[rows.first] & (steps.number[rows.first] != 0)
        again = self._described[rows.request] < rows.first
        held = rows.context > 0
        sudden = (rows.phase == Phase.PREEMPTED) | (np.isin(rows.phase, (Phase.DECODE, Phase.PAUSED)) & held)
        appears = ~touches & ~starts_run & (again | sudden)
        goes_on = np.select(
            [~before.waits & ~rows.waits, ~before.waits, before.waits & rows.waits],
            [rows.context == before.end, rows.phase == Phase.PREEMPTED, rows.phase == before.phase],
            (rows.phase == Phase.PREFILL) | ~held,
        )
        is_last, after = self._ends(touches)
        vanishes = is_last & after & ~self._finishes()
        return np.unique(np.concatenate([rows.first[appears | (touches & ~goes_on)], rows.last[vanishes] + 1]))

    def _ends(self, touches: Mask) -> tuple[Mask, Mask]:
        """Which rows nothing follows at once, and of which the step after them is in the same run."""
        last, run = self._rows.last, self._steps.run
        following = np.minimum(last + 1, len(run) - 1)
        return ~np.append(touches[1:], False)[: len(touches)], (run[following] == run[last]) & (following > last)

    def _finishes(self) -> Mask:
        """Which rows are the last of requests that finished."""
        request = self._rows.request
        is_last = np.append(np.diff(request) != 0, True)[: len(request)]
        return is_last & (self._asked.finish_reason[request] >= 0)

    # --- output tokens --------------------------------------------------------------------------------------------

    def _output_before(self, touches: Mask) -> Ints:
        """Output tokens of each row's request before it, as a reader counts them.

        One more than was computed beyond the prompt; while that is computed anew, what it was. Of a request that a
        keyframe shows first, what its first decode shows.
        """
        rows = self._rows
        if not len(rows.request):
            return np.zeros(0, dtype=np.int64)
        prompt = self._asked.prompt_tokens[rows.request]
        run = self._steps.run[rows.first]
        fresh = np.append(True, (np.diff(rows.request) != 0) | (np.diff(run) != 0))
        begin = np.flatnonzero(fresh)
        segment = np.cumsum(fresh) - 1
        position = np.arange(len(prompt))
        decodes, prefills = rows.phase == Phase.DECODE, rows.phase == Phase.PREFILL

        def first_of(mask: Mask) -> Ints:
            """The first such row of each segment, or one beyond all."""
            return np.minimum.reduceat(np.where(mask, position, len(position)), begin)

        decode, prefill = first_of(decodes), first_of(prefills)
        context = np.append(rows.context, 0)[decode] - prompt[begin]
        reached = np.maximum.reduceat(np.where(prefills, rows.end, 0), begin) - prompt[begin]
        paused = rows.context[begin] - prompt[begin] + 1
        base = np.select(
            [decode < prefill, decode < len(position), prefill < len(position), rows.phase[begin] == Phase.PAUSED],
            [context + 1, context, reached, paused],
            0,
        )
        base = np.where(np.isin(rows.first[begin], self._adopting), np.maximum(base, 0), 0)
        gain = np.where(decodes | prefills, np.clip(rows.end - prompt + 1, 0, _MOST_TOKENS - 1), 0)
        before = np.where(fresh, 0, np.append(0, gain[:-1]))
        # The most so far, of each segment: later segments count from higher up.
        most = np.maximum.accumulate(np.maximum(before, base[segment]) + segment * _MOST_TOKENS)
        output: Ints = most - segment * _MOST_TOKENS
        return output

    def _regular_keyframes(self, starts: Ints) -> Ints:
        """Further keyframes, for readers that miss a step; none in runs of which a reader may count otherwise."""
        rows, run = self._rows, self._steps.run
        beyond = self._asked.prompt_tokens[rows.request] + self._output
        odd = (rows.phase == Phase.DECODE) & (rows.context != beyond - 1)
        odd |= (rows.phase == Phase.PREFILL) & (rows.end > beyond)
        begin_of = np.zeros(len(self._steps.starts), dtype=np.int64)
        begin_of[run[starts]] = starts
        since = np.arange(len(run)) - begin_of[run]
        return np.flatnonzero(self._steps.known & (since % KEYFRAME_EVERY == 0) & ~np.isin(run, run[rows.first[odd]]))

    # --- what is said once ----------------------------------------------------------------------------------------

    def _joins(self, touches: Mask, evictions: tuple[Ints, ...]) -> Events:
        """Requests (codes) that steps tell of first, but for those that a keyframe shows."""
        code = np.flatnonzero(self._described < len(self._steps.number))
        at = self._described[code]
        said = ~np.isin(at, self._keyframes)
        return Events.of(at[said], code[said])

    def _handle_of(self, rows: Rows) -> Ints:
        return self._handle[rows.request]

    def _admissions(self, touches: Mask) -> Events:
        """Handle and tokens found in the cache, of who begins to compute."""
        rows = self._rows
        waited = np.append(False, rows.waits[:-1])[: len(touches)]
        admitted = (rows.phase == Phase.PREFILL) & (~touches | waited) & (rows.context > 0)
        chosen = rows.take(admitted & ~np.isin(rows.first, self._adopting))
        return Events.of(chosen.first, self._handle_of(chosen), chosen.context)

    def _reasons(self) -> Events:
        """Handle, reason and amount lacking, of who waits from now on, or otherwise than before."""
        rows = self._rows
        told = rows.waits & ((rows.reason >= 0) | (rows.lacking >= 0)) & ~np.isin(rows.first, self._adopting)
        chosen = rows.take(told)
        reason = np.where(chosen.reason < 0, _NO_REASON, chosen.reason)
        return Events.of(chosen.first, self._handle_of(chosen), reason, np.maximum(chosen.lacking, 0))

    def _preemptions(self, touches: Mask) -> Events:
        """Handle, and that of who took the blocks; at a keyframe that a reader starts from, of all who had lost theirs."""
        rows = self._rows
        lost = rows.phase == Phase.PREEMPTED
        same = np.zeros(len(touches), dtype=np.bool_)
        same[1:] = touches[1:] & lost[:-1] & (rows.holder[1:] == rows.holder[:-1])
        chosen = rows.take(lost & ~same & ~np.isin(rows.first, self._adopting))
        taken = rows.take(lost & (rows.holder >= 0))
        before = np.searchsorted(self._adopting, taken.first)
        count = np.searchsorted(self._adopting, taken.last, side="right") - before
        shown = np.repeat(np.arange(len(count)), count)
        at = self._adopting[np.arange(len(shown)) - np.repeat(np.cumsum(count) - count, count) + before[shown]]
        handle = np.concatenate([self._handle_of(chosen), self._handle_of(taken)[shown]])
        holder = np.concatenate([chosen.holder, taken.holder[shown]])
        return Events.of(np.concatenate([chosen.first, at]), handle, self._handle[holder])

    def _leaves(self, touches: Mask) -> Events:
        """Handle and reason; who was aborted had left before the step that says so."""
        is_last, after = self._ends(touches)
        reason = self._asked.finish_reason[self._rows.request]
        early = np.isin(reason, _BEFORE_STEP)
        chosen = is_last & self._finishes() & (after | ~early)
        rows = self._rows.take(chosen)
        return Events.of(rows.last + early[chosen], self._handle_of(rows), reason[chosen])

    # --- the steps ------------------------------------------------------------------------------------------------

    def named(self, begin: int, end: int) -> Ints:
        """The requests (codes) that must be described to say what changed in the steps from ``begin`` to ``end``."""
        rows = self._rows
        low, high = np.searchsorted(self._joined.at, [begin, end])
        return np.union1d(rows.request[(rows.first < end) & (rows.last >= begin)], self._joined.columns[0][low:high])

    def changes(self, begin: int, end: int, infos: Mapping[int, RequestInfo]) -> Iterator[Change]:
        """What the steps from position ``begin`` to before ``end`` say; ``infos`` of the requests ``named``."""
        inside = (self._rows.first < end) & (self._rows.last >= begin)
        rows, output = self._rows.take(inside), self._output[inside]
        chunks = self._each_step(rows, rows.phase == Phase.PREFILL, begin, end)
        special = (rows.phase == Phase.PAUSED) | ((rows.phase == Phase.DECODE) & (rows.tokens != 1))
        decodes = self._each_step(rows, special, begin, end, also=self._sudden_decodes(inside))
        parts = (self._joined, self._cached, chunks, decodes, self._waits, self._preempted, self._evicted, self._left)
        keyframes = set(self._keyframes.tolist())
        for position, said in enumerate(zip(*(part.of_steps(begin, end) for part in parts), strict=True), begin):
            joined, cached, chunk, decode, waits, preempted, evicted, left = said
            shown = None
            if position in keyframes:
                shown = self._snapshots(rows, output, position, infos)
            yield Change(
                joined=[infos[code] for (code,) in joined], keyframe=shown, cached=cached, chunks=chunk, decodes=decode,
                waits=waits, preempted=preempted, evicted=evicted, left=left, is_unknown=position in self._unknown,
            )  # fmt: skip

    def _sudden_decodes(self, inside: Mask) -> Mask:
        """Of the rows ``inside``, those of one token a step in which a request begins without a prompt to compute."""
        rows = self._rows
        waited = np.append(False, rows.waits[:-1])[: len(inside)]
        first = np.append(True, np.diff(rows.request) != 0)[: len(inside)]
        sudden = (rows.phase == Phase.DECODE) & (rows.tokens == 1) & (waited | first)
        return (sudden & ~np.isin(rows.first, self._adopting))[inside]

    def _each_step(self, rows: Rows, chosen: Mask, begin: int, end: int, also: Mask | None = None) -> Events:
        """Handle and tokens in each step of the chosen rows, and in the first one of those ``also``."""
        rows_of = rows.take(chosen)
        first, last = np.maximum(rows_of.first, begin), np.minimum(rows_of.last, end - 1)
        count = last - first + 1
        row = np.repeat(np.arange(len(count)), count)
        at = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count) + first[row]
        handle, tokens = self._handle_of(rows_of)[row], rows_of.tokens[row]
        if also is not None:
            single = rows.take(also)
            at = np.concatenate([at, single.first])
            handle = np.concatenate([handle, self._handle_of(single)])
            tokens = np.concatenate([tokens, single.tokens])
        return Events.of(at, handle, tokens)

    def _snapshots(
        self, rows: Rows, output: Ints, position: int, infos: Mapping[int, RequestInfo]
    ) -> list[RequestSnapshot]:
        """Everybody in a step: after its admissions and preemptions, before its tokens."""
        there = np.flatnonzero((rows.first <= position) & (rows.last >= position))
        mine = rows.take(there)
        done = (position - mine.first) * mine.tokens
        held = mine.context + done
        made = output[there] + np.where(mine.phase == Phase.DECODE, done, 0)
        blocks = np.where(mine.waits, 0, -(-(held + mine.tokens) // self._block_size)) if self._block_size else 0 * held
        cached = np.where(mine.waits, 0, self._asked.cached_tokens[mine.request])
        columns = (mine.request, mine.phase, held, made, cached, blocks, mine.reason, mine.lacking)
        return [
            RequestSnapshot(
                info=infos[code],
                state=_STATES.get(Phase(phase), RequestState.RUNNING),
                computed_tokens=computed,
                output_tokens=tokens,
                cached_tokens=found,
                blocks=of_blocks,
                wait_reason=WaitReason(reason) if reason >= 0 else None,
                lacking=max(lacking, 0),
            )
            for code, phase, computed, tokens, found, of_blocks, reason, lacking in zip(
                *(column.tolist() for column in columns), strict=True
            )
        ]
