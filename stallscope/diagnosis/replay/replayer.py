"""Everything that replays of one replica need, made once: its history, its machine, and how far they can be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.diagnosis.incidents import Waits, Window
from stallscope.diagnosis.load import Loads
from stallscope.diagnosis.model import ReplayCheck
from stallscope.diagnosis.replay.check import LEAST_AGREEMENT, forced_agreement, free_error
from stallscope.diagnosis.replay.harm import read_norms
from stallscope.diagnosis.replay.history import History, NotReplayable, read_history
from stallscope.diagnosis.replay.interventions import DRAWS, IncidentReplays, StretchReplays
from stallscope.diagnosis.replay.machine import Machine, learn_machine
from stallscope.diagnosis.replica import Replica

LEAST_KNOWN = 0.5  # share of steps with their batches, below which a replay has too little to go by
TOGETHER_NS = 60_000_000_000  # incidents that are no further apart are replayed in one stretch
MOST_STRETCH_NS = 600_000_000_000


@dataclass(frozen=True, eq=False)
class Replayer:
    """``check`` says how well the recording can be replayed; history and machine are None where it can't at all."""

    check: ReplayCheck
    history: History | None
    machine: Machine | None

    @property
    def trusted(self) -> bool:
        return self.check.trusted

    def incidents(
        self, windows: Sequence[Window], waits: Waits, healthy: pd.DataFrame, loads: Loads
    ) -> list[IncidentReplays]:
        """The replays of each window; those of windows that are near one another are the same.

        Harm is looked for among the tenants and metrics of the window's waits.

        Raises ValueError where the recording can't be replayed.
        """
        if self.history is None or self.machine is None:
            raise ValueError(f"{self.check.replica} can't be replayed: {self.check.reason}")
        norms = read_norms(self.history.replica, waits, healthy)
        found = []
        for stretch in _stretches(windows):
            replays = StretchReplays(self.history, self.machine, loads, stretch[0].start, stretch[-1].end)
            found += [IncidentReplays(replays, norms, window, _kinds(waits, window)) for window in stretch]
        return found


def _kinds(waits: Waits, window: Window) -> frozenset[tuple[int, int]]:
    """Tenant and metric of the window's waits; empty where it has none."""
    kinds = waits.table.loc[window.waits, ["tenant", "metric"]].drop_duplicates()
    return frozenset(zip(kinds["tenant"].to_list(), kinds["metric"].to_list(), strict=True))


def _stretches(windows: Sequence[Window]) -> list[list[Window]]:
    """Windows, which are ordered by time, in runs that are replayed together."""
    runs: list[list[Window]] = []
    for window in windows:
        if (
            runs
            and window.start <= runs[-1][-1].end + TOGETHER_NS
            and window.end <= runs[-1][0].start + MOST_STRETCH_NS
        ):
            runs[-1].append(window)
        else:
            runs.append([window])
    return runs


def prepare_replay(replica: Replica) -> Replayer:
    """Reads history and machine of a replica and checks its scheduler against the recording."""
    policy = str(replica.settings.get("policy") or "unknown")
    known = _known_share(replica)
    if known < LEAST_KNOWN:
        return _impossible(replica, policy, f"the batches of only {known:.0%} of its steps are known")
    try:
        history = read_history(replica)
        machine = learn_machine(history)
    except NotReplayable as error:
        return _impossible(replica, policy, str(error))
    agreement = forced_agreement(history, 0, len(replica.timeline) - 1)
    trusted = agreement.share >= LEAST_AGREEMENT
    reason = "" if trusted else f"its scheduler chose otherwise in {1 - agreement.share:.0%} of the steps looked at"
    check = ReplayCheck(
        replica=replica.name,
        policy=history.config.policy,
        forced_agreement=agreement.share,
        forced_steps=agreement.steps,
        free_error=free_error(history, machine) if trusted else -1.0,
        step_cost_error=machine.cost.error,
        draws=len(DRAWS),
        trusted=trusted,
        reason=reason,
    )
    return Replayer(check, history, machine)


def _known_share(replica: Replica) -> float:
    """Share of a replica's steps that were seen with their batches (fidelity 3)."""
    coverage = replica.trace.coverage
    mine = coverage.filter(pc.equal(coverage["replica"].cast(pa.string()), replica.name)).to_pandas()
    steps = mine["steps_seen"] + mine["steps_lost"]
    return float(mine.loc[mine["fidelity"] == 3, "steps_seen"].sum() / max(steps.sum(), 1))


def _impossible(replica: Replica, policy: str, reason: str) -> Replayer:
    check = ReplayCheck(replica.name, policy, 0.0, 0, -1.0, -1.0, 0, False, reason)
    return Replayer(check, None, None)
