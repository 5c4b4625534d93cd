"""Jaeger's JSON: the recording as its UI downloads it, times rounded to microseconds."""

from pathlib import Path

import orjson

from stallscope.trace import Trace, read_trace
from stallscope_engine.config import EngineConfig
from tests.trace.backends import Backend, jaeger_trace
from tests.trace.recording import Arrival, Workload, read, run, steady

TIMES = ("scheduled", "dispatched", "ready")


def document(lines: list[bytes]) -> dict[str, list[dict[str, object]]]:
    return {"data": [jaeger_trace(trace, spans) for trace, spans in Backend(lines).traces.items()]}


def written(folder: Path, data: object) -> Trace:
    (folder / "traces.json").write_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2))
    return read_trace(folder)


def test_a_download_is_the_recording(tmp_path: Path) -> None:
    lines = steady(5, output=9).lines()
    trace = written(tmp_path, document(lines))
    assert [one.kind for one in trace.findings] == ["experimental_format"]
    assert trace.tables == read(lines).tables


def test_all_but_times_is_as_it_was_and_times_are_of_that_microsecond(tmp_path: Path) -> None:
    config = EngineConfig(max_num_seqs=2, block_size=4, kv_blocks=20, max_num_batched_tokens=8)
    lines = run(Workload(config, [Arrival(333_333, 9, 7, "a")] * 5, 3, 10_000)).step_lines()
    trace, exact = written(tmp_path, document(lines)), read(lines)
    for name in ("residency", "evictions"):
        assert trace.tables[name] == exact.tables[name]
    steps, told = exact.steps.to_pandas(), trace.steps.to_pandas()
    unrounded = ["idle_ns", *TIMES]
    assert told.drop(columns=unrounded).equals(steps.drop(columns=unrounded))
    for name in TIMES:
        assert (told[name] - steps[name]).abs().max() < 2000


def test_what_is_damaged_costs_itself_and_is_counted(tmp_path: Path) -> None:
    lines = steady(5, output=9).lines()
    data = document(lines)
    first, *_ = data["data"]
    step, timeless, odd = first["spans"][:3]  # type: ignore[index]
    step["tags"] += [{"key": "raw", "type": "binary", "value": "AA=="}, {"key": "x", "type": "int64", "value": "x"}, 7]
    del timeless["startTime"]
    odd["processID"] = "p99"
    trace = written(tmp_path, data)
    kinds = {one.kind: one.count for one in trace.findings}
    assert (kinds["malformed_span"], kinds["unsound_attribute"]) == (1, 3)
    assert trace.steps.num_rows == read(lines).steps.num_rows - 1
    assert set(trace.replicas["replica"].to_pylist()) == {"r0", "(unknown)"}
