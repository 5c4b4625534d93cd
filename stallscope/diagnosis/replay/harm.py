"""How much requests waited beyond their tenants' usual, by the same measure for a recording and its replays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stallscope.diagnosis.cost_model import CostModel
from stallscope.diagnosis.incidents import ITL, METRICS, NOTICEABLE_NS, TTFT, Waits
from stallscope.diagnosis.replay.run import Outcome
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Ints


@dataclass(frozen=True, eq=False)
class Norms:
    """What is usual: per metric (``METRICS``) and tenant, the median delay (``usual``) and the ``bar``, in ns.

    A delay is a wait without the request's own work, which ``cost`` estimates.
    """

    usual: Floats
    bar: Floats
    cost: CostModel

    def excess(self, outcomes: pd.DataFrame) -> Floats:
        """Per row of ``Outcome.requests``: ns beyond the usual of its TTFT and longest gap, where beyond the bar."""
        tenant = outcomes["tenant"].to_numpy(np.int64)
        b0, b1, b2, b3, _ = self.cost.coefficients
        prompt = outcomes["prompt_tokens"].to_numpy(np.float64)
        total = np.zeros(len(outcomes))
        for metric, wait, own in (
            (TTFT, _ttft(outcomes), b0 + b1 * prompt + b2 * prompt**2 / 2),
            (ITL, outcomes["longest_gap"].to_numpy(np.float64), np.full(len(outcomes), b0 + b3)),
        ):
            delay = wait - own
            stalled = (delay > self.bar[metric][tenant]) & (delay > NOTICEABLE_NS)
            total += np.where(stalled, np.maximum(delay - self.usual[metric][tenant], 0.0), 0.0)
        return total


def _ttft(outcomes: pd.DataFrame) -> Floats:
    """Time to first token, or as long as it was waited for; 0 where it came before the replay, or nothing arrived."""
    arrived = outcomes["arrived"].to_numpy(np.int64)
    none = (arrived < 0) | ((outcomes["first_token"].to_numpy() < 0) & (outcomes["output_tokens"].to_numpy() > 0))
    wait: Floats = np.where(none, 0, outcomes["waited_until"].to_numpy(np.int64) - arrived).astype(np.float64)
    return np.maximum(wait, 0.0)


def read_norms(replica: Replica, waits: Waits, healthy: pd.DataFrame) -> Norms:
    """From all waits of a replica, and those of them that are usual."""
    tenants = range(len(replica.tenants))
    bar = waits.table.groupby(["metric", "tenant"])["bar"].first()
    usual = healthy.groupby(["metric", "tenant"])["delay"].median()
    index = [[(metric, tenant) for tenant in tenants] for metric in range(len(METRICS))]
    bars = np.array([bar.reindex(keys).to_numpy(np.float64) for keys in index])
    usuals = np.array([usual.reindex(keys).to_numpy(np.float64) for keys in index])
    return Norms(np.nan_to_num(usuals, nan=0.0), np.nan_to_num(bars, nan=np.inf), replica.ledger.model)


def recorded_outcomes(replica: Replica) -> pd.DataFrame:
    """The recording as ``Outcome.requests`` has replays."""
    requests = replica.requests
    longest = replica.gaps.groupby("request")["length_ns"].max().reindex(requests.index).fillna(0)
    first = requests["first_token"]
    return pd.DataFrame(
        {
            "code": np.arange(len(requests)),
            "tenant": requests["tenant"],
            "arrival": requests["arrival"],
            "prompt_tokens": requests["prompt_tokens"],
            "arrived": requests["arrival"],
            "first_token": first,
            "end": requests["end"],
            "longest_gap": longest.to_numpy(np.int64),
            "output_tokens": requests["output_tokens"],
            "waited_until": first.where(first >= 0, requests["seen_until"]),
        }
    )


def in_scope(outcomes: pd.DataFrame, scope: Ints) -> NDArray[np.bool_]:
    """Which rows are of the requests (codes) in ``scope``."""
    found: NDArray[np.bool_] = np.isin(outcomes["code"].to_numpy(np.int64), scope)
    return found


def waits_of(outcome: Outcome | pd.DataFrame, metric: int) -> Floats:
    """The waits of one metric, ns, by row: TTFT, or the longest gap."""
    table = outcome.requests if isinstance(outcome, Outcome) else outcome
    return _ttft(table) if metric == TTFT else table["longest_gap"].to_numpy(np.float64)
