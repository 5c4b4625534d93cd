"""Truth: who is guilty is whose absence helps, whatever was injected beside."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from stallscope.bench.truth import InVirtualTime, Truth, find_truth
from stallscope.workloads.scenario import Scenario
from stallscope_engine.executors.virtual import StepCost
from tests.bench.stories import ANSWERS, FLOOD, RISER, story_case, write_story

GUILTY = "{verdict: noisy_neighbor, culprits: [ember], mechanism: [prefill_queue]}"


def truth_of(folder: Path, *inject: str, expect: str, **settings: int) -> Truth:
    truth, _ = find_truth(story_case(write_story(folder, *inject, expect=expect, **settings)), InVirtualTime(0))
    return truth


def test_the_culprit_is_who_did_it_and_not_who_grew_beside_it(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, FLOOD, RISER, expect=GUILTY)
    assert truth.is_scored
    assert truth.culprits == ("ember",)
    assert truth.effects["ember"] > 0.9
    assert truth.effects["birch"] < 0.1
    assert truth.excused == ()
    assert set(truth.requests) == {f"ember-{number:06d}" for number in range(1, len(truth.requests) + 1)}


def test_the_mechanism_is_measured_where_the_scenario_is_wrong_about_it(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, ANSWERS, expect=GUILTY, slots=8)
    assert "slot_exhaustion" in truth.mechanisms
    assert truth.relief["infinite slots"] > 0.8
    assert truth.relief["no token budget"] < 0.5
    right = truth_of(tmp_path, ANSWERS, expect=GUILTY.replace("prefill_queue", "slot_exhaustion"), slots=8)
    assert right.mechanisms == ("slot_exhaustion",)


def test_what_hurts_nobody_is_not_scored(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, RISER, expect="{verdict: noisy_neighbor, culprits: [birch]}")
    assert not truth.is_scored
    assert truth.culprits == ()


def test_usual_traffic_is_scored_and_nobodys_doing(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, expect="{verdict: overload}")
    assert truth.is_scored
    assert truth.verdicts == ("overload", "healthy")
    assert (truth.culprits, truth.harm) == ((), None)


def test_a_pause_is_the_engines_doing(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, "{engine: pause, at_s: 20, for_s: 4}", expect="{verdict: engine_stall}")
    assert truth.is_harmful
    assert truth.culprits == ()


def test_slow_clients_wait_for_what_the_engine_has_done(tmp_path: Path) -> None:
    slow = "{frontend: slow_client, tenant: amber, from_s: 10, to_s: 30, delay_s: 2}"
    truth = truth_of(tmp_path, slow, expect="{verdict: outside_engine}")
    assert truth.harm is not None
    assert (truth.harm.tenant, truth.harm.metric) == ("amber", "delivery")


class Restless:
    """Runs of which no two without the cause are alike, as on a machine that others use too."""

    start_ns = 0
    repeat = False

    def __init__(self) -> None:
        self.run = InVirtualTime(0)
        self.seen = 0

    def __call__(self, scenario: Scenario, inject: bool = True, cost: StepCost | None = None) -> pd.DataFrame:
        self.seen += not inject
        table = self.run(scenario, inject)
        return table.assign(ttft=table["ttft"] + 5.0 * (self.seen - 1)) if not inject else table


def test_in_real_time_harm_must_be_more_than_runs_differ_by_themselves(tmp_path: Path) -> None:
    case = story_case(write_story(tmp_path, FLOOD, expect=GUILTY))
    steady, _ = find_truth(case, InVirtualTime(0))
    restless, _ = find_truth(case, Restless())
    assert steady.is_harmful
    assert steady.harm is not None
    assert steady.harm.excess_s < 10
    assert not restless.is_harmful


def test_a_truth_survives_json(tmp_path: Path) -> None:
    truth = truth_of(tmp_path, FLOOD, expect=GUILTY)
    assert Truth.from_json(truth.to_json()) == truth
