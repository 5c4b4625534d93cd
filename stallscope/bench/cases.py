"""A scenario file and a seed to one case: a variant, names that tell nothing, and conditions that spare no analyzer."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from stallscope.bench.policies import UNKNOWN_TO_REPLAY, registered
from stallscope.errors import UsageError
from stallscope.workloads.draws import Literal, chance
from stallscope.workloads.scenario import (
    AddedTraffic,
    Expect,
    Growth,
    Injection,
    Scenario,
    SlowClient,
    TelemetryAggregate,
    TelemetryDrop,
    TelemetryFault,
    Traffic,
    load_variants,
    tenants_of,
)

SCENARIOS = Path(__file__).parent / "scenarios"
NAMES = (
    *("amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heron", "iris", "jade", "kelp", "lark", "maple"),
    *("north", "olive", "pearl", "quartz", "river", "sable", "tundra", "umber", "violet", "willow", "zephyr"),
)
UNKNOWN_POLICY_SHARE = 0.2
DROP_SHARE, MOST_DROPPED, LEAST_DROPPED = 0.1, 0.03, 0.01
AGGREGATE_SHARE = 0.03


@dataclass(frozen=True, slots=True)
class Case:
    """One run to be judged. ``family`` is the scenario file's name; ``scenario`` is what really runs."""

    family: str
    variant: str
    seed: int
    scenario: Scenario

    @property
    def expect(self) -> Expect:
        """Raises UsageError where the scenario doesn't say what is right."""
        if self.scenario.expect is None:
            raise UsageError(f"scenario {self.family} has no expect: what would a right answer be?")
        return self.scenario.expect

    @property
    def telemetry_is_whole(self) -> bool:
        return not any(isinstance(one, TelemetryFault) for one in self.scenario.inject)

    @property
    def injects(self) -> bool:
        """Whether anything happens in it but usual traffic."""
        return any(not isinstance(one, TelemetryFault) for one in self.scenario.inject)


def families(folder: Path = SCENARIOS) -> list[Path]:
    """Scenario files of a folder, by name. Raises UsageError where there are none."""
    files = sorted(folder.glob("*.yaml"))
    if not files:
        raise UsageError(f"{folder}: no scenarios (*.yaml) there")
    return files


def make_case(file: Path, seed: int) -> Case:
    """What ``seed`` makes of a scenario file: one of its variants, each as likely, disguised and made hostile."""
    variants = _variants(file, file.stat().st_mtime_ns if file.exists() else 0)
    family = file.stem
    names = list(variants)
    variant = names[int(chance(seed, "variant", family) * len(names))]
    return Case(family, variant, seed, _hostile(_disguised(variants[variant], family, seed), family, seed))


@cache
def _variants(file: Path, written_ns: int) -> dict[str, Scenario]:
    """The variants in a file that was last written then: reading one takes longer than all that is drawn from it."""
    return load_variants(file)


def _disguised(scenario: Scenario, family: str, seed: int) -> Scenario:
    """The scenario with all tenants under other names, drawn from the same pool for all families."""
    injected = [name for one in scenario.inject if isinstance(one, Traffic) for name in tenants_of(one)]
    own = list(dict.fromkeys([*(tenant.name for tenant in scenario.tenants), *injected]))
    drawn = random.Random(f"{family}/{seed}").sample(NAMES, len(own)) if len(own) <= len(NAMES) else own
    called = dict(zip(own, drawn, strict=True))
    expect = scenario.expect
    return replace(
        scenario,
        tenants=tuple(replace(tenant, name=called[tenant.name]) for tenant in scenario.tenants),
        inject=tuple(_renamed(one, called) for one in scenario.inject),
        expect=expect and replace(expect, culprits=tuple(called[name] for name in expect.culprits)),
    )


def _renamed(injection: Injection, called: dict[str, str]) -> Injection:
    if isinstance(injection, AddedTraffic | Growth):
        others = tuple(called[name] for name in injection.others)
        return replace(injection, tenant=called[injection.tenant], others=others)
    if isinstance(injection, Traffic | SlowClient):
        return replace(injection, tenant=called[injection.tenant])
    return injection


def _hostile(scenario: Scenario, family: str, seed: int) -> Scenario:
    """In a share of the cases, a scheduler that no replay has, and telemetry that is lost or says less."""
    engine, faults = scenario.engine, list(scenario.inject)
    if engine.policy == "fcfs" and chance(seed, "policy", family) < UNKNOWN_POLICY_SHARE:
        policies = list(UNKNOWN_TO_REPLAY)
        with registered():
            engine = replace(engine, policy=policies[int(chance(seed, "which policy", family) * len(policies))])
    drawn = chance(seed, "telemetry", family)
    if drawn < DROP_SHARE:
        share = LEAST_DROPPED + (MOST_DROPPED - LEAST_DROPPED) * chance(seed, "dropped", family)
        faults.append(TelemetryDrop(Literal(share)))
    elif drawn < DROP_SHARE + AGGREGATE_SHARE:
        faults.append(TelemetryAggregate())
    return replace(scenario, engine=engine, inject=tuple(faults))
