"""Where a replica's steps need a keyframe, how its requests' rows follow each other, and what a keyframe must say."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stallscope.trace.rebuild import Phase
from stallscope.trace.to_otlp.rows import Asked, Ints, Mask, Rows, StepRuns

KEYFRAME_EVERY = 200  # steps, as an engine's emitter does it
_MOST_TOKENS = 1 << 32


@dataclass(frozen=True, eq=False)
class Keyframes:
    """``rows`` are those of steps whose batch is known. ``evictions``: positions of steps, codes of who took and who
    had the blocks (-1: not known), blocks."""

    steps: StepRuns
    rows: Rows
    asked: Asked
    evictions: tuple[Ints, ...]

    # --- where ----------------------------------------------------------------------------------------------------

    @cached_property
    def at(self) -> Ints:
        """Positions of all keyframes."""
        return np.union1d(np.union1d(self._starts, self._forced), self._regular)

    @cached_property
    def adopted(self) -> Ints:
        """Positions of those that a reader starts from: it knows nothing then, or what does not lead there."""
        return np.union1d(self._starts[self.steps.number[self._starts] != 0], self._forced)

    @cached_property
    def _starts(self) -> Ints:
        return self.steps.starts[self.steps.known[self.steps.starts]]

    @cached_property
    def _forced(self) -> Ints:
        """Where steps do not follow from those before: only a keyframe can say so."""
        rows, steps = self.rows, self.steps
        before = rows.take(np.maximum(np.arange(len(self.touches)) - 1, 0))
        starts_run = steps.fresh[rows.first] & (steps.number[rows.first] != 0)
        again = self.described[rows.request] < rows.first
        held = rows.context > 0
        sudden = (rows.phase == Phase.PREEMPTED) | (np.isin(rows.phase, (Phase.DECODE, Phase.PAUSED)) & held)
        appears = ~self.touches & ~starts_run & (again | sudden)
        goes_on = np.select(
            [~before.waits & ~rows.waits, ~before.waits, before.waits & rows.waits],
            [rows.context == before.end, rows.phase == Phase.PREEMPTED, rows.phase == before.phase],
            (rows.phase == Phase.PREFILL) | ~held,
        )
        vanishes = self.is_last & self.has_after & ~self.finishes
        return np.unique(np.concatenate([rows.first[appears | (self.touches & ~goes_on)], rows.last[vanishes] + 1]))

    @cached_property
    def _regular(self) -> Ints:
        """For readers that miss a step; none in runs of which a reader may count output tokens otherwise."""
        rows, run = self.rows, self.steps.run
        beyond = self.asked.prompt_tokens[rows.request] + self.output
        odd = (rows.phase == Phase.DECODE) & (rows.context != beyond - 1)
        odd |= (rows.phase == Phase.PREFILL) & (rows.end > beyond)
        begin_of = np.zeros(len(self.steps.starts), dtype=np.int64)
        begin_of[run[self._starts]] = self._starts
        since = np.arange(len(run)) - begin_of[run]
        return np.flatnonzero(self.steps.known & (since % KEYFRAME_EVERY == 0) & ~np.isin(run, run[rows.first[odd]]))

    # --- how rows follow each other -------------------------------------------------------------------------------

    @cached_property
    def described(self) -> Ints:
        """Position of the step that tells first of each request, or one beyond all."""
        computes = np.full(len(self.asked.handle), len(self.steps.number))
        np.minimum.at(computes, self.rows.request, self.rows.first)
        first = computes.copy()
        at, taker, owner, _ = self.evictions
        # Who is named before was described where batches are not known.
        unknown = np.maximum.accumulate(np.where(self.steps.known, -1, np.arange(len(self.steps.number))))[at]
        for who in (taker, owner):
            some = (who >= 0) & (unknown >= 0) & (at < computes[who])
            np.minimum.at(first, who[some], unknown[some])
        return first

    @cached_property
    def touches(self) -> Mask:
        """Whether a row goes on where the same request's row before has ended."""
        rows, run = self.rows, self.steps.run
        touches = np.zeros(len(rows.request), dtype=np.bool_)
        touches[1:] = (
            (np.diff(rows.request) == 0)
            & (rows.first[1:] == rows.last[:-1] + 1)
            & (run[rows.first[1:]] == run[rows.last[:-1]])
        )
        return touches

    @cached_property
    def begins(self) -> Mask:
        """Whether a row is what a request does first, or after waiting."""
        waited = np.append(False, self.rows.waits[:-1])[: len(self.touches)]
        return np.asarray(~self.touches | waited)

    @cached_property
    def is_last(self) -> Mask:
        """Whether a row ends and no other touches it."""
        return np.asarray(~np.append(self.touches[1:], False)[: len(self.touches)])

    @cached_property
    def has_after(self) -> Mask:
        """Whether the step after a row is in the same run."""
        last, run = self.rows.last, self.steps.run
        following = np.minimum(last + 1, len(run) - 1)
        return np.asarray((run[following] == run[last]) & (following > last))

    @cached_property
    def finishes(self) -> Mask:
        """Whether a row is the last of a request that finished."""
        request = self.rows.request
        is_last = np.append(np.diff(request) != 0, True)[: len(request)]
        return np.asarray(is_last & (self.asked.finish_reason[request] >= 0))

    # --- output tokens --------------------------------------------------------------------------------------------

    @cached_property
    def output(self) -> Ints:
        """Output tokens of each row's request before it, as a reader counts them.

        One more than was computed beyond the prompt; while that is computed anew, what it was. Of a request that a
        keyframe shows first, what its first decode shows.
        """
        rows = self.rows
        if not len(rows.request):
            return np.zeros(0, dtype=np.int64)
        prompt = self.asked.prompt_tokens[rows.request]
        run = self.steps.run[rows.first]
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
        base = np.where(np.isin(rows.first[begin], self.adopted), np.maximum(base, 0), 0)
        gain = np.where(decodes | prefills, np.clip(rows.end - prompt + 1, 0, _MOST_TOKENS - 1), 0)
        before = np.where(fresh, 0, np.append(0, gain[:-1]))
        # The most so far, of each segment: later segments count from higher up.
        most = np.maximum.accumulate(np.maximum(before, base[segment]) + segment * _MOST_TOKENS)
        output: Ints = most - segment * _MOST_TOKENS
        return output
