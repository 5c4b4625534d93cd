"""Waits that no batch shows: where batches are not known, as the requests' own spans tell them.

A span comes when its request has ended: so the first word of such a stall comes when the first of its victims ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from stallscope.diagnosis.cost_model import CostModel
from stallscope.diagnosis.metrics import ITL, METRICS, TTFT
from stallscope.diagnosis.timeline import Floats, Ints, Mask
from stallscope.trace.decode import RequestSpan
from stallscope.trace.findings import Findings
from stallscope.trace.gaps import TokenTimes, first_tokens, told_token_times
from stallscope.trace.plain_spans import stations
from stallscope.trace.requests import KnownRequest
from stallscope.watch.stream import Window
from stallscope.watch.tally import Tenants, Waited, first_token_work, nothing
from stallscope_telemetry import names

_MOST_STRETCHES = 1024
_MOST_EARLY = 4096  # spans that came before the steps that they are about: they wait for the next window, once


class Told:
    """Of one replica: which stretches of its time are known by batches, and the waits of requests beyond them."""

    def __init__(self) -> None:
        self._stretches: deque[tuple[int, int]] = deque([(-1, -1)], maxlen=_MOST_STRETCHES)  # first, last step ready
        self._early: list[RequestSpan] = []

    def of(self, spans: Sequence[RequestSpan], window: Window, tenants: Tenants, model: CostModel | None) -> Waited:
        """Waits of requests that have ended by then and that no window so far has shown."""
        self._learn(window)
        since, until = self._stretches[-1]
        now = int(window.ready[-1])
        spans, self._early = [*self._early, *spans], [one for one in spans if one.end > now][-_MOST_EARLY:]
        beyond = [
            KnownRequest(one.request_id, None, one)
            for one in spans
            if one.end <= now and not since <= one.arrival <= one.end <= until
        ]
        if not beyond:
            return nothing()
        tokens = told_token_times("", beyond, Findings())
        first, gaps = _first_tokens(beyond, tokens, model), _gaps(beyond, tokens, model)
        request, start, length, weight, own = (np.concatenate(both) for both in zip(first, gaps, strict=True))
        metric = np.repeat((TTFT, ITL), (len(first[0]), len(gaps[0])))
        end = start + length
        shown = self._shows(np.where(metric == TTFT, end, start), end)
        tenant = np.array([tenants.code_of(one.tenant) for one in beyond], dtype=np.int64)[request]
        handle = np.array([-1 if one.handle is None else one.handle for one in beyond], dtype=np.int64)[request]
        # A gap is over: only a first token may have been waited for, and counted, in the windows before.
        handle = np.where(metric == TTFT, handle, -1)
        is_open = np.zeros(len(end), dtype=np.bool_)
        kind = tenant * len(METRICS) + metric
        return Waited(kind, tenant, end, length, own, weight, handle, is_open).where(~shown)

    def _learn(self, window: Window) -> None:
        """Notes a window's stretches: steps that follow one another, with their batches known."""
        goes_on = np.append(self._stretches[-1][1] == window.since_ns, window.known[:-1]) & (window.gap_ns >= 0)
        for first, last in _runs(window.known, goes_on):
            since = self._stretches.pop()[0] if not first and goes_on[0] else int(window.ready[first])
            self._stretches.append((since, int(window.ready[last])))

    def _shows(self, start: Ints, end: Ints) -> Mask:
        """Whether batches are known all the time from ``start`` to ``end``."""
        first, last = np.array(self._stretches, dtype=np.int64).T
        shown: Mask = end <= last[np.searchsorted(first, start, side="right") - 1]
        return shown


_Columns = tuple[Ints, Ints, Ints, Ints, Floats]  # request, start, length, weight, own work of some waits


def _runs(known: Mask, goes_on: Mask) -> list[tuple[int, int]]:
    """First and last position of each run of what is ``known``; where it does not ``go on``, another begins."""
    run = np.cumsum(~known | ~goes_on)
    at = np.flatnonzero(known)
    ends = np.flatnonzero(np.diff(run[at], append=-1) != 0)
    return list(zip(at[np.append(0, ends[:-1] + 1)].tolist() if len(at) else [], at[ends].tolist(), strict=True))


def _first_tokens(requests: Sequence[KnownRequest], tokens: TokenTimes, model: CostModel | None) -> _Columns:
    told = first_tokens(tokens)
    found = []
    for number, one in enumerate(requests):
        assert one.span is not None
        came = told.get(number, stations(one.span.attributes, one.arrival).first_token)
        if came is not None and came >= one.arrival:
            prompt, cached = (one.span.integer(name) or 0 for name in (names.USAGE_PROMPT, names.CACHED_TOKENS))
            found.append((number, one.arrival, came - one.arrival, 1, first_token_work(model, prompt, cached)))
    return _columns(found)


def _gaps(requests: Sequence[KnownRequest], tokens: TokenTimes, model: CostModel | None) -> _Columns:
    """Between tokens; of a request whose tokens have no times, as long as they were on average."""
    own = 0.0 if model is None else model.coefficients[0] + model.coefficients[3]
    untold = np.flatnonzero(tokens.untold(len(requests))).tolist()
    means = _columns([mean for number in untold if (mean := _mean_gap(number, requests[number], own)) is not None])
    later = np.flatnonzero(np.diff(tokens.request) == 0) + 1
    start = tokens.time[later - 1]
    each = (tokens.request[later], start, tokens.time[later] - start, np.ones_like(start), np.full(len(later), own))
    request, begin, length, weight, work = (np.concatenate(both) for both in zip(each, means, strict=True))
    return request, begin, length, weight, work


def _mean_gap(number: int, request: KnownRequest, own: float) -> tuple[int, int, int, int, float] | None:
    span = request.span
    assert span is not None
    first = stations(span.attributes, span.arrival).first_token
    gaps = (span.integer(names.USAGE_COMPLETION) or 0) - 1
    return (number, first, (span.end - first) // gaps, gaps, own) if gaps > 0 and first and span.end >= first else None


def _columns(waits: Sequence[tuple[int, int, int, int, float]]) -> _Columns:
    request, start, length, weight = np.array([one[:4] for one in waits], dtype=np.int64).reshape(-1, 4).T
    return request, start, length, weight, np.array([one[4] for one in waits], dtype=np.float64)
