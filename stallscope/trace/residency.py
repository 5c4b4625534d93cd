"""Rows of the state machine as columns: the residency table, and what gaps need of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from stallscope.trace.decode import Ints
from stallscope.trace.rebuild import Phase, Rebuilt
from stallscope.trace.tables import names_at, plain_table, same
from stallscope_telemetry.records import WaitReason

PHASES = [phase.name.lower() for phase in Phase]
REASONS = [reason.name.lower() for reason in WaitReason]


@dataclass(frozen=True, slots=True)
class ResidencyColumns:
    """Parallel arrays, ordered by first step and request; ``request`` and ``holder`` are positions among the known
    requests (-1: nobody), ``stretch`` tells the stretches of known steps apart."""

    request: Ints
    phase: Ints
    reason: Ints
    lacking: Ints
    first_step: Ints
    last_step: Ints
    tokens: Ints
    context_start: Ints
    holder: Ints
    samples: npt.NDArray[np.bool_]
    stretch: Ints

    def of_requests(self, positions: Ints) -> ResidencyColumns:
        """The same where request i stands at ``positions[i]``."""
        return replace(self, request=positions[self.request])


def residency_columns(rebuilt: Rebuilt, positions: Ints, steps: Ints) -> ResidencyColumns:
    """``positions[i]`` is where request i of ``rebuilt`` stands among the known requests; ``steps`` are those seen."""
    rows = np.array(rebuilt.rows, dtype=np.int64).reshape(len(rebuilt.rows), 10)
    request, holder = positions[rows[:, 0]], rows[:, 8]
    order = np.lexsort((request, rows[:, 4]))
    holder = np.where(holder < 0, -1, np.append(positions, -1)[holder])
    begins = np.array([steps[one.first] for one in rebuilt.stretches if one.known], dtype=np.int64)
    rows = rows[order]
    return ResidencyColumns(
        request=request[order],
        phase=rows[:, 1],
        reason=rows[:, 2],
        lacking=rows[:, 3],
        first_step=rows[:, 4],
        last_step=rows[:, 5],
        tokens=rows[:, 6],
        context_start=rows[:, 7],
        holder=holder[order],
        samples=rows[:, 9].astype(np.bool_),
        stretch=np.searchsorted(begins, rows[:, 4], side="right"),
    )


def residency_table(
    replica: str, rows: ResidencyColumns, names: Sequence[str], tenants: Sequence[str], block_size: Ints
) -> pa.Table:
    """``names`` and ``tenants`` of the known requests; ``block_size`` (tokens, 0: unknown) at each row's first step."""
    waits = (rows.phase == Phase.WAITING) | (rows.phase == Phase.PREEMPTED)
    held = np.where(waits, 0, -(-(rows.context_start + rows.tokens) // np.maximum(block_size, 1)))
    return plain_table(
        "residency",
        {
            "replica": same(replica, len(waits)),
            "request": names_at(names, rows.request),
            "tenant": names_at(tenants, rows.request),
            "phase": names_at(PHASES, rows.phase),
            "reason": names_at(REASONS, rows.reason),
            "lacking": pa.array(rows.lacking, mask=rows.lacking < 0),
            "first_step": rows.first_step,
            "last_step": rows.last_step,
            "tokens": rows.tokens,
            "context_start": rows.context_start,
            "kv_blocks": pa.array(held, mask=~waits & (block_size == 0)),
            "holder": names_at(names, rows.holder),
        },
        len(waits),
    )
