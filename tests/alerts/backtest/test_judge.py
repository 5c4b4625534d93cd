"""What fired held against incidents: caught, too late, missed, by a wrong name, or for nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.alerts.backtest.figures import calm, share
from stallscope.alerts.backtest.firing import Firing, Run
from stallscope.alerts.backtest.judge import GRACE_S, Answer, Outcome, Verdict, judge
from stallscope.alerts.backtest.rulefile import RuleFile
from stallscope.alerts.backtest.timeline import Timeline, grid_of
from stallscope.diagnosis import model
from stallscope.watch.samples import Samples, Series
from tests.alerts.backtest.stories import Stall, ns, rules, timeline

FILE = """
groups:
- name: fast
  interval: 10s
  rules:
  - {alert: Page, expr: x, labels: {severity: page}, annotations: {catches: noisy_neighbor}}
  - {alert: Ticket, expr: x, labels: {severity: ticket}, annotations: {catches: noisy_neighbor overload}}
  - {alert: Engine, expr: x, labels: {severity: page}, annotations: {catches: engine_stall}}
  - {alert: Slo, expr: x, labels: {severity: ticket}, annotations: {names: victim}}
- name: slow
  interval: 40s
  rules:
  - {alert: SlowPage, expr: x, labels: {severity: critical}, annotations: {catches: noisy_neighbor}}
"""
PAGE, TICKET, ENGINE, SLO, SLOW = range(5)


@pytest.fixture
def read(tmp_path: Path) -> RuleFile:
    return rules(tmp_path, FILE)


def fire(alert: int, start_s: float, end_s: float, **labels: str) -> Firing:
    return Firing(alert, tuple(sorted(labels.items())), ns(start_s), ns(end_s), False)


def judged(
    read: RuleFile,
    firings: Sequence[Firing],
    stalls: Sequence[Stall],
    *,
    length_s: float = 2000,
    reasons: Sequence[str] = ("",) * 5,
) -> Verdict:
    made = timeline(length_s, stalls)
    return judge(read, Run(made, grid_of(made, 10), tuple(reasons), tuple(firings), ()), 60)


def answers(verdict: Verdict) -> list[Answer]:
    return [fate.answer for fate in verdict.fates]


def outcomes(verdict: Verdict) -> list[Outcome]:
    return [one.outcome for one in verdict.firings]


def test_a_page_within_the_budget_catches_a_lasting_incident(read: RuleFile) -> None:
    verdict = judged(read, [fire(PAGE, 160, 300, tenant="reasoner")], [Stall(100, 300)])
    (fate,) = verdict.fates
    assert (fate.answer, fate.required, fate.alert, fate.delay_s) == (Answer.CAUGHT, True, PAGE, 60.0)


def test_a_page_after_the_budget_is_late_and_none_is_a_miss(read: RuleFile) -> None:
    assert answers(judged(read, [fire(PAGE, 170, 300)], [Stall(100, 300)])) == [Answer.LATE]
    assert answers(judged(read, [], [Stall(100, 300)])) == [Answer.MISSED]


def test_a_ticket_is_not_enough_for_a_lasting_incident_but_for_a_short_one(read: RuleFile) -> None:
    assert answers(judged(read, [fire(TICKET, 120, 300)], [Stall(100, 300)])) == [Answer.MISSED]
    assert answers(judged(read, [fire(TICKET, 120, 300)], [Stall(100, 160)])) == [Answer.TICKET]
    assert answers(judged(read, [], [Stall(100, 160)])) == [Answer.NOT_REQUIRED]


def test_an_incident_that_no_page_is_for_is_not_required(read: RuleFile) -> None:
    verdict = judged(read, [fire(TICKET, 120, 300)], [Stall(100, 300, verdict=model.Verdict.OVERLOAD)])
    assert [(fate.required, fate.answer, fate.reason) for fate in verdict.fates] == [
        (False, Answer.TICKET, "no page is for it")
    ]


@pytest.mark.parametrize(
    ("start_s", "outcome"),
    [(99, Outcome.FALSE), (100, Outcome.CAUGHT), (300 + GRACE_S, Outcome.CAUGHT), (301 + GRACE_S, Outcome.FALSE)],
)
def test_what_begins_outside_an_incident_and_its_grace_is_false(
    read: RuleFile, start_s: float, outcome: Outcome
) -> None:
    assert outcomes(judged(read, [fire(PAGE, start_s, start_s + 500)], [Stall(100, 300)])) == [outcome]


def test_an_alert_that_always_fires_catches_nothing(read: RuleFile) -> None:
    verdict = judged(read, [fire(PAGE, 0, 2000)], [Stall(100, 300), Stall(900, 1100)])
    assert outcomes(verdict) == [Outcome.FALSE]
    assert answers(verdict) == [Answer.MISSED, Answer.MISSED]


def test_one_page_may_cover_two_incidents_that_follow_each_other(read: RuleFile) -> None:
    verdict = judged(read, [fire(PAGE, 130, 700)], [Stall(100, 300), Stall(450, 600)])
    assert answers(verdict) == [Answer.CAUGHT, Answer.CAUGHT]
    assert [fate.delay_s for fate in verdict.fates] == [30, 0]


@pytest.mark.parametrize("label", ["tenant", "culprit"])
def test_another_tenants_name_catches_nothing(read: RuleFile, label: str) -> None:
    verdict = judged(read, [fire(PAGE, 130, 300, **{label: "chat"})], [Stall(100, 300)])
    assert outcomes(verdict) == [Outcome.WRONG_NAME]
    assert answers(verdict) == [Answer.MISSED]


def test_a_rule_that_names_victims_is_right_with_a_victim(read: RuleFile) -> None:
    stalls = [Stall(100, 160)]
    assert outcomes(judged(read, [fire(SLO, 130, 300, tenant="chat")], stalls)) == [Outcome.CAUGHT]
    assert outcomes(judged(read, [fire(SLO, 130, 300, tenant="reasoner")], stalls)) == [Outcome.WRONG_NAME]


def test_a_page_in_an_incident_of_another_kind_is_not_false_and_catches_nothing(read: RuleFile) -> None:
    verdict = judged(read, [fire(ENGINE, 130, 300)], [Stall(100, 300)])
    assert outcomes(verdict) == [Outcome.OTHER_KIND]
    assert answers(verdict) == [Answer.MISSED]


def test_where_all_pages_that_are_for_it_prove_nothing_an_incident_is_not_provable(read: RuleFile) -> None:
    some = ["needs x", "", "", "", ""]
    every = ["needs x", "", "", "", "needs x"]
    assert answers(judged(read, [], [Stall(100, 300)], reasons=some)) == [Answer.MISSED]
    assert answers(judged(read, [], [Stall(100, 300)], reasons=every)) == [Answer.NOT_PROVABLE]


def test_an_incident_whose_budget_the_trace_does_not_reach_is_not_provable(read: RuleFile) -> None:
    assert answers(judged(read, [], [Stall(1950, 2020)], length_s=2000)) == [Answer.NOT_PROVABLE]


def test_a_group_that_is_evaluated_less_often_may_be_later_by_the_difference(read: RuleFile) -> None:
    verdict = judged(read, [fire(SLOW, 140, 300)], [Stall(100, 300)])
    assert answers(verdict) == [Answer.LATE]
    assert verdict.fates[0].delay_s == 70


def test_calm_is_what_is_in_no_incident_nor_its_grace(read: RuleFile) -> None:
    assert judged(read, [], []).calm_s == 2010
    assert judged(read, [], [Stall(100, 300), Stall(350, 400)]).calm_s == 2010 - (520 - 100)


SPANS = st.tuples(st.integers(0, 190), st.integers(1, 60)).map(lambda one: (one[0] * 10, one[0] * 10 + one[1] * 10))


@given(st.lists(SPANS, max_size=4), st.lists(SPANS, max_size=6))
def test_each_firing_has_one_outcome_and_each_catch_is_within_its_incident(
    stalls: list[tuple[int, int]], firings: list[tuple[int, int]]
) -> None:
    made = [Stall(start, end) for start, end in stalls]
    with tempfile.TemporaryDirectory() as folder:
        read = rules(Path(folder), FILE)
    verdict = judged(read, [fire(PAGE, start, end) for start, end in firings], made)
    for one in verdict.firings:
        inside = [s for s in made if ns(s.start_s) <= one.firing.start_ns <= ns(s.end_s + GRACE_S)]
        assert (one.outcome is Outcome.FALSE) == (not inside)
        for number, delay in one.delay_s.items():
            assert 0 <= delay <= made[number].end_s + GRACE_S - made[number].start_s
    for fate, stall in zip(verdict.fates, made, strict=True):
        assert fate.required == (stall.end_s - stall.start_s > 60)
        assert (fate.answer is Answer.CAUGHT) <= any(fate.number in one.delay_s for one in verdict.firings)


def test_shares_and_rates_say_what_chance_leaves_open() -> None:
    two = share(2, 2)
    assert two is not None
    assert two.low == pytest.approx(0.342, abs=1e-3)  # Wilson: n / (n + z²)
    assert share(0, 0) is None
    week_s = 7 * 86400
    assert calm(week_s, 0).most_per_week == pytest.approx(3.0, abs=0.01)  # the rule of three
    assert calm(week_s, 2).most_per_week == pytest.approx(6.30, abs=0.01)  # a table of Poisson's bounds
    assert calm(0, 0).most_per_week is None


def test_what_fires_once_the_recording_is_over_is_not_false_and_that_time_is_not_calm(read: RuleFile) -> None:
    whole = timeline(2000)
    seen: Series = ("stallscope_last_span_timestamp_seconds", (("replica", "r"),))
    last_s = np.minimum(whole.samples.times_ns / 1e9, ns(1500) / 1e9)
    made = Timeline("ended", Samples(whole.samples.times_ns, {**whole.samples.values, seen: last_s}), ())
    firings = (fire(PAGE, 1495, 1700), fire(PAGE, 1515, 1700))
    verdict = judge(read, Run(made, grid_of(made, 10), ("",) * 5, firings, ()), 60)
    assert outcomes(verdict) == [Outcome.FALSE, Outcome.AFTER]
    assert verdict.calm_s == 1510
    assert grid_of(made, 10).length_s == 1500
