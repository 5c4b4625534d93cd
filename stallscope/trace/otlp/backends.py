"""Tracing backends that are asked for traces: Jaeger's query API and Grafana Tempo's, as streams of bytes.

``jaeger+http://HOST:16686?service=NAME`` and ``tempo+http://HOST:3200?service=NAME``; ``since`` and ``until`` (as those
of ``stallscope analyze``, up to now) say when, ``limit`` how many traces are asked for at a time; all else goes to the
backend as it is. A backend returns no more than its limit and has no pages: a time range that reaches the limit is
asked for in two halves, and what is cut even in the shortest one is told.

Jaeger: https://www.jaegertracing.io/docs/latest/architecture/apis/ and ``query_parser.go``. Tempo:
https://grafana.com/docs/tempo/latest/api_docs/. Written from those: never seen from live ones.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlsplit, urlunsplit

import httpx
import orjson

from stallscope.errors import UsageError
from stallscope.trace.formats.registry import EXPERIMENTAL
from stallscope.trace.otlp.protobuf import Damaged, fields
from stallscope.trace.otlp.sources import Note, Source, shown

TIMEOUT_S = 60.0
DEFAULT_SINCE = "-1h"
MOST_TRACES = 100  # of a step's size: about 20 MB an answer

_NS, _US = 1_000_000_000, 1_000
_JAEGER_SHORTEST_NS, _TEMPO_SHORTEST_NS = 1_000_000, _NS  # what a time range is halved down to
# Fields of Tempo's TraceByIDResponse (``pkg/tempopb/tempo.proto``): the trace, which is a TracesData, and its status.
_TRACE, _STATUS, _PARTIAL = 0x0A, 0x18, b"\x01"


def backend_source(url: str) -> Source:
    """The traces that a URL asks for. Raises UsageError where it can't be understood."""
    kind, _, scheme = url.partition("://")[0].partition("+")
    ask = {"jaeger": _from_jaeger, "tempo": _from_tempo}.get(kind)
    if ask is None or scheme not in ("http", "https"):
        raise UsageError(f"{shown(url)}: nothing reads {kind}+{scheme}://; give jaeger+http(s):// or tempo+http(s)://")
    question = _question(url, scheme)

    def chunks(note: Note) -> Iterator[bytes]:
        if question.by_default:
            note("time_range", "nothing says which time is meant: the last hour; &since=-2h&until=-1h says another")
        with httpx.Client(timeout=TIMEOUT_S, follow_redirects=True) as client:
            found = ask(_Backend(client, question.base, shown(url), kind.capitalize()), question, note)
            first = next(found, None)
            if first is None:
                raise UsageError(f"{shown(url)}: no such trace in that time; check service, since and until")
            yield first
            yield from found

    return Source(shown(url), None, chunks)


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked: ``base`` of the API, a time range in ns, traces at a time, and the backend's own parameters."""

    base: str
    since: int
    until: int
    limit: int
    parameters: dict[str, str]
    by_default: bool  # nothing said which time range


def _question(url: str, scheme: str) -> _Question:
    from stallscope.trace.select import read_time

    parts = urlsplit(url)
    parameters = dict(parse_qsl(parts.query))
    since, until = parameters.pop("since", None), parameters.pop("until", None)
    now = time.time_ns()
    first = read_time(since or DEFAULT_SINCE, 0, now)
    last = now if until is None else read_time(until, 0, now)
    if first >= last:
        raise UsageError(f"{shown(url)}: since={since or DEFAULT_SINCE} is not before until={until or 'now'}")
    limit = parameters.pop("limit", str(MOST_TRACES))
    if not limit.isdecimal() or int(limit) < 1:
        raise UsageError(f"{shown(url)}: limit={limit} is no number of traces")
    base = urlunsplit((scheme, parts.netloc, parts.path.rstrip("/"), "", ""))
    return _Question(base, first, last, int(limit), parameters, since is None and until is None)


@dataclass(frozen=True, slots=True)
class _Backend:
    """Answers of one backend; ``url`` and ``name`` are for errors."""

    client: httpx.Client
    base: str
    url: str
    name: str

    def get(self, path: str, parameters: dict[str, Any], accept: str = "application/json") -> httpx.Response:
        """An answer of 200 or 404. Raises UsageError for any other, and for none."""
        try:
            answer = self.client.get(f"{self.base}{path}", params=parameters, headers={"Accept": accept})
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            reason = " ".join(f"{error}".split()) or type(error).__name__
            raise UsageError(f"{self.url}: no answer ({reason}); is {self.name}'s query API there?") from error
        if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
            raise UsageError(f"{self.url}: {self.name} refuses that many requests (429); ask later, or for less time")
        if answer.status_code not in (httpx.codes.OK, httpx.codes.NOT_FOUND):
            said = " ".join(answer.text.split())[:200]
            raise UsageError(f"{self.url}: {self.name} answered {answer.status_code} ({said}); check the question")
        return answer

    def json(self, path: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """An answer that is a JSON object. Raises UsageError where it is none."""
        answer = self.get(path, parameters)
        try:
            content = orjson.loads(answer.content)
        except ValueError:
            content = None
        if answer.status_code == httpx.codes.NOT_FOUND or not isinstance(content, dict):
            kind = answer.headers.get("content-type", "nothing").partition(";")[0]
            raise UsageError(
                f"{self.url}: answered {answer.status_code} with {kind}, no JSON of {self.name}'s query API; "
                f"is this its address?"
            )
        return content


def _by_halves(
    question: _Question,
    shortest_ns: int,
    ask: Callable[[int, int], list[dict[str, Any]]],
    note: Note,
) -> Iterator[dict[str, Any]]:
    """What ``ask`` finds between two times (ns), each time range halved until fewer than the limit are found in it."""
    ranges = [(question.since, question.until)]
    while ranges:
        low, high = ranges.pop()
        found = ask(low, high)
        if len(found) >= question.limit:
            middle = low + (high - low) // 2 // shortest_ns * shortest_ns
            if low < middle:
                ranges += [(middle, high), (low, middle)]
                continue
            note(
                "cut_answer",
                f"{question.limit} traces or more within the shortest time: the rest is lost; raise &limit=",
            )
        yield from found


# --- Jaeger -------------------------------------------------------------------------------------------------------


def _from_jaeger(backend: _Backend, question: _Question, note: Note) -> Iterator[bytes]:
    """A line for each trace, as ``formats.jaeger`` reads them."""
    if not question.parameters.get("service"):
        raise UsageError(f"{backend.url}: Jaeger finds traces by service; add ?service=NAME")

    def ask(low: int, high: int) -> list[dict[str, Any]]:
        when = {"start": low // _US, "end": high // _US, "limit": question.limit}
        answer = backend.json("/api/traces", {**question.parameters, **when})
        traces = answer.get("data")
        if answer.get("errors") or not isinstance(traces, list):
            said = json.dumps(answer.get("errors"))[:200]
            raise UsageError(f"{backend.url}: Jaeger found no traces, but errors ({said}); check the question")
        return [one for one in traces if isinstance(one, dict)]

    seen: set[str] = set()  # a trace is found in each time range that it reaches into
    for trace in _by_halves(question, _JAEGER_SHORTEST_NS, ask, note):
        name = str(trace.get("traceID"))
        if name not in seen:
            seen.add(name)
            yield orjson.dumps({"data": [trace]}) + b"\n"


# --- Tempo --------------------------------------------------------------------------------------------------------


def _from_tempo(backend: _Backend, question: _Question, note: Note) -> Iterator[bytes]:
    """Messages of traces, in a row."""
    note(*EXPERIMENTAL)
    parameters = dict(question.parameters)
    service = parameters.pop("service", None)
    condition = "" if service is None else f"resource.service.name = {json.dumps(service, ensure_ascii=False)}"
    parameters.setdefault("q", f"{{ {condition} }}")

    def ask(low: int, high: int) -> list[dict[str, Any]]:
        when = {"start": low // _NS, "end": -(-high // _NS), "limit": question.limit, "spss": 1}
        traces = backend.json("/api/search", {**parameters, **when}).get("traces") or []
        return [one for one in traces if isinstance(one, dict)]

    seen: set[str] = set()
    for found in _by_halves(question, _TEMPO_SHORTEST_NS, ask, note):
        name = str(found.get("traceID", "")).zfill(32)
        if name in seen:
            continue
        seen.add(name)
        message = _tempo_trace(backend, name, note)
        if message is None:
            note("missing_trace", "a trace that was found is not there any more")
        else:
            yield message


def _tempo_trace(backend: _Backend, name: str, note: Note) -> bytes | None:
    """A whole trace as TracesData, None where there is none; of versions before 2.7 by their API."""
    answer = backend.get(f"/api/v2/traces/{name}", {}, "application/protobuf")
    if answer.status_code == httpx.codes.NOT_FOUND:
        older = backend.get(f"/api/traces/{name}", {}, "application/protobuf")
        return older.content if older.status_code == httpx.codes.OK else None
    try:
        told = dict(fields(answer.content))
    except Damaged as error:
        raise UsageError(f"{backend.url}: Tempo's answer for a trace is no protobuf ({error})") from error
    if told.get(_STATUS) == _PARTIAL:
        note("partial_trace", "a trace is longer than Tempo returns: its rest is lost; raise max_bytes_per_trace")
    return told.get(_TRACE, b"")
