"""Cases: what runs is drawn by seed, and tells nobody who did it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from stallscope.bench.cases import NAMES, SCENARIOS, families, make_case
from stallscope.bench.policies import UNKNOWN_TO_REPLAY
from stallscope.errors import UsageError
from stallscope.workloads.scenario import TelemetryFault, Traffic, load_variants, tenants_of
from tests.bench.stories import FLOOD, write_story

ALL = {file.stem: file for file in families()}
WITH_CULPRITS = [name for name, file in ALL.items() if make_case(file, 0).expect.culprits]


@pytest.mark.parametrize("family", ALL)
def test_every_family_can_be_made_and_says_what_is_right(family: str) -> None:
    case = make_case(ALL[family], 0)
    assert case == make_case(ALL[family], 0)
    assert case.family == case.scenario.name == family
    assert 150 <= case.scenario.duration_s <= 300
    assert case.expect.verdict
    assert case.injects == (family not in ("healthy", "flare_up"))
    assert 2 <= len(case.scenario.tenants) <= 6


@pytest.mark.parametrize("family", WITH_CULPRITS)
def test_culprits_are_named_from_the_pool_and_differ_by_seed(family: str) -> None:
    named = [make_case(ALL[family], seed).expect.culprits for seed in range(4)]
    assert {name for culprits in named for name in culprits} <= set(NAMES)
    assert len(set(named)) > 1


def test_a_disguise_changes_names_and_nothing_else(tmp_path: Path) -> None:
    growth = "{tenants: [amber, birch], from_s: 16, to_s: 26, grow: 2}"
    slow = "{frontend: slow_client, tenant: amber, from_s: 16, to_s: 26, delay_s: 1}"
    file = write_story(tmp_path, FLOOD, growth, slow, expect="{verdict: noisy_neighbor, culprits: [ember]}")
    scenario = make_case(file, 5).scenario
    names = [tenant.name for tenant in scenario.tenants]
    traffic = [one for one in scenario.inject if isinstance(one, Traffic)]
    assert scenario.expect is not None
    assert scenario.expect.culprits == tenants_of(traffic[0])
    assert tenants_of(traffic[1]) == tuple(names)
    plain = load_variants(file)["cpu"]
    assert [replace(one, name="") for one in scenario.tenants] == [replace(one, name="") for one in plain.tenants]


def test_a_fifth_runs_on_a_scheduler_that_replay_lacks_and_some_lose_telemetry() -> None:
    cases = [make_case(ALL[family], seed) for family in ("chunked_flood", "slot_exhaustion") for seed in range(100)]
    policies = Counter(case.scenario.engine.policy for case in cases)
    assert set(policies) == {"fcfs", *UNKNOWN_TO_REPLAY}
    assert 140 < policies["fcfs"] < 180
    assert 10 < sum(not case.telemetry_is_whole for case in cases) < 50


def test_a_family_that_is_about_its_policy_keeps_it() -> None:
    assert {make_case(ALL["prefill_first"], seed).scenario.engine.policy for seed in range(20)} == {"prefill_first"}


def test_lost_telemetry_is_nothing_that_happens() -> None:
    cases = [make_case(ALL["healthy"], seed) for seed in range(60)]
    assert any(isinstance(one, TelemetryFault) for case in cases for one in case.scenario.inject)
    assert not any(case.injects for case in cases)


def test_a_folder_without_scenarios_is_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no scenarios \(\*.yaml\) there$"):
        families(tmp_path)


def test_the_families_are_those_of_the_design() -> None:
    assert len(ALL) == 23
    assert {file.parent for file in ALL.values()} == {SCENARIOS}
