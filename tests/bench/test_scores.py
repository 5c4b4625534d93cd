"""Scores: what counts for which, and intervals as textbooks have them."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest

from stallscope.bench.answers import Answer, Predicted
from stallscope.bench.paired import Harm
from stallscope.bench.scores import Judged, Score, calibration_error, proportion, resampled, score_all, score_rival
from stallscope.bench.truth import Truth

HARM = Harm("chat", "ttft", 0.9, 0, 60, 1.0, 0.1)
GUILTY = Truth(
    "flood", "cpu", 0, "fcfs", True, True, ("noisy_neighbor",), ("batch",), ("search",), {"batch": 0.9, "search": 0.1},
    ("prefill_queue",), {}, ("batch-000001",), HARM, 0,
)  # fmt: skip
HEALTHY = replace(GUILTY, injects=False, verdicts=("healthy",), culprits=(), excused=(), mechanisms=(), harm=None)
STALL = replace(GUILTY, verdicts=("engine_stall",), culprits=(), excused=(), mechanisms=())
RIGHT = Answer("noisy_neighbor", ("batch",), ("batch",), "prefill_queue", "batch-000001")


def judged(truth: Truth, answer: Answer, **rivals: str) -> Judged:
    return Judged("x", truth, answer, rivals)


def scores(*runs: Judged) -> dict[str, Score]:
    return {score.name.strip(): score for score in score_all(runs)}


def test_a_right_answer_is_right_in_every_way() -> None:
    run = judged(GUILTY, RIGHT)
    found = scores(run)
    for name in ("right verdict", "culprit first, harm at least doubled", "mechanism", "request"):
        assert found[name].value == 1
    assert found["false accusation, bystander"].value == 0
    assert not run.fails


def test_a_bystander_is_falsely_accused_and_an_excused_tenant_is_not() -> None:
    both = replace(RIGHT, culprits=("batch", "search"), accused=("batch", "search"))
    assert judged(GUILTY, both).falsely_accused == ()
    assert judged(GUILTY, both).set_f1 == 1
    wrong = replace(RIGHT, culprits=("batch", "chat"), accused=("batch", "chat"))
    assert judged(GUILTY, wrong).falsely_accused == ("chat",)
    assert judged(GUILTY, wrong).set_f1 == pytest.approx(2 / 3)
    assert judged(GUILTY, wrong).fails


def test_any_name_is_false_where_nobody_did_it() -> None:
    found = scores(judged(HEALTHY, RIGHT), judged(HEALTHY, Answer("healthy")))
    assert found["false accusation, no culprit"].value == 0.5
    assert found["right verdict"].value == 0.5


def test_harm_that_nobody_notices_counts_for_false_accusations_only() -> None:
    unnoticed = replace(GUILTY, culprits=(), harm=replace(HARM, with_s=0.11))
    run = judged(unnoticed, replace(RIGHT, accused=("chat",)))
    found = scores(run)
    assert found["right verdict"].runs == found["mechanism"].runs == 0
    assert found["false accusation, no culprit"].value == 1
    assert run.fails


def test_who_lost_telemetry_may_say_so() -> None:
    lost = replace(GUILTY, telemetry_is_whole=False, verdicts=("noisy_neighbor", "insufficient_data"))
    run = judged(lost, Answer("insufficient_data"))
    assert run.verdict_is_right
    assert not run.must_name
    assert not run.fails
    assert judged(GUILTY, Answer("insufficient_data")).fails


def test_harm_splits_who_is_named_first() -> None:
    milder = replace(GUILTY, harm=replace(HARM, without_s=0.7))
    found = scores(judged(GUILTY, RIGHT), judged(milder, Answer("overload")))
    assert (found["culprit first, harm at least doubled"].value, found["culprit first, less"].value) == (1, 0)


def test_workload_and_engine_are_told_apart() -> None:
    found = scores(judged(GUILTY, RIGHT), judged(STALL, Answer("engine_stall")), judged(STALL, Answer("overload")))
    assert found["workload or engine, F1"].value == pytest.approx(2 / 3)


def test_a_rival_is_scored_on_the_runs_it_was_asked_for() -> None:
    runs = [judged(GUILTY, RIGHT, rate="batch"), judged(GUILTY, RIGHT, rate="chat"), judged(HEALTHY, RIGHT)]
    score = score_rival("rate", runs)
    assert (score.value, score.runs) == (0.5, 2)


def test_calibration_compares_changes_of_the_same_percentile() -> None:
    arrival = [float(second) for second in range(60)]
    pairs = pd.DataFrame({"tenant": "chat", "arrival_s": arrival, "ttft": 1.0, "ttft_without": 0.2})
    one = Predicted(("batch",), "chat", "ttft", 0.9, 0, 60, 1.0, 0.3)
    answer = replace(RIGHT, predictions=(one,))
    assert calibration_error(GUILTY, pairs, answer) == pytest.approx(0.1)
    for other in (replace(one, changed=("search",)), replace(one, tenant="batch"), replace(one, to_s=5)):
        assert calibration_error(GUILTY, pairs, replace(RIGHT, predictions=(other,))) is None


def test_intervals_are_wilsons_and_the_bootstraps() -> None:
    share = proportion("x", [True] * 9 + [False])
    assert (share.low, share.high) == (pytest.approx(0.596, abs=0.001), pytest.approx(0.982, abs=0.001))
    mean = resampled("x", [0.0, 1.0] * 50, lambda values: float(values.mean()))
    assert mean.value == 0.5
    assert (mean.low, mean.high) == (pytest.approx(0.4, abs=0.03), pytest.approx(0.6, abs=0.03))
    assert proportion("x", []).runs == 0
