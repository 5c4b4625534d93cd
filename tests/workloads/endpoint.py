"""A small OpenAI-compatible server on a real socket, which streams tokens and misbehaves by tenant."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

Json = dict[str, object]


@dataclass
class Endpoint:
    """What the server does, and what it was asked. ``refused``: fields that it answers with a 400."""

    behaviour: dict[str, str] = field(default_factory=dict)  # by tenant: ok, cut, 429, 500, hang, error, empty, bare
    models: tuple[str, ...] = ("tiny",)
    key: str = ""
    keys: dict[str, str] = field(default_factory=dict)  # by tenant
    refused: tuple[str, ...] = ()
    refuse_every: int = 0  # every so many requests gets a 429
    token_s: float = 0.001
    asked: list[tuple[dict[str, str], Json]] = field(default_factory=list)  # headers and body, the trial's too
    left: int = 0  # clients who went away before their answer ended
    url: str = ""

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._list_models),
                Route("/v1/completions", self._complete, methods=["POST"]),
            ]
        )

    @property
    def sent(self) -> list[tuple[dict[str, str], Json]]:
        """Without the trial."""
        return [(headers, body) for headers, body in self.asked if headers["x-request-id"] != "trial"]

    def _allows(self, request: Request, tenant: str) -> bool:
        key = self.keys.get(tenant, self.key)
        return not key or request.headers.get("authorization") == f"Bearer {key}"

    async def _list_models(self, request: Request) -> Response:
        if not self._allows(request, next(iter(self.keys), "")):
            return JSONResponse({"error": {"message": "no"}}, 401)
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

    async def _complete(self, request: Request) -> Response:
        body = json.loads(await request.body())
        tenant = str(body.get("user", ""))
        self.asked.append((dict(request.headers), body))
        if not self._allows(request, tenant):
            return JSONResponse({"error": {"message": "no such key"}}, 401)
        for name in self.refused:
            if name in body:
                return JSONResponse({"error": {"message": f"unknown field {name}"}}, 400)
        behaviour = self.behaviour.get(tenant, "ok")
        if behaviour == "429" or (self.refuse_every and len(self.asked) % self.refuse_every == 0):
            return JSONResponse({"error": {"message": "too many"}}, 429, {"Retry-After": "0"})
        if behaviour == "500":
            return JSONResponse({"error": {"message": "it broke"}}, 500)
        return StreamingResponse(self._stream(body, behaviour), media_type="text/event-stream")

    async def _stream(self, body: Json, behaviour: str) -> AsyncIterator[str]:
        tokens = int(str(body["max_tokens"]))
        done = False
        try:
            if behaviour == "empty":
                return
            for index in range(tokens):
                if behaviour == "cut" and index == 2:
                    raise ConnectionError("cut on purpose")
                if behaviour == "error" and index == 2:
                    yield _event({"error": {"message": "the engine died", "code": 500}})
                    return
                if behaviour == "hang" and index == 1:
                    await asyncio.sleep(3600)
                last = index == tokens - 1
                ids = {"token_ids": [7]} if body.get("return_token_ids") else {}
                yield _event({"choices": [{"text": "x", "finish_reason": "length" if last else None, **ids}]})
                await asyncio.sleep(self.token_s)
            done = True
            if behaviour != "bare":
                yield _event({"choices": [], "usage": {"completion_tokens": tokens}})
                yield "data: [DONE]\n\n"
        except asyncio.CancelledError:
            self.left += not done
            raise


def _event(content: Json) -> str:
    return f"data: {json.dumps(content)}\n\n"


@contextmanager
def serving(endpoint: Endpoint) -> Iterator[Endpoint]:
    """Serves on a free port of the loopback interface, from a thread of its own."""
    listener = socket.create_server(("127.0.0.1", 0))
    endpoint.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(endpoint.app(), log_level="critical", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        listener.close()
