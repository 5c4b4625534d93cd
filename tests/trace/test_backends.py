"""Tracing backends: the traces that Jaeger and Tempo return are the recording; what they cut or refuse is said."""

import re
import socket
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache

import pytest

from stallscope.errors import UsageError
from stallscope.trace import Trace, read_trace
from stallscope_engine.config import EngineConfig
from stallscope_telemetry import names, spans
from tests.trace.backends import Backend, running
from tests.trace.recording import START_NS, Arrival, Recording, Workload, line, read, run

SINCE, UNTIL = (
    datetime.fromtimestamp(START_NS // 10**9 + seconds, UTC).isoformat().replace("+00:00", "Z") for seconds in (-60, 60)
)


@cache
def recording() -> Recording:
    """A request every second and a half: Tempo's times are seconds."""
    return run(Workload(EngineConfig(block_size=4, kv_blocks=64), [Arrival(1_500_000_000, 8, 9, "a")] * 6, 4, 10_000))


@cache
def lines() -> tuple[bytes, ...]:
    """Three steps share a trace, each request has its own. All times are whole microseconds, as Jaeger's are."""
    config = recording().config
    steps = [
        (names.STEP_SPAN, one.scheduled_ns, one.ready_ns, spans.step_attributes(one, 0), 1000 + one.step // 3)
        for one in recording().steps
    ]
    requests = [
        (names.REQUEST_SPAN, one.info.arrival_ns, one.end_ns, spans.request_attributes(one), 2000 + one.info.handle)
        for one in recording().ended
    ]
    return tuple(line("r0", config, *one) for one in steps + requests)


@pytest.fixture
def backend() -> Iterator[Backend]:
    with running(Backend(list(lines()))) as one:
        yield one


def url(kind: str, backend: Backend, more: str = "") -> str:
    return f"{kind}+http://{backend.url}?service=engine&since={SINCE}&until={UNTIL}{more}"


def kinds(trace: Trace) -> set[str]:
    return {one.kind for one in trace.findings}


@pytest.mark.parametrize(("kind", "limit", "questions"), [("jaeger", 100, 1), ("jaeger", 4, 20), ("tempo", 8, 4)])
def test_what_a_backend_returns_is_the_recording(kind: str, limit: int, questions: int, backend: Backend) -> None:
    trace = read_trace(url(kind, backend, f"&limit={limit}"))
    assert kinds(trace) == {"experimental_format"}
    assert trace.tables == read(list(lines())).tables
    assert sum("/traces/" not in path for path in backend.asked) >= questions


@pytest.mark.parametrize("kind", ["jaeger", "tempo"])
def test_what_is_cut_is_said(kind: str, backend: Backend) -> None:
    trace = read_trace(url(kind, backend, "&limit=1"))
    assert "cut_answer" in kinds(trace)
    assert trace.steps.num_rows > 0
    assert trace.tables != read(list(lines())).tables


def test_a_tempo_from_before_version_2_7_is_read(backend: Backend) -> None:
    backend.older = True
    assert read_trace(url("tempo", backend)).tables == read(list(lines())).tables


def test_traces_that_tempo_lost_or_cut_are_said(backend: Backend) -> None:
    backend.missing, backend.partial = {f"{1001:032x}"}, {f"{1002:032x}"}
    trace = read_trace(url("tempo", backend))
    assert kinds(trace) >= {"missing_trace", "partial_trace"}
    assert 0 < trace.steps.num_rows < len(recording().steps)


def test_without_a_time_it_is_the_last_hour_and_that_is_said(backend: Backend) -> None:
    with pytest.raises(UsageError, match="no such trace in that time"):
        read_trace(f"jaeger+http://{backend.url}?service=engine")
    query = backend.asked[-1]
    found = re.search(r"start=(\d+)&end=(\d+)", query)
    assert found is not None
    assert int(found[2]) - int(found[1]) == 3_600_000_000


@pytest.mark.parametrize(
    ("status", "kind", "body", "said"),
    [
        (404, "text/plain", b"404 page not found", "is this its address"),
        (429, "text/plain", b"slow down", "429"),
        (400, "application/json", b'{"errors": [{"code": 400, "msg": "unable to parse"}]}', "unable to parse"),
        (500, "text/plain", b"too\nmany\nlines", "too many lines"),
        (200, "text/html", b"<html>Sign in</html>", "text/html"),
        (200, "application/json", b"[]", "no JSON of"),
    ],
)
@pytest.mark.parametrize("name", ["jaeger", "tempo"])
def test_a_refusal_is_one_line(name: str, status: int, kind: str, body: bytes, said: str, backend: Backend) -> None:
    backend.refuse = status, kind, body
    with pytest.raises(UsageError, match=said) as error:
        read_trace(url(name, backend))
    assert "\n" not in str(error.value)


def test_errors_within_an_answer_are_told(backend: Backend) -> None:
    backend.refuse = 200, "application/json", b'{"data": null, "errors": [{"code": 500, "msg": "storage is gone"}]}'
    with pytest.raises(UsageError, match="storage is gone"):
        read_trace(url("jaeger", backend))


def test_a_refused_connection_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UsageError, match="no answer") as error:
        read_trace(f"tempo+http://user:secret@127.0.0.1:{port}")
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("jaeger+http://127.0.0.1:1", "add .service=NAME"),
        ("zipkin+http://127.0.0.1:1", "give jaeger"),
        ("jaeger+ftp://127.0.0.1:1", "give jaeger"),
        ("jaeger+http://127.0.0.1:1?service=a&since=yesterday", "can't be read"),
        ("jaeger+http://127.0.0.1:1?service=a&since=-1h&until=-2h", "is not before"),
        ("jaeger+http://127.0.0.1:1?service=a&limit=0", "no number of traces"),
    ],
)
def test_a_question_that_can_not_be_asked_is_one_line(address: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        read_trace(address)
