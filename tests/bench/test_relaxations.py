"""Relaxations: what a run is short of is what must be made endless for its harm to go."""

from __future__ import annotations

from pathlib import Path

import pytest

from stallscope.bench.paired import outcomes, pair, same_harm, worst_harm
from stallscope.bench.policies import registered
from stallscope.bench.relaxations import RELAXATIONS, relaxed, worth_trying
from stallscope.workloads.recording import simulate
from stallscope.workloads.scenario import load_scenario
from tests.bench.stories import ANSWERS, FLOOD, RESIDENTS, write_story

NAMED = {relaxation.name: relaxation for relaxation in RELAXATIONS}


@pytest.mark.parametrize(
    ("inject", "settings", "right", "wrong"),
    [
        (FLOOD, {"budget": 512}, "no token budget", "infinite KV"),
        (FLOOD, {"budget": 512}, "prefill is free", "infinite slots"),
        (ANSWERS, {"slots": 8}, "infinite slots", "no token budget"),
        (RESIDENTS, {"blocks": 900}, "infinite KV", "infinite slots"),
    ],
)
def test_the_harm_goes_under_the_right_relaxation_alone(
    tmp_path: Path, inject: str, settings: dict[str, int], right: str, wrong: str
) -> None:
    scenario = load_scenario(write_story(tmp_path, inject, **settings))
    usual = outcomes(scenario, 0, False, simulate(scenario, 0, inject=False))
    harm = worst_harm(pair(outcomes(scenario, 0, True, simulate(scenario, 0)), usual), ["amber", "birch"])
    assert harm is not None
    assert harm.counts
    left = {}
    with registered():
        for name in (right, wrong):
            changed, cost = relaxed(scenario, NAMED[name])
            run = outcomes(changed, 0, True, simulate(changed, 0, cost=cost))
            left[name] = same_harm(pair(run, usual), harm).excess_s / harm.excess_s
    assert left[right] < 0.2
    assert left[wrong] > 0.5


def test_expected_mechanisms_are_tried_first_and_what_changes_nothing_never(tmp_path: Path) -> None:
    scenario = load_scenario(write_story(tmp_path, FLOOD))
    names = [relaxation.name for relaxation in worth_trying(scenario, ["slot_exhaustion"])]
    assert names[0] == "infinite slots"
    assert "decodes run in every step" not in names
    assert "skip what does not fit" in names
