"""The ASGI application: OpenAI's routes, limits and errors around the engine.

A request is read, checked and handed to ``async_engine``; its answer is written as the engine's steps bring it. While
it waits, somebody listens for the client's going away, and then its blocks are free by the next step.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from stallscope_engine.models.tokenizer import Tokenizer
from stallscope_engine.request import Request
from stallscope_engine.server.answers import CHAT, COMPLETION, Answer, Kind, error_event, reason_text
from stallscope_engine.server.asked import Asked, Body, Limits, parse_body, parse_chat, parse_completion
from stallscope_engine.server.async_engine import AsyncEngine, Stream
from stallscope_engine.server.errors import ApiError
from stallscope_engine.server.stop_text import StopText
from stallscope_engine.server.tenants import ApiKeys, Tenant, claimed_tenant
from stallscope_telemetry.records import FinishReason, RequestInfo

log = logging.getLogger(__name__)

READ_S = 60.0  # to send a request's body
MOST_RETRY_S = 600
_DISCARDED = 8  # times the body limit: as much is read before a client hears that it sends too much
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(?:-.*)?")
_CLOSE = {"Connection": "close"}

Parse = Callable[[Body, Limits, Tokenizer], Asked]


@dataclass(frozen=True, slots=True)
class Settings:
    """What the server allows its clients."""

    max_queue: int = 256  # requests beyond those that run; more are told to come back
    max_body: int = 2**20  # bytes; reading a body holds everybody up
    max_unread: int = 2048  # tokens of an answer that its client has not taken; with more, the request is given up


class Server:
    """The application and its state. ``keys`` may be replaced while it runs; without keys, tenants are claims."""

    def __init__(
        self, engine: AsyncEngine, tokenizer: Tokenizer, limits: Limits, settings: Settings, keys: ApiKeys | None
    ) -> None:
        self.engine = engine
        self.keys = keys
        self.is_draining = False
        self._tokenizer = tokenizer
        self._limits = limits
        self._settings = settings
        self._handles = count(1)
        self._created_s = int(time.time())
        self._registry = CollectorRegistry()
        self._registry.register(engine.metrics)
        self.app = Starlette(
            routes=[
                Route("/v1/completions", _Endpoint(self, COMPLETION, parse_completion), methods=["POST"]),
                Route("/v1/chat/completions", _Endpoint(self, CHAT, parse_chat), methods=["POST"]),
                Route("/v1/models", self._show_models, methods=["GET"]),
                Route("/v1/models/{model:path}", self._show_model, methods=["GET"]),
                Route("/health", self._show_health, methods=["GET"]),
                Route("/metrics", self._show_metrics, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _http_error, ApiError: _api_error, Exception: _unexpected_error},
        )
        self.app.router.redirect_slashes = False  # a POST would lose its body on the way

    # --- the small pages ------------------------------------------------------------------------------------------

    async def _show_models(self, request: HttpRequest) -> Response:
        self._check_key(request.headers)
        return _json({"object": "list", "data": [self._model()]})

    async def _show_model(self, request: HttpRequest) -> Response:
        self._check_key(request.headers)
        if request.path_params["model"] != self._limits.model:
            raise ApiError(
                404, f"there is no such model here; {self._limits.model!r} is served", None, "model_not_found"
            )
        return _json(self._model())

    def _model(self) -> dict[str, object]:
        return {
            "id": self._limits.model,
            "object": "model",
            "created": self._created_s,
            "owned_by": "stallscope",
            "max_model_len": self._limits.tokens,
        }

    async def _show_health(self, _: HttpRequest) -> Response:
        if self.engine.is_dead:
            raise ApiError(503, "the engine has stopped")
        if self.is_draining:
            raise _draining()
        return Response()

    async def _show_metrics(self, request: HttpRequest) -> Response:
        # Names of tenants are on it, so where there are keys it takes one.
        self._check_key(request.headers)
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    def _check_key(self, headers: Headers) -> None:
        if self.keys is not None:
            self.keys.tenant_of(headers.get("authorization", ""))

    # --- completions ----------------------------------------------------------------------------------------------

    async def begin(self, kind: Kind, parse: Parse, headers: Headers, request_id: str, receive: Receive) -> _Running:
        """Reads and checks a request and hands it to the engine. Raises ApiError."""
        arrival_ns = self.engine.now_ns()
        if self.is_draining:
            raise _draining()
        keyed = self.keys.tenant_of(headers.get("authorization", "")) if self.keys is not None else None
        body = parse_body(await self._read(headers, receive))
        asked = parse(body, self._limits, self._tokenizer)
        self._check_queue()
        tenant = keyed or claimed_tenant(headers.get("x-tenant", ""), asked.claimed_tenant, asked.user)
        info = self._describe(asked, tenant, headers, request_id, arrival_ns)
        stream = self.engine.submit(
            Request(info, asked.prompt, asked.sampling),
            each_step=asked.stream or bool(asked.stop),
            most_pending=self._settings.max_unread,
        )
        answer = Answer(kind, asked, request_id, self._limits.model, int(arrival_ns // 1e9))
        return _Running(self.engine, stream, asked, answer, self._tokenizer)

    def _describe(
        self, asked: Asked, tenant: Tenant, headers: Headers, request_id: str, arrival_ns: int
    ) -> RequestInfo:
        traced = _TRACEPARENT.fullmatch(headers.get("traceparent", "").strip())
        trace_id, parent_id = (int(traced[1], 16), int(traced[2], 16)) if traced else (0, 0)
        return RequestInfo(
            handle=next(self._handles),
            request_id=request_id,
            arrival_ns=arrival_ns,
            prompt_tokens=len(asked.prompt),
            max_tokens=asked.max_tokens,
            tenant=tenant.name,
            tenant_source=tenant.source,
            priority=asked.priority if tenant.priority is None else tenant.priority,
            trace_id=trace_id if parent_id else 0,
            parent_span_id=parent_id if trace_id else 0,
        )

    def _check_queue(self) -> None:
        queued = self.engine.queue_length
        if queued < self._settings.max_queue:
            return
        self.engine.metrics.rejected += 1
        rate = self.engine.drain_rate()
        retry_s = min(MOST_RETRY_S, math.ceil((queued + 1) / rate)) if rate else 1
        raise ApiError(
            429,
            f"{queued:,} requests wait already; try again in {retry_s} s",
            code="queue_full",
            headers={"Retry-After": str(retry_s)},
        )

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        """The body. Raises ApiError where it is too large, too slow or of another type than JSON."""
        kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            raise ApiError(415, f"the body must be JSON: send Content-Type: application/json, not {kind[:80]!r}")
        most = self._settings.max_body
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(READ_S):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    size += len(message.get("body", b""))
                    if size <= most:
                        parts.append(message.get("body", b""))
                    if not message.get("more_body", False) or size > most * _DISCARDED:
                        break
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {READ_S:g} s", headers=_CLOSE) from None
        if size > most:
            raise ApiError(413, f"the body is larger than {most:,} bytes", headers=_CLOSE)
        return b"".join(parts)


class _Gone(Exception):
    """The client went away before it had sent its request."""


class _Endpoint:
    """One of the two completion routes, as an ASGI application."""

    def __init__(self, server: Server, kind: Kind, parse: Parse) -> None:
        self._server = server
        self._kind = kind
        self._parse = parse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        extra = [(b"x-request-id", request_id.encode())]
        try:
            running = await self._server.begin(self._kind, self._parse, headers, request_id, receive)
            await running.answer(receive, send, extra)
        except ApiError as error:
            await _error_response(error, extra)(scope, receive, send)
        except _Gone:
            return


class _Running:
    """A request that the engine works on, and the way its answer takes."""

    def __init__(self, engine: AsyncEngine, stream: Stream, asked: Asked, answer: Answer, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._stream = stream
        self._asked = asked
        self._answer = answer
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder()
        self._stops = StopText(asked.stop) if asked.stop else None
        self._made = 0  # tokens taken

    async def answer(self, receive: Receive, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        """Writes the answer. Raises ApiError where there is none and nothing was written."""
        listener = asyncio.create_task(self._listen(receive))
        try:
            if self._asked.stream:
                await self._send_events(send, headers)
            else:
                await self._send_whole(send, headers)
        finally:
            listener.cancel()
            self._engine.delivered(self._stream)

    async def _listen(self, receive: Receive) -> None:
        """Ends the request when its client goes away."""
        message: Message = {"type": ""}
        while message["type"] != "http.disconnect":
            message = await receive()
        self._stream.fail(ApiError(499, "the client went away"))
        self._engine.abort(self._stream, FinishReason.ABORT)

    async def _send_events(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        stream, answer = self._stream, self._answer
        has_begun = False
        while True:
            token_ids = await stream.take()
            if stream.error is not None and not has_begun:
                raise stream.error
            body = b""
            if not has_begun:
                has_begun = True
                start = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": start + headers})
                body = answer.opening()
            if stream.error is not None:
                await send({"type": "http.response.body", "body": error_event(stream.error)})
                return
            text, finish = self._take_text(token_ids)
            body += answer.event(text, token_ids, finish)
            if finish is not None:
                body += answer.closing(self._made)
            await send({"type": "http.response.body", "body": body, "more_body": finish is None})
            if finish is not None:
                return

    async def _send_whole(self, send: Send, headers: list[tuple[bytes, bytes]]) -> None:
        stream = self._stream
        texts: list[str] = []
        token_ids: list[int] = []
        finish = None
        while finish is None:
            taken = await stream.take()
            if stream.error is not None:
                raise stream.error
            text, finish = self._take_text(taken)
            texts.append(text)
            token_ids += taken
        body = self._answer.whole("".join(texts), token_ids, finish)
        start = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": start + headers})
        await send({"type": "http.response.body", "body": body})

    def _take_text(self, token_ids: list[int]) -> tuple[str, str | None]:
        """The text that ``token_ids`` bring, up to a stop string, and the reason if the answer ends with them."""
        reason = self._stream.finish_reason
        self._made += len(token_ids)
        text = ""
        if self._asked.detokenize:
            text = "".join(map(self._decoder.push, token_ids))
            if reason is not None:
                text += self._decoder.finish()
        if self._stops is not None:
            text = self._stops.push(text)
            if self._stops.stopped:
                # The engine learns of it after the step: in its telemetry the request was ended from outside.
                self._engine.abort(self._stream, FinishReason.ABORT, counted_as="stop")
                return text, "stop"
            if reason is not None:
                text += self._stops.finish()
        return text, None if reason is None else reason_text(reason)


# --- responses ----------------------------------------------------------------------------------------------------


def _draining() -> ApiError:
    return ApiError(503, "the server is shutting down and takes no new requests", headers=_CLOSE)


def _json(value: object) -> Response:
    return Response(json.dumps(value), media_type="application/json")


def _error_response(error: ApiError, headers: list[tuple[bytes, bytes]] | None = None) -> Response:
    response = Response(error.body(), error.status, error.headers, "application/json")
    response.raw_headers.extend(headers or [])
    return response


async def _api_error(_: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _error_response(error)


async def _http_error(request: HttpRequest, error: Exception) -> Response:
    """Starlette's own: no such path, or not with this method."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:200]
    message = f"there is no {path} here" if error.status_code == 404 else f"{path} does not take {request.method}"
    return _error_response(ApiError(error.status_code, message, headers=error.headers or {}))


async def _unexpected_error(_: HttpRequest, error: Exception) -> Response:
    return _error_response(ApiError(500, f"the server failed ({type(error).__name__}); its log has more"))
