"""GPU samples of a replica to the table ``gpu``: in order, each once, with null for what was not told."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import pyarrow as pa

from stallscope.trace.decode import MOST, GpuSpan
from stallscope.trace.findings import Findings
from stallscope.trace.schema import TABLES
from stallscope.trace.tables import Column, plain_table, same
from stallscope_telemetry import names

COLUMNS = {
    "utilization": names.GPU_UTILIZATION,
    "sm_clock": names.GPU_SM_CLOCK,
    "mem_clock": names.GPU_MEM_CLOCK,
    "power_w": names.GPU_POWER,
    "temperature": names.GPU_TEMPERATURE,
    "memory_used": names.GPU_MEMORY_USED,
    "throttle": names.GPU_THROTTLE,
}
_LEAST = {"temperature": -MOST}  # of others 0
_MOST = {"utilization": 1}  # of others ``MOST``


def gpu_table(replica: str, samples: Sequence[GpuSpan], findings: Findings) -> pa.Table:
    """A row a sample, by device and time. A value that is no sound number is null, and told."""
    once = _without_duplicates(replica, samples, findings)
    columns: dict[str, Column] = {
        "replica": same(replica, len(once)),
        "device": [one.device for one in once],
        "time": [one.time for one in once],
    }
    for column, name in COLUMNS.items():
        told = [one.attributes.get(name) for one in once]
        values = [value if _is_sound(column, value) else None for value in told]
        unsound = sum(value is not None for value in told) - sum(value is not None for value in values)
        text = f"values of {column} are no sound number and count as absent"
        findings.add("unsound_value", replica, f" {column}", text, unsound)
        columns[column] = values
    return plain_table("gpu", columns, len(once))


def _is_sound(column: str, value: object) -> bool:
    kind = TABLES["gpu"].field(column).type
    if pa.types.is_dictionary(kind):
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int if pa.types.is_int64(kind) else int | float):
        return False
    return math.isfinite(value) and _LEAST.get(column, 0) <= value <= _MOST.get(column, MOST)


def _without_duplicates(replica: str, samples: Iterable[GpuSpan], findings: Findings) -> list[GpuSpan]:
    """By device and time, each once; of several that say different things, one whichever file was read first."""
    once: dict[tuple[str, int], GpuSpan] = {}
    ordered = sorted(samples, key=lambda one: (one.device, one.time, repr(one.attributes)))
    for one in ordered:
        once.setdefault((one.device, one.time), one)
    text = "samples of a GPU came twice; one counts"
    findings.add("duplicate_sample", replica, "", text, len(ordered) - len(once))
    return list(once.values())
