"""Forms of OTLP: whatever form the same spans come in, the trace is the same; what is damaged costs itself alone."""

import base64
import gzip
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import orjson
import pytest
import zstandard
from google.protobuf.json_format import ParseDict
from hypothesis import assume, given
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from stallscope.errors import UsageError
from stallscope.trace import Trace, read_trace
from stallscope_telemetry import names
from tests.trace.recording import Workload, folder, line, run, steady, workloads, write

Encode = Callable[[list[bytes]], bytes]


@cache
def lines() -> tuple[bytes, ...]:
    return tuple(steady(5, output=9).lines())


def message(text: bytes) -> bytes:
    """One line of JSON as a protobuf message."""
    data = orjson.loads(text)
    for resource in data["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                span["traceId"] = base64.b64encode(bytes.fromhex(span["traceId"])).decode()
    encoded: bytes = ParseDict(data, TracesData()).SerializeToString()
    return encoded


def varint(value: int) -> bytes:
    low = value & 0x7F
    return bytes([low]) if value < 0x80 else bytes([low | 0x80]) + varint(value >> 7)


def framed(message: bytes) -> bytes:
    return struct.pack(">I", len(message)) + message


FORMS: dict[str, Encode] = {
    "JSON lines": b"\n".join,
    "JSON lines after blank ones": lambda texts: b"\n\n" + b"\r\n".join(texts),
    "one JSON document": lambda texts: orjson.dumps(
        {"resourceSpans": [one for text in texts for one in orjson.loads(text)["resourceSpans"]]},
        option=orjson.OPT_INDENT_2,
    ),
    "protobuf messages in a row": lambda texts: b"".join(map(message, texts)),
    "protobuf after lengths of 4 bytes": lambda texts: b"".join(framed(message(text)) for text in texts),
    "protobuf after varints": lambda texts: b"".join(varint(len(one)) + one for one in map(message, texts)),
    "compressed messages after lengths": lambda texts: b"".join(
        framed(zstandard.compress(message(text))) for text in texts
    ),
    "compressed JSON after lengths": lambda texts: b"".join(framed(zstandard.compress(text)) for text in texts),
}


def read(data: bytes) -> Trace:
    with folder() as path:
        (path / "trace").write_bytes(data)
        return read_trace(path / "trace")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_spans_are_the_same_trace_in_any_form(form: str, compress: Callable[[bytes], bytes]) -> None:
    trace = read(compress(FORMS[form](list(lines()))))
    assert trace.findings == ()
    assert trace.tables == read(b"\n".join(lines())).tables


@given(workload=workloads(6))
def test_protobuf_says_what_json_says(workload: Workload) -> None:
    recording = run(workload)
    assume(recording.steps)
    texts = recording.lines()
    assert read(b"".join(map(message, texts))).tables == read(b"\n".join(texts)).tables


@pytest.mark.parametrize("form", [form for form in FORMS if "document" not in form])
def test_half_a_file_gives_what_came_before(form: str) -> None:
    data = FORMS[form](list(lines()))
    trace = read(data[: len(data) // 3])
    assert 0 < trace.steps.num_rows < read(data).steps.num_rows
    assert {one.kind for one in trace.findings} <= {"damaged_file", "unreadable_line"}
    assert trace.findings


def test_a_damaged_message_between_two_is_named_and_the_rest_is_kept() -> None:
    whole = [message(text) for text in lines()]
    broken = whole[1][:2] + b"\xff" * (len(whole[1]) - 2)
    trace = read(b"".join(framed(one) for one in [whole[0], broken, *whole[1:]]))
    assert trace.tables == read(b"\n".join(lines())).tables
    (finding,) = trace.findings
    assert finding.kind in ("unreadable_message", "damaged_file")


@given(garbage=st.binary(min_size=1, max_size=300))
def test_garbage_is_one_line_of_advice(garbage: bytes) -> None:
    with pytest.raises(UsageError):
        read(garbage)


def test_one_bad_file_among_many_is_named(tmp_path: Path) -> None:
    for number, text in enumerate(lines()):
        (tmp_path / f"{number:03}.bin").write_bytes(message(text))
    good = read_trace(tmp_path)
    (tmp_path / "999.pb").write_bytes(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01")
    trace = read_trace(tmp_path)
    assert trace.tables == good.tables
    bad, counted = trace.findings
    assert bad.where.endswith("999.pb")
    assert (counted.where, counted.count) == (str(tmp_path), 1)
    assert f"the other {len(lines())} are read" in counted.text


def test_a_bomb_is_cut_off_where_a_line_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stallscope.trace.otlp.json.MOST_LINE_BYTES", 1 << 20)
    bomb = gzip.compress(b"\n".join(lines()) + b"\n" + b" " * (1 << 26) + b"{}\n" + lines()[0])
    trace = read(bomb)
    assert trace.steps.num_rows == read(b"\n".join(lines())).steps.num_rows


def test_attributes_of_no_type_that_otlp_allows_are_counted_in_protobuf_too() -> None:
    data = TracesData.FromString(message(lines()[0]))
    (span,) = data.resource_spans[0].scope_spans[0].spans
    span.attributes.add(key="bytes").value.bytes_value = b"x"
    mixed = span.attributes.add(key="mixed").value.array_value.values
    mixed.add(int_value=1)
    mixed.add(string_value="a")
    trace = read(data.SerializeToString() + b"".join(map(message, lines()[1:])))
    assert [(one.kind, one.count) for one in trace.findings] == [("unsound_attribute", 2)]


def test_an_empty_array_of_zeros_reads_as_zeros() -> None:
    config = steady().config
    text = line("r0", config, names.STEP_SPAN, 1, 2, {names.STEP: 0, "zeros": [0, 0], "none": []})
    data = TracesData.FromString(message(text))
    values = data.resource_spans[0].scope_spans[0].spans[0].attributes
    assert [len(one.value.array_value.values) for one in values if one.key == "zeros"] == [2]
    assert read(message(text) + b"".join(map(message, lines()))).findings != ()


def test_a_folder_may_hold_all_forms(tmp_path: Path) -> None:
    texts = list(lines())
    write(tmp_path / "a.otlp.jsonl", texts[:3])
    (tmp_path / "b.pb.gz").write_bytes(gzip.compress(b"".join(map(message, texts[3:6]))))
    (tmp_path / "c.binpb.zst").write_bytes(zstandard.compress(b"".join(framed(message(text)) for text in texts[6:])))
    (tmp_path / "notes.txt").write_text("not a trace")
    assert read_trace(tmp_path).tables == read(b"\n".join(texts)).tables
