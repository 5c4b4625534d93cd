"""A window's columns to what each tenant spent in it, and to its waits: the numbers behind metrics and alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stallscope.diagnosis.cost_model import CostModel
from stallscope.diagnosis.ledger import cost_lines
from stallscope.diagnosis.metrics import ITL, METRICS, TTFT
from stallscope.diagnosis.replica import OTHER, UNKNOWN
from stallscope.diagnosis.timeline import Floats, Ints, running_total
from stallscope.trace.rebuild import Phase, SeenRequest
from stallscope.watch.stream import Window

MOST_TENANTS = 200  # of a replica, in the order in which they came; the others are one

Counts = npt.NDArray[np.int64]


@dataclass(eq=False, slots=True)
class Tenants:
    """A replica's tenants as codes, in the order in which they came."""

    names: list[str] = field(default_factory=list)
    _codes: dict[str, int] = field(default_factory=dict)

    def code(self, request: SeenRequest) -> int:
        name = request.info.tenant or UNKNOWN
        code = self._codes.get(name)
        if code is None and len(self.names) >= MOST_TENANTS:
            name, code = OTHER, self._codes.get(OTHER)
        if code is None:
            code = self._codes[name] = len(self.names)
            self.names.append(name)
        return code

    def codes(self, requests: Sequence[SeenRequest]) -> Ints:
        return np.array([self.code(one) for one in requests], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Spent:
    """What each tenant (index = code) spent in a window: tokens, of them recomputed ones, step time (ns) and KV blocks
    times ns."""

    prefill_tokens: Floats
    decode_tokens: Floats
    recomputed_tokens: Floats
    step_ns: Floats
    kv_block_ns: Floats


@dataclass(frozen=True, eq=False)
class Waited:
    """Waits that ended in a window, or that were still going on at its end (``open``), as columns; times in ns.

    ``weight``: so many gaps of a tenant in one step are one row. ``own``: the part that is the request's own work.
    ``handle``: of the request, where it may wait on in the next window; -1 for gaps in steps that follow one another.
    """

    kind: Ints
    tenant: Ints
    time: Ints
    length: Ints
    own: Floats
    weight: Ints
    handle: Ints
    open: npt.NDArray[np.bool_]

    @property
    def delay(self) -> Floats:
        """Without the request's own work."""
        delay: Floats = np.maximum(self.length - self.own, 0.0)
        return delay


def spent(window: Window, tenant: Ints, tenants: int, block_tokens: int, model: CostModel | None) -> Spent:
    """What was spent in a window; ``tenant``: the code of each of its requests."""
    rows, n = window.rows, len(window.ready)
    of = tenant[rows.request] if len(rows) else np.zeros(0, dtype=np.int64)
    steps = rows.last - rows.first + 1
    tokens = (rows.tokens * steps).astype(np.float64)
    recomputed = rows.prefill & _has_output(window)
    passed = np.where(window.gap_ns >= 0, window.gap_ns, window.ready - window.begin).astype(np.float64)
    time, weighted = running_total(passed), running_total(passed * np.arange(n))
    held_ns = time[rows.last + 1] - time[rows.first]
    grown = weighted[rows.last + 1] - weighted[rows.first] - (rows.first - 1) * held_ns
    token_ns = rows.resident * (rows.context * held_ns + rows.tokens * grown)
    cost = np.zeros(len(rows))
    if model is not None:
        level, rise = cost_lines(model, rows, np.arange(len(rows)))
        cost = level * steps + rise * (steps * (steps - 1) / 2)

    def total(amount: Floats) -> Floats:
        each: Floats = np.bincount(of, amount, tenants).astype(np.float64)
        return each

    return Spent(
        total(tokens * rows.prefill),
        total(tokens * rows.decode),
        total(tokens * recomputed),
        total(cost),
        total(token_ns / max(block_tokens, 1) + rows.resident * held_ns / 2),  # half of a block is not full
    )


def _has_output(window: Window) -> npt.NDArray[np.bool_]:
    """Rows of requests that had tokens before: their prefill is done again."""
    had = np.array([one.preemptions > 0 for one in window.requests], dtype=np.bool_)
    return had[window.rows.request] if len(window.rows) else np.zeros(0, dtype=np.bool_)


class Waits:
    """The waits of one replica's requests that go on from one window to the next."""

    def __init__(self) -> None:
        self._paused_since: dict[int, int] = {}  # by handle: when its last token was

    def of(self, window: Window, tenant: Ints, model: CostModel | None) -> Waited:
        """All waits of a window; ``tenant``: the code of each of its requests."""
        gaps = _gaps(window, tenant, model)
        found = [*_first_tokens(window, tenant, model), *self._pauses(window, tenant)]
        single = np.array(found, dtype=np.float64).reshape(len(found), 7)
        joined = [np.concatenate([one, two]) for one, two in zip(gaps, single.T, strict=True)]
        metric, of, when, length, handle = (joined[column].astype(np.int64) for column in (0, 1, 2, 3, 5))
        own, is_open = joined[4], joined[6]
        weight = np.where(handle < 0, -handle, 1)
        return Waited(
            of * len(METRICS) + metric, of, when, length, own, weight, np.maximum(handle, -1), is_open.astype(np.bool_)
        )

    def _pauses(self, window: Window, tenant: Ints) -> list[_Wait]:
        """Of each request that had tokens and got none in some steps: preempted, paused, or computed again."""
        since, rows = self._paused_since, window.rows
        found: list[_Wait] = []
        now = int(window.ready[-1])
        special = np.flatnonzero((window.phase == Phase.PREEMPTED) | rows.paused | (rows.prefill & _has_output(window)))
        for row in special.tolist():
            one = window.requests[int(rows.request[row])]
            first = int(rows.first[row])
            if one.output_tokens and one.info.handle not in since:
                since[one.info.handle] = int(window.ready[first - 1]) if first else int(window.begin[0])
        if not since:
            return []
        there = {one.info.handle: number for number, one in enumerate(window.requests)}
        for handle, began in list(since.items()):
            number = there.get(handle)
            if number is None or window.requests[number].left_step is not None:
                del since[handle]
                continue
            decodes = np.flatnonzero((rows.request == number) & rows.decode)
            ends = window.ready[rows.first[decodes]]
            ends = ends[ends > began]
            if len(ends):
                del since[handle]
            when = int(ends[0]) if len(ends) else now
            found.append((ITL, int(tenant[number]), when, when - began, 0.0, handle, not len(ends)))
        return found


_Wait = tuple[
    float, float, float, float, float, float, float
]  # metric, tenant, time, length, own, handle, whether open


def _gaps(window: Window, tenant: Ints, model: CostModel | None) -> list[Floats]:
    """Between tokens in steps that follow one another, as columns: a row a tenant and step, where the handle is the
    number of such gaps, negative."""
    rows = window.rows
    decode = np.flatnonzero(rows.decode & (rows.tokens > 0))
    n, count = len(window.ready), int(tenant.max(initial=-1)) + 1
    change = np.zeros((count, n + 1))
    np.add.at(change, (tenant[rows.request[decode]], rows.first[decode]), 1)
    np.add.at(change, (tenant[rows.request[decode]], rows.last[decode] + 1), -1)
    running = np.cumsum(change, axis=1)[:, :n]
    running[:, window.gap_ns < 0] = 0
    of, step = np.nonzero(running)
    own = 0.0 if model is None else model.coefficients[0] + model.coefficients[3]
    return [
        np.full(len(of), float(ITL)),
        of.astype(np.float64),
        window.ready[step].astype(np.float64),
        window.gap_ns[step].astype(np.float64),
        np.full(len(of), own),
        -running[of, step],
        np.zeros(len(of)),
    ]


def _first_tokens(window: Window, tenant: Ints, model: CostModel | None) -> list[_Wait]:
    """Of each request that got its first token, or waits for it."""
    found: list[_Wait] = []
    now = int(window.ready[-1])
    b0, b1, b2 = (0.0, 0.0, 0.0) if model is None else model.coefficients[:3]
    for one, code in zip(window.requests, tenant.tolist(), strict=True):
        came = window.has(one.first_token_step)
        if not came and (one.output_tokens or one.first_token_step is not None):
            continue
        when = window.ready_of(one.first_token_step or 0) if came else now
        prompt = one.info.prompt_tokens
        new = prompt - one.cached_tokens if came or one.computed_tokens else 0
        own = b0 + b1 * new + b2 * new * (prompt - new / 2) if new > 0 else 0.0
        waits = not came and one.left_step is None
        found.append((TTFT, code, when, max(when - one.info.arrival_ns, 0), own, one.info.handle, waits))
    return found
