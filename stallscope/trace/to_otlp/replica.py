"""One replica's tables as columns, by the numbers of its requests and the positions of its steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stallscope.trace.model import Trace
from stallscope.trace.residency import PHASES, REASONS
from stallscope.trace.schema import TABLES
from stallscope.trace.to_otlp.batches import Batches
from stallscope.trace.to_otlp.keyframes import Keyframes
from stallscope.trace.to_otlp.rows import Asked, Ints, Mask, Rows, StepRuns
from stallscope_telemetry.records import FinishReason

_FIDELITY_BATCHES, _FIDELITY_SUMS = 3, 2
_REASONS_TO_LEAVE = [reason.name.lower() for reason in FinishReason]


@dataclass(frozen=True, eq=False)
class ReplicaTables:
    """What a trace has of the replica ``name``; tables are read as they are asked for."""

    trace: Trace
    name: str

    @staticmethod
    def of(trace: Trace, name: str) -> ReplicaTables:
        return ReplicaTables(trace.narrowed([name]), name)

    def table(self, table: str) -> pa.Table:
        """The rows of a table that are this replica's, with plain names."""
        return self._columns(table, TABLES[table].names)

    def _columns(self, table: str, names: Sequence[str]) -> pa.Table:
        whole, mine = self.trace.columns(table, names), self._mine(table)
        return whole if mine.all() else whole.filter(pa.array(mine))

    def _mine(self, table: str) -> Mask:
        replica = self.trace.columns(table, ["replica"])["replica"]
        mine = [pc.equal(chunk.cast(pa.string()), self.name).fill_null(False) for chunk in replica.chunks]
        return np.concatenate([np.zeros(0, dtype=np.bool_), *(one.to_numpy(zero_copy_only=False) for one in mine)])

    # --- requests -------------------------------------------------------------------------------------------------

    @cached_property
    def requests(self) -> pa.Table:
        return self.table("requests")

    @cached_property
    def _code_of_row(self) -> Ints:
        mine = self._mine("requests")
        code = np.full(len(mine) + 1, -1)
        code[np.flatnonzero(mine)] = np.arange(np.count_nonzero(mine))
        return code

    def named(self, table: str, column: str) -> Ints:
        """The request (its row in ``requests``) that each of the replica's rows of a table means; -1: none."""
        return self._code_of_row[self.trace.request_rows(table, column)[self._mine(table)]]

    @cached_property
    def handles(self) -> Ints:
        """Those that the requests have, and others for those that have none."""
        handle = ints(self.requests["handle"], -1)
        free = handle.max(initial=-1) + 1 + np.arange(len(handle))
        return np.where(handle < 0, free, handle)

    @cached_property
    def gaps(self) -> tuple[Ints, Ints]:
        """Start, length and count of gaps, ordered by request, and where those of each request begin."""
        table, request = self.table("gaps"), self.named("gaps", "request")
        order = np.argsort(request, kind="stable")
        columns = np.stack([ints(table[name]) for name in ("start", "length_ns", "count")], axis=1)[order]
        return columns, np.searchsorted(request[order], np.arange(len(self.requests) + 1))

    # --- steps ----------------------------------------------------------------------------------------------------

    @cached_property
    def step_numbers(self) -> Ints:
        """In order."""
        return np.sort(ints(self._columns("steps", ["step"])["step"]))

    def step_tables(self, most: int) -> Iterator[pa.Table]:
        """The rows of ``steps`` in order, at most so many at a time; where they are stored, no more are read."""
        batches: Iterator[pa.RecordBatch]
        if (np.diff(ints(self._columns("steps", ["step"])["step"])) < 0).any():
            batches = self.table("steps").sort_by("step").to_batches(most)
        elif self.trace.is_stored:
            # What is read ahead would be half of the memory.
            ahead = {"batch_readahead": 0, "fragment_readahead": 0, "use_threads": False}
            batches = self.trace.scannable("steps").to_batches(batch_size=most, **ahead)
        else:
            batches = self.table("steps").to_batches(most)
        return (pa.Table.from_batches([batch]) for batch in batches if len(batch))

    @cached_property
    def coverage(self) -> pa.Table:
        return self.table("coverage").sort_by([("start", "ascending"), ("end", "ascending")])

    @property
    def is_estimated(self) -> bool:
        """Whether its steps are estimates from its requests."""
        fidelity = ints(self.coverage["fidelity"])
        return bool(len(fidelity)) and fidelity.max() < _FIDELITY_SUMS

    @property
    def kept_share(self) -> float:
        """Of requests; 1 where all are there."""
        share = pc.min(self.coverage["sampled_share"]).as_py()
        return 1.0 if share is None else float(share)

    @cached_property
    def _stretch(self) -> Ints:
        """The row of coverage that each step belongs to, -1 where there is none."""
        seen = ints(self.coverage["steps_seen"])
        if seen.sum() == len(self.step_numbers):
            return np.repeat(np.arange(len(seen)), seen)
        scheduled = np.sort(ints(self._columns("steps", ["scheduled"])["scheduled"]))
        return np.searchsorted(ints(self.coverage["start"]), scheduled, side="right") - 1

    @cached_property
    def dropped(self) -> Ints:
        """The records that were lost to a full queue so far, as each step says."""
        lost, fidelity = ints(self.coverage["spans_dropped"]), ints(self.coverage["fidelity"])
        total = np.zeros(len(self.step_numbers) + 1, dtype=np.int64)
        # In a stretch of known batches by its last step, else by the first after it.
        last = np.searchsorted(self._stretch, np.arange(len(lost)), side="right")
        at = np.clip(np.where(fidelity == _FIDELITY_BATCHES, last - 1, last), 0, max(len(self.step_numbers) - 1, 0))
        np.add.at(total, at, lost)
        return np.cumsum(total)[:-1]

    # --- batches --------------------------------------------------------------------------------------------------

    def batches(self) -> tuple[Batches | None, int]:
        """Who did what, as far as it is no estimate (None: all is), and how many rows of residency are estimates."""
        residency = self.table("residency")
        known = np.append(ints(self.coverage["fidelity"]) == _FIDELITY_BATCHES, False)[self._stretch]
        was_never_known = not known.any() and not len(residency) and self.kept_share == 1.0
        if not len(self.step_numbers) or not (known.any() or was_never_known):
            return None, 0
        runs = StepRuns(self.step_numbers, known)
        rows = self._rows(residency, runs)
        told = (rows.request >= 0) & known[np.minimum(rows.first, len(known) - 1)]
        block_size = pc.max(self.table("replicas")["block_size"]).as_py() or 0
        kept = rows.take(told)
        kept = kept.take(np.lexsort((kept.first, kept.request)))
        keyframes = Keyframes(runs, kept, self._asked(), self._evictions(runs))
        return Batches(keyframes, block_size, was_never_known), int((~told).sum())

    def _rows(self, residency: pa.Table, runs: StepRuns) -> Rows:
        return Rows(
            request=self.named("residency", "request"),
            phase=_codes(residency["phase"], PHASES),
            reason=_codes(residency["reason"], REASONS),
            lacking=ints(residency["lacking"], -1),
            first=runs.positions(ints(residency["first_step"])),
            last=runs.positions(ints(residency["last_step"])),
            tokens=ints(residency["tokens"]),
            context=ints(residency["context_start"]),
            holder=self.named("residency", "holder"),
        )

    def _asked(self) -> Asked:
        requests = self.requests
        reason = _codes(requests["finish_reason"], _REASONS_TO_LEAVE)
        finished = pc.equal(requests["state"].cast(pa.string()), "finished").fill_null(False).to_numpy()
        # For which reason it left is told by its own span, where it is known at all.
        left = np.where(finished, np.where(reason < 0, FinishReason.STOP, reason), -1)
        prompt, cached = ints(requests["prompt_tokens"]), ints(requests["cached_tokens"])
        return Asked(self.handles, prompt, cached, left)

    def _evictions(self, runs: StepRuns) -> tuple[Ints, ...]:
        table = self.table("evictions")
        names = self.requests["request"].cast(pa.string())
        who = (
            pc.index_in(table[column].cast(pa.string()), value_set=names).fill_null(-1).to_numpy().astype(np.int64)
            for column in ("evicting_request", "owner_request")
        )
        return runs.positions(ints(table["step"])), *who, ints(table["blocks"])


def ints(column: pa.ChunkedArray, null: int = 0) -> Ints:
    """As int64, ``null`` where there is none."""
    values: Ints = column.fill_null(null).to_numpy()
    return values


def _codes(column: pa.ChunkedArray, names: list[str]) -> Ints:
    """Where each value stands among the names, -1: nowhere."""
    found = pc.index_in(column.cast(pa.string()), value_set=pa.array(names))
    codes: Ints = found.fill_null(-1).to_numpy().astype(np.int64)
    return codes
