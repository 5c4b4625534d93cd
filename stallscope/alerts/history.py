"""Thresholds from what a running Prometheus remembers of the last day, by its HTTP API.

What an alert compares is asked for in the very words of the rule. Nobody says which stretches were incidents: those in
which a watch charged blame are left out, and of the rest a high percentile counts, not the highest.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cached_property

import httpx
import msgspec
import numpy as np
import numpy.typing as npt

from stallscope.alerts.promql import number, span
from stallscope.alerts.quantities import Counted, Quantity
from stallscope.alerts.settings import (
    HISTORY_QUANTILE,
    HISTORY_S,
    HISTORY_STEP_S,
    LEAST_CALM_S,
    MARGIN_S,
    Limit,
)
from stallscope.alerts.thresholds import Threshold, floor, learned, length, too_short
from stallscope.errors import UsageError
from stallscope.watch.families import BLAME, JUDGED

_WITHIN_S = 60.0


class _Series(msgspec.Struct):
    metric: dict[str, str]
    values: list[tuple[float, str]]


class _Data(msgspec.Struct):
    result: list[_Series]


class _Answer(msgspec.Struct):
    status: str
    data: _Data | None = None
    error: str = ""


class FromPrometheus:
    """A teacher that asks a Prometheus; ``now_s`` is when the history ends, s since the epoch."""

    def __init__(self, url: str, now_s: float | None = None) -> None:
        self._url = url.rstrip("/")
        self._end_s = float(round(time.time() if now_s is None else now_s))

    def threshold(self, quantity: Quantity, limit: Limit) -> Threshold:
        """Raises UsageError where the Prometheus does not answer."""
        if isinstance(quantity, Counted) and quantity.counter in (BLAME, JUDGED):
            return Threshold(floor(limit, "where blame was charged counts as no calm, so a history can't teach it"))
        highest: dict[tuple[str, ...], float] = {}
        calm_s = 0.0
        for series in self._asked(quantity.promql()):
            times, values = _columns(series)
            calm = np.isfinite(values) & self._calm(times, quantity.window_s)
            calm_s = max(calm_s, float(calm.sum()) * HISTORY_STEP_S)
            if calm.any():
                key = tuple(series.metric.get(name, "") for name in quantity.by)
                highest[key] = float(np.quantile(values[calm], HISTORY_QUANTILE))
        if not highest:
            return Threshold(floor(limit, f"{self._url} had nothing of it in {length(HISTORY_S)}"))
        if calm_s < LEAST_CALM_S:
            return Threshold(floor(limit, too_short(calm_s, quantity.window_s)))
        what = f"the p{number(HISTORY_QUANTILE * 100)} of {length(calm_s)} without blame"
        return learned(quantity, limit, highest, what)

    @cached_property
    def _blamed(self) -> npt.NDArray[np.float64]:
        """When blame was charged (s), ascending."""
        rise = f"sum(increase({BLAME.name}[{span(HISTORY_STEP_S)}])) > 0"
        times = [_columns(series)[0] for series in self._asked(rise)]
        return np.sort(np.concatenate(times)) if times else np.empty(0)

    def _calm(self, times: npt.NDArray[np.float64], window_s: int) -> npt.NDArray[np.bool_]:
        """Of each time, whether what a window until then looks back on was free of blame."""
        first = np.searchsorted(self._blamed, times - window_s - HISTORY_STEP_S - MARGIN_S)
        last = np.searchsorted(self._blamed, times + HISTORY_STEP_S + MARGIN_S, side="right")
        return np.equal(first, last)

    def _asked(self, query: str) -> list[_Series]:
        asked = {
            "query": query,
            "start": f"{self._end_s - HISTORY_S:.0f}",
            "end": f"{self._end_s:.0f}",
            "step": f"{HISTORY_STEP_S}s",
        }
        answer = _answer(self._url, asked)
        return answer.result


def _answer(url: str, asked: Mapping[str, str]) -> _Data:
    try:
        response = httpx.post(f"{url}/api/v1/query_range", data=dict(asked), timeout=_WITHIN_S)
        answer = msgspec.json.decode(response.content, type=_Answer)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UsageError(
            f"{url} does not answer ({type(error).__name__}: {error}); give the address of a Prometheus, such as "
            "http://127.0.0.1:9090"
        ) from error
    except msgspec.MsgspecError as error:
        raise UsageError(
            f"{url} answered {response.status_code}, and not as a Prometheus does; check the address"
        ) from error
    if answer.data is None:
        raise UsageError(f"{url} could not answer: {answer.error or answer.status}")
    return answer.data


def _columns(series: _Series) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Times (s) and values."""
    times = np.array([when for when, _ in series.values], dtype=np.float64)
    return times, np.array([float(value) for _, value in series.values], dtype=np.float64)
