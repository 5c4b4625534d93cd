"""OTLP over HTTP: POST /v1/traces, in protobuf and JSON, compressed or not; and GET /metrics, for a scraper.

https://opentelemetry.io/docs/specs/otlp/#otlphttp. Metrics and logs are 404, as at an OpenTelemetry Collector that has
no pipeline for them: their sender then says so and drops them; to take and lose them would hide that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from stallscope.live.bodies import ENCODINGS, JSON, PROTOBUF
from stallscope.live.intake import DISK_RETRY_S, Intake, Room
from stallscope.live.metrics import Metrics
from stallscope.live.refusals import Refusal, TooLarge, TooSlow, Unavailable, WrongType, status_of
from stallscope.watch.scores import Scores

READ_S = 60.0  # to send a request's body
CLOSE_S = 10  # for requests under way, at the end
_IDLE_S = 120  # longer than senders keep a connection between batches
_DISCARDED = 4  # times the limit of a body: as much is read and dropped before a sender hears that it is refused
_ONLY_TRACES = (
    "only traces are taken here, at /v1/traces: turn off other signals, or send them elsewhere; the collector's own "
    "metrics are read at /metrics"
)


class HttpServer(uvicorn.Server):
    """uvicorn for one event loop among others' tasks, whose signals are the collector's.

    ``scores``: what /metrics shows beside the receivers' counts.
    """

    def __init__(self, intake: Intake, most_body_bytes: int, scores: Scores | None = None) -> None:
        super().__init__(
            uvicorn.Config(
                _application(intake, most_body_bytes, scores or Scores()),
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=CLOSE_S,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _application(intake: Intake, most_body_bytes: int, scores: Scores) -> Starlette:
    traces = _Traces(intake, most_body_bytes)
    metrics = Metrics(scores, intake.counts)
    app = Starlette(
        routes=[
            Route("/v1/traces", traces.post, methods=["POST"]),
            Route("/metrics", metrics.get, methods=["GET"]),
        ],
        exception_handlers={HTTPException: _http_error},
    )
    app.router.redirect_slashes = False  # a POST would lose its body on the way
    return app


class _Traces:
    def __init__(self, intake: Intake, most_body_bytes: int) -> None:
        self._intake = intake
        self._most_body_bytes = most_body_bytes

    async def post(self, request: Request) -> Response:
        content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        try:
            with self._intake.room() as room:
                encoding = request.headers.get("content-encoding", "").strip().lower() or "identity"
                body = await self._read(request, room, _wrong_type(content_type, encoding))
                batch = await self._intake.receive(body, content_type, encoding, room)
        except Refusal as refusal:
            return _refused(refusal, content_type)
        except ClientDisconnect:
            return Response(status_code=400)  # nobody hears it
        except asyncio.CancelledError:  # by the server, that has waited for it for ``CLOSE_S``
            return _refused(Unavailable("the collector has ended", retry_s=DISK_RETRY_S), content_type)
        answer = ExportTraceServiceResponse()
        if batch.refused:
            answer.partial_success.rejected_spans = batch.refused
            answer.partial_success.error_message = batch.remark
        return _response(answer, content_type)

    async def _read(self, request: Request, room: Room, refusal: Refusal | None) -> bytes:
        """The body as sent. Raises Refusal, the one given or one of its own, after as much was read as lets most
        senders hear why."""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(READ_S):
                async for chunk in request.stream():
                    size += len(chunk)
                    refusal = refusal or self._no_room(size, len(chunk), room)
                    if refusal is None:
                        parts.append(chunk)
                        continue
                    parts.clear()
                    room.hold(0)
                    if size > self._most_body_bytes * _DISCARDED:
                        break
        except TimeoutError:
            raise TooSlow(f"the body did not come within {READ_S:g} s") from None
        if refusal is not None:
            raise refusal
        return b"".join(parts)

    def _no_room(self, size: int, more: int, room: Room) -> Refusal | None:
        """Takes room for ``more`` bytes of a body that has ``size`` by now, or says why not."""
        most = self._most_body_bytes
        if size > most:
            return TooLarge(f"the body is larger than {most:,} bytes; send smaller batches")
        try:
            room.take(more)
        except Refusal as refusal:
            return refusal
        return None


def _wrong_type(content_type: str, encoding: str) -> WrongType | None:
    if content_type not in (PROTOBUF, JSON):
        return WrongType(f"send Content-Type: {PROTOBUF} or {JSON}, not {content_type[:80]!r}")
    if encoding not in (*ENCODINGS, "identity"):
        return WrongType(f"send Content-Encoding: {', '.join(ENCODINGS)} or none, not {encoding[:80]!r}")
    return None


def _refused(refusal: Refusal, content_type: str) -> Response:
    response = _response(status_of(refusal), content_type, refusal.http_status)
    if refusal.retry_s is not None:
        response.headers["Retry-After"] = str(refusal.retry_s)
    if isinstance(refusal, WrongType):
        response.headers["Accept-Encoding"] = ", ".join(ENCODINGS)
    if isinstance(refusal, TooLarge | TooSlow):
        response.headers["Connection"] = "close"
    return response


def _response(message: Message, content_type: str, status: int = 200) -> Response:
    """In the form in which the request came; JSON where that is none."""
    if content_type == PROTOBUF:
        return Response(message.SerializeToString(), status, media_type=PROTOBUF)
    return Response(MessageToJson(message, indent=None), status, media_type=JSON)


async def _http_error(request: Request, error: Exception) -> Response:
    """Another path or method than ours."""
    if not isinstance(error, HTTPException):
        raise error
    refusal = Refusal(_ONLY_TRACES if error.status_code == 404 else error.detail)
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    response = _response(status_of(refusal), content_type, error.status_code)
    response.headers.update(error.headers or {})
    return response
