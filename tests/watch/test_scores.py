"""The budget of series: whatever comes, it is kept, nothing is lost, and no counter falls."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallscope.errors import UsageError
from stallscope.watch.families import (
    BLAME,
    BUCKETS,
    BUSY,
    COVERAGE,
    FAMILIES,
    FOLDED,
    INCIDENTS,
    JUDGED,
    LAST_SEEN,
    OLDEST_WAIT,
    OTHER,
    REQUESTS,
    RUNNING,
    SERIES,
    STEP_TIME,
    THROTTLED,
    TOKENS,
    TTFT,
    Kind,
)
from stallscope.watch.names import MOST_BYTES, label_value
from stallscope.watch.scores import LEAST_SERIES, Scores
from tests.watch.scoring import (
    HOSTILE,
    HOUR_S,
    Scored,
    blame,
    buckets,
    names,
    of,
    parse_exposition,
    rises,
    scored,
    total,
)

COUNTERS = (REQUESTS, STEP_TIME, BUSY, INCIDENTS, TOKENS, JUDGED, THROTTLED, BLAME)
numbered = st.integers(0, 3000).map(lambda number: f"n{number}")


def do(it: Scored, what: str, number: int, labels: tuple[str, str, str], amount: int) -> None:
    family = COUNTERS[number % len(COUNTERS)]
    if what == "admit":
        it.scores.admit(labels[0], labels[1:])
    elif what == "observe":
        it.scores.observe(TTFT, labels[:1], buckets(*[0] * (number % 12), amount), float(amount))
        it.added[TTFT.name] += amount
    elif what == "set":
        it.scores.set((COVERAGE, RUNNING, OLDEST_WAIT)[number % 3], labels[:1], amount)
    elif what == "forget":
        it.scores.forget_replica(labels[0])
    elif what == "flood":
        for at in range(number, number + 200):
            it.add(family, tuple(f"{name}{at}" for name in labels[: len(family.labels)]), 1)
    else:
        it.add(family, labels[: len(family.labels)], amount)


steps = st.lists(
    st.tuples(
        st.sampled_from(["add"] * 6 + ["admit", "observe", "set", "forget", "flood", "scrape", "scrape"]),
        st.integers(0, 1000),
        st.tuples(names | numbered, names | numbered, names | numbered),
        st.integers(1, 1000),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(steps=steps, pause_s=st.sampled_from([10.0, 3000.0]))
def test_the_budget_holds_no_counter_falls_and_none_rises_unseen(
    steps: list[tuple[str, int, tuple[str, str, str], int]], pause_s: float
) -> None:
    it = scored(LEAST_SERIES)
    last: dict[object, float] = {}
    since: dict[object, int] = defaultdict(int)
    for what, number, labels, amount in [*steps, *[("scrape", 0, ("", "", ""), 1)] * 2]:
        if what != "scrape":
            do(it, what, number, labels, amount)
            continue
        was_away = number % 4 == 3 and pause_s > 30
        exposed = it.scrape(pause_s if was_away else 10.0)
        assert len(exposed) == exposed[of(SERIES)] <= LEAST_SERIES
        for series, value in exposed.items():
            if rises(series):
                assert value >= last.get(series, 0.0)  # also of one that had left, and is back
                assert since[series] or was_away or value == last.get(series, 0.0)
        since = defaultdict(int, dict.fromkeys(exposed, 1))
        last.update(exposed)


@settings(max_examples=200)
@given(steps=steps)
def test_what_is_exposed_sums_to_all_that_came(steps: list[tuple[str, int, tuple[str, str, str], int]]) -> None:
    it = scored(LEAST_SERIES)
    for what, number, labels, amount in steps:
        if what == "scrape":
            it.scrape()
        elif what != "forget":  # then series may leave at once
            do(it, what, number, labels, amount)
    it.scrape()
    exposed = it.scrape()
    assert {family.name: total(exposed, family) for family in (*COUNTERS, TTFT)} == {
        family.name: it.added[family.name] for family in (*COUNTERS, TTFT)
    }


@settings(max_examples=60)
@given(victims=st.lists(names, max_size=8), culprit=names)
def test_text_and_numbers_say_the_same_whatever_tenants_are_called(victims: list[str], culprit: str) -> None:
    both = scored(), scored()
    for it in both:
        for victim in victims:
            it.scores.blame(victim, culprit, "kv_pinning", 0.1)
            it.scores.observe(TTFT, (victim,), buckets(0, 1), 0.07)
        it.scores.set(COVERAGE, (culprit,), 0.5)
        it.scrape()
        it.clock.passes(10)
    text = both[0].scores.exposition().decode()
    assert parse_exposition(text) == both[1].scores.exposed()


def test_names_that_differ_stay_apart_and_short_enough() -> None:
    long = [f"{'x' * 2000}{end}" for end in "ab"]
    shown = [label_value(name) for name in (*HOSTILE, *long, "\udc80", "\udc81")]
    assert len(set(shown)) == len(shown)
    assert max(len(name.encode()) for name in shown) <= MOST_BYTES
    assert label_value("x" * 300) == "x" * 300


def test_by_default_200_tenants_and_200_replicas_are_all_named_and_so_is_who_stalls_them() -> None:
    it = scored()
    tenants = [f"tenant-{number}" for number in range(200)]
    for number, tenant in enumerate(tenants):
        it.scores.admit(tenant, tenants[:number])
        for family in FAMILIES:
            if family.labels == ("replica",):
                (it.scores.add if family.kind is Kind.COUNTER else it.scores.set)(family, (f"r{number}",), 1)
        it.scores.blame(tenants[number - 1], tenant, "kv_pinning", 1)
    it.scrape()
    exposed = it.scrape()
    assert [series for series in exposed if OTHER in dict(series[1]).values()] == []
    assert all(exposed[blame(tenants[number - 1], tenants[number])] == 1 for number in range(200))


@pytest.mark.parametrize("budget", [LEAST_SERIES, 3000])
def test_a_crowd_of_every_kind_fills_the_budget_and_no_more(budget: int) -> None:
    it = scored(budget)
    for number in range(budget // 10):
        tenant, replica = f"tenant-{number}", f"replica-{number}"
        it.scores.admit(tenant, [f"tenant-{number // 2}", f"tenant-{number // 3}"])
        for family in FAMILIES:
            if family.kind is Kind.GAUGE and family.labels:
                it.scores.set(family, (tenant if "tenant" in family.labels else replica,), 1)
            elif family.labels == ("replica",):
                it.scores.add(family, (replica,), 1)
        for few in range(20):
            it.scores.blame(f"tenant-{number + few}", tenant, f"mechanism-{few}", 1)
            it.scores.add(JUDGED, (replica, f"verdict-{few}"), 1)
            it.scores.add(INCIDENTS, (f"verdict-{number}",), 1)
    for _ in range(2):
        text = it.scores.exposition().decode()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert 0.9 * budget < len(lines) <= budget


# --- who is (other) -------------------------------------------------------------------------------------------------


def crowd(it: Scored, count: int, cost: float = 1.0) -> None:
    for number in range(count):
        it.scores.add(STEP_TIME, (f"tenant-{number}",), cost)


def named(it: Scored) -> set[str]:
    return {dict(labels)["tenant"] for name, labels in it.scrape() if name == STEP_TIME.name}


def test_tenants_beyond_the_budget_are_other_and_counted_by_label() -> None:
    it = scored(LEAST_SERIES)
    crowd(it, 100)
    it.scrape()
    exposed = it.scrape()
    own = [labels for name, labels in exposed if name == STEP_TIME.name and ("tenant", OTHER) not in labels]
    assert 2 < len(own) < 100
    assert exposed[of(STEP_TIME, OTHER)] == 100 - len(own) == exposed[of(FOLDED, "tenant")]


def test_a_tenant_that_costs_more_gets_the_seat_of_the_cheapest_but_only_after_hours() -> None:
    it = scored(LEAST_SERIES)
    crowd(it, 100)
    before = named(it)
    for _ in range(100):
        crowd(it, 5)
        it.scores.add(STEP_TIME, ("dear",), 50.0)
        it.clock.passes(HOUR_S / 60)
    assert named(it) == before
    for _ in range(60):
        crowd(it, 5)
        it.scores.add(STEP_TIME, ("dear",), 50.0)
        it.clock.passes(HOUR_S / 60)
    assert named(it) - before == {"dear"}
    assert len(before - named(it)) == 1


def test_a_series_that_left_goes_on_from_its_value() -> None:
    it = scored(LEAST_SERIES)
    it.scores.add(STEP_TIME, ("back",), 7.0)
    it.scrape()
    assert it.scrape()[of(STEP_TIME, "back")] == 7
    it.clock.passes(3 * HOUR_S)
    crowd(it, 100)
    assert of(STEP_TIME, "back") not in it.scrape()
    it.scores.add(STEP_TIME, ("back",), 1.0)
    assert of(STEP_TIME, "back") not in it.scrape()  # (other) now
    it.clock.passes(3 * HOUR_S)
    it.scores.add(STEP_TIME, ("back",), 2.0)
    assert it.scrape()[of(STEP_TIME, "back")] == 7
    assert it.scrape()[of(STEP_TIME, "back")] == 9


def test_what_nobody_has_seen_of_a_series_that_left_is_others() -> None:
    it = scored(LEAST_SERIES)
    it.scores.add(STEP_TIME, ("unseen",), 7.0)
    it.clock.passes(3 * HOUR_S)
    crowd(it, 100)
    it.scrape()
    exposed = it.scrape()
    assert of(STEP_TIME, "unseen") not in exposed
    assert total(exposed, STEP_TIME) == 107


def test_a_culprit_is_named_at_once_though_the_budget_is_full_of_pairs_at_zero() -> None:
    it = scored(LEAST_SERIES)
    everybody = [f"tenant-{number}" for number in range(50)]
    for tenant in everybody:
        it.scores.admit(tenant, everybody)
    full = it.scrape()[of(SERIES)]
    it.scores.blame("tenant-1", "newcomer", "kv_pinning", 3.0)
    assert it.scrape()[blame("tenant-1", "newcomer")] == 0
    assert it.scrape()[blame("tenant-1", "newcomer")] == 3
    assert it.scrape()[of(SERIES)] <= full + 2  # FOLDED's own


def test_where_there_is_no_room_for_the_pair_the_culprit_is_named_and_the_victim_is_other() -> None:
    it = scored(LEAST_SERIES)
    for number in range(500):
        it.scores.blame(f"victim-{number}", "innocent", "kv_pinning", 1.0)
    it.scores.blame("chat", "newcomer", "kv_pinning", 3.0)
    it.scrape()
    assert it.scrape()[blame(OTHER, "newcomer")] == 3


def test_one_kind_of_label_can_not_take_the_room_of_another() -> None:
    it = scored(2000)
    for number in range(2000):
        it.scores.blame(f"victim-{number}", f"culprit-{number}", "kv_pinning", 1.0)
        it.scores.add(THROTTLED, ("loud", f"device-{number}", "power"), 1.0)
    it.scores.add(STEP_TIME, ("chat",), 1.0)
    it.scores.add(BUSY, ("quiet",), 1.0)
    it.scrape()
    exposed = it.scrape()
    assert exposed[of(STEP_TIME, "chat")] == 1
    assert exposed[of(THROTTLED, "loud", OTHER, "power")] > 0


def test_gauges_of_replicas_without_room_are_one_gauge_that_still_means_something() -> None:
    it = scored(LEAST_SERIES)
    for number in range(100):
        it.scores.set(RUNNING, (f"r{number}",), 2)
        it.scores.set(COVERAGE, (f"r{number}",), 0.5 if number == 99 else 1)
        it.scores.set(LAST_SEEN, (f"r{number}",), 1000 - number)
    exposed = it.scrape()
    assert total(exposed, RUNNING) == 200
    assert (exposed[of(COVERAGE, OTHER)], exposed[of(LAST_SEEN, OTHER)]) == (0.5, 901)
    for number in range(100):
        it.scores.forget_replica(f"r{number}")
    assert [series for series in it.scrape() if series[0] in (RUNNING.name, COVERAGE.name, LAST_SEEN.name)] == []


def test_a_replica_that_has_ended_makes_room_for_the_next_one() -> None:
    it = scored(LEAST_SERIES)
    for number in range(100):
        it.scores.add(BUSY, (f"r{number}",), 1)
    it.scrape()
    it.clock.passes(60)
    it.scores.add(BUSY, ("new",), 1)
    assert of(BUSY, "new") not in it.scrape()
    it.clock.passes(60)
    it.scores.forget_replica("r0")
    it.scores.add(BUSY, ("new",), 1)
    exposed = it.scrape()
    assert of(BUSY, "r0") not in exposed
    assert of(BUSY, "new") in exposed


# --- wrong use ------------------------------------------------------------------------------------------------------


def test_amounts_that_would_make_a_counter_fall_or_mean_nothing_are_refused() -> None:
    it = scored()
    for amount in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="only rises"):
            it.scores.blame("chat", "newcomer", "kv_pinning", amount)
    with pytest.raises(ValueError, match="only rises"):
        it.scores.observe(TTFT, ("chat",), buckets(-1), 1.0)
    with pytest.raises(ValueError, match="12 buckets"):
        it.scores.observe(TTFT, ("chat",), [1.0], 1.0)
    with pytest.raises(ValueError, match="gauge"):
        it.scores.add(COVERAGE, ("r",), 1.0)
    with pytest.raises(ValueError, match="counter"):
        it.scores.set(REQUESTS, ("chat",), 1.0)
    with pytest.raises(ValueError, match="labels"):
        it.scores.add(BLAME, ("chat",), 1.0)
    assert it.scrape() == {of(SERIES): 1}


def test_fewer_series_than_can_say_anything_are_refused() -> None:
    with pytest.raises(UsageError, match="499 series are too few: give at least 500"):
        Scores(most_series=499)
    bounds = {name: [0.01 * number for number in range(1, 100)] for name in BUCKETS}
    with pytest.raises(UsageError, match="too few"):
        Scores(most_series=LEAST_SERIES, bounds=bounds)
