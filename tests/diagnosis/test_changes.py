"""What a tenant did that chance does not make of its usual: found where it was put, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from stallscope.diagnosis.changes import Arrivals, Change, scan
from stallscope.diagnosis.timeline import Floats

S = 1_000_000_000
LAST = 170 * S


def at_random(rng: np.random.Generator, rate: float, since: float = 0, until: float = 170) -> Floats:
    return rng.uniform(since, until, rng.poisson(rate * (until - since)))


def arrivals(at: Floats, prompt: Floats, output: Floats | None = None) -> Arrivals:
    order = np.argsort(at, kind="stable")
    when = (at[order] * S).astype(np.int64)
    answers = np.full(len(at), 20.0) if output is None else output[order]
    return Arrivals(when, when + S, {"prompt tokens": prompt[order], "output tokens": answers})


def usual(rng: np.random.Generator, rate: float, median: float = 300, sigma: float = 0.8) -> Arrivals:
    at = at_random(rng, rate)
    return arrivals(at, rng.lognormal(np.log(median), sigma, len(at)), rng.lognormal(3, 0.6, len(at)))


def beside(one: Arrivals, at: Floats, prompt: Floats) -> Arrivals:
    """With more requests."""
    sizes = one.sizes
    answers = np.random.default_rng(len(at)).lognormal(3, 0.6, len(at))
    return arrivals(
        np.concatenate([one.at / S, at]),
        np.concatenate([sizes["prompt tokens"], prompt]),
        np.concatenate([sizes["output tokens"], answers]),
    )


def found(tenants: Sequence[Arrivals]) -> tuple[Change, ...]:
    return scan(tenants, 0, LAST).found


def test_chance_is_no_change() -> None:
    """Of 300 tenants whose sizes are lognormal, as those of real prompts are, next to none is said to have changed."""
    changed = 0
    for seed in range(75):
        rng = np.random.default_rng(seed)
        changed += len(
            found([usual(rng, rate, sigma=sigma) for rate, sigma in ((3, 0.75), (1, 0.9), (0.5, 0.6), (0.15, 0.5))])
        )
    assert changed <= 3


def test_the_longer_one_looks_the_more_chance_makes() -> None:
    """In six hours of twenty tenants there is a stretch that is unlikely in five minutes of one."""
    changed = possible = 0
    for seed in range(4):
        rng = np.random.default_rng(seed)
        tenants = []
        for _ in range(20):
            at = at_random(rng, 0.2, until=6 * 3600)
            tenants.append(arrivals(at, rng.lognormal(6, 1, len(at)), rng.lognormal(5, 0.8, len(at))))
        changes = scan(tenants, 0, 6 * 3600 * S)
        changed += len(changes.found)
        possible += len(changes.possible)
    assert changed == 0
    assert possible <= 20


@pytest.mark.parametrize("seed", range(10))
def test_a_burst_is_found_where_it_was(seed: int) -> None:
    rng = np.random.default_rng(seed)
    burst = at_random(rng, 3, 70, 110)
    steady, grown = usual(rng, 2), usual(rng, 1)
    changes = found([steady, beside(grown, burst, rng.lognormal(np.log(300), 0.8, len(burst)))])
    assert [change.tenant for change in changes] == [1]
    assert abs(changes[0].start / S - 70) < 6
    assert abs(changes[0].end / S - 110) < 6
    assert not changes[0].newcomer


@pytest.mark.parametrize("seed", range(10))
def test_a_few_huge_prompts_are_a_change_though_hardly_more_requests(seed: int) -> None:
    rng = np.random.default_rng(seed)
    changes = found([usual(rng, 2), beside(usual(rng, 0.7), rng.uniform(80, 110, 5), np.full(5, 12_000.0))])
    assert [(change.tenant, change.of) for change in changes] == [(1, "prompt tokens")]
    assert changes[0].count == 5


@pytest.mark.parametrize("seed", range(10))
def test_longer_answers_are_a_change(seed: int) -> None:
    rng = np.random.default_rng(seed)
    one = usual(rng, 1)
    inside = (one.at > 70 * S) & (one.at < 110 * S)
    one.sizes["output tokens"][inside] *= 20
    assert [(change.tenant, change.of) for change in found([usual(rng, 2), one])] == [(1, "output tokens")]


@pytest.mark.parametrize("seed", range(10))
def test_where_all_grow_alike_nobody_has_changed(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tenants = []
    for rate in (2.0, 1.5, 1.0, 0.8):
        more = at_random(rng, 0.6 * rate, 70, 120)
        tenants.append(beside(usual(rng, rate), more, rng.lognormal(np.log(300), 0.8, len(more))))
    assert found(tenants) == ()


def test_who_was_not_there_before_is_a_newcomer() -> None:
    rng = np.random.default_rng(0)
    changes = found([usual(rng, 2), arrivals(np.array([40.0, 55.0]), np.array([9000.0, 9000.0]))])
    assert [(change.tenant, change.newcomer, change.count) for change in changes] == [(1, True, 2)]


def test_who_is_there_from_first_to_last_is_no_newcomer() -> None:
    rng = np.random.default_rng(0)
    assert found([usual(rng, 2), arrivals(np.array([2.0, 90.0, 168.0]), np.full(3, 9000.0))]) == ()


@pytest.mark.parametrize("seed", range(5))
def test_bursty_arrivals_are_that_tenants_usual(seed: int) -> None:
    """Batches of 15 requests at once, all the time: a Poisson process would hardly have one."""
    rng = np.random.default_rng(seed)
    at = np.repeat(at_random(rng, 0.2), 15)
    assert found([usual(rng, 2), arrivals(at, rng.lognormal(np.log(300), 0.8, len(at)))]) == ()


def test_the_clock_and_the_order_of_tenants_play_no_part() -> None:
    rng = np.random.default_rng(3)
    burst = at_random(rng, 3, 70, 110)
    tenants = [usual(rng, 2), beside(usual(rng, 1), burst, np.full(len(burst), 300.0))]
    shift = 1_767_225_600 * S
    later = [Arrivals(one.at + shift, one.until + shift, one.sizes) for one in tenants]
    (change,) = found(tenants)
    (moved,) = scan(later, shift, shift + LAST).found
    assert (moved.start - shift, moved.end - shift, moved.chance) == (change.start, change.end, change.chance)
    (swapped,) = found(tenants[::-1])
    assert (swapped.tenant, swapped.start, swapped.chance) == (0, change.start, change.chance)


def test_nothing_is_no_change() -> None:
    none = np.zeros(0)
    assert found([]) == ()
    assert found([arrivals(none, none)]) == ()
    assert found([arrivals(np.array([80.0]), np.array([100.0]))])[0].newcomer


def test_who_was_there_for_one_stretch_only_leaves_nothing_to_look_at() -> None:
    """From the first second on, so that it is no newcomer: what is left without its change is nothing."""
    rng = np.random.default_rng(0)
    burst = at_random(rng, 4, 0, 30)
    (change,) = found([usual(rng, 2), arrivals(burst, rng.lognormal(np.log(300), 0.8, len(burst)))])
    assert change.tenant == 1
    assert not change.newcomer


@pytest.mark.parametrize("seed", range(5))
def test_when_all_traffic_ends_nobody_has_changed(seed: int) -> None:
    """A load test, and the time in which the engine works off what has come."""
    rng = np.random.default_rng(seed)
    tenants = []
    for _ in range(3):
        at = at_random(rng, 4, 0, 7)
        tenants.append(arrivals(at, rng.lognormal(np.log(300), 0.8, len(at))))
    assert found(tenants) == ()


@pytest.mark.parametrize("seed", range(5))
def test_who_sent_nothing_at_other_times_has_grown_with_the_others(seed: int) -> None:
    """All tenants but one straggler in one stretch: none of them stands out."""
    rng = np.random.default_rng(seed)
    tenants = [arrivals(np.array([160.0]), np.array([300.0]))]
    for _ in range(3):
        at = at_random(rng, 4, 0, 30)
        tenants.append(arrivals(at, rng.lognormal(np.log(300), 0.8, len(at))))
    assert [change for change in found(tenants) if not change.newcomer] == []
