"""Lines of percentiles: every request counts once, points are those of a plain sort, few requests give no p99."""

from __future__ import annotations

from collections import defaultdict
from math import ceil
from statistics import median

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallscope.views.percentiles import SHOWN_METRICS, Line, Percentiles, bin_length, percentiles
from stallscope_engine.config import EngineConfig
from tests.diagnosis.runs import MS, only_replica
from tests.trace.recording import START_NS, Arrival, Workload, read, run
from tests.views.recordings import replica

SECOND = 1_000_000_000


def span() -> tuple[int, int]:
    return int(replica().timeline.before[0]), int(replica().timeline.end[-1])


def whole(width: int = 40) -> tuple[Line, ...]:
    return percentiles(replica(), *span(), width).lines


def test_each_request_counts_once_in_the_bin_of_its_arrival() -> None:
    r = replica()
    for line in whole():
        if line.metric == "ttft":
            assert line.requests.sum() == (r.requests["tenant"] == r.tenants.index(line.tenant)).sum()


def test_a_point_is_that_of_a_plain_sort() -> None:
    r = replica()
    view = percentiles(r, *span(), 10)
    line = next(one for one in view.lines if (one.tenant, one.metric, one.quantile) == ("chat", "ttft", 0.5))
    requests = r.requests[r.requests["tenant"] == r.tenants.index("chat")]
    for start, value, count in zip(line.start_ns, line.value_s, line.requests, strict=True):
        mine = requests[(requests["arrival"] >= start) & (requests["arrival"] < start + view.bin_ns)]
        lengths = (mine["first_token"] - mine["arrival"]).to_numpy()
        assert len(mine) == count
        assert value == pytest.approx(np.quantile(lengths, 0.5, method="higher") / 1e9)


def longest_gaps() -> dict[int, int]:
    """Of each request (code) that has a gap, by a plain loop."""
    longest: dict[int, int] = {}
    for request, length in replica().gaps[["request", "length_ns"]].to_numpy(np.int64).tolist():
        longest[request] = max(length, longest.get(request, length))
    return longest


def plain(start: int, end: int, view: Percentiles, metric: str) -> dict[tuple[str, int], list[tuple[int, bool]]]:
    """(ns, still waiting) of each request, by tenant and start of its bin: a plain loop over all requests."""
    r = replica()
    gaps = longest_gaps()
    last_bin = start + max(ceil((end - start) / view.bin_ns) - 1, 0) * view.bin_ns
    found = defaultdict(list)
    columns = r.requests[["tenant", "arrival", "first_token", "end", "seen_until"]].to_numpy(np.int64)
    for code, (tenant, arrival, first, ended, seen) in enumerate(columns.tolist()):
        if not start <= arrival <= end or (metric == "itl" and code not in gaps):
            continue
        waits = first < 0 if metric == "ttft" else ended < 0
        until = first if metric == "ttft" and not waits else seen
        bin_start = min(start + (arrival - start) // view.bin_ns * view.bin_ns, last_bin)
        found[r.tenants[tenant], bin_start].append((gaps[code] if metric == "itl" else until - arrival, waits))
    return found


# The recording has few requests in a bin, and so few quantiles; with a p99 of 6 requests it has all of them.
@settings(max_examples=60)
@given(st.data(), st.integers(1, 120), st.sampled_from([6, 60, 300]))
def test_all_lines_of_any_window_are_those_of_a_plain_loop(data: st.DataObject, width: int, tail_requests: int) -> None:
    r = replica()
    bounds = st.integers(int(r.timeline.before[0]) - SECOND, int(r.timeline.end[-1]) + SECOND)
    start, end = sorted((data.draw(bounds), data.draw(bounds)))
    metrics = data.draw(st.lists(st.sampled_from(SHOWN_METRICS), unique=True))
    tenants = data.draw(st.none() | st.sets(st.sampled_from([*r.tenants, "nobody"])))
    needs = {0.9: tail_requests // 10, 0.95: tail_requests // 5, 0.99: tail_requests}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("stallscope.views.percentiles._NEEDS", needs)
        view = percentiles(r, start, end, width, 8, metrics, tenants)
    expected = {}
    for metric in metrics:
        of_tenant: dict[str, dict[int, list[tuple[int, bool]]]] = defaultdict(dict)
        for (tenant, bin_start), requests in plain(start, end, view, metric).items():
            if tenants is None or tenant in tenants:
                of_tenant[tenant][bin_start] = sorted(requests)
        for tenant, bins in of_tenant.items():
            typical = median(len(requests) for requests in bins.values())
            tails = [tail for tail in (0.95, 0.99) if typical >= needs[tail]]
            for quantile in (0.5, *(tails or [0.9 if typical >= needs[0.9] else 1.0])):
                expected[tenant, metric, quantile] = [
                    (at, each[ceil(quantile * (len(each) - 1))][0] / 1e9, len(each), sum(waits for _, waits in each))
                    for at, each in sorted(bins.items())
                ]
    found = {
        (line.tenant, line.metric, line.quantile): list(
            zip(
                *(each.tolist() for each in (line.start_ns, line.value_s, line.requests, line.open_requests)),
                strict=True,
            )
        )
        for line in view.lines
    }
    assert found == expected
    assert all(len(line.start_ns) <= width for line in view.lines)


def test_bins_with_few_requests_show_the_worst_and_no_percentile() -> None:
    assert {line.quantile for line in whole(width=40)} == {0.5, 1.0}


@pytest.mark.parametrize(
    ("requests", "quantiles"),
    [
        (3, [0.5, 1.0]),
        (29, [0.5, 1.0]),
        (30, [0.5, 0.9]),
        (60, [0.5, 0.95]),
        (299, [0.5, 0.95]),
        (300, [0.5, 0.95, 0.99]),
    ],
)
def test_a_percentile_is_shown_where_three_requests_lie_beyond_it(requests: int, quantiles: list[float]) -> None:
    arrivals = [Arrival(MS, 8, 2, "chat")] * requests
    r = only_replica(read(run(Workload(EngineConfig(), arrivals, 10, 100_000)).lines()))
    view = percentiles(r, START_NS, int(r.timeline.end[-1]), 1)
    for metric in SHOWN_METRICS:
        assert [line.quantile for line in view.lines if line.metric == metric] == quantiles


def test_end_to_end_is_never_shorter_than_the_wait_for_the_first_token() -> None:
    view = percentiles(replica(), *span(), 40)
    ttft, whole_time = (
        {(line.tenant, line.quantile): line for line in view.lines if line.metric == metric}
        for metric in ("ttft", "e2e")
    )
    assert ttft.keys() == whole_time.keys()
    assert all((ttft[key].value_s <= whole_time[key].value_s).all() for key in ttft)


@pytest.mark.parametrize(("asked", "shown"), [(0.5, 0.5), (0.9, 0.95), (0.95, 0.95), (0.99, 0.95), (1.0, 0.95)])
def test_the_line_nearest_to_a_quantile_stands_for_it(asked: float, shown: float) -> None:
    view = percentiles(replica(), *span(), 2, tenants=["chat"])
    assert {line.quantile for line in view.lines} == {0.5, 0.95}
    assert [(line.tenant, line.metric, line.quantile) for line in view.nearest("ttft", asked)] == [
        ("chat", "ttft", shown)
    ]


def test_a_metric_that_has_no_percentiles_is_an_error() -> None:
    with pytest.raises(ValueError, match="delivery"):
        percentiles(replica(), *span(), 10, metrics=["ttft", "delivery"])


def test_a_window_has_only_what_arrived_in_it_and_never_more_bins_than_asked_for() -> None:
    r = replica()
    start = int(r.timeline.before[0])
    view = percentiles(r, start + 10 * SECOND, start + 20 * SECOND, 5)
    arrived = r.requests["arrival"].between(start + 10 * SECOND, start + 20 * SECOND)
    assert sum(line.requests.sum() for line in view.lines if line.metric == "ttft") == 2 * arrived.sum()
    assert all(len(line.start_ns) <= 5 and line.start_ns[0] >= start + 10 * SECOND for line in view.lines)


def test_tenants_beyond_the_most_shown_are_counted() -> None:
    view = percentiles(replica(), *span(), 10, most_tenants=1)
    assert {line.tenant for line in view.lines} == {"chat"}
    assert view.tenants_left_out == 2
    assert percentiles(replica(), *span(), 10, most_tenants=1, tenants=["chat"]).tenants_left_out == 0


def test_who_still_waits_counts_with_the_time_so_far() -> None:
    arrivals = [Arrival(0, 8, 500, "chat"), Arrival(0, 8, 500, "chat")]
    r = only_replica(read(run(Workload(EngineConfig(max_num_seqs=1), arrivals, 10, 30)).lines()))
    lines = percentiles(r, START_NS, int(r.timeline.end[-1]), 1).lines
    for metric, still in (("ttft", 1), ("e2e", 2)):
        (worst,) = (line for line in lines if line.metric == metric and line.quantile == 1.0)
        assert (worst.requests.tolist(), worst.open_requests.tolist()) == ([2], [still])
        assert worst.value_s[0] == pytest.approx((int(r.timeline.end[-1]) - START_NS) / 1e9)


@pytest.mark.parametrize(
    ("length", "most", "bin_ns"),
    [(60 * SECOND, 60, SECOND), (61 * SECOND, 60, 2 * SECOND), (5 * MS, 10, 100 * MS), (0, 10, 100 * MS)],
)
def test_bins_have_lengths_that_people_count_in(length: int, most: int, bin_ns: int) -> None:
    assert bin_length(length, most) == bin_ns
