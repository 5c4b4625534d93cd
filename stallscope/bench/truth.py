"""The right answer of a case, by running it again: without its cause, without each culprit alone, and relaxed.

Nothing here is an opinion: who hurt whom is what changes when it is taken away. The scenario's own ``expect`` says what
kind of thing was injected, and which mechanisms count as the same story.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import pandas as pd

from stallscope.bench.cases import Case
from stallscope.bench.paired import Harm, few_harmed, outcomes, outcomes_of_trace, pair, same_harm, worst_harm
from stallscope.bench.policies import registered
from stallscope.bench.relaxations import Relaxation, relaxed, worth_trying
from stallscope.trace import read_trace
from stallscope.workloads.recording import VIRTUAL_START_NS, record, simulate
from stallscope.workloads.scenario import Scenario, Traffic, tenants_of
from stallscope_engine.executors.virtual import StepCost

CULPRIT_SHARE = 0.2  # of the harm, averaged over what goes with it first and last: above, a party is a culprit
BYSTANDER_SHARE = 0.1  # below, to accuse it is false; between the two it is no mistake either way
EXPLAINS = 0.5  # of the harm that a relaxation takes away: its mechanisms are part of the story
HEALTHY, NOISY, OVERLOAD, OUTSIDE, SELF = "healthy", "noisy_neighbor", "overload", "outside_engine", "self_inflicted"


@dataclass(frozen=True, slots=True)
class Truth:
    """What is right about one case.

    ``verdicts``: any of them is right. ``culprits`` did it, ``excused`` may be named or not (they did a little of it,
    hurt a few requests where no percentile shows it, or themselves), all others are bystanders. ``effects`` is the
    share of the harm by tenant (that of its group), ``relief`` the share that goes under each relaxation.
    ``requests``: those injected by the culprits, by the ids that the trace has. ``harm`` is None where nothing was
    injected; where it doesn't count, the case is scored for false accusations only.
    """

    family: str
    variant: str
    seed: int
    policy: str
    telemetry_is_whole: bool
    injects: bool
    verdicts: tuple[str, ...]
    culprits: tuple[str, ...]
    excused: tuple[str, ...]
    effects: dict[str, float]
    mechanisms: tuple[str, ...]
    relief: dict[str, float]
    requests: tuple[str, ...]
    harm: Harm | None
    start_ns: int  # when the run began, on the trace's clock

    @property
    def is_harmful(self) -> bool:
        return self.harm is not None and self.harm.counts

    @property
    def is_scored(self) -> bool:
        """Whether there is a right verdict: usual traffic has one, and so has harm that somebody would notice."""
        return self.is_harmful or not self.injects

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> Truth:
        """The inverse of ``to_json``. Raises ValueError, KeyError or TypeError for anything else."""
        raw = json.loads(text)
        names = ("verdicts", "culprits", "excused", "mechanisms", "requests")
        lists = {name: tuple(raw[name]) for name in names}
        return Truth(**(raw | lists | {"harm": raw["harm"] and Harm(**raw["harm"])}))


class Runs(Protocol):
    """Runs scenarios, with or without what they inject, to ``paired.outcomes``.

    ``repeat``: the same run twice is the same. Where it isn't, steps can't be given another cost either.
    """

    @property
    def start_ns(self) -> int: ...
    @property
    def repeat(self) -> bool: ...
    def __call__(self, scenario: Scenario, inject: bool = True, cost: StepCost | None = None) -> pd.DataFrame: ...


@dataclass(frozen=True, slots=True)
class InVirtualTime:
    """Runs one seed in virtual time."""

    seed: int
    start_ns: int = VIRTUAL_START_NS
    repeat: bool = True

    def __call__(self, scenario: Scenario, inject: bool = True, cost: StepCost | None = None) -> pd.DataFrame:
        return outcomes(scenario, self.seed, inject, simulate(scenario, self.seed, inject, cost))


@dataclass(slots=True)
class OnTorch:
    """Records one seed in real time into ``folder``; ``recorded`` is the run of ``judged`` that is there already."""

    seed: int
    folder: Path
    judged: Scenario
    recorded: Path
    start_ns: int = 0
    repeat: bool = False

    def __call__(self, scenario: Scenario, inject: bool = True, cost: StepCost | None = None) -> pd.DataFrame:
        path = self.recorded
        is_judged = inject and scenario is self.judged
        if not is_judged:
            path = self.folder / "again.otlp.jsonl.zst"
            record(scenario, path, seed=self.seed, executor="torch", inject=inject, force=True)
        table, start_ns = outcomes_of_trace(scenario, self.seed, inject, read_trace(path))
        if is_judged:
            self.start_ns = start_ns
        return table


def find_truth(case: Case, run: Runs) -> tuple[Truth, pd.DataFrame]:
    """The truth of a case, and its requests with and without the cause (``paired.pair``)."""
    with registered():
        return _find(case, run)


def _find(case: Case, run: Runs) -> tuple[Truth, pd.DataFrame]:
    expect, scenario = case.expect, case.scenario
    with_all = run(scenario)
    without = run(scenario, inject=False) if case.injects else with_all
    pairs = pair(with_all, without)
    everyone = [tenant.name for tenant in scenario.tenants]
    suspects = [name for party in _parties(scenario) for name in party]
    innocent = [name for name in everyone if name not in suspects]
    victims = {
        NOISY: innocent if expect.verdict == NOISY else everyone,
        SELF: suspects,
    }.get(expect.verdict, everyone)
    harm = worst_harm(pairs, victims) if case.injects else None
    if harm is not None and harm.counts and not run.repeat:
        harm = _beyond_chance(harm, run(scenario, inject=False), without)
    effects = _effects(case, run, harm, without) if expect.verdict == NOISY and harm and harm.counts else {}
    culprits = tuple(name for name, share in effects.items() if share >= CULPRIT_SHARE)
    excused = [name for name, share in effects.items() if BYSTANDER_SHARE <= share < CULPRIT_SHARE]
    if not effects and few_harmed(pairs[~pairs["tenant"].isin(suspects)]):
        excused = suspects
    if expect.verdict == SELF:
        excused = suspects
    relief = _relief(case, run, harm, without) if effects and harm and run.repeat else {}
    injected = with_all[with_all["injected"] & with_all["tenant"].isin(culprits)]
    return Truth(
        case.family,
        case.variant,
        case.seed,
        scenario.engine.policy,
        case.telemetry_is_whole,
        case.injects,
        _verdicts(case, pairs, innocent, harm),
        culprits,
        tuple(excused),
        effects,
        _mechanisms(expect.mechanism, relief),
        {relaxation.name: share for relaxation, share in relief.items()},
        tuple(injected["request"].sort_values()),
        harm,
        run.start_ns,
    ), pairs


def _beyond_chance(harm: Harm, again: pd.DataFrame, without: pd.DataFrame) -> Harm:
    """The harm, or none where two runs without the cause differ by half as much."""
    spread_s = abs(same_harm(pair(again, without), harm).excess_s)
    return harm if harm.excess_s > 2 * spread_s else replace(harm, with_s=harm.without_s)


def _verdicts(case: Case, pairs: pd.DataFrame, innocent: list[str], harm: Harm | None) -> tuple[str, ...]:
    """What is right to say: what the scenario is about, and what else is true of this run."""
    expected = case.expect.verdict
    right = [expected]
    if not case.injects and expected == OVERLOAD:
        right.append(HEALTHY)  # chance makes some waits, or none
    if expected == SELF and (beside := worst_harm(pairs, innocent)) is not None and beside.counts:
        right.append(NOISY)
    if not case.telemetry_is_whole:
        right.append("insufficient_data")
    return tuple(right)


# --- whose doing it was -------------------------------------------------------------------------------------------


def _parties(scenario: Scenario) -> list[tuple[str, ...]]:
    """Who acts on their own in what is injected: tenants, or groups of them that act alike."""
    return list(dict.fromkeys(tenants_of(one) for one in scenario.inject if isinstance(one, Traffic)))


def _effects(case: Case, run: Runs, harm: Harm, without: pd.DataFrame) -> dict[str, float]:
    """Each tenant's share of the harm: what goes with its party first and what goes with it last, on average.

    For two parties that is the Shapley value.
    """
    parties = _parties(case.scenario)
    if len(parties) == 1:
        return dict.fromkeys(parties[0], 1.0)
    shares = {}
    for party in parties:
        alone, others = (run(_only(case.scenario, chosen)) for chosen in ([party], _all_but(parties, party)))
        first = 1 - same_harm(pair(others, without), harm).excess_s / harm.excess_s
        last = same_harm(pair(alone, without), harm).excess_s / harm.excess_s
        shares.update(dict.fromkeys(party, round((first + last) / 2, 3)))
    return shares


def _all_but(parties: list[tuple[str, ...]], left_out: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [party for party in parties if party != left_out]


def _only(scenario: Scenario, parties: list[tuple[str, ...]]) -> Scenario:
    kept = tuple(one for one in scenario.inject if not isinstance(one, Traffic) or tenants_of(one) in parties)
    return replace(scenario, inject=kept)


# --- by which mechanism -------------------------------------------------------------------------------------------


def _relief(case: Case, run: Runs, harm: Harm, without: pd.DataFrame) -> dict[Relaxation, float]:
    """Share of the harm that is gone under each relaxation, tried until one of the expected mechanisms explains it."""
    shares: dict[Relaxation, float] = {}
    expected = case.expect.mechanism
    for relaxation in worth_trying(case.scenario, expected):
        scenario, cost = relaxed(case.scenario, relaxation)
        left_s = same_harm(pair(run(scenario, cost=cost), without), harm).excess_s
        shares[relaxation] = round(min(1 - left_s / harm.excess_s, 1.0), 3)
        if relaxation.takes_away(expected) and shares[relaxation] >= EXPLAINS:
            break
    return shares


def _mechanisms(expected: tuple[str, ...], relief: dict[Relaxation, float]) -> tuple[str, ...]:
    """Those of the scenario; where their relaxations don't explain the harm, those of the one that does best too."""
    if any(relaxation.takes_away(expected) and share >= EXPLAINS for relaxation, share in relief.items()):
        return expected
    best = max(relief, key=lambda relaxation: relief[relaxation], default=None)
    return tuple(dict.fromkeys((*expected, *(best.mechanisms if best else ()))))
