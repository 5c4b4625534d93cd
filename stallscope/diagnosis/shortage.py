"""By which mechanism: what the engine was short of, by replays in which there is enough of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from stallscope.diagnosis.case import Case
from stallscope.diagnosis.evidence import share
from stallscope.diagnosis.partition import MECHANISMS, Mechanism
from stallscope.diagnosis.replay.interventions import IncidentReplays
from stallscope.diagnosis.replay.relaxations import Relaxation, relaxations
from stallscope.diagnosis.suspects import largest_mechanism

EXPLAINS = 0.6  # share of the harm that is gone: a shortage of this was necessary for it
NEARLY = 0.25  # and so much less at most than what takes away most
TIE = 0.1  # at most, for the share of the charges
LACKS, EVICTS = 0.5, 0.1  # so little of the excess is in the replay, and so much of it charged to evictions
PINS = 0.05  # share of the charges by one shortage from which on a head that does not fit counts as pinning


def mechanism_of(
    case: Case, replays: IncidentReplays, culprits: Sequence[int], restored: Callable[[Relaxation], float]
) -> str | None:
    """Of the mechanisms of what the engine was short of, the one by which the culprits cost most.

    ``restored``: share of the harm that is gone under a relaxation. A particular one that explains it is the answer,
    else the one that helps most.
    """
    excess = case.excess
    theirs = excess[excess["holder"].isin(list(culprits))]
    charged = np.bincount(theirs["mechanism"], theirs["ns"], len(MECHANISMS))
    by_name = pd.Series(charged, index=[str(mechanism) for mechanism in MECHANISMS])
    eviction = str(Mechanism.CACHE_EVICTION)
    lacking = replays.replayed_excess < LACKS * replays.recorded_excess
    if lacking and by_name[eviction] >= EVICTS * by_name.sum():
        # What a prefix cache lost shows in a replay only as far as the telemetry says which prompts begin alike.
        return eviction
    every = relaxations(replays.history.config)
    gone = {relaxation: min(restored(relaxation), 1.0) for relaxation in every}
    most = max(gone.values())
    tried: dict[str, float] = {}
    for relaxation in every:
        part = by_name.reindex([str(one) for one in relaxation.mechanisms])
        if relaxation.particular and gone[relaxation] >= max(EXPLAINS, most - NEARLY):
            return _named(part)
        # Whether prompts or contexts cost too much, or took too much of the budget, charges tell.
        tried[_named(part)] = min(gone[relaxation], EXPLAINS) + TIE * share(float(part.sum()), float(by_name.sum()))
    best = max(tried, key=lambda name: tried[name])
    return best if tried[best] > 0 else largest_mechanism(theirs)


def _named(charged: pd.Series[float]) -> str:
    """Of the mechanisms that one relaxation takes away, the one that most is charged by.

    Who stands before the others and does not fit lacks blocks: pinning is the cause where there is any of it.
    """
    pinning = str(Mechanism.KV_PINNING)
    if charged.idxmax() == str(Mechanism.HEAD_OF_LINE) and charged.get(pinning, 0.0) >= PINS * charged.sum():
        return pinning
    return str(charged.idxmax())
