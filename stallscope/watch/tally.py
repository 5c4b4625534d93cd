"""A window's columns to what each tenant spent in it, and to its waits: the numbers behind metrics and alarms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from stallscope.diagnosis.cost_model import CostModel
from stallscope.diagnosis.ledger import cost_lines
from stallscope.diagnosis.metrics import ITL, METRICS, TTFT
from stallscope.diagnosis.replica import OTHER
from stallscope.diagnosis.timeline import Floats, Ints, Mask, running_total
from stallscope.trace.rebuild import SeenRequest
from stallscope.trace.reserved import UNKNOWN
from stallscope.watch.stream import Window

MOST_TENANTS = 200  # of a replica, in the order in which they came; the others are one

Counts = npt.NDArray[np.int64]


@dataclass(eq=False, slots=True)
class Tenants:
    """A replica's tenants as codes, in the order in which they came."""

    names: list[str] = field(default_factory=list)
    _codes: dict[str, int] = field(default_factory=dict)

    def code(self, request: SeenRequest) -> int:
        return self.code_of(request.info.tenant or UNKNOWN)

    def code_of(self, name: str) -> int:
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
    ``handle``: of the request, where its wait may have begun in a window before; -1 for gaps in steps that follow one
    another. Who left without a first token counts as open: it never had one.
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

    def where(self, chosen: Mask) -> Waited:
        """Those of the rows."""
        return Waited(*(getattr(self, field.name)[chosen] for field in fields(Waited)))

    def and_also(self, more: Waited) -> Waited:
        """These and those."""
        if not len(more.kind):
            return self
        both = (np.concatenate([getattr(one, field.name) for one in (self, more)]) for field in fields(Waited))
        return Waited(*both)


def nothing() -> Waited:
    """No waits."""
    none, no = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.bool_)
    return Waited(none, none, none, none, np.zeros(0), none, none, no)


def first_token_work(model: CostModel | None, prompt: int, cached: int) -> float:
    """What it costs to compute a prompt of so many tokens, of which some are in the cache, ns; 0 without a model."""
    new = prompt - cached
    if model is None or new <= 0:
        return 0.0
    b0, b1, b2 = model.coefficients[:3]
    return b0 + b1 * new + b2 * new * (prompt - new / 2)


def spent(window: Window, tenant: Ints, tenants: int, block_tokens: int, model: CostModel | None) -> Spent:
    """What was spent in a window; ``tenant``: the code of each of its requests."""
    rows, n = window.rows, len(window.ready)
    of = tenant[rows.request] if len(rows) else np.zeros(0, dtype=np.int64)
    steps = rows.last - rows.first + 1
    tokens = (rows.tokens * steps).astype(np.float64)
    passed = np.where(window.gap_ns >= 0, window.gap_ns, window.ready - window.begin).astype(np.float64)
    held = passed * _share_held(window, block_tokens)
    time, weighted = running_total(held), running_total(held * np.arange(n))
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
        total(window.recomputed.astype(np.float64)),
        total(cost),
        total(token_ns / max(block_tokens, 1) + rows.resident * held_ns / 2),  # half of a block is not full
    )


def _share_held(window: Window, block_tokens: int) -> Floats:
    """Of each step, the share of the blocks that its requests need by their contexts which is really used: below 1
    where requests share the blocks of a prefix."""
    rows, n = window.rows, len(window.ready)
    rise = rows.resident * rows.tokens / max(block_tokens, 1)
    level = rows.resident * (rows.context / max(block_tokens, 1) + 0.5) - rise * (rows.first - 1)

    def of_steps(amount: Floats) -> Floats:
        begun, ended = (np.bincount(at, amount, n + 1)[:n] for at in (rows.first, rows.last + 1))
        total: Floats = np.cumsum(begun - ended)
        return total

    needed, used = of_steps(level) + of_steps(rise) * np.arange(n), window.columns["kv_used"].astype(np.float64)
    share: Floats = np.divide(used, needed, out=np.ones(n), where=(used > 0) & (needed > used))
    return share


class Waits:
    """The waits of one replica's requests that go on from one window to the next."""

    def __init__(self) -> None:
        self._token_ns: dict[int, int] = {}  # by handle: when its last token was, where nothing was lost since

    def of(self, window: Window, tenant: Ints, model: CostModel | None) -> Waited:
        """All waits of a window; ``tenant``: the code of each of its requests."""
        row, first, before, is_next = self._token_rows(window)
        gaps = _gaps(window, tenant, row, first - is_next, model)
        alone = np.flatnonzero(~is_next & (before >= 0))
        length = window.ready[first[alone]] - before[alone]
        handle = _handles(window)
        request = window.rows.request[row[alone]]
        ended = _columns(ITL, tenant[request], window.ready[first[alone]], length, handle=handle[request])
        waiting = [*_first_tokens(window, tenant, model), *self._without_token(window, tenant)]
        single = np.array(waiting, dtype=np.float64).reshape(len(waiting), len(_COLUMNS)).T
        joined = [np.concatenate(columns) for columns in zip(gaps, ended, single, strict=True)]
        metric, of, when, length, weight, handle = (column.astype(np.int64) for column in (*joined[:4], *joined[5:7]))
        return Waited(of * len(METRICS) + metric, of, when, length, joined[4], weight, handle, joined[7] > 0)

    def _token_rows(self, window: Window) -> tuple[Ints, Ints, Ints, Mask]:
        """Rows with tokens, by request and time; of each the position of the step of its first token, when the token
        before that was (ns; -1: not known) and whether in the step before. Notes the last one of each request."""
        rows, ready = window.rows, window.ready
        decodes = rows.decode & (rows.tokens > 0)
        row = np.flatnonzero(decodes | window.samples)
        row = row[np.argsort(rows.request[row], kind="stable")]
        request, last = rows.request[row], rows.last[row]
        first = np.where(decodes[row], rows.first[row], last)
        stretch: Ints = np.cumsum((window.gap_ns < 0) | ~window.known, dtype=np.int64)
        begins = np.diff(request, prepend=-1) != 0
        follows = ~begins & (stretch[first] == np.roll(stretch[last], 1))
        before = np.where(follows, np.roll(ready[last], 1), -1)
        is_next = follows & (np.roll(last, 1) == first - 1)
        for at in np.flatnonzero(begins & (stretch[first] == 0)).tolist():
            told = self._token_ns.get(window.requests[request[at]].info.handle, -1)
            before[at], is_next[at] = told, first[at] == 0 and told == window.since_ns
        self._note_tokens(window, request, last, stretch)
        return row, first, before, is_next

    def _note_tokens(self, window: Window, request: Ints, last: Ints, stretch: Ints) -> None:
        there = {one.info.handle for one in window.requests if one.left_step is None and not one.lost}
        if stretch[-1]:
            self._token_ns.clear()
        ends = np.flatnonzero((np.diff(request, append=-1) != 0) & (stretch[last] == stretch[-1]))
        for number, when in zip(request[ends].tolist(), window.ready[last[ends]].tolist(), strict=True):
            self._token_ns[window.requests[number].info.handle] = when
        self._token_ns = {handle: when for handle, when in self._token_ns.items() if handle in there}

    def _without_token(self, window: Window, tenant: Ints) -> list[_Wait]:
        """Of each request that had tokens and none in the last step: it is preempted, paused, or computed again."""
        now = int(window.ready[-1])
        return [
            (ITL, code, now, now - self._token_ns[one.info.handle], 0.0, 1, one.info.handle, True)
            for one, code in zip(window.requests, tenant.tolist(), strict=True)
            if self._token_ns.get(one.info.handle, now) < now
        ]


_Wait = tuple[float, float, float, float, float, float, float, float]
_COLUMNS = ("metric", "tenant", "time", "length", "own", "weight", "handle", "open")


def _columns(
    metric: int, tenant: Ints, time: Ints, length: Ints, *, own: float = 0.0, weight: Ints | None = None,
    handle: Ints | None = None,
) -> list[Floats]:  # fmt: skip
    """Waits that have ended, as ``_COLUMNS``."""
    n = len(tenant)
    weights = np.ones(n) if weight is None else weight.astype(np.float64)
    handles = np.full(n, -1.0) if handle is None else handle.astype(np.float64)
    return [
        np.full(n, float(metric)), tenant.astype(np.float64), time.astype(np.float64), length.astype(np.float64),
        np.full(n, own), weights, handles, np.zeros(n),
    ]  # fmt: skip


def _handles(window: Window) -> Ints:
    return np.array([one.info.handle for one in window.requests], dtype=np.int64)


def _gaps(window: Window, tenant: Ints, row: Ints, first: Ints, model: CostModel | None) -> list[Floats]:
    """Between tokens in steps that follow one another, a row a tenant and step, as columns; ``first``: for each row
    with tokens the position of the step after which its gaps are such. Tokens that are ready at once have gaps of 0."""
    rows = window.rows
    last, of = rows.last[row], tenant[rows.request[row]]
    count = int(tenant.max(initial=-1)) + 1
    parts = [_NOBODY]
    for tenants_code in np.unique(of).tolist():
        mine = of == tenants_code
        step, number = _running(first[mine] + 1, last[mine] + 1, len(window.ready))
        parts.append((np.full(len(step), tenants_code), step, number))
    code, step, number = (np.concatenate(column) for column in zip(*parts, strict=True))
    own = 0.0 if model is None else model.coefficients[0] + model.coefficients[3]
    more = np.where(rows.decode[row], (rows.tokens[row] - 1) * (last - rows.first[row] + 1), 0)
    together = np.bincount(of, more, count).astype(np.int64)
    some = np.flatnonzero(together)
    at_once = _columns(ITL, some, np.full(len(some), window.ready[-1]), np.zeros_like(some), weight=together[some])
    between = _columns(ITL, code, window.ready[step], window.gap_ns[step], own=own, weight=number)
    return [np.concatenate(both) for both in zip(between, at_once, strict=True)]


_NOBODY: tuple[Ints, Ints, Ints] = (np.zeros(0, dtype=np.int64),) * 3


def _running(begin: Ints, end: Ints, n: int) -> tuple[Ints, Ints]:
    """In which of n steps some of these stretches are under way (``end`` is not), and how many."""
    running = np.cumsum(np.bincount(begin, minlength=n + 1) - np.bincount(end, minlength=n + 1))[:n]
    step = np.flatnonzero(running)
    return step, running[step]


def _first_tokens(window: Window, tenant: Ints, model: CostModel | None) -> list[_Wait]:
    """Of each request that got its first token, or waits for it."""
    found: list[_Wait] = []
    now = int(window.ready[-1])
    for one, code in zip(window.requests, tenant.tolist(), strict=True):
        came = window.has(one.first_token_step)
        if not came and (one.lost or one.output_tokens or one.first_token_step is not None):
            continue
        last = one.first_token_step if came else one.left_step
        when = now if last is None else window.ready_of(last)
        begun = came or one.computed_tokens
        own = first_token_work(model, one.info.prompt_tokens, one.cached_tokens) if begun else 0.0
        found.append((TTFT, code, when, max(when - one.info.arrival_ns, 0), own, 1, one.info.handle, not came))
    return found
