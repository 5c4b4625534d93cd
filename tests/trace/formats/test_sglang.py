"""SGLang's request traces: a root span and the spans of its stages are one request."""

from pathlib import Path

import orjson

from stallscope.trace import Trace, read_trace
from stallscope_telemetry import names
from tests.trace.recording import START_NS, key_values

MS = 1_000_000


def span(name: str, trace: int, start_ms: int, end_ms: int, **attributes: int | str | float) -> dict[str, object]:
    return {
        "traceId": f"{trace:032x}",
        "name": name,
        "startTimeUnixNano": str(START_NS + start_ms * MS),
        "endTimeUnixNano": str(START_NS + end_ms * MS),
        "attributes": key_values({key.replace("__", "."): value for key, value in attributes.items()}),
    }


def request(number: int, start_ms: int, waited_ms: int, ttft_ms: int, end_ms: int, trace: int = 0) -> list[object]:
    """What SGLang writes of a request, in the order in which its spans end."""
    trace = trace or number
    root = span(
        f" Req {number:08}",
        trace,
        start_ms,
        end_ms,
        rid=f"{number:08}-rest",
        module="sglang::request",
        gen_ai__usage__prompt_tokens=50,
        gen_ai__usage__cached_tokens=16,
        gen_ai__usage__completion_tokens=1 + (end_ms - start_ms - ttft_ms) // 10,
        gen_ai__latency__time_to_first_token=ttft_ms / 1e3,
        gen_ai__latency__time_in_model_prefill=ttft_ms / 1e3,
    )
    return [
        span("tokenize", trace, start_ms, start_ms + 1),
        span("prefill_waiting", trace, start_ms + 1, start_ms + 1 + waited_ms),
        span("prefill_forward", trace, start_ms + 1 + waited_ms, start_ms + ttft_ms),
        span("request_process", trace, start_ms + 1, end_ms),
        root,
    ]


def read(folder: Path, spans: list[object]) -> Trace:
    resource = {"attributes": key_values({names.SERVICE_NAME: "sglang"})}
    lines = [
        orjson.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": [one]}]}]}) for one in spans
    ]
    (folder / "t.jsonl").write_bytes(b"\n".join(lines))
    return read_trace(folder)


def test_a_request_has_its_tokens_and_the_times_of_its_stations(tmp_path: Path) -> None:
    spans = [one for number in range(1, 4) for one in request(number, 30 * number, 10, 25, 30 * number + 225)]
    for order in (spans, spans[::-1]):
        trace = read(tmp_path, order)
        assert trace.validate() == []
        assert trace.coverage["fidelity"].to_pylist() == [1]
        first = trace.requests.to_pylist()[0]
        assert {name: first[name] for name in ("request", "prompt_tokens", "cached_tokens", "output_tokens")} == {
            "request": "00000001-rest",
            "prompt_tokens": 50,
            "cached_tokens": 16,
            "output_tokens": 21,
        }
        times = [(first[name] - START_NS) // MS for name in ("arrival", "queued", "scheduled", "first_token", "end")]
        assert times == [30, 31, 41, 55, 255]


def test_the_stages_are_read_or_foreign_and_the_format_is_experimental(tmp_path: Path) -> None:
    kinds = {one.kind: one.count for one in read(tmp_path, request(1, 0, 10, 25, 225)).findings}
    assert kinds == {"foreign_spans": 3, "experimental_format": 1}


def test_requests_of_one_callers_trace_keep_their_own_waits(tmp_path: Path) -> None:
    trace = read(tmp_path, [*request(1, 0, 10, 25, 225, trace=9), *request(2, 300, 40, 60, 500, trace=9)])
    waits = [(one["scheduled"] - one["queued"]) // MS for one in trace.requests.to_pylist()]
    assert waits == [10, 40]


def test_a_root_without_usable_id_costs_itself(tmp_path: Path) -> None:
    bad = span("Req", 7, 0, 10, rid=5, module="sglang::request")
    trace = read(tmp_path, [bad, *request(1, 0, 10, 25, 225)])
    assert trace.requests.num_rows == 1
    assert {one.kind: one.count for one in trace.findings}["malformed_span"] == 1
