"""The Perfetto file, read back with Perfetto's protos: every request, step and stall, at the trace's own times."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stallscope.diagnosis import Diagnosis, diagnose
from stallscope.reports import perfetto
from stallscope.reports.perfetto import write_perfetto
from stallscope.trace import Trace
from stallscope.trace.rename import renamed
from stallscope.trace.schema import TABLES
from stallscope.trace.tables import encode, plain_schema, same
from tests.reports.examples import hostile_diagnosis, hostile_trace
from tests.reports.perfetto_file import Read, read_perfetto
from tests.trace.recording import Workload, read, run, workloads
from tests.views.recordings import diagnosed, recorded, replica

TENANT = {"kv_pinning": "archive", "reasoning_prompt": "reasoner"}


def written(trace: Trace, diagnosis: Diagnosis | None) -> Read:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.pftrace"
        with path.open("wb") as file:
            write_perfetto(trace, diagnosis, file)
        return read_perfetto(path)


@cache
def stall(scenario: str = "kv_pinning") -> Read:
    return written(recorded(scenario), diagnosed(scenario))


def test_every_step_is_a_slice_at_its_own_time() -> None:
    r = replica()
    slices = stall().on("steps")
    assert [one.begin for one in slices] == r.timeline.start.tolist()
    assert [one.end for one in slices] == r.steps["ready"].tolist()
    assert [one.notes["step"] for one in slices] == r.steps["step"].tolist()
    assert [one.notes["prefill_tokens"] for one in slices] == r.steps["prefill_tokens"].tolist()


def test_every_request_of_the_trace_is_there_with_its_tenant_and_tokens() -> None:
    requests = recorded().requests.to_pandas().set_index("request")
    drawn = [*stall().on("waiting"), *stall().on("batch")]
    assert {one.notes["request"] for one in drawn} == set(requests.index)
    for one in drawn:
        known = requests.loc[one.notes["request"]]
        assert one.name == f"{one.notes['request']} · {known['tenant']}"
        assert one.category == one.alike == known["tenant"]
        assert one.notes["prompt_tokens"] == known["prompt_tokens"]
        assert one.notes["output_tokens"] == known["output_tokens"]
        assert known["arrival"] <= one.begin < one.end
    begun = {one.notes["request"]: one.begin for one in reversed(drawn)}
    assert min(begun[name] - requests.loc[name, "arrival"] for name in begun) == 0


def test_a_slot_is_a_track_and_what_a_request_does_lies_within_its_slice() -> None:
    slots = {one.track for one in stall().on("batch")}
    most = int(recorded().steps.to_pandas()["running"].max())
    assert slots >= {f"/{replica().name}/batch/slot {number}" for number in range(1, most + 1)}
    assert {one.name for one in stall().on("batch", 1)} >= {"prefill", "decoding"}
    assert "waiting for KV blocks" in {one.name for one in stall().on("waiting", 1)}


def test_counters_end_where_the_steps_end() -> None:
    steps = recorded().steps.to_pandas()
    for name, column in (
        ("requests waiting", "waiting"),
        ("requests running", "running"),
        ("KV blocks used", "kv_used"),
    ):
        track = next(track for track in stall().counters if f"/{name}" in track)
        values = [value for _, value in stall().counters[track]]
        assert max(values) == steps[column].max()
        assert all(a != b for a, b in pairwise(values))


@pytest.mark.parametrize("scenario", TENANT)
def test_an_arrow_leads_from_the_culprits_request_to_each_wait_of_its_victims(scenario: str) -> None:
    read = stall(scenario)
    sources = {arrow: one for one in read.slices for arrow in one.out}
    targets = {arrow: one for one in read.slices for arrow in one.into}
    assert len(sources) > 10
    assert sources.keys() == targets.keys()
    assert sum(len(one.out) for one in read.slices) == len(sources)
    assert {one.category for one in sources.values()} == {TENANT[scenario]}
    for arrow, source in sources.items():
        assert source.begin <= targets[arrow].begin < targets[arrow].end
        assert targets[arrow].name == f"for {source.name}"
        assert "/stalled waits" in targets[arrow].track


def test_incidents_are_slices_that_say_what_happened() -> None:
    incidents = diagnosed().incidents
    slices = stall().on("incidents")
    assert {(one.begin, one.end) for one in slices} == {(one.start_ns, one.end_ns) for one in incidents}
    worst = next(one for one in slices if one.begin == incidents[0].start_ns)
    assert worst.name.startswith(f"{incidents[0].verdict}: {incidents[0].culprits[0].tenant} stalled")
    assert worst.notes["lost_s"] == pytest.approx(incidents[0].lost_s)


def test_without_a_diagnosis_there_are_no_incidents_and_no_arrows() -> None:
    read = written(recorded(), None)
    assert read.on("steps")
    assert read.on("batch")
    assert not read.on("incidents") + read.on("stalled waits")
    assert not any(one.out or one.into for one in read.slices)


def test_replicas_are_processes_of_their_own() -> None:
    trace = recorded("reasoning_prompt")
    name = replica("reasoning_prompt").name
    both = Trace({key: encode(key, [*_named(trace, key, name, "engine-b")]) for key in TABLES}, "both")
    read = written(both, None)
    assert sorted(read.processes) == sorted([name, "engine-b"])
    (clock,) = read.clocks  # a second one could only go backwards
    assert set(clock.values()) == {trace.steps["scheduled"][0].as_py()}
    for process in read.processes:
        mine = [one for one in read.on("steps") if one.track.startswith(f"/{process}/")]
        assert len(mine) == trace.steps.num_rows


def _named(trace: Trace, table: str, *replicas: str) -> Iterator[pa.Table]:
    """A table with plain strings, as that of each of these replicas."""
    plain = trace.tables[table].cast(plain_schema(TABLES[table]))
    for name in replicas:
        yield plain.set_column(0, "replica", same(name, plain.num_rows))


def test_hostile_names_come_out_on_one_line_and_titles_are_short() -> None:
    read = written(hostile_trace(), hostile_diagnosis())
    assert len(read.slices) == len(stall().slices)
    for one in read.slices:
        assert one.name.isprintable()
        assert one.category.isprintable()
        assert len(one.name) <= 200
    assert any("<script>" in one.notes["tenant"] for one in read.on("batch"))
    assert any("\\x1b[31m" in one.notes["tenant"] for one in read.on("batch"))


def test_a_name_of_ten_thousand_characters_is_written_in_full_once() -> None:
    long = "<b>\n" + "x" * 10_000
    trace = renamed(recorded(), {"tenant": lambda name: long if name == "archive" else name})
    with TemporaryDirectory() as folder:
        path = Path(folder) / "long.pftrace"
        with path.open("wb") as file:
            write_perfetto(trace, None, file)
        assert path.read_bytes().count(b"x" * 9_000) == 1
        mine = [one for one in read_perfetto(path).on("batch") if one.notes["tenant"].startswith("<b>\\n")]
    assert mine
    assert all(len(one.name) < 140 and len(one.category) <= 64 for one in mine)
    assert len(mine[0].notes["tenant"]) == 10_005


def test_packets_are_written_while_others_are_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(perfetto, "_PACKETS", 100)
    sizes: list[int] = []

    class Counting:
        def write(self, content: bytes) -> None:
            sizes.append(len(content))

    write_perfetto(recorded(), diagnosed(), Counting())  # type: ignore[arg-type]
    path = tmp_path / "whole.pftrace"
    with path.open("wb") as file:
        write_perfetto(recorded(), diagnosed(), file)
    assert sum(sizes) == path.stat().st_size
    assert max(sizes) < 60_000
    assert len(read_perfetto(path).slices) == len(stall().slices)


def test_progress_rises_to_the_whole() -> None:
    seen: list[float] = []
    with Path(os.devnull).open("wb") as file:
        write_perfetto(recorded(), None, file, seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1


def test_perfettos_own_trace_processor_reads_it(tmp_path: Path) -> None:
    binary = os.environ.get("TRACE_PROCESSOR_SHELL") or shutil.which("trace_processor_shell")
    if binary is None:
        pytest.skip("no trace_processor_shell on the path: Perfetto's package only downloads it")
    from perfetto.trace_processor import TraceProcessor, TraceProcessorConfig

    path = tmp_path / "stall.pftrace"
    with path.open("wb") as file:
        write_perfetto(recorded(), diagnosed(), file)
    with TraceProcessor(str(path), config=TraceProcessorConfig(bin_path=binary)) as processor:

        def value(query: str) -> int:
            return int(next(iter(processor.query(query))).value)

        read = stall()
        assert value("select count(*) as value from slice") == len(read.slices)
        assert value("select count(*) as value from slice where dur < 0") == 0
        assert value("select count(*) as value from flow") == sum(len(one.into) for one in read.slices)
        backwards = (
            "select count(*) as value from flow join slice a on slice_out = a.id join slice b on slice_in = b.id"
        )
        assert value(f"{backwards} where b.name != 'for ' || a.name") == 0
        errors = "select coalesce(sum(value), 0) as value from stats where severity in ('error', 'data_loss')"
        assert value(errors) == 0
        assert value("select count(*) as value from counter") == sum(map(len, read.counters.values()))


@settings(max_examples=20)
@given(workloads(), st.integers(0, 2**32), st.sampled_from([0.0, 0.2, 0.6]))
def test_whatever_was_lost_slices_nest_and_lives_are_whole(workload: Workload, seed: int, lost: float) -> None:
    rng = random.Random(seed)
    lines = [line for line in run(workload).lines() if rng.random() >= lost]
    assume(any(b"engine.step" in line for line in lines))
    trace = read(lines)
    found = written(trace, diagnose(trace, replay=False))
    assert len(found.on("steps")) == trace.steps.num_rows
    ends: dict[str, int] = {}
    for one in [*found.on("waiting"), *found.on("batch")]:
        request = one.notes["request"]
        ends[request] = max(ends.get(request, 0), one.end)
    for row in trace.requests.to_pylist():
        if row["end"] is not None and row["end"] > row["arrival"]:
            assert ends[row["request"]] == row["end"]
