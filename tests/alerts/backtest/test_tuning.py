"""Thresholds are raised just enough for the part that is tuned on, and the part held out is shown beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from stallscope.alerts.backtest import backtest
from stallscope.alerts.backtest.result import Backtest
from stallscope.alerts.backtest.tuning import Tuning, rounded_up
from stallscope.errors import UsageError
from tests.alerts.backtest.stories import PAGE, Stall, needs_promtool, rules, timeline

STALL = timeline(900, [Stall(100, 250)])
BUSY = Stall(300, 360, per_s=0.43)  # 0.43 x a whole window of a minute is the highest that the rule sees
BUSIER = Stall(1500, 1560, per_s=0.6)


def tuned(folder: Path, quiet: list[list[Stall]], text: str = PAGE, length_s: float = 1800) -> tuple[Backtest, Tuning]:
    made = [timeline(length_s, also=stalls, name=f"quiet-{at}") for at, stalls in enumerate(quiet)]
    result = backtest(rules(folder, text), [STALL], made, tuned=True)
    assert result.tuning is not None
    return result, result.tuning


@needs_promtool
def test_one_quiet_trace_is_tuned_on_its_first_half_and_judged_on_its_second(tmp_path: Path) -> None:
    result, tuning = tuned(tmp_path, [[BUSY]])
    (raised,) = tuning.raised
    assert (raised.before, raised.after) == (0.2, pytest.approx(0.43, abs=0.011))
    assert (tuning.before.tuned.pages, tuning.after.tuned.pages) == (1, 0)
    assert (tuning.before.held_out.pages, tuning.after.held_out.pages) == (0, 0)
    assert "the second half of quiet-0, 15 min, is held out" in tuning.how
    assert not result.found
    assert [fate.delay_s for fate in result.required] == [35.0]  # ten seconds later than before


@needs_promtool
def test_what_was_tuned_on_says_nothing_of_what_was_held_out(tmp_path: Path) -> None:
    result, tuning = tuned(tmp_path, [[BUSY, BUSIER]])
    assert (tuning.before.held_out.pages, tuning.after.held_out.pages) == (1, 1)
    assert result.found


@needs_promtool
def test_of_several_quiet_traces_the_last_is_held_out(tmp_path: Path) -> None:
    _, tuning = tuned(tmp_path, [[BUSIER], [BUSY]])
    assert tuning.how == "quiet-1 is held out"
    assert (tuning.before.held_out.pages, tuning.after.held_out.pages) == (1, 0)
    assert tuning.raised[0].after == pytest.approx(0.6, abs=0.011)


@needs_promtool
def test_a_rule_of_another_form_is_named_and_left_as_it_is(tmp_path: Path) -> None:
    text = PAGE.replace("> 0.2", "> 0.1 * 2")
    result, tuning = tuned(tmp_path, [[BUSY]], text)
    assert [(one.after, one.reason) for one in tuning.raised] == [(None, "it is not of the form EXPR > NUMBER")]
    assert tuning.after.tuned.pages == 1
    assert result.rules.source == text
    assert result.found


@needs_promtool
def test_rules_that_are_quiet_stay_as_they_are(tmp_path: Path) -> None:
    result, tuning = tuned(tmp_path, [[]])
    assert tuning.raised == ()
    assert result.rules.alerts[0].expression.endswith("> 0.2")


@needs_promtool
def test_an_expression_of_several_lines_is_raised_before_its_condition(tmp_path: Path) -> None:
    text = PAGE.replace("[1m])) > 0.2", "[1m])) > 0.2  # 0.3\n      and on (culprit)\n      vector(1) > 0.2")
    text = text.replace("expr: sum by (culprit) (", "expr: |\n      sum by (culprit) (").replace(
        "and on (culprit)", "and on ()"
    )
    result, _ = tuned(tmp_path, [[BUSY]], text)
    assert result.rules.alerts[0].expression == (
        "sum by (culprit) (rate(stallscope_blame_seconds_total[1m])) > 0.43  # 0.3\nand on ()\nvector(1) > 0.2\n"
    )


@needs_promtool
def test_a_ticket_is_not_raised(tmp_path: Path) -> None:
    _, tuning = tuned(tmp_path, [[BUSY]], PAGE.replace("severity: page", "severity: ticket"))
    assert tuning.raised == ()


@needs_promtool
def test_the_tuned_rule_says_why(tmp_path: Path) -> None:
    result, _ = tuned(tmp_path, [[BUSY]])
    rule = yaml.safe_load(result.rules.own_text())["groups"][0]["rules"][0]
    assert rule["annotations"]["catches"] == "noisy_neighbor"
    assert rule["annotations"]["threshold_tuned"].startswith("raised from 0.2 to 0.43: ")
    assert rule["expr"] == "sum by (culprit) (rate(stallscope_blame_seconds_total[1m])) > 0.43"


@given(st.floats(-1e12, 1e12).filter(lambda value: value == 0 or abs(value) > 1e-12), st.booleans())
def test_rounding_up_is_up_and_not_far(value: float, beyond: bool) -> None:
    up = rounded_up(value, beyond=beyond)
    assert up > value if beyond else up >= value
    assert up - value <= max(abs(value) * 0.2, 0.01)


def test_tuning_without_quiet_traces_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--quiet-on"):
        backtest(rules(tmp_path), [STALL], tuned=True)
