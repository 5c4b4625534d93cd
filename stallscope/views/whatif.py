"""What if, side by side: what each tenant waited as recorded, replayed unchanged, and with the change."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from stallscope.diagnosis.model import Intervention
from stallscope.diagnosis.replay.history import NotReplayable, configuration
from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Ints, Mask


@dataclass(frozen=True, eq=False)
class SideBySide:
    """A row for each tenant, metric and percentile, in the order of the predictions.

    ``low_s`` to ``high_s`` holds ``predicted_s`` in all draws; the three are NaN where no request is left to wait.
    ``requests`` are those recorded, ``changed`` says whose tenant is no bystander of the change.
    """

    tenants: tuple[str, ...]
    metrics: tuple[str, ...]
    quantile: Floats
    requests: Ints
    changed: Mask
    recorded_s: Floats
    replayed_s: Floats
    predicted_s: Floats
    low_s: Floats
    high_s: Floats


def settings_of(replica: Replica) -> dict[str, str]:
    """What the replica was run with, as it is written in a question; nothing where the trace does not say."""
    try:
        config = configuration(replica)
    except NotReplayable:
        return {}
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in values.items()}


def side_by_side(answer: Intervention) -> SideBySide:
    """The predictions of a replay, as columns."""
    rows = answer.predictions
    left = {one.tenant for one in rows if one.high_s > 0}
    gone = [one.tenant not in left for one in rows]

    times = np.array(
        [(one.recorded_s, one.replayed_s, one.predicted_s, one.low_s, one.high_s) for one in rows], dtype=np.float64
    ).reshape(-1, 5)
    times[gone, 2:] = np.nan
    return SideBySide(
        tuple(one.tenant for one in rows),
        tuple(one.metric for one in rows),
        np.array([one.quantile for one in rows], dtype=np.float64),
        np.array([one.requests for one in rows], dtype=np.int64),
        np.array([one.tenant in answer.tenants for one in rows], dtype=np.bool_),
        *times.T,
    )
