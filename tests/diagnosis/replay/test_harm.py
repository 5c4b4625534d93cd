"""Harm: percentiles of the same requests with and without something, over windows that are long enough for them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from stallscope.diagnosis.cost_model import CostModel
from stallscope.diagnosis.incidents import NOTICEABLE_NS, Window
from stallscope.diagnosis.metrics import ITL, METRICS, TTFT
from stallscope.diagnosis.replay.harm import Harm, Norms, recorded_outcomes, same_harm, waits_of, worst_harm
from tests.diagnosis.replay.recorded import CHAT, FLOOD, only_incident

MS, S = 1_000_000, 1_000_000_000
NONE = np.zeros(0, dtype=np.int64)
WINDOW = Window(100 * S, 110 * S, np.zeros(0, dtype=np.int64))


def outcomes(arrived_s: np.ndarray, ttft_s: float | np.ndarray, tenant: int = 0, first_code: int = 0) -> pd.DataFrame:
    """Requests that wait so long for their first token, and never afterwards."""
    arrived = (np.asarray(arrived_s) * S).astype(np.int64)
    first = arrived + (np.broadcast_to(ttft_s, len(arrived)) * S).astype(np.int64)
    return pd.DataFrame(
        {
            "code": np.arange(len(arrived)) + first_code,
            "tenant": tenant,
            "arrival": arrived,
            "prompt_tokens": 100,
            "arrived": arrived,
            "first_token": first,
            "end": first,
            "longest_gap": 0,
            "output_tokens": 1,
            "waited_until": first,
        }
    )


def kinds(tenants: set[int]) -> set[tuple[int, int]]:
    return {(tenant, metric) for tenant in tenants for metric in (TTFT, ITL)}


def harm(with_it: pd.DataFrame, without: pd.DataFrame, apart: tuple[int, ...] = ()) -> Harm:
    found = worst_harm([(with_it, without)], WINDOW, kinds(set(with_it["tenant"]) - set(apart)))
    assert found is not None
    return found


def test_harm_is_the_change_of_a_percentile_of_the_same_requests() -> None:
    times = np.linspace(95, 115, 200)
    found = harm(outcomes(times, 1.0), outcomes(times, 0.25))
    assert (found.metric, found.quantile) == (TTFT, 0.9)
    assert (found.with_s, found.without_s, found.excess_s) == pytest.approx((1.0, 0.25, 0.75))
    assert found.counts


def test_who_is_in_only_one_of_the_two_is_not_compared() -> None:
    times = np.linspace(95, 115, 100)
    newcomers = outcomes(times, 30.0, first_code=1000)
    drawn = outcomes(times, 30.0).assign(code=-1)
    calm = outcomes(times, 0.2)
    assert harm(pd.concat([calm, newcomers, drawn], ignore_index=True), calm).excess_s == 0
    never = calm.assign(arrived=np.where(calm["code"] % 2 == 0, -1, calm["arrived"]))
    late = outcomes(times, np.where(calm["code"] % 2 == 0, 30.0, 0.2))
    assert harm(late, never).excess_s == 0


def test_the_tenants_that_are_set_apart_are_not_the_harmed() -> None:
    times = np.linspace(95, 115, 100)
    calm = pd.concat([outcomes(times, 0.2), outcomes(times, 0.2, 1, 1000)], ignore_index=True)
    late = pd.concat([outcomes(times, 0.2), outcomes(times, 9.0, 1, 1000)], ignore_index=True)
    assert harm(late, calm).tenant == 1
    assert harm(late, calm, (1,)).excess_s == 0


def test_a_harm_is_the_mean_of_all_draws() -> None:
    times = np.linspace(95, 115, 200)
    calm = outcomes(times, 0.25)
    pairs = [(outcomes(times, 1.0), calm), (outcomes(times, 2.0), calm)]
    found = worst_harm(pairs, WINDOW, kinds({0}))
    assert found is not None
    assert (found.with_s, found.without_s) == pytest.approx((1.5, 0.25))
    assert same_harm(found, pairs[:1]).excess_s == pytest.approx(0.75)


def test_who_sent_too_few_for_a_percentile_only_counts_where_nobody_sent_more() -> None:
    many, few = np.linspace(95, 115, 100), np.linspace(95, 115, 10)
    calm = pd.concat([outcomes(many, 0.2), outcomes(few, 0.2, 1, 1000)], ignore_index=True)
    late = pd.concat([outcomes(many, 0.3), outcomes(few, 9.0, 1, 1000)], ignore_index=True)
    assert harm(late, calm).tenant == 0
    assert harm(late, calm, (0,)).tenant == 1


def test_a_p99_is_asked_only_where_there_are_requests_for_one() -> None:
    # Five in a hundred are late: no p90 shows them.
    for requests, seen in ((200, False), (2000, True)):
        times = np.linspace(95, 115, requests)
        late = np.where(np.arange(requests) % 20 == 0, 5.0, 0.2)
        assert harm(outcomes(times, late), outcomes(times, 0.2)).counts is seen


def test_of_a_slow_tenant_the_requests_nearest_to_the_incident_are_taken() -> None:
    times = np.linspace(0, 300, 30)
    late = np.where((times > 95) & (times < 130), 4.0, 0.2)
    found = harm(outcomes(times, late), outcomes(times, 0.2))
    assert found.quantile == 0.9
    assert found.excess_s == pytest.approx(3.8)


def test_what_nobody_would_notice_does_not_count() -> None:
    assert Harm(0, TTFT, 0.9, 0.10, 0.05, NONE).counts
    assert not Harm(0, TTFT, 0.9, 0.09, 0.05, NONE).counts  # 40 ms
    assert not Harm(0, TTFT, 0.9, 1.15, 1.0, NONE).counts  # 15%
    assert not Harm(0, TTFT, 0.9, 0.2, 1.0, NONE).counts  # better with it


def test_a_wait_that_never_ended_counts_as_long_as_it_was_waited() -> None:
    table = outcomes(np.array([100.0]), 2.0).assign(first_token=-1, end=-1, output_tokens=0)
    assert waits_of(table, TTFT).tolist() == [2 * S]
    # Its first token came before the replay, or it never arrived: nothing is known of that wait.
    assert waits_of(table.assign(output_tokens=7), TTFT).tolist() == [0]
    assert waits_of(table.assign(arrived=-1), TTFT).tolist() == [0]


def test_excess_is_beyond_the_usual_and_only_of_what_is_beyond_the_bar() -> None:
    usual, bar = np.full((len(METRICS), 2), 0.0), np.full((len(METRICS), 2), np.inf)
    usual[TTFT], bar[TTFT] = 100 * MS, [500 * MS, np.inf]
    free = CostModel((0.0, 0.0, 0.0, 0.0, 0.0), 0.0, 0)
    norms = Norms(usual, bar, free)
    table = outcomes(np.array([1.0, 2.0, 3.0]), np.array([0.4, 0.6, 2.0]))
    assert norms.excess(table).tolist() == [0, 500 * MS, 1900 * MS]
    # Nothing is known of the other tenant's usual.
    assert norms.excess(table.assign(tenant=1)).tolist() == [0, 0, 0]
    gaps = outcomes(np.array([1.0]), 0.0).assign(longest_gap=NOTICEABLE_NS + 1)
    bar[ITL] = MS
    assert norms.excess(gaps).tolist() == [NOTICEABLE_NS + 1]
    assert norms.excess(gaps.assign(longest_gap=NOTICEABLE_NS)).tolist() == [0]


def test_the_recording_is_measured_as_its_replays_are() -> None:
    replays = only_incident(CHAT + FLOOD)
    requests = replays.history.replica.requests
    recorded = recorded_outcomes(replays.history.replica)
    assert list(recorded.columns) == list(replays.stretch.unchanged(0).requests.columns)
    answered = requests["first_token"] >= 0
    waits = pd.Series(waits_of(recorded, TTFT))
    assert (waits[answered] == (requests["first_token"] - requests["arrival"])[answered]).all()
