"""What runs a replay's batches, learnt from the recording: the cost of a step, and what no batch explains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from stallscope.diagnosis.replay.disturbances import Disturbances, StepTimes, read_disturbances
from stallscope.diagnosis.replay.history import History, NotReplayable
from stallscope.diagnosis.replay.step_cost import StepCost, fit_step_cost

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
    ledger, timeline, steps = history.replica.ledger, history.replica.timeline, history.replica.steps
    known = ledger.known
    if int(known.sum()) < FEWEST_STEPS:
        raise NotReplayable(f"only {int(known.sum())} steps are known, which is too few to learn what a step costs")
    features = ledger.features[known]
    cost = fit_step_cost(features, timeline.duration[known].astype(np.float64))
    if history.config.async_scheduling:
        # The host prepares a step while the one before it runs: the gap says nothing of its work.
        host = (steps["dispatched"] - steps["scheduled"]).to_numpy(np.int64)
    else:
        host = (timeline.start - timeline.before) - (timeline.idle_end - timeline.idle_start)
    host = np.where(timeline.observed, host, 0)
    times = StepTimes(
        timeline.scheduled[known],
        timeline.start[known],
        timeline.end[known],
        host[known],
        steps["batch_size"].fillna(0).to_numpy(np.float64)[known],
        cost.predict(features),
    )
    return Machine(cost, read_disturbances(times))
