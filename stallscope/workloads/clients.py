"""What the clients of a run saw: how a request can end, the file that keeps it, and the figures by tenant."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np

from stallscope.errors import UsageError
from stallscope_telemetry.clients import ClientFile, ClientRecord
from stallscope_telemetry.files import SUFFIXES

OK = "ok"
REJECTED = "rejected"  # 429: too many requests
TIMEOUT = "timeout"  # the client lost patience, and went away
DISCONNECTED = "disconnected"  # the answer ended before its end
UNREACHABLE = "unreachable"  # no connection
ERROR = "error"  # an error in the stream, or no stream at all
ABANDONED = "abandoned"  # the driver stopped first: interrupted, or done with waiting

FILE_NAME = "clients.otlp.jsonl.zst"  # in a folder, beside the engine's


def open_file(out: Path, model: str, force: bool) -> ClientFile:
    """A new trace file: ``out`` itself, or one for the clients in the folder ``out``.

    Raises UsageError where it exists (unless ``force``) or can't be written.
    """
    path = out if out.name.endswith(SUFFIXES) else out / FILE_NAME
    if path.exists() and not force:
        raise UsageError(f"{path} exists: choose another name, or overwrite it with --force")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if force:
            path.unlink(missing_ok=True)
        return ClientFile(path, model)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be written: {error}") from error


@dataclass(frozen=True, slots=True)
class Figures:
    """What one tenant's clients saw. Quantiles are seconds, None where nothing was measured.

    TTFT and longest gap are of all requests that got so far; end to end is of those that ended well.
    """

    tenant: str
    statuses: Mapping[str, int]
    output_tokens: int
    ttft_p50: float | None
    ttft_p99: float | None
    longest_gap_p99: float | None
    e2e_p50: float | None
    e2e_p99: float | None

    @property
    def sent(self) -> int:
        return sum(self.statuses.values())

    @property
    def ok(self) -> int:
        return self.statuses.get(OK, 0)


@dataclass(frozen=True, slots=True)
class Lateness:
    """How late the driver sent its requests, in seconds."""

    p50: float
    p99: float
    most: float


@dataclass(slots=True)
class Tally:
    """Adds up records as they come, a few numbers each, so that a long run fits in memory."""

    _statuses: dict[str, Counter[str]] = field(default_factory=dict)
    _measured: dict[tuple[str, str], array[int]] = field(default_factory=dict)  # by tenant and what: ns, or tokens
    _late: array[int] = field(default_factory=lambda: array("q"))

    def add(self, record: ClientRecord) -> None:
        tenant, times = record.tenant, record.token_times_ns
        self._statuses.setdefault(tenant, Counter())[record.status] += 1
        self._late.append(record.late_ns)
        self._put(tenant, "tokens", record.tokens)
        if times:
            self._put(tenant, "ttft", times[0] - record.sent_ns)
        if len(times) > 1:
            self._put(tenant, "gap", max(later - sooner for sooner, later in pairwise(times)))
        if record.status == OK:
            self._put(tenant, "e2e", record.end_ns - record.sent_ns)

    def _put(self, tenant: str, what: str, value: int) -> None:
        self._measured.setdefault((tenant, what), array("q")).append(value)

    def figures(self) -> tuple[Figures, ...]:
        """One for each tenant that sent anything, by name."""
        return tuple(
            Figures(
                tenant,
                dict(statuses),
                sum(self._measured[tenant, "tokens"]),
                self._seconds(tenant, "ttft", 50),
                self._seconds(tenant, "ttft", 99),
                self._seconds(tenant, "gap", 99),
                self._seconds(tenant, "e2e", 50),
                self._seconds(tenant, "e2e", 99),
            )
            for tenant, statuses in sorted(self._statuses.items())
        )

    def lateness(self) -> Lateness:
        """Zeros where nothing was sent."""
        p50, p99, most = np.percentile(self._late, (50, 99, 100)) / 1e9 if self._late else (0.0, 0.0, 0.0)
        return Lateness(float(p50), float(p99), float(most))

    def _seconds(self, tenant: str, what: str, percent: int) -> float | None:
        values = self._measured.get((tenant, what))
        return float(np.percentile(values, percent)) / 1e9 if values else None
