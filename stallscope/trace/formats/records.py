"""What a foreign record becomes, and how its numbers are taken out of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from stallscope.trace.otlp.spans import Attributes, Span
from stallscope_telemetry import names

Record = Mapping[str, object]

MOST = 1 << 53
_MOST_MS = 1e10


@dataclass(frozen=True, slots=True)
class Converted:
    """Attributes of the process that a record is of, and its spans. ``remark``: kind and text of what its reader should
    know besides; ``malformed``: how many more spans there were."""

    resource: Attributes
    spans: list[Span]
    remark: tuple[str, str] | None = None
    malformed: int = 0


def part(record: Record, name: str) -> Record:
    """An object within the record, empty where there is none. Raises TypeError where it is something else."""
    value = record.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is no object")
    return value


def amount(record: Record, name: str, absent: int | None = None) -> int:
    """A number of things. Raises ValueError where it is none, or missing without a value for ``absent``."""
    value = record.get(name)
    if value is None and absent is not None:
        return absent
    if type(value) is not int or not 0 <= value < MOST:
        raise ValueError(f"{name} is no amount")
    return value


def milliseconds(record: Record, name: str) -> float | None:
    """A duration, None where there is none. Raises ValueError where it is no duration."""
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} is no number")
    if not 0 <= value < _MOST_MS:
        raise ValueError(f"{name} is no duration")
    return float(value)


def text(record: Record, name: str) -> str:
    """A string, "" where there is none."""
    value = record.get(name)
    return value if isinstance(value, str) else ""


def step_span(start: int, end: int, attributes: Attributes) -> Span:
    """A step that tells of its sums alone; what its producer does not measure is 0."""
    unmeasured: Attributes = {names.DISPATCH_DELAY: 0, names.SCHED: 0, names.KV_USED: 0}
    return Span(names.STEP_SPAN, "", "", start, end, unmeasured | attributes)
