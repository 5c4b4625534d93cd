"""Two recordings compared: what changed for each tenant, beyond what chance explains, and what became of incidents."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import pandas as pd

from stallscope.diagnosis.incidents import TAIL_REQUESTS
from stallscope.diagnosis.metrics import ITL, METRICS, TTFT
from stallscope.diagnosis.model import Diagnosis
from stallscope.diagnosis.replica import OTHER, replicas
from stallscope.diagnosis.timeline import Floats, Ints
from stallscope.trace import Trace
from stallscope.trace.reserved import UNKNOWN

DRAWS = 4000
LEVEL = 0.95  # that all intervals of a comparison hold together
FEWEST = 20  # requests on either side, for anything to be said
_FEWEST_BLOCKS, _MOST_BLOCKS, _BLOCK_NS = 12, 60, 5_000_000_000
_LOAD_CHANGED = 1.25
_MOST_VALUES = 2000  # that a percentile may take; of more requests, so many of their order statistics


class Outcome(StrEnum):
    """What a change is; ``CHANCE``: no difference that chance doesn't explain."""

    BETTER = "better"
    WORSE = "worse"
    CHANCE = "chance"


@dataclass(frozen=True)
class Change:
    """A tenant's percentile before and after, and the interval of after over before.

    The more is compared, the wider each interval: all hold together with a probability of ``LEVEL``.
    """

    tenant: str
    metric: str
    quantile: float
    before_s: float
    after_s: float
    before_requests: int
    after_requests: int
    ratio_low: float
    ratio_high: float
    outcome: Outcome  # better or worse only where the whole interval is


@dataclass(frozen=True)
class Side:
    """One of the recordings: its length, load (a second), incidents and what they cost; share of its steps that were
    lost from the telemetry."""

    source: str
    verdict: str
    length_s: float
    requests: int
    requests_per_s: float
    tokens_per_s: float
    incidents: int
    lost_s: float
    steps_lost_share: float


@dataclass(frozen=True)
class LoadChange:
    """A tenant whose load is another in the second recording: tokens a second, prompt and output."""

    tenant: str
    before: float
    after: float


@dataclass(frozen=True)
class Comparison:
    """All changes, and what makes them hard to read: loads that differ, tenants that can't be compared."""

    before: Side
    after: Side
    changes: tuple[Change, ...]
    loads: tuple[LoadChange, ...]
    not_compared: tuple[str, ...]


def compare(before: tuple[Trace, Diagnosis], after: tuple[Trace, Diagnosis], seed: int = 0) -> Comparison:
    """Percentiles of each tenant that both recordings have enough requests of; ``seed`` of the draws."""
    sides = [_requests(trace) for trace, _ in (before, after)]
    described = [_side(table, diagnosis) for table, (_, diagnosis) in zip(sides, (before, after), strict=True)]
    rng = np.random.default_rng(seed)
    names = sorted(set(sides[0]["tenant"]) | set(sides[1]["tenant"]))
    pairs: list[_Pair] = []
    loads: list[LoadChange] = []
    for name in names:
        mine = [table[table["tenant"] == name] for table in sides]
        pairs += [] if name in (UNKNOWN, OTHER) else _pairs(name, *mine)
        first, second = (float(one["tokens"].sum()) / side.length_s for one, side in zip(mine, described, strict=True))
        if max(first, second) > _LOAD_CHANGED * min(first, second):
            loads.append(LoadChange(name, first, second))
    loads.sort(key=lambda load: -abs(load.after - load.before))
    outside = (1 - LEVEL) / max(len(pairs), 1)
    compared = {pair.tenant for pair in pairs}
    return Comparison(
        described[0],
        described[1],
        tuple(_change(pair, outside, rng) for pair in pairs),
        tuple(loads),
        tuple(name for name in names if name not in compared),
    )


def _requests(trace: Trace) -> pd.DataFrame:
    """A row a request of all replicas: tenant, arrival, tokens, block (of time), ttft and itl (ns; NaN: none)."""
    parts = []
    for replica in replicas(trace):
        requests = replica.requests
        until = requests["first_token"].where(requests["first_token"] >= 0, requests["seen_until"])
        parts.append(
            pd.DataFrame(
                {
                    "tenant": np.array(replica.tenants, dtype=object)[replica.tenant_of_request],
                    "arrival": requests["arrival"],
                    "tokens": requests["prompt_tokens"] + requests["output_tokens"],
                    "ttft": (until - requests["arrival"]).astype(np.float64),
                    "itl": np.where(replica.longest_gap >= 0, replica.longest_gap, np.nan),
                }
            )
        )
    table = pd.concat(parts, ignore_index=True)
    return table.assign(block=_blocks(table))


def _blocks(table: pd.DataFrame) -> Ints:
    """Stretches of time that are drawn as a whole, since a stall hits neighbours together: longer than most waits."""
    arrival = table["arrival"].to_numpy(np.int64)
    length = int(arrival.max() - arrival.min()) + 1 if len(arrival) else 1
    longest = float(np.nanquantile(table[["ttft", "itl"]].to_numpy(), 0.99)) if len(arrival) else 0.0
    count = int(np.clip(length // max(_BLOCK_NS, 2 * longest), _FEWEST_BLOCKS, _MOST_BLOCKS))
    found: Ints = (arrival - arrival.min(initial=arrival.max(initial=0))) * count // length
    return found


def _side(table: pd.DataFrame, diagnosis: Diagnosis) -> Side:
    length, coverage = max((diagnosis.end_ns - diagnosis.start_ns) / 1e9, 1e-9), diagnosis.coverage
    return Side(
        diagnosis.source,
        str(diagnosis.verdict),
        length,
        len(table),
        len(table) / length,
        float(table["tokens"].sum()) / length,
        len(diagnosis.incidents),
        sum(incident.lost_s for incident in diagnosis.incidents),
        coverage.steps_lost / max(coverage.steps + coverage.steps_lost, 1),
    )


@dataclass(frozen=True, eq=False)
class _Pair:
    """One percentile of a tenant's metric, and the requests (columns value in ns, block) of both sides."""

    tenant: str
    metric: str
    quantile: float
    before: pd.DataFrame
    after: pd.DataFrame


def _pairs(tenant: str, before: pd.DataFrame, after: pd.DataFrame) -> list[_Pair]:
    """Of each metric the median, and the highest percentile that both sides can bear; nothing where either has too few
    requests."""
    found = []
    for metric in (METRICS[TTFT], METRICS[ITL]):
        sides = [
            side[[metric, "block"]].rename(columns={metric: "value"}).dropna().sort_values("value", kind="stable")
            for side in (before, after)
        ]
        fewest = min(map(len, sides))
        tail = 0.99 if fewest >= TAIL_REQUESTS else 0.9 if fewest >= TAIL_REQUESTS // 10 else 0.5
        if fewest >= FEWEST:
            found += [_Pair(tenant, metric, quantile, *sides) for quantile in sorted({0.5, tail})]
    return found


def _change(pair: _Pair, outside: float, rng: np.random.Generator) -> Change:
    """The change with an interval that leaves out the share ``outside`` of the draws."""
    ratio = _draws(pair.after, pair.quantile, rng) / _draws(pair.before, pair.quantile, rng)
    low, high = np.quantile(ratio, [outside / 2, 1 - outside / 2])
    then, now = (
        float(np.quantile(side["value"], pair.quantile, method="higher")) / 1e9 for side in (pair.before, pair.after)
    )
    outcome = Outcome.BETTER if high < 1 else Outcome.WORSE if low > 1 else Outcome.CHANCE
    sizes = (len(pair.before), len(pair.after))
    return Change(pair.tenant, pair.metric, pair.quantile, then, now, *sizes, float(low), float(high), outcome)


def _draws(side: pd.DataFrame, quantile: float, rng: np.random.Generator) -> Floats:
    """The percentile (ns) in each of ``DRAWS`` recordings made of blocks of this one, drawn with replacement."""
    values = np.maximum(side["value"].to_numpy(np.float64), 1.0)
    chosen = np.unique(np.linspace(0, len(values) - 1, min(len(values), _MOST_VALUES)).round().astype(np.int64))
    cell = np.searchsorted(chosen, np.arange(len(values)))
    blocks, block = np.unique(side["block"].to_numpy(np.int64), return_inverse=True)
    requests = np.zeros((len(blocks), len(chosen)))
    np.add.at(requests, (block, cell), 1)
    times = rng.multinomial(len(blocks), np.full(len(blocks), 1 / len(blocks)), size=DRAWS)
    reached = np.cumsum(times @ requests, axis=1)
    found: Floats = values[chosen][(reached < np.ceil(quantile * reached[:, -1:])).sum(axis=1)]
    return found
