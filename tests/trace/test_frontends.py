"""A frontend's own request spans beside the engine's: one request, told twice."""

import orjson

from stallscope_telemetry import names
from tests.trace.recording import line, read, steady


def frontend_line(request: bytes, late_ns: int) -> bytes:
    """What a frontend that is a process of its own says of the same request."""
    data = orjson.loads(request)
    (span,) = data["resourceSpans"][0]["scopeSpans"][0]["spans"]
    kept = {names.REQUEST_ID: "", names.USAGE_PROMPT: 0, names.LATENCY_TTFT: 0.0}
    found = {one["key"]: one for one in span["attributes"]}
    span["attributes"] = [found[name] for name in kept if name in found]
    span["endTimeUnixNano"] = str(int(span["endTimeUnixNano"]) + late_ns)
    data["resourceSpans"][0]["resource"]["attributes"] = [{"key": names.REPLICA, "value": {"stringValue": "a-uuid"}}]
    return orjson.dumps(data)


def test_a_request_told_by_engine_and_frontend_is_one_delivered_when_the_frontend_was_done() -> None:
    recording = steady(3)
    alone = read(recording.lines())
    both = read([*recording.lines(), *(frontend_line(one, 5_000_000) for one in recording.request_lines())])
    assert both.requests.drop_columns("delivered") == alone.requests.drop_columns("delivered")
    assert both.tables["steps"] == alone.tables["steps"]
    late = [row["delivered"] - row["end"] for row in both.requests.to_pylist()]
    assert late == [5_000_000] * 3
    assert both.findings == ()


def test_where_the_engines_own_span_was_lost_the_frontends_is_taken() -> None:
    recording = steady(3)
    spans = recording.request_lines()
    trace = read([*recording.step_lines(), *spans[1:], *(frontend_line(one, 0) for one in spans)])
    assert trace.replicas["replica"].to_pylist() == ["r0"]
    assert trace.requests["state"].to_pylist() == ["finished"] * 3


def test_requests_of_another_engine_stay_where_they_are() -> None:
    recording = steady(2)
    other = line("elsewhere", recording.config, names.REQUEST_SPAN, 1, 2, {names.REQUEST_ID: "foreign"})
    trace = read([*recording.lines(), other])
    assert set(trace.requests["replica"].to_pylist()) == {"r0", "elsewhere"}
