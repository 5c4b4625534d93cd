"""Files that nobody should have sent: memory stays bounded, the bad is named and counted, the good is kept."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import orjson
import pytest
import zstandard

from stallscope.errors import UsageError
from stallscope.trace import read_trace
from stallscope_telemetry import names
from tests.trace.recording import any_value, read, steady
from tests.trace.test_forms import framed, message

MIB = 1 << 20
MOST_MIB = 400  # a line of 64 MiB, its parts, and what is made of it
PROGRAM = """
import json, resource, sys
import orjson, pandas, zstandard
from stallscope.errors import UsageError
from stallscope.trace import read, read_trace
from stallscope.trace.otlp import protobuf

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

before = peak()
try:
    trace = read_trace(sys.argv[1])
    told = {"steps": trace.steps.num_rows, "requests": trace.requests.num_rows,
            "findings": [[one.kind, one.where, one.count, one.text] for one in trace.findings]}
except UsageError as error:
    told = {"steps": 0, "requests": 0, "findings": [["refused", "", 1, str(error)]]}
print(json.dumps({**told, "mib": peak() - before}))
"""


@cache
def good() -> bytes:
    return b"\n".join(steady(5, output=9).lines()) + b"\n"


def changed(change: Callable[[dict[str, list[dict[str, object]]]], object], of: str = names.STEP_SPAN) -> bytes:
    """A line of the recording, whose span is changed."""
    text = next(text for text in steady(5, output=9).lines()[1:] if of.encode() in text)
    data = orjson.loads(text)
    change(data["resourceSpans"][0]["scopeSpans"][0]["spans"][0])
    return orjson.dumps(data) + b"\n"


def attribute(key: str, value: object) -> Callable[[dict[str, list[dict[str, object]]]], object]:
    def put(span: dict[str, list[dict[str, object]]]) -> None:
        kept = [one for one in span["attributes"] if one["key"] != key]
        span["attributes"] = [*kept, {"key": key, "value": any_value(value)}]  # type: ignore[arg-type]

    return put


def joins(request_id: str) -> Callable[[dict[str, list[dict[str, object]]]], object]:
    def put(span: dict[str, list[dict[str, object]]]) -> None:
        attribute(names.R_HANDLE, [9])(span)
        attribute(names.R_ID, [request_id])(span)

    return put


def of_resource(value: str) -> bytes:
    label = orjson.dumps({"key": "label", "value": {"stringValue": value}})
    return good().splitlines()[1].replace(b'"attributes":[', b'"attributes":[' + label + b",", 1) + b"\n"


def spaces(compress: Callable[[bytes], bytes]) -> bytes:
    """A gigabyte without a line's end, in as many members as it takes."""
    return compress(good()) + compress(b" " * (64 * MIB)) * 16


CASES: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "gzip bomb": (lambda: spaces(gzip.compress), {"long_line"}),
    "zstd bomb": (lambda: spaces(zstandard.compress), {"long_line"}),
    "bomb of objects": (lambda: gzip.compress(good() + b"[" + b"{}," * (32 * MIB) + b"{}]", 1), {"long_line"}),
    "bomb within a message": (
        lambda: b"".join(framed(message(one)) for one in good().splitlines())
        + framed(zstandard.compress(b"\n\x00" * (512 * MIB))),
        {"damaged_file"},
    ),
    "attribute of 100 MB": (
        lambda: good() + changed(attribute("note", "x" * 100_000_000)) * 2, {"long_line"}
    ),
    "many attributes of 20 MB that nobody knows": (
        lambda: gzip.compress(good() + changed(attribute("note", "x" * 20_000_000)) * 24, 1), {"duplicate_step"}
    ),
    "tenants of 20 MB": (
        lambda: gzip.compress(
            good() + changed(attribute(names.TENANT, "x" * 20_000_000), names.REQUEST_SPAN) * 24, 1
        ),
        {"unsound_attribute", "duplicate_request"},
    ),
    "ids of 20 MB where a request joins": (
        lambda: gzip.compress(good() + changed(joins("x" * 20_000_000)) * 24, 1),
        {"unsound_attribute", "conflicting_step"},
    ),
    "labels of 20 MB": (
        lambda: gzip.compress(good() + b"".join(of_resource(f"{n}" * 10_000_000) for n in range(20)), 1),
        {"duplicate_step"},
    ),
    "deep nesting": (lambda: good() + b"[" * MIB + b"\n" + b'{"resourceSpans":[' * MIB + b"\n", {"unreadable_line"}),
    "deep nesting within an attribute": (
        lambda: good() + b'{"resourceSpans":[{"scopeSpans":[{"spans":[' + b'{"arrayValue":{"values":[' * MIB + b"\n",
        {"unreadable_line"},
    ),
    "an array of a million": (
        lambda: good() + changed(attribute(names.CHUNKS, [7] * 1_000_000)), {"conflicting_step"}
    ),
    "a number of a hundred thousand digits": (
        lambda: good() + changed(attribute("note", 4711)).replace(b"4711", b"9" * 100_000),
        {"unsound_attribute", "duplicate_step"},
    ),
}  # fmt: skip


def read_elsewhere(path: Path) -> dict[str, object]:
    """What a process of its own reads, with its memory."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path)], capture_output=True, text=True, timeout=300, check=True
    )
    told: dict[str, object] = json.loads(done.stdout)
    return told


@pytest.mark.parametrize("case", CASES)
def test_memory_is_bounded_and_the_good_is_kept(tmp_path: Path, case: str) -> None:
    make, kinds = CASES[case]
    (tmp_path / "bad.otlp.jsonl").write_bytes(make())
    told = read_elsewhere(tmp_path)
    assert told["mib"] <= MOST_MIB  # type: ignore[operator]
    assert {kind for kind, *_ in told["findings"]} == kinds  # type: ignore[attr-defined]
    whole = read(good().splitlines())
    assert (told["steps"], told["requests"]) == (whole.steps.num_rows, whole.requests.num_rows)


def test_a_file_of_zeros_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "t.pb.gz").write_bytes(gzip.compress(bytes(64 * MIB)) * 16)
    with pytest.raises(UsageError, match="a message is empty"):
        read_trace(tmp_path)


def test_lines_are_counted_the_good_and_the_bad(tmp_path: Path) -> None:
    (tmp_path / "t.otlp.jsonl").write_bytes(good() + b"garbage\n{}\n" + b" " * (65 * MIB) + b"\n")
    unreadable, long = read_trace(tmp_path).findings
    lines = len(good().splitlines())
    assert (unreadable.kind, unreadable.count, unreadable.where[-3:]) == ("unreadable_line", 2, f":{lines + 1}")
    assert (long.kind, long.count) == ("long_line", 1)
    assert long.text == f"a line is longer than 64 MiB and is left out; the other {lines} in this file are read"


# --- wrong content ------------------------------------------------------------------------------------------------

CONTENTS = {
    "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9,
    "html": b"<!doctype html>\n<title>502</title>\n" * 50,
    "csv": b"request,tenant\n" + b"r1,chat\n" * 500,
    "zip": b"PK\x03\x04" + bytes(range(255, 0, -1)) * 20,
    "parquet": b"PAR1" + bytes(range(256)) * 4 + b"PAR1",
    "json": b'{"hits": [1, 2, 3]}\n' * 40,
    "text": "журнал\n".encode() * 400,
    "half gzip": gzip.compress(b"{}" * 9000)[:40],
    "no bytes": b"\n",
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_another_kind_of_file_is_refused_alone_and_named_beside_good_ones(tmp_path: Path, kind: str) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_bytes(CONTENTS[kind])
    with pytest.raises(UsageError, match=re.escape(str(bad))) as refused:
        read_trace(bad)
    assert len(str(refused.value).splitlines()) == 1
    (tmp_path / "good.otlp.jsonl").write_bytes(good())
    trace = read_trace(tmp_path)
    assert trace.tables == read(good().splitlines()).tables
    assert all("bad.jsonl" in one.where for one in trace.findings if one.kind != "bad_files")
    assert bool(trace.findings) == (kind != "no bytes")


def test_one_bad_file_among_thousands_is_named_and_all_are_counted(tmp_path: Path) -> None:
    lines = good().splitlines()
    for number in range(2000):
        (tmp_path / f"{number:04}.otlp.jsonl").write_bytes(lines[number % len(lines)] + b"\n")
    (tmp_path / "1000.otlp.jsonl").write_bytes(lines[0][:50])
    trace = read_trace(tmp_path)
    assert trace.steps == read(lines).steps
    told = {one.kind: one for one in trace.findings}
    assert told["unreadable_line"].where == f"{tmp_path / '1000.otlp.jsonl'}:1"
    assert told["bad_files"].count == 1
    assert "the other 1,999 are read" in told["bad_files"].text


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.5, 1e300])
def test_numbers_that_are_no_times_count_as_absent(value: float) -> None:
    data = good().splitlines()
    double = json.dumps({"doubleValue": value}).encode()
    raw = changed(attribute(names.DISPATCH_DELAY, 4711)).replace(b'{"intValue":"4711"}', double)
    trace = read([data[0], raw.strip(), *data[2:]])
    assert trace.steps.num_rows >= 8
    trace.steps.validate(full=True)
    assert trace.findings


@pytest.mark.parametrize(("start", "end"), [("-5", "7"), ("1", "-9"), ("NaN", "7"), ("1x9", "7"), ("9" * 25, "9" * 26)])
@pytest.mark.parametrize("of", [names.STEP_SPAN, names.REQUEST_SPAN])
def test_a_span_without_sound_times_is_left_out(of: str, start: str, end: str) -> None:
    wrong = changed(lambda span: span.update(startTimeUnixNano=start, endTimeUnixNano=end), of)  # type: ignore[call-overload]
    trace = read([*good().splitlines(), wrong.strip()])
    assert trace.tables == read(good().splitlines()).tables
    assert {one.kind for one in trace.findings} <= {"malformed_span", "unsound_step"}
    assert sum(one.count for one in trace.findings) == 1
