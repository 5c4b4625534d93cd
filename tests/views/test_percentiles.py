"""Lines of percentiles: every request counts once, points are those of a plain sort, few requests give no p99."""

from __future__ import annotations

import numpy as np
import pytest

from stallscope.views.percentiles import Line, bin_length, percentiles
from stallscope_engine.config import EngineConfig
from tests.diagnosis.runs import MS, only_replica
from tests.trace.recording import START_NS, Arrival, Workload, read, run
from tests.views.recordings import replica

SECOND = 1_000_000_000


def whole(width: int = 40, most_tenants: int = 8) -> tuple[Line, ...]:
    r = replica()
    return percentiles(r, int(r.timeline.before[0]), int(r.timeline.end[-1]), width, most_tenants).lines


def test_each_request_counts_once_in_the_bin_of_its_arrival() -> None:
    r = replica()
    for line in whole():
        if line.metric == "ttft":
            assert line.requests.sum() == (r.requests["tenant"] == r.tenants.index(line.tenant)).sum()


def test_a_point_is_that_of_a_plain_sort() -> None:
    r = replica()
    view = percentiles(r, int(r.timeline.before[0]), int(r.timeline.end[-1]), 10)
    line = next(one for one in view.lines if (one.tenant, one.metric, one.quantile) == ("chat", "ttft", 0.5))
    requests = r.requests[r.requests["tenant"] == r.tenants.index("chat")]
    for start, value, count in zip(line.start_ns, line.value_s, line.requests, strict=True):
        mine = requests[(requests["arrival"] >= start) & (requests["arrival"] < start + view.bin_ns)]
        lengths = (mine["first_token"] - mine["arrival"]).to_numpy()
        assert len(mine) == count
        assert value == pytest.approx(np.quantile(lengths, 0.5, method="higher") / 1e9)


def test_bins_with_few_requests_show_the_worst_and_no_percentile() -> None:
    assert {line.quantile for line in whole(width=40)} == {0.5, 1.0}
    assert 0.95 in {line.quantile for line in whole(width=2) if line.tenant == "chat"}


def test_a_window_has_only_what_arrived_in_it_and_never_more_bins_than_asked_for() -> None:
    r = replica()
    start = int(r.timeline.before[0])
    view = percentiles(r, start + 10 * SECOND, start + 20 * SECOND, 5)
    arrived = r.requests["arrival"].between(start + 10 * SECOND, start + 20 * SECOND)
    assert sum(line.requests.sum() for line in view.lines if line.metric == "ttft") == 2 * arrived.sum()
    assert all(len(line.start_ns) <= 6 and line.start_ns[0] >= start + 10 * SECOND for line in view.lines)


def test_tenants_beyond_the_most_shown_are_counted() -> None:
    r = replica()
    view = percentiles(r, int(r.timeline.before[0]), int(r.timeline.end[-1]), 10, most_tenants=1)
    assert {line.tenant for line in view.lines} == {"chat"}
    assert view.tenants_left_out == 2


def test_who_still_waits_counts_with_the_time_so_far() -> None:
    arrivals = [Arrival(0, 8, 500, "chat"), Arrival(0, 8, 500, "chat")]
    r = only_replica(read(run(Workload(EngineConfig(max_num_seqs=1), arrivals, 10, 30)).lines()))
    lines = percentiles(r, START_NS, int(r.timeline.end[-1]), 1).lines
    (worst,) = (line for line in lines if line.metric == "ttft" and line.quantile == 1.0)
    assert (worst.requests.tolist(), worst.open_requests.tolist()) == ([2], [1])
    assert worst.value_s[0] == pytest.approx((int(r.timeline.end[-1]) - START_NS) / 1e9)


@pytest.mark.parametrize(
    ("length", "most", "bin_ns"),
    [(60 * SECOND, 60, SECOND), (61 * SECOND, 60, 2 * SECOND), (5 * MS, 10, 100 * MS), (0, 10, 100 * MS)],
)
def test_bins_have_lengths_that_people_count_in(length: int, most: int, bin_ns: int) -> None:
    assert bin_length(length, most) == bin_ns
