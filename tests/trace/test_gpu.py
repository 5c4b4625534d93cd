"""GPU samples: each becomes a row, what was not told is null, and a damaged one costs itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from stallscope.errors import UsageError
from stallscope.trace import read_trace, write_parquet
from stallscope_telemetry import names, spans
from stallscope_telemetry.records import GpuSample
from tests.trace.recording import START_NS, line, read, steady, write

FULL = GpuSample("GPU-a", START_NS, 0.5, 1980, 2619, 512.3, 61, 7_000_000_000, ("sw_power_cap", "hw_slowdown"))
COLD = GpuSample("GPU-a", START_NS + 5, temperature_c=-3, throttle=())
OTHER = GpuSample("GPU-b", START_NS, power_w=70.0)


def gpu_line(sample: GpuSample, replica: str = "r0") -> bytes:
    attributes = spans.gpu_attributes(sample)
    return line(replica, steady().config, names.GPU_SPAN, sample.time_ns, sample.time_ns, attributes)


def test_samples_become_rows_by_device_and_time_with_null_for_what_was_not_told() -> None:
    trace = read([gpu_line(OTHER), *steady().lines(), gpu_line(COLD), gpu_line(FULL)])
    assert trace.findings == ()
    assert trace.validate() == []
    untold = dict.fromkeys(trace.gpu.column_names)
    assert trace.gpu.to_pylist() == [
        {
            "replica": "r0",
            "device": "GPU-a",
            "time": START_NS,
            "utilization": 0.5,
            "sm_clock": 1980,
            "mem_clock": 2619,
            "power_w": 512.3,
            "temperature": 61,
            "memory_used": 7_000_000_000,
            "throttle": "sw_power_cap|hw_slowdown",
        },
        untold | {"replica": "r0", "device": "GPU-a", "time": START_NS + 5, "temperature": -3.0, "throttle": ""},
        untold | {"replica": "r0", "device": "GPU-b", "time": START_NS, "power_w": 70.0},
    ]
    without = read(steady().lines())
    assert all(trace.tables[name] == without.tables[name] for name in trace.tables if name != "gpu")


def test_a_sampler_of_its_own_process_may_write_beside_the_engine(tmp_path: Path) -> None:
    write(tmp_path / "engine.otlp.jsonl", steady().lines())
    write(tmp_path / "gpu.otlp.jsonl", [gpu_line(FULL, "r0"), gpu_line(OTHER, "host-7")])
    trace = read_trace(tmp_path)
    assert [(row["replica"], row["device"]) for row in trace.gpu.to_pylist()] == [("r0", "GPU-a"), ("host-7", "GPU-b")]
    assert trace.replicas.column("replica").to_pylist() == ["r0"]
    with pytest.raises(UsageError, match=r"no engine\.step spans"):
        read_trace(tmp_path / "gpu.otlp.jsonl")


def test_samples_go_with_the_life_of_the_process_that_they_were_taken_in() -> None:
    first, second = steady().step_lines(), steady().step_lines()
    later = [
        re.sub(rb'(TimeUnixNano":")(\d+)', lambda m: m[1] + str(int(m[2]) + 10**9).encode(), one) for one in second
    ]
    after = GpuSample("GPU-a", START_NS + 10**9 + 1, power_w=1.0)
    trace = read([*first, *later, gpu_line(FULL), gpu_line(after)])
    assert trace.gpu.column("replica").to_pylist() == ["r0", "r0 #2"]


@pytest.mark.parametrize(
    ("pattern", "by", "kind"),
    [
        (rb'("stallscope.gpu.utilization","value":\{"doubleValue":)0.5', rb"\g<1>50.0", "unsound_value"),
        (rb'("stallscope.gpu.power","value":\{"doubleValue":)512.3', rb'\g<1>"NaN"', "unsound_value"),
        (rb'("stallscope.gpu.sm_clock","value":\{"intValue":")1980', rb"\g<1>-1980", "unsound_value"),
        (rb'("stallscope.gpu.memory_used","value":\{"intValue":")7', rb"\g<1>99999999999999", "unsound_value"),
        (rb'("stallscope.gpu.throttle","value":\{)"stringValue":"[^"]*"', rb'\g<1>"intValue":"4"', "unsound_value"),
        (rb'("stallscope.gpu.sm_clock","value":)\{"intValue":"1980"\}', rb"\g<1>[]", "unsound_attribute"),
    ],
)
def test_a_damaged_value_is_told_and_null_and_the_rest_of_the_sample_is_used(
    pattern: bytes, by: bytes, kind: str
) -> None:
    damaged, count = re.subn(pattern, by, gpu_line(FULL))
    assert count == 1
    trace = read([*steady().lines(), damaged])
    assert [(finding.kind, finding.count) for finding in trace.findings] == [(kind, 1)]
    (row,) = trace.gpu.to_pylist()
    assert list(row.values()).count(None) == 1
    assert row["temperature"] == 61


@pytest.mark.parametrize(
    ("pattern", "by"),
    [
        (rb'startTimeUnixNano":"\d+', rb'startTimeUnixNano":"-5'),
        (rb'startTimeUnixNano":"\d+', rb'startTimeUnixNano":"x'),
        (rb'"stallscope.gpu.device"', rb'"stallscope.gpu.dev"'),
        (rb'"stringValue":"GPU-a"', rb'"stringValue":""'),
    ],
)
def test_a_sample_without_device_or_time_is_left_out_and_told(pattern: bytes, by: bytes) -> None:
    damaged, count = re.subn(pattern, by, gpu_line(FULL))
    assert count == 1
    trace = read([*steady().lines(), damaged, gpu_line(OTHER)])
    assert [(finding.kind, finding.count) for finding in trace.findings] == [("malformed_span", 1)]
    assert trace.gpu.column("device").to_pylist() == ["GPU-b"]


def test_a_sample_that_came_twice_counts_once() -> None:
    trace = read([*steady().lines(), gpu_line(FULL), gpu_line(FULL)])
    assert [(finding.kind, finding.count) for finding in trace.findings] == [("duplicate_sample", 1)]
    assert trace.gpu.num_rows == 1


def test_parquet_returns_the_same_samples(tmp_path: Path) -> None:
    trace = read([*steady().lines(), gpu_line(FULL), gpu_line(COLD), gpu_line(OTHER)])
    write_parquet(trace, tmp_path / "tables")
    assert read_trace(tmp_path / "tables").gpu == trace.gpu
