"""Two runs of one case, with and without something: each request in both, and what that did to whom.

Requests are matched by who sent them and when they were due, which the runs have in common; their ids count what was
injected too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import pyarrow.compute as pc

from stallscope.trace import Trace
from stallscope.workloads.recording import VIRTUAL_START_NS, Simulation
from stallscope.workloads.scenario import Scenario
from stallscope.workloads.traffic import plan
from stallscope_telemetry.records import RequestRecord

METRICS = ("ttft", "itl", "delivery")  # of gaps, a request's longest; delivery: from the last token to the client
LEAST_HARM_S, LEAST_HARM_SHARE = 0.05, 0.2
TAIL_REQUESTS = 300  # that a p99 needs behind it
FEW_REQUESTS = 3
FEWEST_REQUESTS = 20  # that a p90 needs
WINDOWS_S = (15.0, 60.0)
_COLUMNS = ("request", "tenant", "arrival_s", *METRICS)


def outcomes(scenario: Scenario, seed: int, inject: bool, run: Simulation) -> pd.DataFrame:
    """A row for each request: key (index), request, tenant, injected, arrival_s, and ``METRICS`` in seconds.

    Requests that wait still when the run ends count as waited so far; those that had begun to answer are left out.
    """
    rows = [
        (one.info.request_id, one.info.tenant, one.info.arrival_ns, *_waits(one), one.delivered_ns - one.end_ns)
        for one in run.requests
        if not one.info.retry_of
    ]
    began = {handle for step in run.steps for handle, _ in step.chunks}
    ended = {row[0] for row in rows}
    end_ns = run.steps[-1].ready_ns if run.steps else VIRTUAL_START_NS
    rows += [
        (info.request_id, info.tenant, info.arrival_ns, end_ns - info.arrival_ns, 0, 0)
        for step in run.steps
        for info in step.joined
        if info.request_id not in ended and info.handle not in began and not info.retry_of
    ]
    return _keyed(pd.DataFrame(rows, columns=list(_COLUMNS)), scenario, seed, inject, VIRTUAL_START_NS)


def outcomes_of_trace(scenario: Scenario, seed: int, inject: bool, trace: Trace) -> tuple[pd.DataFrame, int]:
    """The same of a recording in real time, and when its run began (ns)."""
    requests = trace.requests.select(["request", "tenant", "arrival", "first_token", "end", "delivered", "retry_of"])
    table = requests.to_pandas().astype({"request": str, "tenant": str})
    table = table[table["retry_of"].isna()]
    gaps = trace.gaps.select(["request", "length_ns"]).to_pandas().astype({"request": str})
    last_ns = pc.max(trace.steps["ready"]).as_py() or 0
    rows = pd.DataFrame(
        {
            "request": table["request"],
            "tenant": table["tenant"],
            "arrival_s": table["arrival"],
            "ttft": table["first_token"].fillna(table["end"]).fillna(last_ns) - table["arrival"],
            "itl": table["request"].map(gaps.groupby("request")["length_ns"].max()).fillna(0),
            "delivery": (table["delivered"] - table["end"]).fillna(0),
        }
    )
    due = {one.request_id: one.offset_ns for one in plan(scenario, seed, inject)}
    start_ns = int((rows["arrival_s"] - rows["request"].map(due)).min())
    return _keyed(rows, scenario, seed, inject, start_ns), start_ns


def _keyed(table: pd.DataFrame, scenario: Scenario, seed: int, inject: bool, start_ns: int) -> pd.DataFrame:
    """Rows of ``_COLUMNS`` in ns as those of ``outcomes``, by a key that other runs of the case have too."""
    due = pd.DataFrame(
        [(one.request_id, one.offset_ns, one.injected) for one in plan(scenario, seed, inject)],
        columns=["request", "due", "injected"],
    ).set_index("request")
    table["arrival_s"] -= start_ns
    table[["arrival_s", *METRICS]] /= 1e9
    table = table.join(due, on="request")
    table["injected"] = table["injected"].eq(True)
    # A client's requests have no time of their own, but a number that both runs give them.
    same = table.groupby(["tenant", "due"], dropna=False).cumcount().astype(str)
    by_time = table["tenant"] + "@" + table["due"].astype("Int64").astype(str) + "/" + same
    table["key"] = table["request"].where(table["due"].isna(), by_time)
    return table.drop(columns="due").set_index("key")


def _waits(record: RequestRecord) -> tuple[int, int]:
    """TTFT (so far, where there was no token) and the longest gap, ns."""
    times = record.token_times_ns
    gap = max((later - sooner for sooner, later in pairwise(times)), default=0)
    return (record.first_token_ns or record.end_ns) - record.info.arrival_ns, gap


@dataclass(frozen=True, slots=True)
class Harm:
    """What the worst of a run's windows did to a tenant's percentile: seconds with the cause, and without it."""

    tenant: str
    metric: str
    quantile: float
    from_s: float
    to_s: float
    with_s: float
    without_s: float

    @property
    def excess_s(self) -> float:
        return self.with_s - self.without_s

    @property
    def counts(self) -> bool:
        """Whether anybody would notice."""
        return self.excess_s >= max(LEAST_HARM_S, LEAST_HARM_SHARE * self.without_s)

    @property
    def doubles(self) -> bool:
        return self.with_s >= 2 * self.without_s


def pair(with_it: pd.DataFrame, without: pd.DataFrame) -> pd.DataFrame:
    """Requests of both runs: tenant, arrival_s, and each metric twice, ``ttft`` and ``ttft_without``."""
    other = without[list(METRICS)].add_suffix("_without")
    return with_it[["request", "tenant", "arrival_s", *METRICS]].join(other, how="inner").sort_values("arrival_s")


def worst_harm(pairs: pd.DataFrame, victims: Collection[str]) -> Harm | None:
    """The largest change of a percentile of any of ``victims``, of those that count or else of all; None of nobody."""
    harms = [
        harm
        for tenant, of_tenant in pairs[pairs["tenant"].isin(list(victims))].groupby("tenant")
        for harm in _harms(str(tenant), of_tenant)
    ]
    return max(harms, key=lambda harm: (harm.counts, harm.excess_s), default=None)


def _harms(tenant: str, pairs: pd.DataFrame) -> Iterator[Harm]:
    arrival = pairs["arrival_s"].to_numpy()
    last = float(arrival[-1])
    stretches = [(0.0, last + 1)]
    for length in WINDOWS_S:
        stretches += [(start, start + length) for start in np.arange(0, last, length / 2).tolist()]
    for from_s, to_s in stretches:
        first, end = np.searchsorted(arrival, (from_s, to_s))
        if (number := end - first) < FEWEST_REQUESTS:
            continue
        quantile = 0.99 if number >= TAIL_REQUESTS else 0.9
        for metric in METRICS:
            both = [pairs[name].to_numpy()[first:end] for name in (metric, f"{metric}_without")]
            with_s, without_s = (float(np.quantile(values, quantile, method="higher")) for values in both)
            yield Harm(tenant, metric, quantile, from_s, to_s, with_s, without_s)


def few_harmed(pairs: pd.DataFrame) -> bool:
    """Whether some requests at least waited far longer, though perhaps no percentile moved."""
    harmed = pd.Series(False, index=pairs.index)
    for metric in METRICS:
        excess, usual = pairs[metric] - pairs[f"{metric}_without"], pairs[f"{metric}_without"]
        harmed |= (excess >= LEAST_HARM_S) & (excess >= LEAST_HARM_SHARE * usual)
    return int(harmed.sum()) >= FEW_REQUESTS


def same_harm(pairs: pd.DataFrame, harm: Harm) -> Harm:
    """What the window and percentile of ``harm`` show in another pair of runs."""
    chosen = pairs[(pairs["tenant"] == harm.tenant) & pairs["arrival_s"].between(harm.from_s, harm.to_s)]
    if chosen.empty:
        return replace(harm, with_s=0.0, without_s=0.0)
    with_s, without_s = (
        float(np.quantile(chosen[name], harm.quantile, method="higher"))
        for name in (harm.metric, f"{harm.metric}_without")
    )
    return replace(harm, with_s=with_s, without_s=without_s)
