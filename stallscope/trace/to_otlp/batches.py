"""Residency back to what changed in each step: the inverse of ``rebuild``.

All is worked out on columns, for a whole replica; only the steps that are about to be written become records. Batches
that are known begin with a keyframe, as do those that do not follow from the step before (a reader takes these from the
keyframe again, as whoever read them first did).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stallscope.trace.rebuild import Phase
from stallscope.trace.to_otlp.keyframes import Keyframes
from stallscope.trace.to_otlp.rows import Events, Ints, Mask, Rows, Tuples
from stallscope_telemetry.records import FinishReason, RequestInfo, RequestSnapshot, RequestState, WaitReason

NOBODY = (1 << 31) - 1  # a handle that names no request
_NO_REASON = 99  # a number that is none: the amount lacking is known, and the reason is not
_BEFORE_STEP = (FinishReason.ABORT, FinishReason.TIMEOUT, FinishReason.ERROR)
_STATES = {Phase.WAITING: RequestState.WAITING, Phase.PREEMPTED: RequestState.PREEMPTED}


@dataclass(frozen=True, slots=True)
class Change:
    """What a step says of its batch, by the fields of ``records.StepRecord``. ``is_unknown``: from here on, who is in
    the batches is not known any more."""

    joined: Sequence[RequestInfo]
    keyframe: list[RequestSnapshot] | None
    cached: Tuples
    chunks: Tuples
    decodes: Tuples
    waits: Tuples
    preempted: Tuples
    evicted: Tuples
    left: Tuples
    is_unknown: bool


class Batches:
    """Who did what in the steps of a replica. ``was_never_known``: its batches, although they are no estimates."""

    def __init__(self, keyframes: Keyframes, block_size: int, was_never_known: bool) -> None:
        self._keyframes, self._rows, self._steps = keyframes, keyframes.rows, keyframes.steps
        self._handle = np.append(keyframes.asked.handle, NOBODY)
        self._block_size = block_size
        unknown = self._steps.starts[~self._steps.known[self._steps.starts]]
        # A reader takes what follows a known batch for known, and so whatever follows step 0.
        told = self._steps.follows[unknown] | (self._steps.number[unknown] == 0) | ((unknown == 0) & was_never_known)
        self._unknown = set(unknown[told].tolist())
        self._is_adopted = np.isin(self._rows.first, keyframes.adopted)
        self._shown = set(keyframes.at.tolist())
        self._joined = self._joins()
        self._cached = self._admissions()
        self._waits = self._reasons()
        self._preempted = self._preemptions()
        self._left = self._leaves()
        at, taker, owner, blocks = keyframes.evictions
        self._evicted = Events.of(at, self._handle[taker], self._handle[owner], blocks)

    # --- what is said once ----------------------------------------------------------------------------------------

    def _joins(self) -> Events:
        """Requests (codes) that steps tell of first, but for those that a keyframe shows."""
        described = self._keyframes.described
        code = np.flatnonzero((described < len(self._steps.number)) & ~np.isin(described, self._keyframes.at))
        return Events.of(described[code], code)

    def _handle_of(self, rows: Rows) -> Ints:
        return self._handle[rows.request]

    def _admissions(self) -> Events:
        """Handle and tokens found in the cache, of who begins to compute."""
        rows = self._rows
        admitted = (rows.phase == Phase.PREFILL) & self._keyframes.begins & (rows.context > 0) & ~self._is_adopted
        chosen = rows.take(admitted)
        return Events.of(chosen.first, self._handle_of(chosen), chosen.context)

    def _reasons(self) -> Events:
        """Handle, reason and amount lacking, of who waits from now on, or otherwise than before."""
        rows = self._rows
        chosen = rows.take(rows.waits & ((rows.reason >= 0) | (rows.lacking >= 0)) & ~self._is_adopted)
        reason = np.where(chosen.reason < 0, _NO_REASON, chosen.reason)
        return Events.of(chosen.first, self._handle_of(chosen), reason, np.maximum(chosen.lacking, 0))

    def _preemptions(self) -> Events:
        """Handle, and that of who took the blocks; at a keyframe that a reader starts from, of all who lost theirs."""
        rows, adopted = self._rows, self._keyframes.adopted
        lost = rows.phase == Phase.PREEMPTED
        same = np.zeros(len(lost), dtype=np.bool_)
        same[1:] = self._keyframes.touches[1:] & lost[:-1] & (rows.holder[1:] == rows.holder[:-1])
        chosen = rows.take(lost & ~same & ~self._is_adopted)
        taken = rows.take(lost & (rows.holder >= 0))
        before = np.searchsorted(adopted, taken.first)
        count = np.searchsorted(adopted, taken.last, side="right") - before
        shown = np.repeat(np.arange(len(count)), count)
        at = adopted[np.arange(len(shown)) - np.repeat(np.cumsum(count) - count, count) + before[shown]]
        handle = np.concatenate([self._handle_of(chosen), self._handle_of(taken)[shown]])
        holder = np.concatenate([chosen.holder, taken.holder[shown]])
        return Events.of(np.concatenate([chosen.first, at]), handle, self._handle[holder])

    def _leaves(self) -> Events:
        """Handle and reason; who was aborted had left before the step that says so."""
        of = self._keyframes
        reason = of.asked.finish_reason[self._rows.request]
        early = np.isin(reason, _BEFORE_STEP)
        chosen = of.is_last & of.finishes & (of.has_after | ~early)
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
        rows, output = self._rows.take(inside), self._keyframes.output[inside]
        chunks = self._each_step(rows, rows.phase == Phase.PREFILL, begin, end)
        special = (rows.phase == Phase.PAUSED) | ((rows.phase == Phase.DECODE) & (rows.tokens != 1))
        decodes = self._each_step(rows, special, begin, end, also=self._sudden_decodes()[inside])
        parts = (self._joined, self._cached, chunks, decodes, self._waits, self._preempted, self._evicted, self._left)
        for position, said in enumerate(zip(*(part.of_steps(begin, end) for part in parts), strict=True), begin):
            joined, cached, chunk, decode, waits, preempted, evicted, left = said
            shown = None
            if position in self._shown:
                shown = self._snapshots(rows, output, position, infos)
            yield Change(
                joined=[infos[code] for (code,) in joined], keyframe=shown, cached=cached, chunks=chunk, decodes=decode,
                waits=waits, preempted=preempted, evicted=evicted, left=left, is_unknown=position in self._unknown,
            )  # fmt: skip

    def _sudden_decodes(self) -> Mask:
        """Rows of one token a step in which a request begins without a prompt to compute."""
        rows = self._rows
        sudden = (rows.phase == Phase.DECODE) & (rows.tokens == 1) & self._keyframes.begins
        return np.asarray(sudden & ~self._is_adopted)

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
        cached = np.where(mine.waits, 0, self._keyframes.asked.cached_tokens[mine.request])
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
