"""Tables written as OTLP and read again are the same tables, whatever they were read from."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import orjson
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stallscope.diagnosis import diagnose
from stallscope.errors import UsageError
from stallscope.trace import Trace, parquet, read_trace
from stallscope.trace.estimated import trace_of_requests
from stallscope.trace.mapping import read_mapped
from stallscope.trace.rename import anonymized
from stallscope.trace.schema import TABLES
from stallscope.trace.select import between, span
from stallscope.trace.to_otlp import write_otlp
from stallscope.trace.to_otlp.keyframes import KEYFRAME_EVERY
from stallscope.workloads.recording import record as record_scenario
from stallscope.workloads.scenario import load_scenario
from stallscope_telemetry import names, spans
from tests.trace.formats import files
from tests.trace.recording import (
    Batches,
    Recording,
    Workload,
    as_batches,
    folder,
    line,
    read,
    run,
    steady,
    workloads,
)
from tests.trace.test_clients import known_request, traced
from tests.trace.test_clients import record as client
from tests.trace.test_gpu import COLD, FULL, OTHER, gpu_line
from tests.trace.test_parquet import cut, grown, over_hours, rows, stored, two_replicas
from tests.trace.test_plain_spans import CAPTURES
from tests.trace.test_read import mutations


def written(trace: Trace, path: Path) -> Path:
    assert write_otlp(trace, path) == 0
    return path


def again(trace: Trace) -> Trace:
    """The trace as it is read from what is written of it."""
    with folder() as path:
        return read_trace(written(trace, path / "t.otlp.jsonl.gz"))


def differences(one: Trace, other: Trace) -> dict[str, tuple[set[str], set[str]]]:
    """By table, the rows that only one of two traces has."""
    tables = ((name, rows(one.tables[name]), rows(other.tables[name])) for name in TABLES)
    return {name: (set(a) - set(b), set(b) - set(a)) for name, a, b in tables if a != b}


def lossy(recording: Recording, dice: random.Random, lost: float) -> list[bytes]:
    """Lines of which about the share ``lost`` is missing, steps in stretches."""
    steps, at = recording.step_lines(), 0
    kept: list[bytes] = []
    while at < len(steps):
        at += dice.randint(1, 6) if dice.random() < lost else 0
        kept.extend(steps[at : at + 1])
        at += 1
    return kept + [one for one in recording.request_lines() if dice.random() >= lost]


# --- recordings ---------------------------------------------------------------------------------------------------


@settings(max_examples=80)
@given(workloads(), st.integers(0, 2**32), st.sampled_from([0.0, 0.0, 0.05, 0.3]))
def test_any_recording_is_read_again_as_it_was(workload: Workload, seed: int, lost: float) -> None:
    lines = lossy(run(workload), random.Random(seed), lost)
    assume(any(b"engine.step" in line for line in lines))
    trace = read(lines)
    assert differences(trace, again(trace)) == {}


@settings(max_examples=20)
@given(workloads(), st.sampled_from([2_000_000, 50_000_000]))
def test_from_otlp_to_parquet_to_otlp_nothing_changes(workload: Workload, length_ns: int) -> None:
    lines = run(workload).lines()
    assume(any(b"engine.step" in line for line in lines))
    trace = read(lines)
    with folder() as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_HOUR_NS", length_ns)
        patch.setattr(parquet, "_named_hour", str)
        assert differences(trace, again(stored(trace, path / "data"))) == {}


@settings(max_examples=40)
@given(mutations())
def test_of_any_damaged_recording_the_batches_that_are_known_stay_the_same(data: bytes) -> None:
    with folder() as path:
        (path / "t.otlp.jsonl").write_bytes(data)
        try:
            trace = read_trace(path / "t.otlp.jsonl")
        except UsageError:
            return
    read_back = again(trace)
    assert set(differences(trace, read_back)) <= {"residency"}  # a stretch may have been cut for no visible reason
    for replica in trace.steps["replica"].unique().to_pylist():
        assert as_batches(read_back, replica) == as_batches(trace, replica)


def test_a_request_that_one_sender_told_and_steps_of_another_know_stays_apart() -> None:
    lines = steady(output=30).lines()
    told = next(number for number, text in enumerate(lines) if b'"llm_request"' in text)
    lines[told] = lines[told].replace(b'"service.instance.id"', b'"some.id"')
    trace = read(lines)
    assert set(trace.requests["replica"].to_pylist()) == {"r0", "(unknown)"}
    assert differences(trace, again(trace)) == {}


@pytest.mark.parametrize(("scenario", "variant"), [("kv_pinning", "sample"), ("reasoning_prompt", "demo")])
def test_the_same_is_diagnosed(tmp_path: Path, scenario: str, variant: str) -> None:
    record_scenario(load_scenario(scenario, variant), tmp_path / "a.otlp.jsonl.zst", seed=7, executor="virtual")
    trace = read_trace(tmp_path / "a.otlp.jsonl.zst")
    read_back = again(trace)
    assert differences(trace, read_back) == {}
    first, second = (diagnose(one, replay=False).to_dict() for one in (trace, read_back))
    assert {**first, "source": ""} == {**second, "source": ""}


def test_who_misses_a_step_of_what_is_written_soon_knows_again(tmp_path: Path) -> None:
    path = written(read(over_hours(3 * KEYFRAME_EVERY).lines()), tmp_path / "t.otlp.jsonl")
    lines = [orjson.loads(text) for text in path.read_bytes().splitlines()]
    of_steps = lines[0]["resourceSpans"][0]["scopeSpans"][0]["spans"]
    assert of_steps[50]["name"] == names.STEP_SPAN
    del of_steps[50]
    (tmp_path / "lossy.otlp.jsonl").write_bytes(b"\n".join(map(orjson.dumps, lines)))
    known, unknown, rest = read_trace(tmp_path / "lossy.otlp.jsonl").coverage.to_pylist()
    assert (known["fidelity"], known["steps_seen"]) == (3, 50)
    assert (unknown["steps_lost"], unknown["steps_seen"]) == (1, KEYFRAME_EVERY - 51)
    assert rest["fidelity"] == 3


def test_two_replicas_of_several_hours() -> None:
    assert differences(two_replicas(), again(two_replicas())) == {}


def test_configurations_stay_apart_even_where_they_are_alike() -> None:
    lines = steady(output=30).lines()
    changed = [text.replace(b'"key":"stallscope.kv.total_blocks"', b'"key":"some.label"', 1) for text in lines]
    told_twice = [text.replace(b'"some.label"', b'"another.label"') for text in changed]
    trace = read([*lines[:8], *changed[8:16], *told_twice[16:]])
    assert trace.replicas.num_rows == 3
    assert differences(trace, again(trace)) == {}


def test_records_lost_to_a_full_queue_are_counted_alike() -> None:
    recording, dropped = steady(3, output=40), 0
    lines = []
    for number, one in enumerate(recording.steps):
        if number in range(9, 14) or number == 30:
            dropped += 2
            continue
        attributes = spans.step_attributes(one, dropped)
        lines.append(line("r0", recording.config, names.STEP_SPAN, one.scheduled_ns, one.ready_ns, attributes))
    trace = read(lines)
    assert sum(trace.coverage["spans_dropped"].to_pylist()) == dropped
    assert differences(trace, again(trace)) == {}


# --- parts, and what was put together -----------------------------------------------------------------------------


def without_holders(batches: Batches) -> Batches:
    return {step: {name: (*doing[:4], None) for name, doing in batch.items()} for step, batch in batches.items()}


def without_owners(trace: Trace) -> list[dict[str, object]]:
    return trace.evictions.drop_columns(["owner_request", "owner_tenant"]).to_pylist()


@settings(max_examples=40)
@given(workloads(), st.floats(0, 1), st.floats(0, 1))
def test_a_part_is_a_part_again(workload: Workload, a: float, b: float) -> None:
    lines = run(workload).lines()
    assume(any(b"engine.step" in line for line in lines))
    trace = read(lines)
    start, end = span(trace)
    low, high = (start + round((end - start) * share) for share in sorted((a, b)))
    try:
        part = between(trace, low, high)
    except UsageError:
        return
    read_back = again(part)
    # Who took the blocks of somebody who computes anew is known only where that was seen, and whose an evicted block
    # was only where that one is still there.
    assert set(differences(part, read_back)) <= {"residency", "evictions"}
    assert without_owners(read_back) == without_owners(part)
    assert without_holders(as_batches(read_back)) == without_holders(as_batches(part))


@pytest.mark.parametrize("step", [10, 60, 95, 100, 150])
def test_files_that_were_added_to_a_dataset_are_one(tmp_path: Path, step: int) -> None:
    """Whether the second begins with a keyframe or not."""
    both = grown(tmp_path / "data", cut(over_hours(), step))
    read_back = again(both)
    assert set(differences(both, read_back)) <= {"residency", "coverage"}  # stretches that touch become one
    assert as_batches(read_back) == as_batches(both)
    for column in ("steps_seen", "steps_lost"):
        assert sum(read_back.coverage[column].to_pylist()) == sum(both.coverage[column].to_pylist())


def test_what_is_shared_without_names_has_none_in_otlp(tmp_path: Path) -> None:
    trace = anonymized(read(steady(3).lines()))
    path = written(trace, tmp_path / "t.otlp.jsonl")
    assert differences(trace, read_trace(path)) == {}
    assert b"req-" not in path.read_bytes()


# --- what others tell ---------------------------------------------------------------------------------------------


def of_gpus(_: Path) -> Trace:
    own, sampler = [gpu_line(one) for one in (OTHER, COLD, FULL)], gpu_line(COLD, "sampler")
    return read([*steady().lines(), *own, sampler])


def of_clients(path: Path) -> Trace:
    lost = client("nobody", 8, tenant="", token_times_ns=[], status="timeout", output_tokens=0)
    return traced(path, client(known_request()), lost, damage=lambda span: span.update(traceId=""))


def of_sums(path: Path) -> Trace:
    files.write_recording(path, over_hours())
    return read_trace(path)


def of_requests(path: Path) -> Trace:
    files.write_recording(path, over_hours())
    for passes in path.glob("fpm*"):
        passes.unlink()
    return read_trace(path)


def of_a_table(path: Path) -> Trace:
    """One is still open, one has an adapter, none a trace id."""
    table = "id,team,lora,in,at,wait,ttft,took\nr2,batch,,9,3,10,250.125,2000\nr1,chat,l1,7,1,0,20,40\nr3,,,,2,,,\n"
    mapping = "unit: ms\nrequest: id\ntenant: team\nadapter: lora\nprompt_tokens: in\narrival: {column: at, unit: s}\n"
    (path / "t.csv").write_text(table)
    (path / "m.yaml").write_text(mapping + "time_in_queue: wait\nttft: ttft\nduration: took\n")
    requests, findings = read_mapped(path / "t.csv", path / "m.yaml")
    return trace_of_requests(requests, "t.csv", findings)


def of_sampled_spans(path: Path) -> Trace:
    trace = of_requests(path)
    at = TABLES["coverage"].get_field_index("sampled_share")
    quarter = trace.coverage.set_column(at, TABLES["coverage"].field(at), pa.array([0.25] * len(trace.coverage)))
    return Trace({**trace.tables, "coverage": quarter}, trace.source)


@pytest.mark.parametrize("make", [of_gpus, of_clients, of_sums, of_requests, of_a_table, of_sampled_spans])
def test_whatever_a_trace_tells_is_told_again(tmp_path: Path, make: Callable[[Path], Trace]) -> None:
    trace = make(tmp_path)
    assert differences(trace, again(trace)) == {}


@pytest.mark.skipif(not CAPTURES.is_dir(), reason="the captures of a real vLLM are not there")
@pytest.mark.parametrize("name", ["hog", "base"])
def test_a_plain_vllm_too(name: str) -> None:
    trace = read_trace(CAPTURES / name)
    assert differences(trace, again(trace)) == {}


def test_a_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "t.otlp.jsonl").write_bytes(b"mine")
    with pytest.raises(UsageError, match="exists"):
        write_otlp(read(steady().lines()), tmp_path / "t.otlp.jsonl")
    assert (tmp_path / "t.otlp.jsonl").read_bytes() == b"mine"
