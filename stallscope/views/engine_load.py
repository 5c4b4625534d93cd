"""An engine's load over time, as ordinary panels show it: in a stall most of these lines look as they always do."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Ints, Places, at, running_total
from stallscope.views.percentiles import bin_length


@dataclass(frozen=True, eq=False)
class EngineLoad:
    """One value a bin; each begins at ``start_ns`` and is ``bin_ns`` long, but for the last, which may be cut short.

    ``busy``: share of the time in which steps ran. ``gpu_utilization``: mean of the samples, in [0, 1]. ``kv_share``:
    the highest share of the KV cache's blocks in use. ``output_tokens_per_s`` and ``prefill_tokens_per_s``: what steps
    compute counts evenly over their time, a request's first token when it comes. ``waiting`` and ``running``: the most
    requests in any step.

    Only time that was seen counts. A value is NaN where none of the bin was seen, or where the trace does not tell.
    """

    replica: str
    bin_ns: int
    start_ns: Ints
    busy: Floats
    gpu_utilization: Floats
    kv_share: Floats
    output_tokens_per_s: Floats
    prefill_tokens_per_s: Floats
    waiting: Floats
    running: Floats


def engine_load(replica: Replica, start_ns: int, end_ns: int, width: int) -> EngineLoad:
    """The replica's load from ``start_ns`` to ``end_ns``, in at most ``width`` bins."""
    timeline = replica.timeline
    bin_ns = bin_length(end_ns - start_ns, width)
    edges = np.append(np.arange(start_ns, end_ns, bin_ns), end_ns)
    begin, end = edges[:-1], edges[1:]
    inside = np.clip(edges, *timeline.bounds[[0, -1]])
    seen_ns = np.diff(inside) - timeline.unobserved.between(begin, end)

    places = timeline.locate(edges)
    touched = slice(int(places.position[0]), int(places.position[-1]) + 1)
    local = Places(places.position - touched.start, places.passed)
    steps = {str(name): column.to_numpy()[touched] for name, column in replica.steps.items()}
    first = np.searchsorted(timeline.end, begin, side="right") - touched.start
    after = np.searchsorted(timeline.start, end) - touched.start

    def computed(tokens: Ints) -> Floats:
        return np.diff(at(running_total(tokens.astype(np.float64)), local))

    def highest(count: Ints) -> Floats:
        most = np.maximum.reduceat(np.append(count, 0), np.stack([first, after], axis=1).ravel())[::2]
        return np.where(seen_ns > 0, np.where(first < after, most, 0), np.nan)

    first_token = replica.requests["first_token"].to_numpy()
    first_token = first_token[(first_token >= start_ns) & (first_token < end_ns)]
    first_tokens = np.bincount((first_token - start_ns) // bin_ns, minlength=len(begin))
    kv_total = int(replica.steps["kv_total"].max())
    return EngineLoad(
        replica.name,
        bin_ns,
        begin,
        _ratio(timeline.slices.between(begin, end), seen_ns),
        _gpu_utilization(replica, start_ns, end_ns, bin_ns, len(begin)),
        highest(steps["kv_used"]) / (kv_total or np.nan),
        _ratio((computed(steps["decode_tokens"]) + first_tokens) * 1e9, seen_ns),
        _ratio(computed(steps["prefill_tokens"]) * 1e9, seen_ns),
        highest(steps["waiting"]),
        highest(steps["running"]),
    )


def _gpu_utilization(replica: Replica, start_ns: int, end_ns: int, bin_ns: int, bins: int) -> Floats:
    samples = replica.read_gpu(["time", "utilization"], start_ns, end_ns).drop_null()
    which = (samples["time"].to_numpy() - start_ns) // bin_ns
    return _ratio(np.bincount(which, samples["utilization"].to_numpy(), bins), np.bincount(which, minlength=bins))


def _ratio(amount: Ints | Floats, of: Ints) -> Floats:
    """NaN of nothing."""
    ratio: Floats = np.divide(amount, of, out=np.full(len(of), np.nan), where=of > 0)
    return ratio
