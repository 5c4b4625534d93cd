"""Batches from what requests tell by themselves, where no step tells of its batch: who computed what, and when.

Every running request takes one token a step, so that its tokens count the steps between its first token and its end.
Where the steps' times are not known either (fidelity 1), all requests together tell them: how many steps lie between
any two of their stations follows from those counts by multiplicative algebraic reconstruction, as tomography does it
(SMART: C. Byrne, "Iterative image reconstruction algorithms based on cross-entropy minimization", 1993). Where they
are (fidelity 2), prefills are placed so that they add up to each step's tokens and to each prompt, by iterative
proportional fitting (W. E. Deming, F. F. Stephan, 1940).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stallscope.trace.decode import Ints
from stallscope.trace.rebuild import Phase
from stallscope.trace.residency import ResidencyColumns
from stallscope_telemetry.records import WaitReason

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

_ROUNDS = 30
_SAME_STEP = 0.2  # of a step: stations closer together are of the same one
_LEAST_SAME_NS = 200_000
_MOSTLY = 0.5  # of a wait


@dataclass(frozen=True, slots=True)
class Stations:
    """When n requests passed their stations (ns, ascending for each), and their tokens."""

    arrival: Ints
    scheduled: Ints
    first_token: Ints
    end: Ints
    prompt_tokens: Ints
    output_tokens: Ints

    def __len__(self) -> int:
        return len(self.arrival)


@dataclass(frozen=True, slots=True)
class StepClock:
    """m steps (ns, without overlaps); each request computes its prompt in the steps from ``first`` on, decodes from
    ``decode`` on, and is gone in ``after`` (positions of steps, n each)."""

    start: Ints
    ready: Ints
    first: Ints
    decode: Ints
    after: Ints


def estimate_clock(told: Stations) -> StepClock:
    """When steps began and ended, as far as the requests tell: each station lies between two of them."""
    n = len(told)
    times = np.concatenate([told.scheduled, told.first_token, told.end])
    typical = _typical_step(told)
    order = np.argsort(times, kind="stable")
    fresh = np.ones(len(order), dtype=np.bool_)
    fresh[1:] = np.diff(times[order]) > max(_SAME_STEP * typical, _LEAST_SAME_NS)
    edges = times[order][fresh]
    edge_of = np.empty(len(order), dtype=np.int64)
    edge_of[order] = np.cumsum(fresh) - 1
    # A prompt takes a step at least. One more edge, for those that are scheduled at the very last.
    edges = np.append(edges, edges[-1] + int(typical))
    first = edge_of[:n]
    decode = np.maximum(edge_of[n : 2 * n], first + 1)
    after = np.maximum(edge_of[2 * n :], decode)

    count = len(edges) - 1
    there = np.cumsum(np.bincount(first, minlength=count + 1) - np.bincount(after, minlength=count + 1))[:-1] > 0
    computes = _over(first, decode, np.ones(n), count) > 0
    steps = _steps_between(np.diff(edges), there, computes, decode, after, told.output_tokens - 1, typical)
    begin = np.concatenate([[0], np.cumsum(steps)])  # of the first step in each interval
    interval = np.repeat(np.arange(count), steps)
    within = np.arange(len(interval)) - begin[interval]
    length = np.diff(edges)[interval]
    start = edges[interval] + length * within // steps[interval]
    ready = edges[interval] + length * (within + 1) // steps[interval]
    return StepClock(start, ready, begin[first], begin[decode], begin[after])


def known_clock(told: Stations, start: Ints, ready: Ints) -> StepClock:
    """The same where the steps' times are known: each station is at the beginning or end of the one next to it."""
    first = np.minimum(_nearest(start, told.scheduled), len(start) - 1)
    decode = np.maximum(_nearest(ready, told.first_token) + 1, first + 1)
    after = np.maximum(_nearest(ready, told.end) + 1, decode)
    return StepClock(start, ready, first, decode, after)


def _typical_step(told: Stations) -> float:
    decodes = told.output_tokens > 1
    if not decodes.any():
        return float(np.median(told.first_token - told.scheduled)) if len(told) else 0.0
    length = (told.end - told.first_token)[decodes] / (told.output_tokens[decodes] - 1)
    return float(np.median(length))


def _steps_between(
    length: Ints, there: Mask, computes: Mask, begin: Ints, end: Ints, counted: Ints, typical: float
) -> Ints:
    """How many steps fit into each interval, so that each request's add up to what it ``counted``; one at least where
    anybody is ``there``, else none.

    As long as nothing speaks against it, a step that ``computes`` a prompt takes the whole interval, others as long as
    most.
    """
    steps = np.where(there, np.where(computes, 1.0, np.maximum(length / max(typical, 1.0), 1e-3)), 0.0)
    some = (counted > 0) & (end > begin)
    begin, end, counted = begin[some], end[some], counted[some]
    over = _over(begin, end, np.ones(len(begin)), len(steps))
    for _ in range(_ROUNDS):
        total = np.concatenate([[0.0], np.cumsum(steps)])
        ratio = np.log(counted / np.maximum(total[end] - total[begin], 1e-9))
        steps = steps * np.exp(np.clip(_over(begin, end, ratio, len(steps)) / np.maximum(over, 1.0), -1.0, 1.0))
    whole = np.diff(np.rint(np.concatenate([[0.0], np.cumsum(steps)]))).astype(np.int64)
    return np.where(there, np.maximum(whole, 1), 0)


def _over(begin: Ints, end: Ints, amount: Floats, length: int) -> Floats:
    """For each of ``length`` positions the sum of the amounts of those that have begun and not ended."""
    change = np.bincount(begin, amount, length + 1) - np.bincount(end, amount, length + 1)
    return np.asarray(np.cumsum(change)[:-1])


def _nearest(times: Ints, wanted: Ints) -> Ints:
    """Position of the time (ascending) that is nearest to each wanted one."""
    after = np.clip(np.searchsorted(times, wanted), 1, max(len(times) - 1, 1))
    before = after - 1
    if len(times) == 1:
        return np.zeros(len(wanted), dtype=np.int64)
    return np.where(wanted - times[before] <= times[after] - wanted, before, after)


# --- who did what in them -------------------------------------------------------------------------------------


def reconstruct(told: Stations, clock: StepClock, numbers: Ints, prefill_tokens: Ints | None) -> ResidencyColumns:
    """Residency of the requests in the steps of a clock, with these ``numbers``.

    ``prefill_tokens`` of each step, where they are known. Why somebody waited is not told: prompts were computed, or
    all slots were taken, or else blocks were short.
    """
    prefills = _prefills(told, clock, prefill_tokens)
    request = np.arange(len(told))
    decodes = request[clock.after > clock.decode]
    waits = np.searchsorted(clock.start, told.arrival)
    waiting = request[waits < clock.first]
    reasons = _reasons(clock, prefills[1], waits[waiting], clock.first[waiting])
    ones = np.ones(len(decodes), dtype=np.int64)
    nothing = np.zeros(len(waiting), dtype=np.int64)
    parts = (
        (waiting, Phase.WAITING, reasons, waits[waiting], clock.first[waiting] - 1, nothing, nothing),
        (prefills[0], Phase.PREFILL, None, prefills[1], prefills[1], prefills[2], prefills[3]),
        (
            decodes,
            Phase.DECODE,
            None,
            clock.decode[decodes],
            clock.after[decodes] - 1,
            ones,
            told.prompt_tokens[decodes],
        ),
    )
    columns = [
        np.concatenate(column)
        for column in zip(
            *(
                (
                    who,
                    np.full(len(who), phase),
                    np.full(len(who), -1) if why is None else why,
                    begin,
                    last,
                    tokens,
                    context,
                )
                for who, phase, why, begin, last, tokens, context in parts
            ),
            strict=True,
        )
    ]
    order = np.lexsort((columns[0], columns[3]))
    who, phase, reason, begin, last, tokens, context = (column[order] for column in columns)
    samples = (phase == Phase.PREFILL) & (context + tokens >= told.prompt_tokens[who])
    nobody = np.full(len(who), -1)
    return ResidencyColumns(
        request=who,
        phase=phase,
        reason=reason,
        lacking=nobody,
        first_step=numbers[begin],
        last_step=numbers[last],
        tokens=tokens,
        context_start=context,
        holder=nobody,
        samples=samples,
        stretch=np.zeros(len(who), dtype=np.int64),
    )


def _prefills(told: Stations, clock: StepClock, prefill_tokens: Ints | None) -> tuple[Ints, Ints, Ints, Ints]:
    """Request, step, tokens and context of each part of a prompt, ordered by request and step."""
    lengths = clock.decode - clock.first
    request = np.repeat(np.arange(len(told)), lengths)
    begin = np.cumsum(lengths) - lengths
    step = np.arange(len(request)) - begin[request] + clock.first[request]
    prompt = told.prompt_tokens.astype(np.float64)
    share = np.maximum(clock.ready - clock.start, 1)[step].astype(np.float64)
    share *= _ratio(prompt, _sum_by(request, share, len(told)))[request]
    if prefill_tokens is not None:
        for _ in range(_ROUNDS):
            share *= _ratio(prefill_tokens.astype(np.float64), _sum_by(step, share, len(prefill_tokens)))[step]
            share *= _ratio(prompt, _sum_by(request, share, len(told)))[request]
    done = np.rint(np.cumsum(share)).astype(np.int64)
    before = np.concatenate([[0], done])[:-1]
    tokens = done - before
    context = before - before[begin[request]]
    some = tokens > 0
    return request[some], step[some], tokens[some], context[some]


def _sum_by(key: Ints, amount: Floats, length: int) -> Floats:
    return np.bincount(key, amount, length).astype(np.float64)


def _ratio(wanted: Floats, there: Floats) -> Floats:
    return np.divide(wanted, there, out=np.ones_like(there), where=there > 0)


def _reasons(clock: StepClock, prefills: Ints, begin: Ints, end: Ints) -> Ints:
    """Why requests waited through these ranges of steps, by what went on in them for most of that time."""
    count = len(clock.start)
    length = (clock.ready - clock.start).astype(np.float64)
    computes = np.bincount(prefills, minlength=count) > 0
    running = _over(clock.first, clock.after, np.ones(len(clock.first)), count)

    def share(flag: Mask) -> Floats:
        total, flagged = (np.concatenate([[0.0], np.cumsum(one)]) for one in (length, length * flag))
        return np.asarray((flagged[end] - flagged[begin]) / np.maximum(total[end] - total[begin], 1.0))

    return np.select(
        [share(computes) >= _MOSTLY, share(running >= running.max(initial=0)) >= _MOSTLY],
        [int(WaitReason.BUDGET), int(WaitReason.SLOTS)],
        int(WaitReason.KV),
    )


def step_sums(rows: ResidencyColumns, numbers: Ints) -> dict[str, Ints]:
    """What the steps' batches add up to: columns of ``steps``."""
    begin, end = np.searchsorted(numbers, rows.first_step), np.searchsorted(numbers, rows.last_step) + 1

    def total(phase: Phase, amount: Ints | None = None) -> Ints:
        mine = rows.phase == phase
        amounts = np.ones(int(mine.sum())) if amount is None else amount[mine].astype(np.float64)
        return np.rint(_over(begin[mine], end[mine], amounts, len(numbers))).astype(np.int64)

    running = total(Phase.PREFILL) + total(Phase.DECODE)
    return {
        "prefill_tokens": total(Phase.PREFILL, rows.tokens),
        "decode_tokens": total(Phase.DECODE, rows.tokens),
        "batch_size": running,
        "running": running,
        "waiting": total(Phase.WAITING),
    }
