"""Thresholds: what is learned is what Prometheus will compare, from calm alone, and with its reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.alerts import settings as s
from stallscope.alerts.quantities import Counted
from stallscope.alerts.settings import Limit
from stallscope.alerts.thresholds import FromSamples, NoTeacher, Threshold, length
from stallscope.diagnosis.model import Confidence, Incident, Verdict
from stallscope.watch import families as f
from stallscope.watch.samples import Samples, Series, samples_of
from tests.alerts.unit_tests import STEP_S, UnitTest, needs_promtool

BEGIN_NS = 1_790_000_000_000_000_000
PAGE = Counted(f.BLAME, ("culprit",), 60)
LIMIT = Limit(0.1, "because")


def sampled(rises: dict[Series, list[float]]) -> Samples:
    """Counters by their rise a second before each scrape."""
    count = max(map(len, rises.values()))
    totals = {series: np.cumsum(np.array(values) * STEP_S).tolist() for series, values in rises.items()}
    scrapes = [
        (BEGIN_NS + number * STEP_S * 1_000_000_000, {series: values[number] for series, values in totals.items()})
        for number in range(count)
    ]
    return samples_of(scrapes)


def pair(culprit: str, victim: str = "chat", mechanism: str = "kv_pinning") -> Series:
    return (f.BLAME.name, tuple(sorted({"culprit": culprit, "victim": victim, "mechanism": mechanism}.items())))


def incident(first: int, last: int) -> Incident:
    """From one scrape to another."""
    times = [BEGIN_NS + number * STEP_S * 1_000_000_000 for number in (first, last)]
    return Incident("r0", *times, Verdict.NOISY_NEIGHBOR, Confidence.HIGH, None, (), (), 1.0, 1.0, (), None, 0.0, ())


def only(threshold: Threshold) -> float:
    assert not threshold.own
    return threshold.otherwise.value


def test_without_calm_traffic_the_floor_stands_and_says_so() -> None:
    level = NoTeacher().threshold(PAGE, LIMIT).otherwise
    assert (level.value, level.reason) == (
        0.1,
        "0.1 is the floor: because; no calm traffic was given to learn from",
    )


def test_a_tenant_that_is_blamed_in_calm_gets_a_threshold_of_its_own_with_its_reason() -> None:
    samples = sampled({pair("noisy"): [0.2] * 100, pair("quiet"): [0.001] * 100})
    threshold = FromSamples(samples, ()).threshold(PAGE, LIMIT)
    assert threshold.otherwise.value == 0.1
    assert threshold.own["noisy"].value == pytest.approx(0.6)
    assert threshold.own["noisy"].reason == "3 x the highest in 15 min of calm: 3 x 0.2 = 0.6"
    assert "0.001" in threshold.otherwise.reason
    assert threshold.exceeded_by(PAGE).count(" > ") == 2


def test_only_so_many_tenants_have_their_own_and_the_rest_share_the_next_highest() -> None:
    count = s.MOST_OWN + 3
    samples = sampled({pair(f"t{number:02}"): [0.1 * (number + 1)] * 100 for number in range(count)})
    threshold = FromSamples(samples, ()).threshold(PAGE, LIMIT)
    assert sorted(threshold.own) == [f"t{number:02}" for number in range(3, count)]
    assert threshold.otherwise.value == pytest.approx(0.9)


def test_replicas_share_one_threshold_as_tomorrow_s_have_other_names() -> None:
    quantity = Counted(f.JUDGED, ("replica",), 60)
    rises = {
        (f.JUDGED.name, (("replica", name), ("verdict", "overload"))): [rate] * 100
        for name, rate in (("a", 0.1), ("b", 0.3))
    }
    assert only(FromSamples(sampled(rises), ()).threshold(quantity, LIMIT)) == pytest.approx(0.9)


def test_a_share_can_t_be_asked_to_exceed_what_it_can_be() -> None:
    quantity = Counted(f.RECOMPUTED, (), 60, over=f.TOKENS)
    rises: dict[Series, list[float]] = {
        (f.RECOMPUTED.name, (("tenant", "chat"),)): [40.0] * 100,
        (f.TOKENS.name, (("phase", "decode"), ("tenant", "chat"))): [100.0] * 100,
    }
    threshold = FromSamples(sampled(rises), ()).threshold(quantity, Limit(0.05, "because", ceiling=0.8))
    assert only(threshold) == 0.8
    assert "would be more than can be" in threshold.otherwise.reason


def test_calm_without_any_of_it_is_learned_from_too() -> None:
    level = (
        FromSamples(sampled({pair("quiet"): [0.0] * 100}), ())
        .threshold(Counted(f.PREEMPTIONS, (), 300), LIMIT)
        .otherwise
    )
    assert (level.value, level.learned) == (0.1, True)
    assert level.reason.endswith("11 min of calm had none of it")


def test_too_little_calm_teaches_nothing_and_is_said() -> None:
    samples = sampled({pair("noisy"): [0.5] * 50})
    level = FromSamples(samples, ()).threshold(PAGE, LIMIT).otherwise
    assert level.value == 0.1
    assert "only 7 min of calm were given to windows of 1m, too short to learn from (10 min are needed)" in level.reason
    with_incident = FromSamples(sampled({pair("noisy"): [0.5] * 100}), [incident(40, 65)])
    assert only(with_incident.threshold(PAGE, LIMIT)) == 0.1


@given(st.integers(10, 190), st.integers(0, 100), st.floats(1, 1e6))
def test_nothing_is_learned_from_within_an_incident(first: int, scrapes: int, rate: float) -> None:
    last = min(first + scrapes, 199)
    calm = [0.05] * 300
    stalled = [rate if first <= number <= last else 0.05 for number in range(300)]
    # A rise that a scrape shows may be of the time before it, so an incident begins one earlier.
    incidents = [incident(first - 1, last)]
    learned = [
        FromSamples(sampled({pair("hog"): rises}), incidents).threshold(PAGE, LIMIT) for rises in (calm, stalled)
    ]
    assert learned[0].own["hog"].value == pytest.approx(0.15)
    assert learned[0].own["hog"].value == pytest.approx(learned[1].own["hog"].value)


def test_a_length_of_time_reads_as_one() -> None:
    assert [length(seconds) for seconds in (45, 60, 7800, 86_400, 5 * 86_400)] == [
        "45 s",
        "1 min",
        "2 h 10 min",
        "24 h",
        "5 days",
    ]


@needs_promtool
def test_what_is_computed_from_samples_is_what_prometheus_computes(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    series: dict[Series, list[float]] = {
        pair(culprit, victim, by): rng.exponential(1.0, 120).tolist()
        for culprit in ("a", "b")
        for victim in ("a", "c", "(other)")
        for by in ("kv_pinning", "head_of_line", "decode_drag")
    }
    series |= {
        (f.STEPS.name, (("replica", "r0"),)): [30.0] * 120,
        (f.STEPS_LOST.name, (("replica", "r0"),)): rng.exponential(1.0, 120).tolist(),
    }
    samples = sampled(series)
    test = UnitTest()
    for (name, labels), values in samples.values.items():
        test.scraped(name, dict(labels), values.tolist())
    quantities = [
        PAGE,
        Counted(f.BLAME, ("culprit",), 600, whole=True),
        Counted(f.BLAME, ("culprit", "mechanism"), 600, ("mechanism", ("kv_pinning", "head_of_line")), whole=True),
        Counted(f.STEPS_LOST, ("replica",), 600, over=f.STEPS),
        Counted(f.STEPS_LOST, (), 300),
    ]
    compared = 0
    for quantity in quantities:
        for key, values in quantity.of(samples).items():
            assert np.isnan(values[: quantity.window_s // STEP_S]).all()
            for number in (60, 75, 119):
                chosen = [f'{label}="{value}"' for label, value in zip(quantity.by, key, strict=True)]
                test.about(quantity.promql(*chosen), number * STEP_S, float(values[number]))
                compared += 1
    test.passes("groups: []", tmp_path)
    assert compared == 3 * (2 + 2 + 4 + 1 + 1)
