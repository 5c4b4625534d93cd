"""What is exposed rises only after it was seen as it began."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.watch.families import BLAME, INCIDENTS, STALLED, TTFT
from stallscope.watch.scores import LIKELY, POSSIBLE
from tests.watch.scoring import blame, buckets, of, scored, total


def test_pairs_are_at_zero_from_the_admission_on() -> None:
    it = scored()
    it.scores.admit("newcomer", ["chat", "batch"])
    exposed = it.scrape()
    pairs = [("newcomer", "chat"), ("chat", "newcomer"), ("newcomer", "batch"), ("batch", "newcomer")]
    expected = {blame(*pair, mechanism): 0.0 for pair in pairs for mechanism in (*LIKELY, *POSSIBLE)}
    assert {series: value for series, value in exposed.items() if series[0] == BLAME.name} == expected
    assert exposed[of(STALLED, "newcomer")] == 0


def test_of_many_tenants_pairs_are_at_zero_for_the_likely_mechanisms_before_any_for_the_others() -> None:
    it = scored()
    everybody = [f"tenant-{number}" for number in range(30)]
    for number, tenant in enumerate(everybody):
        it.scores.admit(tenant, everybody[:number])
    exposed = it.scrape()
    assert all(blame(one, other, LIKELY[-1]) in exposed for one in everybody for other in everybody if one != other)
    assert blame("tenant-1", "tenant-0", POSSIBLE[-1]) in exposed
    assert blame("tenant-29", "tenant-28", POSSIBLE[0]) not in exposed


def test_blame_of_a_pair_that_was_seen_at_zero_is_shown_at_once() -> None:
    it = scored()
    it.scores.admit("newcomer", ["chat"])
    it.scrape()
    it.scores.blame("chat", "newcomer", LIKELY[0], 3.0)
    assert it.scrape()[blame("chat", "newcomer", LIKELY[0])] == 3


def test_a_first_offence_by_another_mechanism_is_shown_at_zero_first_and_nothing_of_it_is_lost() -> None:
    it = scored()
    it.scrape()
    it.scores.blame("chat", "newcomer", "adapter_swap", 3.0)
    it.scores.blame("chat", "newcomer", "adapter_swap", 2.0)
    assert it.scrape()[blame("chat", "newcomer", "adapter_swap")] == 0
    it.scores.blame("chat", "newcomer", "adapter_swap", 1.0)
    assert it.scrape()[blame("chat", "newcomer", "adapter_swap")] == 6


def test_every_counter_and_histogram_begins_at_zero() -> None:
    it = scored()
    it.scores.add(INCIDENTS, ("noisy_neighbor",), 1)
    it.scores.observe(TTFT, ("chat",), buckets(0, 2, 1), 1.5)
    first, second = it.scrape(), it.scrape()
    assert (first[of(INCIDENTS, "noisy_neighbor")], second[of(INCIDENTS, "noisy_neighbor")]) == (0, 1)
    bucket = of(TTFT, "chat", suffix="_bucket", le="0.1")
    assert (first[bucket], second[bucket]) == (0, 2)
    assert (second[of(TTFT, "chat", suffix="_count")], second[of(TTFT, "chat", suffix="_sum")]) == (3, 1.5)


def test_where_nobody_scrapes_blame_waits_for_30_s_only() -> None:
    it = scored()
    it.scores.blame("chat", "newcomer", "kv_pinning", 3.0)
    assert it.scrape(after_s=29)[blame("chat", "newcomer")] == 0
    it = scored()
    it.scores.blame("chat", "newcomer", "kv_pinning", 3.0)
    assert it.scrape(after_s=30)[blame("chat", "newcomer")] == 3


def test_what_happened_while_the_only_scraper_was_away_does_not_rise_when_it_is_back() -> None:
    it = scored()
    for _ in range(3):
        it.scrape()
    it.scores.blame("chat", "newcomer", "kv_pinning", 500.0)
    assert it.scrape(after_s=1800)[blame("chat", "newcomer")] == 500


@pytest.mark.parametrize("interval_s", [10.0, 60.0, 120.0])
def test_of_two_servers_that_scrape_each_sees_the_zero_first(interval_s: float) -> None:
    it = scored()
    for _ in range(3):
        it.scrape(interval_s / 2, "10.0.0.1")
        it.scrape(interval_s / 2, "10.0.0.2")
    it.scores.blame("chat", "newcomer", "kv_pinning", 3.0)
    seen = [it.scrape(interval_s / 2, f"10.0.0.{1 + number % 2}")[blame("chat", "newcomer")] for number in range(4)]
    assert seen == [0, 0, 3, 3]


@given(
    intervals_s=st.lists(st.integers(5, 120), min_size=1, max_size=4),
    blamed_s=st.lists(st.integers(0, 300), min_size=1, max_size=3),
)
def test_whoever_scrapes_regularly_sees_each_series_at_zero_first_and_all_of_it_soon(
    intervals_s: list[int], blamed_s: list[int]
) -> None:
    it = scored()
    quiet_s = 3 * max(intervals_s)  # all have come
    last_s = quiet_s + max(blamed_s) + 3 * max(intervals_s)
    first: dict[tuple[int, int], float] = {}
    for second in range(last_s + 1):
        for number, at_s in enumerate(blamed_s):
            if second == quiet_s + at_s:
                it.scores.blame("chat", f"newcomer-{number}", "adapter_swap", 3.0)
        for scraper, interval_s in enumerate(intervals_s):
            if second % interval_s == scraper % interval_s:
                exposed = it.scrape(0, f"10.0.0.{scraper}")
                for number in range(len(blamed_s)):
                    if blame("chat", f"newcomer-{number}", "adapter_swap") in exposed:
                        first.setdefault(
                            (scraper, number), exposed[blame("chat", f"newcomer-{number}", "adapter_swap")]
                        )
        it.clock.passes(1)
    assert first == {(scraper, number): 0 for scraper in range(len(intervals_s)) for number in range(len(blamed_s))}
    assert total(it.scrape(), BLAME) == 3 * len(blamed_s)


def test_a_look_by_hand_or_a_server_that_is_gone_delays_nothing() -> None:
    it = scored()
    for _ in range(3):
        it.scrape(10, "gone")
    for _ in range(4):
        it.scrape(10, "10.0.0.1")
    it.scores.snapshot()  # a scraper that went away before it had it
    it.scrape(1, "by hand")
    it.scores.blame("chat", "newcomer", "kv_pinning", 3.0)
    assert [it.scrape(10, "10.0.0.1")[blame("chat", "newcomer")] for _ in range(2)] == [0, 3]


def test_a_scrape_that_was_not_received_shows_nothing_to_anybody() -> None:
    it = scored()
    it.scrape()
    it.scores.blame("chat", "newcomer", "kv_pinning", 3.0)
    it.scores.snapshot()
    assert [it.scrape()[blame("chat", "newcomer")] for _ in range(2)] == [0, 3]


def test_a_restart_is_a_fall_to_zero_in_every_counter() -> None:
    it = scored()
    for _ in range(2):
        it.scores.blame("chat", "newcomer", "kv_pinning", 3.0)
        it.scrape()
    again = scored()
    again.scores.blame("chat", "newcomer", "kv_pinning", 1.0)
    assert again.scrape()[blame("chat", "newcomer")] == 0
