"""Data-parallel ranks that step together: whose batch it was that a rank's steps waited for.

Ranks that share experts exchange tokens within each layer, so all of a group end a step together, as late as the one
with the most to do (https://docs.vllm.ai/en/latest/serving/data_parallel_deployment/). A rank's own work then explains
nothing of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from stallscope.diagnosis.replica import Replica
from stallscope.diagnosis.timeline import Floats, Ints

TOGETHER_NS, TOGETHER_SHARE = (
    2_000_000,
    0.05,
)  # steps end together that end so close, or within that share of their length
LONG = 2.0  # times the replica's median step
MOSTLY = 0.8  # of the long steps' time
TIMES_OWN = 4.0  # tokens in the other rank's batches


@dataclass(frozen=True)
class Peer:
    """Another rank of the same group, and how many ``tokens`` its batches had, on average, where a replica's long steps
    ended together with its own; ``own_tokens`` are that replica's."""

    replica: str
    rank: int
    tokens: float
    own_tokens: float


def ranks_beside(replica: Replica) -> dict[str, int]:
    """The other data-parallel ranks of its group that the trace has, by the names of their replicas."""
    mine = replica.settings
    rows = {row["replica"]: row for row in replica.beside.replicas.to_pylist()}
    return {
        name: row["rank"]
        for name, row in rows.items()
        if name != replica.name
        and row["rank"] is not None
        and row["rank"] != mine.get("rank")
        and all(row[same] == mine.get(same) for same in ("group", "model", "dp_size"))
    }


def waited_for(replica: Replica, start_ns: int, end_ns: int) -> Peer | None:
    """The rank with which most of the replica's long steps between two times ended, and which had far more to do."""
    ready, length, tokens = _steps(replica, replica.name)
    long = (ready > start_ns) & (ready <= end_ns) & (length > LONG * np.median(length))
    if not long.any():
        return None
    ready, length, tokens = ready[long], length[long], tokens[long]
    found = [peer for peer in _peers(replica, ready, length, tokens) if peer.tokens >= TIMES_OWN * peer.own_tokens]
    return max(found, key=lambda peer: peer.tokens, default=None)


def _peers(replica: Replica, ready: Ints, length: Ints, tokens: Ints) -> Iterator[Peer]:
    """Those whose steps end with these."""
    for name, rank in ranks_beside(replica).items():
        its_ready, _, its_tokens = _steps(replica, name)
        if not len(its_ready):
            continue
        after = np.clip(np.searchsorted(its_ready, ready), 1, max(len(its_ready) - 1, 1))
        before = after - 1
        after = np.minimum(after, len(its_ready) - 1)
        nearest = np.where(ready - its_ready[before] < its_ready[after] - ready, before, after)
        together = np.abs(its_ready[nearest] - ready) <= np.maximum(TOGETHER_NS, TOGETHER_SHARE * length)
        if length[together].sum() >= MOSTLY * length.sum():
            mean: Floats = np.average(
                [its_tokens[nearest[together]], tokens[together]], axis=1, weights=length[together]
            )
            yield Peer(name, rank, float(mean[0]), float(mean[1]))


def _steps(replica: Replica, name: str) -> tuple[Ints, Ints, Ints]:
    """When each step of a replica was ready, in order; how long it took since the one before it, or since it was
    scheduled if that was later; tokens of its batch."""
    names = ["scheduled", "ready", "prefill_tokens", "decode_tokens"]
    steps = replica.beside.narrowed([name]).columns("steps", ["replica", *names])
    steps = steps.filter(pc.equal(steps["replica"].cast("string"), name)).sort_by("ready")
    scheduled, ready, prefill, decode = (steps[column].fill_null(0).to_numpy() for column in names)
    begin = np.maximum(scheduled, np.concatenate([scheduled[:1], ready[:-1]]))
    return ready, ready - begin, prefill + decode
