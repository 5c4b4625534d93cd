"""Mapped tables: times are exact in every unit, what is not sound is counted, mistakes are named by file and key."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from stallscope.errors import UsageError
from stallscope.trace import read_trace
from stallscope.trace.findings import Finding
from stallscope.trace.mapping import read_mapped
from stallscope.trace.schema import REQUESTS
from tests.trace.recording import steady, write

PLAIN = """
unit: s
request: id
tenant: team
arrival: at
end: done
"""
T0 = 1_790_000_000
NS = 1_000_000_000


def mapped(folder: Path, table: str, mapping: str = PLAIN) -> tuple[list[dict[str, object]], tuple[Finding, ...]]:
    (folder / "t.csv").write_text(table, encoding="utf-8")
    (folder / "m.yaml").write_text(mapping, encoding="utf-8")
    requests, findings = read_mapped(folder / "t.csv", folder / "m.yaml")
    assert requests.schema == REQUESTS
    return requests.to_pylist(), findings


def test_a_table_becomes_requests_in_the_order_of_their_arrival(tmp_path: Path) -> None:
    table = (
        "rid,team,replica,received,queue_ms,ttft_ms,total_ms,in,out,trace,why\n"
        "r2,batch,e0,1790000001.5,10,250.125,2000,100,5,,length\n"
        f"r1,chat,e0,1790000000,0,20,40,7,2,{'AB' * 16},STOP\n"
        "r3,,e1,1790000002,,,,9,,,\n"
    )
    mapping = """
    unit: ms
    request: rid
    tenant: team
    replica: replica
    model: {value: llama}
    arrival: {column: received, unit: s}
    time_in_queue: queue_ms
    ttft: ttft_ms
    duration: total_ms
    prompt_tokens: in
    output_tokens: out
    trace_id: trace
    finish_reason: why
    """
    rows, findings = mapped(tmp_path, table, mapping)
    first, second, third = rows
    assert [row["request"] for row in rows] == ["r1", "r2", "r3"]
    assert (first["tenant"], first["tenant_source"]) == ("chat", "table:team")
    assert (first["trace_id"], first["finish_reason"], first["state"]) == ("ab" * 16, "stop", "finished")
    assert second["arrival"] == T0 * NS + 1_500_000_000
    assert second["scheduled"] == T0 * NS + 1_510_000_000
    assert second["first_token"] == T0 * NS + 1_750_125_000
    assert second["end"] == T0 * NS + 3_500_000_000
    assert (second["prompt_tokens"], second["output_tokens"], second["model"]) == (100, 5, "llama")
    assert (third["tenant"], third["tenant_source"], third["replica"]) == ("(unknown)", None, "e1")
    assert (third["end"], third["state"], third["output_tokens"]) == (None, "open", None)
    assert findings == ()


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("1790000000123456789", "ns", 1_790_000_000_123_456_789),
        ("1790000000123456.789", "us", 1_790_000_000_123_456_789),
        ("1790000000123.456789", "ms", 1_790_000_000_123_456_789),
        ("1790000000.123456789", "s", 1_790_000_000_123_456_789),
        ("1790000000.1234567899", "s", 1_790_000_000_123_456_789),
        ("1.79e9", "s", 1_790_000_000_000_000_000),
        ("2026-09-21T14:13:20.123456789Z", "rfc3339", 1_790_000_000_123_456_789),
        ("2026-09-21T16:13:20+02:00", "rfc3339", 1_790_000_000_000_000_000),
        ("2026-09-21 14:13:20", "rfc3339", 1_790_000_000_000_000_000),
    ],
)
def test_times_are_exact_in_every_unit(tmp_path: Path, text: str, unit: str, expected: int) -> None:
    mapping = f"arrival: {{column: at, unit: {unit}}}\nduration: {{column: took, unit: ms}}\n"
    (row,), _ = mapped(tmp_path, f"at,took\n{text},1\n", mapping)
    assert row["arrival"] == expected
    assert row["end"] == expected + 1_000_000


def test_an_arrival_is_told_by_the_end_and_the_duration(tmp_path: Path) -> None:
    mapping = "unit: s\nend: done\nduration: took\n"
    (row,), _ = mapped(tmp_path, "done,took\n1790000010,2.5\n", mapping)
    assert row["arrival"] == T0 * NS + 7_500_000_000


@pytest.mark.parametrize(
    "row",
    [
        "NaN,9",
        "-5,9",
        "inf,9",
        "1e400,9",
        ",9",
        "soon,9",
        "99999999999999999999,9",
        "9999999999,9999999999",
        "5,-1",
        "5,nan",
    ],
)
def test_rows_without_sound_times_are_left_out_and_counted(tmp_path: Path, row: str) -> None:
    rows, findings = mapped(tmp_path, f"at,done,id,team\n1,2,good,a\n{row},bad,b\n")
    assert [row["request"] for row in rows] == ["good"]
    assert [(one.kind, one.where, one.count) for one in findings] == [("unsound_row", f"{tmp_path / 't.csv'}:3", 1)]


def test_a_request_that_ends_before_it_arrives_is_left_out_and_counted(tmp_path: Path) -> None:
    rows, (finding,) = mapped(tmp_path, "at,done,id,team\n1,2,good,a\n5,4,bad,b\n")
    assert len(rows) == 1
    assert (finding.kind, finding.count) == ("backward_row", 1)


def test_other_values_that_are_not_sound_count_as_absent(tmp_path: Path) -> None:
    mapping = PLAIN + "first_token: first\nprompt_tokens: tokens\n"
    table = "at,done,id,team,first,tokens\n1,3,a,x,2,10\n1,3,b,x,0.5,-3\n1,3,c,x,late,many\n"
    rows, findings = mapped(tmp_path, table, mapping)
    assert [row["first_token"] for row in rows] == [2 * NS, None, None]
    assert [row["prompt_tokens"] for row in rows] == [10, None, None]
    assert {(one.where, one.count) for one in findings} == {
        (f"{tmp_path / 't.csv'}: first_token, row 4", 2),
        (f"{tmp_path / 't.csv'}: prompt_tokens, row 3", 2),
    }


def test_ids_that_are_missing_or_there_twice_become_unique(tmp_path: Path) -> None:
    rows, _ = mapped(tmp_path, "at,done,id,team\n3,4,a,x\n1,2,a,x\n2,3,,x\n")
    assert [row["request"] for row in rows] == ["a", "row-4", "a #2"]


def test_a_table_in_parquet_has_its_own_types(tmp_path: Path) -> None:
    at = pa.array([datetime(2026, 9, 21, 14, 13, 20, 5, tzinfo=UTC)], pa.timestamp("us", "UTC"))
    table = pa.table({"at": at, "took": pa.array([0.25]), "tokens": pa.array([12.0])})
    parquet.write_table(table, tmp_path / "t.parquet")
    mapping = "arrival: {column: at, unit: rfc3339}\nduration: {column: took, unit: s}\nprompt_tokens: tokens\n"
    (tmp_path / "m.yaml").write_text(mapping)
    requests, findings = read_mapped(tmp_path / "t.parquet", tmp_path / "m.yaml")
    (row,) = requests.to_pylist()
    assert (row["arrival"], row["end"]) == (T0 * NS + 5_000, T0 * NS + 250_005_000)
    assert row["prompt_tokens"] == 12
    assert findings == ()


SPANS = """
span: llm_request
request: gen_ai.request.id
tenant: stallscope.tenant
replica: resource.service.instance.id
arrival: {column: start, unit: ns}
end: {column: end, unit: ns}
prompt_tokens: gen_ai.usage.prompt_tokens
output_tokens: gen_ai.usage.completion_tokens
trace_id: trace_id
"""


def test_spans_of_a_name_are_requests_as_reading_them_finds(tmp_path: Path) -> None:
    recording = steady(requests=5)
    path = write(
        tmp_path / "t.otlp.jsonl", [*recording.lines(), b'{"resourceSpans": [{"scopeSpans": [{"spans": [7]}]}]}']
    )
    (tmp_path / "m.yaml").write_text(SPANS)
    requests, _ = read_mapped(path, tmp_path / "m.yaml")
    known = read_trace(path).requests
    for name in ("replica", "request", "tenant", "arrival", "end", "prompt_tokens", "output_tokens", "trace_id"):
        assert requests[name].to_pylist() == known[name].to_pylist()
    assert set(requests["tenant_source"].to_pylist()) == {"claim:stallscope.tenant"}


def test_where_no_span_has_the_name_that_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "t.otlp.jsonl", steady().lines())
    (tmp_path / "m.yaml").write_text(SPANS.replace("llm_request", "generate"))
    with pytest.raises(UsageError, match="no span in it is called 'generate'"):
        read_mapped(path, tmp_path / "m.yaml")


@pytest.mark.parametrize(
    ("mapping", "says"),
    [
        ("arival: at\n", "m.yaml: arival: unknown key; did you mean arrival?"),
        ("arrival: at\nend: done\n", "m.yaml: arrival: its unit is missing: {column: at, unit: ms}; units are ns, us"),
        ("unit: days\narrival: at\nend: done\n", "m.yaml: unit: must be one of ns, us, ms, s, rfc3339, not 'days'"),
        ("unit: [s]\narrival: at\nend: done\n", "m.yaml: unit: must be one of"),
        ("unit: s\narrival: at\n", "m.yaml: two of arrival, end and duration are needed"),
        ("unit: rfc3339\narrival: at\nduration: done\n", "m.yaml: duration: a duration has no date"),
        ("unit: s\narrival: at\nend: done\nduration: done\n", "m.yaml: duration: end says that already"),
        ("unit: s\narrival: at\nend: done\nttft: x\nfirst_token: x\n", "m.yaml: ttft: first_token says that already"),
        (
            "unit: s\narrival: at\nend: gone\n",
            "m.yaml: end: TABLE has no 'gone' with anything in it; it has",
        ),
        ("unit: s\narrival: at\nend: {value: 5}\n", "m.yaml: end.value: unknown key"),
        ("unit: s\narrival: at\nend: {unit: s}\n", "m.yaml: end: say which column it is"),
        ("unit: s\narrival: at\nend: done\nmodel: {value: a, column: b}\n", "m.yaml: model: say which column it is"),
        ("- at\n", "m.yaml: must be a mapping"),
        ("a: [\n", "m.yaml, line 2:"),
        ("unit: s\narrival: word\nend: done\n", "no row can be used: rows without sound times"),
    ],
)
def test_mistakes_are_one_line_that_names_file_and_key(tmp_path: Path, mapping: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        mapped(tmp_path, "at,done,word\n1,2,x\n", mapping)
    assert says.replace("TABLE", str(tmp_path / "t.csv")) in str(raised.value)
    assert "\n" not in str(raised.value)
