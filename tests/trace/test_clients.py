"""The table of clients: joined with the engine's requests, damaged spans found, nothing else lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from stallscope.errors import UsageError
from stallscope.trace import Trace, read_trace, write_parquet
from stallscope.trace.clients import ClientSpan, client_table
from stallscope.trace.findings import Findings
from stallscope.trace.tables import plain_table
from stallscope_telemetry.clients import Caller, ClientFile, ClientRecord
from tests.trace.recording import steady, write

S = 1_000_000_000
Span = dict[str, object]


def record(request_id: str, trace_id: int = 7, **values: object) -> ClientRecord:
    known: dict[str, object] = {
        "caller": Caller(trace_id, 9),
        "request_id": request_id,
        "tenant": "t0",
        "prompt_tokens": 8,
        "max_tokens": 6,
        "due_ns": S,
        "sent_ns": S + 5,
        "end_ns": 2 * S,
        "status": "ok",
        "http_status": 200,
        "token_times_ns": [S + 100, S + 300, S + 900],
        "output_tokens": 6,
    }
    return ClientRecord(**(known | values))  # type: ignore[arg-type]


def traced(folder: Path, *records: ClientRecord, damage: Callable[[Span], object] | None = None) -> Trace:
    """An engine's trace of one request, and beside it a client's file, whose first span is damaged."""
    write(folder / "engine.otlp.jsonl", steady().lines())
    path = folder / "clients.otlp.jsonl"
    path.unlink(missing_ok=True)
    file = ClientFile(path, "tiny")
    for one in records:
        file.write(one)
    file.close()
    if damage is not None:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        line = json.loads(first)
        damage(line["resourceSpans"][0]["scopeSpans"][0]["spans"][0])
        path.write_text("\n".join([json.dumps(line), *rest]), encoding="utf-8")
    return read_trace(folder)


def known_request() -> str:
    (one,) = steady().requests
    return str(one.info.request_id)


def kinds(trace: Trace) -> set[str]:
    return {finding.kind for finding in trace.findings}


def test_a_client_is_joined_with_its_request_and_keeps_its_own_view(tmp_path: Path) -> None:
    trace = traced(tmp_path, record(known_request()))
    (row,) = trace.clients.to_pylist()
    replica, request = trace.requests.column("replica")[0].as_py(), trace.requests.column("request")[0].as_py()
    assert row == {
        "replica": replica,
        "request": request,
        "trace_id": f"{7:032x}",
        "tenant": "t0",
        "sent": S + 5,
        "first_token": S + 100,
        "end": 2 * S,
        "status": "ok",
        "output_tokens": 6,
        "longest_gap_ns": 600,
        "late_ns": 5,
    }
    assert trace.findings == ()
    assert trace.validate() == []


def test_the_trace_id_tells_more_than_the_request_id() -> None:
    columns = {"replica": ["r0", "r1"], "request": ["a", "b"], "trace_id": [f"{1:032x}", f"{2:032x}"]}
    requests = plain_table("requests", columns, 2)
    span = ClientSpan("a", f"{2:032x}", "t0", S, 2 * S, "ok", 1, 0, "", "file")
    (row,) = client_table([span], requests, Findings()).to_pylist()
    assert (row["replica"], row["request"]) == ("r1", "b")


def test_an_id_that_two_replicas_used_joins_with_neither() -> None:
    columns = {"replica": ["r0", "r1"], "request": ["a", "a"], "trace_id": [None, None]}
    span = ClientSpan("a", f"{2:032x}", "t0", S, 2 * S, "ok", 1, 0, "", "file")
    (row,) = client_table([span], plain_table("requests", columns, 2), Findings()).to_pylist()
    assert (row["replica"], row["request"]) == (None, "a")


def test_what_never_reached_an_engine_has_no_replica(tmp_path: Path) -> None:
    refused = record("elsewhere", status="rejected", token_times_ns=[], output_tokens=0)
    (row,) = traced(tmp_path, refused).clients.to_pylist()
    assert (row["replica"], row["request"], row["status"]) == (None, "elsewhere", "rejected")
    assert (row["first_token"], row["longest_gap_ns"]) == (None, None)


def test_clients_change_nothing_of_the_engines_tables(tmp_path: Path) -> None:
    both = traced(tmp_path, record(known_request()), record("elsewhere"))
    (tmp_path / "clients.otlp.jsonl").unlink()
    alone = read_trace(tmp_path)
    assert alone.clients.num_rows == 0
    assert all(both.tables[name] == alone.tables[name] for name in alone.tables if name != "clients")


def test_a_span_that_came_twice_counts_once(tmp_path: Path) -> None:
    trace = traced(tmp_path, record("a"), record("a"), record("a", trace_id=8))
    assert trace.clients.num_rows == 2
    assert kinds(trace) == {"duplicate_client"}


def put(name: str, value: object) -> Callable[[Span], object]:
    return lambda span: span.update({name: value})


def drop(attribute: str) -> Callable[[Span], object]:
    def change(span: Span) -> None:
        attributes = span["attributes"]
        assert isinstance(attributes, list)
        span["attributes"] = [one for one in attributes if one["key"] != attribute]

    return change


@pytest.mark.parametrize(
    "damage",
    [
        put("endTimeUnixNano", "5"),
        put("startTimeUnixNano", "soon"),
        put("attributes", 3),
        drop("gen_ai.request.id"),
        drop("stallscope.client.status"),
    ],
)
def test_a_damaged_span_is_a_finding_and_the_others_are_read(damage: Callable[[Span], object], tmp_path: Path) -> None:
    trace = traced(tmp_path, record("broken"), record("sound"), damage=damage)
    assert trace.clients.column("request").to_pylist() == ["sound"]
    assert "malformed_span" in kinds(trace)


@pytest.mark.parametrize("times", ["1,x", "99999999999999999", "", "-5", f"{3 * S}"])
def test_token_times_that_cannot_be_count_as_absent(times: str, tmp_path: Path) -> None:
    def damage(span: Span) -> None:
        drop("stallscope.token_times")(span)
        attributes = span["attributes"]
        assert isinstance(attributes, list)
        attributes.append({"key": "stallscope.token_times", "value": {"stringValue": times}})

    trace = traced(tmp_path, record("a"), damage=damage)
    (row,) = trace.clients.to_pylist()
    assert (row["first_token"], row["longest_gap_ns"], row["output_tokens"]) == (None, None, 6)
    assert kinds(trace) == ({"unsound_value"} if times else set())


def test_clients_survive_parquet(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    trace = traced(tmp_path / "in", record(known_request()), record("elsewhere"))
    write_parquet(trace, tmp_path / "out")
    stored = read_trace(tmp_path / "out").clients
    assert stored.schema == trace.clients.schema
    assert sorted(stored.to_pylist(), key=str) == sorted(trace.clients.to_pylist(), key=str)


def test_clients_alone_are_one_line_that_says_what_is_missing(tmp_path: Path) -> None:
    traced(tmp_path, record("a"))
    (tmp_path / "engine.otlp.jsonl").unlink()
    with pytest.raises(UsageError, match=r"only what clients saw \(1 llm_client spans\); put the engine's trace"):
        read_trace(tmp_path)
