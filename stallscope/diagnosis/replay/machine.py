"""What runs a replay's batches, learnt from the recording: the cost of a step, and what no batch explains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from stallscope.diagnosis.ledger import features_at
from stallscope.diagnosis.replay.disturbances import Disturbances, StepTimes, read_disturbances
from stallscope.diagnosis.replay.history import History, NotReplayable
from stallscope.diagnosis.replay.step_cost import StepCost, fit_step_cost

MOST_STEPS = 500_000  # that are looked at
FEWEST_STEPS = 200  # below, the cost of a step is a guess


@dataclass(frozen=True, eq=False)
class Machine:
    """Cost of a step, and the disturbances, of one replica.

    What is made free is no real machine: it shows what a batch's time went into. Prompt tokens beyond ``most_tokens`` a
    step cost nothing; with ``free_context`` a decode costs as if nothing were before it.
    """

    cost: StepCost
    disturbances: Disturbances
    most_tokens: int | None = None
    free_context: bool = False

    def without_faults(self) -> Machine:
        return replace(self, disturbances=self.disturbances.without_faults())


def learn_machine(history: History) -> Machine:
    """Learns from all steps whose batch is known. Raises NotReplayable where those are too few."""
    replica, timeline = history.replica, history.replica.timeline
    looked_at = np.unique(np.linspace(0, len(timeline) - 1, min(len(timeline), MOST_STEPS)).astype(np.int64))
    features = features_at(replica.ledger.stretches, looked_at)
    known = features[:, 1:].any(axis=1)
    if int(known.sum()) < FEWEST_STEPS:
        raise NotReplayable(f"only {int(known.sum())} steps are known, which is too few to learn what a step costs")
    chosen, features = looked_at[known], features[known]
    cost = fit_step_cost(features, timeline.duration[chosen].astype(np.float64))
    scheduled, dispatched = (replica.steps[name].to_numpy(np.int64)[chosen] for name in ("scheduled", "dispatched"))
    if history.config.async_scheduling:
        # The host prepares a step while the one before it runs: the gap says nothing of its work.
        host = dispatched - scheduled
    else:
        host = timeline.host_gap(timeline.before[chosen], timeline.start[chosen])
    times = StepTimes(
        timeline.start[chosen],
        timeline.end[chosen],
        np.where(timeline.observed[chosen], host, 0),
        replica.steps["batch_size"].to_numpy(np.float64)[chosen],
        cost.predict(features),
    )
    return Machine(cost, read_disturbances(times))
