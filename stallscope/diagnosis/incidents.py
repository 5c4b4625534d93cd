"""Waits of every request, which of them were far beyond the tenant's usual, and when: incidents and their victims.

A wait is a request's time to first token, one of its inter-token gaps, or the time from its last token until that was
delivered, which is no time of the engine's. Waits are compared without the request's
own work in them (what its prompt and tokens cost by themselves), which matches each request to healthy ones of its own
length. A tenant's usual is taken from the calmer part of time bins, so that a stall, however bad, does not raise
the bar for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from stallscope.diagnosis.changes import NO_CHANGES, Changes
from stallscope.diagnosis.metrics import DELIVERY, ITL, METRICS, TTFT
from stallscope.diagnosis.partition import MECHANISMS, Mechanism, Party
from stallscope.diagnosis.refills import Refills, read_refills
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.slo import Slo, limits_of
from stallscope.diagnosis.timeline import Floats, Ints

NOTICEABLE_NS = 50_000_000  # nobody opens an incident for less
BIN_NS = 1_000_000_000  # shortest bin; longer in long traces
SLACK_NS = 5_000_000_000  # stalled waits that follow one another so closely are one stretch
_MOST_BINS = 500
_SIGMAS = 5.0
_TIMES_USUAL = (3.0, 10.0)  # the bar lies between these multiples of the usual
_MOST_BEYOND_NS = 500_000_000  # and where the usual is long, no further above it than this, or the lower multiple
USUAL_WAITS = 300  # of a tenant, whose charges say what is usual
FEWEST_STALLED = 3
LEAST_OF_WORST = 0.05  # an episode that lost less of what the worst one did is part of the usual
LEADS_UP_NS = 5_000_000_000
MOST_UNUSUAL = 0.6  # share of a trace that may be not usual
TAIL_SHARE = 0.01  # p99: what fewer than one in a hundred meet does not move it
TAIL_REQUESTS = 300  # requests that a p99 needs behind it


@dataclass(frozen=True, eq=False)
class Waits:
    """All waits of a replica and their charges.

    ``table`` (index = wait): metric (``METRICS`` code), request, tenant, begin, end (ns), censored (had not ended when
    last seen), delay (ns, without own work), bar (ns: the delay above which it is stalled), stalled, charged.
    ``charges`` of the charged ones: query (wait), holder, mechanism, ns, as ``Partition.charge`` gives them with
    tenants as groups.
    """

    table: pd.DataFrame
    charges: pd.DataFrame
    refills: Refills | None = None


@dataclass(frozen=True, eq=False)
class Window:
    """A stretch of time with stalled waits (``waits``: their indices), ns."""

    start: int
    end: int
    waits: Ints


def measure_waits(replica: Replica, slos: Sequence[Slo] = (), changes: Changes = NO_CHANGES) -> Waits:
    """The waits of a replica's requests, partitioned and compared with their tenant's usual, or with ``slos``.

    Those that began during ``changes`` are charged in any case.
    """
    table = _all_waits(replica)
    inside = np.flatnonzero(table["metric"] != DELIVERY)
    table["delay"] = table["end"] - table["begin"]
    own_ns = np.zeros(len(table), dtype=np.int64)
    own_ns[inside] = replica.partition.own_work(table if len(inside) == len(table) else table.iloc[inside])
    # Work that a request is usually spared is a delay.
    refills = read_refills(replica)
    if refills is not None:
        cold = (table["metric"] == TTFT).to_numpy() & (refills.share[table["request"].to_numpy()] > 0)
        own_ns[cold] = (own_ns[cold] * (1.0 - refills.share[table["request"].to_numpy()[cold]])).astype(np.int64)
    table["delay"] -= own_ns
    span = replica.timeline.end[-1] - replica.timeline.before[0] if len(replica.timeline) else 0
    bin_ns = max(BIN_NS, int(span) // _MOST_BINS)
    table["bar"] = _bars(table, bin_ns)
    table["stalled"] = (table["delay"] > table["bar"]) & (table["delay"] > NOTICEABLE_NS)
    table["promised"] = False
    for (tenant, metric), slo in limits_of(slos, replica.tenants).items():
        mine = (table["tenant"] == tenant) & (table["metric"] == metric)
        table.loc[mine, "bar"] = float(slo.limit_ns)
        table.loc[mine, "stalled"] = (table["end"] - table["begin"])[mine] > slo.limit_ns
        table.loc[mine, "promised"] = True
    table["charged"] = _worth_charging(table) | _during(changes, table)
    charged = table[table["charged"]]
    queries = charged.loc[charged["metric"] != DELIVERY, ["request", "begin", "end"]]
    charges = replica.partition.charge(queries.assign(query=queries.index), replica.tenant_of_request)
    if refills is not None:
        charges = refills.passed_on(charges, table["request"].to_numpy())
    return Waits(table, pd.concat([charges, _delivery_charges(charged)], ignore_index=True), refills)


def _all_waits(replica: Replica) -> pd.DataFrame:
    """Metric, request, tenant, begin, end, censored of each wait."""
    requests, gaps = replica.requests, replica.read_gaps()
    first_token = requests["first_token"].to_numpy()
    # Each long gap, and for everybody the longest of the short ones, so that a percentile counts all requests.
    chosen = np.flatnonzero((gaps["count"] == 1) | _longest_of_short(gaps, len(requests)))
    start, length = gaps["start"].to_numpy()[chosen], gaps["length_ns"].to_numpy()[chosen]
    request = np.concatenate([np.arange(len(requests), dtype=np.int32), gaps["request"].to_numpy()[chosen]])
    answered = np.where(first_token >= 0, first_token, requests["seen_until"])
    ended, delivered = requests["end"].to_numpy(), requests["delivered"].to_numpy()
    # Of tenants some of whose answers were late, all: what is usual for them is mostly nothing.
    slow = np.bincount(replica.tenant_of_request[delivered > ended], minlength=len(replica.tenants)) > 0
    late = np.flatnonzero((ended >= 0) & (delivered >= ended) & slow[replica.tenant_of_request])
    request = np.concatenate([request, late.astype(np.int32)])
    counts = [len(requests), len(chosen), len(late)]
    return pd.DataFrame(
        {
            "metric": np.repeat(np.array([TTFT, ITL, DELIVERY], dtype=np.int8), counts),
            "request": request,
            "tenant": replica.tenant_of_request[request],
            "begin": np.concatenate([requests["arrival"], start, ended[late]]),
            "end": np.concatenate([answered, start + length, delivered[late]]),
            "censored": np.concatenate([first_token < 0, np.zeros(len(chosen) + len(late), dtype=np.bool_)]),
        },
        copy=False,
    )


def _longest_of_short(gaps: pd.DataFrame, requests: int) -> NDArray[np.bool_]:
    """Of each request the longest bin of short gaps."""
    short = np.flatnonzero(gaps["count"] > 1)
    request, length = gaps["request"].to_numpy()[short], gaps["length_ns"].to_numpy()[short]
    longest = np.full(requests, -1)
    np.maximum.at(longest, request, length)
    at = np.full(requests, -1)
    is_longest = length == longest[request]
    at[request[is_longest]] = short[is_longest]
    chosen = np.zeros(len(gaps), dtype=np.bool_)
    chosen[at[at >= 0]] = True
    return chosen


def _worth_charging(table: pd.DataFrame) -> NDArray[np.bool_]:
    """The waits whose charges anybody asks for: the stalled ones, those who waited for a first token meanwhile, and of
    each tenant's others enough to say what is usual."""
    stalled = table["stalled"].to_numpy()
    charged = stalled.copy()
    ttft = np.flatnonzero(table["metric"] == TTFT)
    begin, end = (table[name].to_numpy() for name in ("begin", "end"))
    order = np.flatnonzero(stalled)[np.argsort(begin[stalled], kind="stable")]
    if len(order):
        # The stalled ones that began before a wait ended: did one of them end after it began?
        latest = np.maximum.accumulate(end[order])
        begun = np.searchsorted(begin[order], end[ttft])
        charged[ttft[(begun > 0) & (latest[begun - 1] > begin[ttft])]] = True
    usual = ttft[~charged[ttft] & ~table["censored"].to_numpy()[ttft]]
    if len(usual):
        # All tenants at the same moments: what is read for one is then at hand for the others.
        moments = np.sort(begin[usual])[np.linspace(0, len(usual) - 1, USUAL_WAITS).astype(np.int64)]
        tenant = table["tenant"].to_numpy()[usual]
        for code in np.unique(tenant):
            mine = usual[tenant == code]
            near = mine[np.argsort(begin[mine], kind="stable")]
            near = near[np.minimum(np.searchsorted(begin[near], moments), len(near) - 1)]
            charged[mine if len(mine) <= USUAL_WAITS else near] = True
    return charged


def _during(changes: Changes, table: pd.DataFrame) -> NDArray[np.bool_]:
    """The waits in the engine that began while somebody's changed requests were there."""
    begin = table["begin"].to_numpy()
    found = np.zeros(len(table), dtype=np.bool_)
    for start, end in changes.spans:
        found |= (begin >= start) & (begin <= end)
    return found & (table["metric"] != DELIVERY).to_numpy()


def _delivery_charges(table: pd.DataFrame) -> pd.DataFrame:
    """What comes after a request's last token is the frontend's, all of it."""
    late = table[table["metric"] == DELIVERY]
    return pd.DataFrame(
        {
            "query": late.index.to_numpy(np.int64),
            "holder": int(Party.FRONTEND),
            "mechanism": MECHANISMS.index(Mechanism.DELIVERY),
            "ns": (late["end"] - late["begin"]).to_numpy(np.int64),
        }
    )


def _bars(table: pd.DataFrame, bin_ns: int) -> Floats:
    """Per wait: the delay (ns) beyond which its tenant's waits of this metric count as stalled.

    From the worst delay of each time bin: median and spread are estimated from the calmer 30% of the bins (as the
    normal distribution of their logarithms has them), so that up to two thirds of the bins may be stalled.
    """
    tenant, begin = table["tenant"].to_numpy(), table["begin"].to_numpy()
    bins = begin // bin_ns
    bins -= bins.min(initial=0 if len(bins) == 0 else bins[0])
    kind = tenant * np.int64(len(METRICS)) + table["metric"].to_numpy()
    size = int(bins.max(initial=0)) + 1
    delays = np.full((int(kind.max(initial=-1)) + 1) * size, -1)
    np.maximum.at(delays, kind * size + bins, table["delay"].to_numpy())
    seen = np.flatnonzero(delays >= 0)
    # Below a millisecond, differences mean nothing.
    worst = pd.Series(np.log(np.maximum(delays[seen], 1e6))).groupby(seen // size)
    _, bars = _bars_between(worst.quantile(0.1).to_numpy(), worst.quantile(0.3).to_numpy())
    found: Floats = np.full(int(kind.max(initial=-1)) + 1, np.nan)
    found[np.unique(seen // size)] = bars
    by_wait: Floats = found[kind]
    return by_wait


def bars_of(worst: Floats) -> tuple[Floats, Floats]:
    """Usual delay and bar (ns) of each row, of the logarithms of its bins' worst delays (ns; NaN: no such bin)."""
    ordered = np.sort(worst, axis=1)  # NaN comes last
    last = np.maximum((~np.isnan(worst)).sum(axis=1) - 1, 0)
    row = np.arange(len(worst))

    def quantile(share: float) -> Floats:
        at = share * last
        low = at.astype(np.int64)
        below, above = ordered[row, low], ordered[row, np.minimum(low + 1, last)]
        between: Floats = below + (above - below) * (at - low)
        return between

    return _bars_between(quantile(0.1), quantile(0.3))


def _bars_between(low: Floats, calm: Floats) -> tuple[Floats, Floats]:
    """The same of the quantiles at 10% and 30%."""
    sigma = (calm - low) / 0.757  # distance of the normal distribution's 10% and 30% points, in sigmas
    # Where next to nothing is the usual, the spread of its logarithm says little: hence the bounds.
    usual, times = np.exp(calm + 0.524 * sigma), np.exp(np.clip(_SIGMAS * sigma, *np.log(_TIMES_USUAL)))
    return usual, np.minimum(usual * times, np.maximum(usual * _TIMES_USUAL[0], usual + _MOST_BEYOND_NS))


def find_episodes(waits: Waits) -> list[Window]:
    """All stretches of stalled waits, sorted by time, none overlapping.

    Waits that follow one another within a few seconds are one stretch.
    """
    stalled = waits.table[waits.table["stalled"]].sort_values("begin", kind="stable")
    if stalled.empty:
        return []
    slack = SLACK_NS
    reach = np.maximum.accumulate(stalled["end"].to_numpy())
    fresh = np.ones(len(stalled), dtype=bool)
    fresh[1:] = stalled["begin"].to_numpy()[1:] > reach[:-1] + slack
    return [
        Window(int(group["begin"].min()), int(group["end"].max()), group.index.to_numpy(np.int64))
        for _, group in stalled.groupby(np.cumsum(fresh))
    ]


def windows_of_changes(waits: Waits, changes: Changes) -> list[tuple[Window, Window]]:
    """Each stretch in which changed requests were there, and within it the time of those who waited noticeably longer
    then than they mostly do.

    A change may hurt others without a stall that would open an incident by itself.
    """
    table = waits.table
    inside = table[(table["metric"] != DELIVERY) & table["charged"]]
    usual = table["delay"].groupby([table["tenant"], table["metric"]]).median()
    longer = inside["delay"] - usual.reindex(pd.MultiIndex.from_frame(inside[["tenant", "metric"]])).to_numpy()
    # What keeps a promise is no harm, however much longer it takes.
    delayed = inside[((longer >= NOTICEABLE_NS) & ~inside["promised"]) | inside["stalled"]]
    windows = []
    for start, end in changes.spans:
        there = delayed[(delayed["begin"] >= start) & (delayed["begin"] <= end)]
        stalled = there[there["stalled"]]
        chosen = stalled if len(stalled) else there
        if len(chosen):
            within = Window(int(chosen["begin"].min()), int(chosen["end"].max()), chosen.index.to_numpy(np.int64))
            windows.append((Window(start, max(end, within.end), there.index.to_numpy(np.int64)), within))
    return windows


def not_usual(waits: Waits, episodes: list[Window], span_ns: int) -> list[tuple[int, int]]:
    """Begin and end (ns) of the episodes that can't count as usual, in a trace of this length.

    Small stalls are part of a busy engine's usual. Of the others, the worst go first, until what is left would be too
    little to know the usual by. What leads up to one is not usual either.
    """
    table = waits.table
    lost = [float(table.loc[episode.waits, "delay"].sum()) for episode in episodes]
    chosen: list[tuple[int, int]] = []
    taken = 0
    for index in np.argsort(lost)[::-1].tolist():
        length = episodes[index].end - episodes[index].start
        if chosen and (lost[index] < LEAST_OF_WORST * max(lost) or taken + length > MOST_UNUSUAL * span_ns):
            break
        chosen.append((episodes[index].start - LEADS_UP_NS, episodes[index].end))
        taken += length
    return sorted(chosen)


def find_windows(waits: Waits, episodes: list[Window], replica: Replica, slos: Sequence[Slo] = ()) -> list[Window]:
    """The episodes that a percentile would show.

    One in which no tenant has at least ``FEWEST_STALLED`` stalled requests, and more than 1% of the ``TAIL_REQUESTS``
    around it, is no incident. Metrics with an SLO count by themselves, and may be stalled as often as that allows.
    """
    tenants = len(replica.tenants)
    allowed = np.full((tenants, 1 + len(METRICS)), TAIL_SHARE)
    counts_as = np.zeros((tenants, len(METRICS)), dtype=np.int64)  # column of ``allowed``, by tenant and metric
    for (tenant, metric), slo in limits_of(slos, replica.tenants).items():
        counts_as[tenant, metric] = 1 + metric
        allowed[tenant, 1 + metric] = 1.0 - slo.quantile
    tenant_of, arrival = replica.tenant_of_request, replica.requests["arrival"].to_numpy(np.int64)
    arrivals = [np.sort(arrival[tenant_of == code]) for code in range(tenants)]
    windows = []
    for episode in episodes:
        stalled = waits.table.loc[episode.waits, ["request", "tenant", "metric"]]
        stalled = stalled.assign(column=counts_as[stalled["tenant"], stalled["metric"]])
        each = stalled.drop_duplicates(["request", "column"])
        hit = np.zeros(allowed.shape, dtype=np.int64)
        np.add.at(hit, (each["tenant"].to_numpy(), each["column"].to_numpy()), 1)
        around = np.array([_requests_around(times, episode.start, episode.end) for times in arrivals])
        if ((hit >= FEWEST_STALLED) & (hit / around[:, None] > allowed)).any():
            windows.append(episode)
    return windows


def _requests_around(arrivals: Ints, start: int, end: int) -> int:
    """Requests of a tenant in the window, widened to ``TAIL_REQUESTS`` of them where there are as many."""
    inside = int(np.searchsorted(arrivals, end, side="right") - np.searchsorted(arrivals, start))
    return max(1, inside, min(len(arrivals), TAIL_REQUESTS))
