"""The batch of each step, expanded from run-length coded residency: for views and tests."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.trace.model import Trace

_NAMES = ("request", "phase", "reason", "holder")


def batches(trace: Trace, replica: str, first_step: int = 0, last_step: int | None = None) -> pa.Table:
    """Who did what in each step of a replica, from ``first_step`` to ``last_step`` (inclusive; None: to the end).

    One row a step and request, ordered by step, with columns step, request, phase, reason, holder (coded names),
    tokens (computed in this step) and context (tokens held before it). It is as long as all steps' running and
    waiting counts together: take a window of a long trace.
    """
    rows = trace.residency.filter(pc.equal(trace.residency.column("replica").cast(pa.string()), replica))
    first, last, tokens, context = (
        rows.column(name).to_numpy() for name in ("first_step", "last_step", "tokens", "context_start")
    )
    begin = np.maximum(first, first_step)
    end = last if last_step is None else np.minimum(last, last_step)
    lengths = np.maximum(end - begin + 1, 0)
    row = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.arange(len(row)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    step = begin[row] + offset
    order = np.argsort(step, kind="stable")
    row, step = row[order], step[order]
    columns = {"step": pa.array(step)}
    columns |= {name: rows.column(name).take(pa.array(row)) for name in _NAMES}
    columns |= {
        "tokens": pa.array(tokens[row]),
        "context": pa.array(context[row] + (step - first[row]) * tokens[row]),
    }
    return pa.table(columns)
