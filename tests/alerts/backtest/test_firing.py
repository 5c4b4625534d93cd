"""Prometheus evaluates: windows, for, keep_firing_for, recording rules and names behave as they will."""

from __future__ import annotations

from pathlib import Path

import pytest

from stallscope.alerts.backtest.firing import Run, evaluate, proof
from stallscope.alerts.backtest.promtool import run_tests
from stallscope.alerts.backtest.provable import reads
from stallscope.alerts.backtest.rulefile import TAG
from stallscope.alerts.promtool import RULES
from stallscope.errors import StallscopeError, UsageError
from tests.alerts.backtest.stories import PAGE, Stall, blamed, needs_promtool, rules, timeline

pytestmark = needs_promtool


def alert(expression: str, more: str = "labels: {severity: page}", name: str = "A") -> str:
    return f"\n  - alert: {name}\n    expr: {expression}\n    {more}"


def group(*alerts: str) -> str:
    return "groups:\n- name: g\n  rules:" + "".join(alerts) + "\n"


def fired(folder: Path, text: str, stalls: list[Stall], length_s: float = 600) -> list[tuple[int, float, float]]:
    """Which alert fired from when to when, s after the first scrape."""
    run = ran(folder, text, stalls, length_s)
    first_ns = int(run.timeline.samples.times_ns[0])
    return [(one.alert, (one.start_ns - first_ns) / 1e9, (one.end_ns - first_ns) / 1e9) for one in run.firings]


def ran(folder: Path, text: str, stalls: list[Stall], length_s: float = 600) -> Run:
    read = rules(folder, text)
    return evaluate(read, reads(read), timeline(length_s, stalls))


def test_a_window_of_one_scrape_interval_never_has_two_samples(tmp_path: Path) -> None:
    text = group(
        alert("rate(stallscope_blame_seconds_total[10s]) > 0"), alert("rate(stallscope_blame_seconds_total[20s]) > 0")
    )
    assert fired(tmp_path, text, [Stall(100, 200)]) == [(1, 115, 205)]


def test_for_delays_and_keep_firing_for_holds(tmp_path: Path) -> None:
    rate = "rate(stallscope_blame_seconds_total[20s]) > 0"
    text = group(
        alert(rate, "for: 30s"), alert(rate, "keep_firing_for: 1m", "B"), alert(rate.replace("> 0", "> 7"), "for: 1s")
    )
    assert fired(tmp_path, text, [Stall(100, 200)]) == [(1, 115, 265), (0, 145, 205)]


def test_recording_rules_work(tmp_path: Path) -> None:
    recording = "\n  - record: r:blame\n    expr: sum by (culprit) (rate(stallscope_blame_seconds_total[1m]))"
    assert fired(tmp_path, group(recording, alert("r:blame > 0.2")), [Stall(100, 200)]) == [(0, 125, 235)]


def test_rules_of_one_name_are_told_apart(tmp_path: Path) -> None:
    rate = "rate(stallscope_blame_seconds_total[20s]) > 0"
    ticket = alert(rate.replace("20s", "1m"), "labels: {severity: ticket}")
    text = group(alert(rate), ticket, alert(rate.replace("> 0", "> 2")))
    assert fired(tmp_path, text, [Stall(100, 200)]) == [(0, 115, 205), (1, 115, 245)]


def test_rules_that_share_a_series_in_prometheus_are_refused_with_the_way_out(tmp_path: Path) -> None:
    rate = "rate(stallscope_blame_seconds_total[20s]) > 0"
    with pytest.raises(UsageError, match="two alerts of this name have the same labels"):
        ran(tmp_path, group(alert(rate), alert(rate.replace("20s", "1m"))), [Stall(100, 200)])


def test_a_tenant_named_like_a_template_stays_a_name(tmp_path: Path) -> None:
    hostile = '{{ $labels.x }}"}, {a="\\\n🦙' + "x" * 300
    run = ran(tmp_path, PAGE, [Stall(100, 200, hostile)])
    (one,) = run.firings
    assert dict(one.labels) == {"alertname": "Stalls", "culprit": hostile, "severity": "page", "tenant": hostile}


def test_the_firing_at_the_end_is_open(tmp_path: Path) -> None:
    assert [one.is_open for one in ran(tmp_path, PAGE, [Stall(100, 200), Stall(500, 600)]).firings] == [False, True]


def test_a_series_that_goes_away_resolves_the_alert_at_once(tmp_path: Path) -> None:
    made = timeline(300, [Stall(100, 300)])
    series = ("stallscope_blame_seconds_total", blamed("reasoner"))
    values = made.samples.values[series]
    values[20:] = float("nan")
    read = rules(tmp_path, group(alert("stallscope_blame_seconds_total > 0")))
    (one,) = evaluate(read, reads(read), made).firings
    assert (one.end_ns - int(made.samples.times_ns[0])) / 1e9 == 195


def test_what_a_rule_can_not_be_proven_of_does_not_fire_and_the_others_do(tmp_path: Path) -> None:
    text = group(
        alert("absent(vllm:num_requests_waiting)"),
        alert("sum(rate(stallscope_blame_seconds_total[6h])) > 0", name="B"),
        alert("rate(stallscope_blame_seconds_total[1m]) > 0", name="C"),
    )
    run = ran(tmp_path, text, [Stall(100, 200)])
    assert run.reasons == ("needs vllm:num_requests_waiting", "looks back 6 h, the trace has 10 min", "")
    assert {one.alert for one in run.firings} == {2}
    assert 'alertname=~"C"' in run.expected[0].expression


def test_nothing_is_asked_where_nothing_is_provable(tmp_path: Path) -> None:
    run = ran(tmp_path, group(alert("absent(up)")), [Stall(100, 200)])
    assert (run.firings, run.expected) == ((), ())


def test_a_rule_that_can_not_be_evaluated_is_an_error_of_its_user(tmp_path: Path) -> None:
    text = group(alert("stallscope_blame_seconds_total * on() stallscope_blame_seconds_total > 0"))
    with pytest.raises(UsageError, match="duplicate series") as refused:
        ran(tmp_path, text, [Stall(100, 200), Stall(100, 200, "other")])
    assert "\n" not in str(refused.value)


def test_rules_that_depend_on_the_label_that_tells_them_apart_are_not_proven(tmp_path: Path) -> None:
    text = group(
        alert("rate(stallscope_blame_seconds_total[1m]) > 0"), alert(f'count(ALERTS{{{TAG}=~".+"}}) > 0', name="B")
    )
    with pytest.raises(StallscopeError, match="fire otherwise with one more label"):
        ran(tmp_path, text, [Stall(100, 200)])


def test_the_proof_passes_and_fails_once_a_rule_is_changed(tmp_path: Path) -> None:
    read = rules(tmp_path, PAGE)
    run = evaluate(read, reads(read), timeline(400, [Stall(100, 200, 'x"y')]))
    lines = list(proof(read, RULES, reads(read), [run, run]))
    assert run_tests(PAGE, lines, "rules") == []
    assert len(run_tests(PAGE.replace("[1m]", "[30s]"), lines, "rules")) > 0


def test_the_fastest_group_sets_the_pace(tmp_path: Path) -> None:
    assert ran(tmp_path, PAGE.replace("10s", "30s"), []).grid.evaluation_ms == 30_000
    assert ran(tmp_path, PAGE.replace("10s", "5s"), []).grid.phase_ms == 2_500
