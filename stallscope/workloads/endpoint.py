"""An OpenAI-compatible endpoint as a load driver needs it: what it serves and accepts, and one streamed request."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import httpx
import orjson

from stallscope.errors import UsageError
from stallscope.nodes import Node, read_yaml, suggest
from stallscope.workloads.clients import ABANDONED, DISCONNECTED, ERROR, OK, REJECTED, UNREACHABLE
from stallscope.workloads.http import Disconnected, HttpClient, Response, Unreachable
from stallscope.workloads.prompts import VOCABULARY, token_ids, words
from stallscope.workloads.traffic import PlannedRequest
from stallscope_telemetry.clients import Caller

Json = dict[str, object]
PromptKind = Literal["ids", "text"]

_CHECK_S = 30.0  # for an answer before the run; a model that loads still refuses connections
_MOST_LINE_BYTES = 1 << 22
_MOST_DETAIL = 200  # characters of a server's complaint


@dataclass(frozen=True, slots=True)
class Target:
    """What to drive, as its user names it: ``model`` "" asks the endpoint, ``keys`` are by tenant."""

    url: str
    model: str = ""
    key: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    prompts: PromptKind = "ids"
    vocabulary: int = VOCABULARY

    @property
    def base(self) -> str:
        """The URL that ends in ``/v1``."""
        url = self.url.rstrip("/")
        return url if url.endswith("/v1") else f"{url}/v1"

    def key_of(self, tenant: str) -> str:
        return self.keys.get(tenant, self.key)


@dataclass(frozen=True, slots=True)
class Dialect:
    """What an endpoint takes beyond OpenAI's own fields.

    ``extras``: ``ignore_eos``, token ids in the answer, and vLLM's ``vllm_xargs``; servers that know no such field
    ignore it, some refuse it.
    """

    extras: bool
    priority: bool


@dataclass(slots=True)
class Answer:
    """What has come back so far: filled while the stream is read, so that nothing is lost where reading is given up."""

    status: str = ABANDONED
    http_status: int = 0
    token_times_ns: list[int] = field(default_factory=list)
    output_tokens: int = 0  # as the server counted them; 0 where it did not
    retry_after_s: float | None = None
    end_ns: int = 0  # of an answer that came to its end
    detail: str = ""  # the server's complaint


def read_key(path: Path) -> str:
    """The key in a file. Raises UsageError where it holds none."""
    try:
        return _sound_key(path.read_text(encoding="utf-8").strip(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read: {error}") from error


def read_keys(path: Path) -> dict[str, str]:
    """Keys by tenant, from a YAML or JSON file. Raises UsageError where it holds something else."""
    nodes = Node(str(path), "", read_yaml(path)).named()
    return {tenant: _sound_key(node.text(), f"{path}: {tenant}") for tenant, node in nodes.items()}


def _sound_key(key: str, where: str) -> str:
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(f"{where}: no key; expected one word of printable characters")
    return key


class Endpoint:
    """A checked endpoint: its model, and the fields that it takes. ``notes`` say what it does not take."""

    def __init__(self, http: HttpClient, target: Target, model: str, dialect: Dialect, seed: int) -> None:
        self.target = target
        self.model = model
        self.dialect = dialect
        self.notes: list[str] = []
        self._http = http
        self._path = f"{urlsplit(target.base).path}/completions"
        self._seed = seed

    def close(self) -> None:
        self._http.close()

    def body(self, planned: PlannedRequest) -> bytes:
        """The request as JSON. Made ahead of its time: a long prompt takes a millisecond."""
        prompt: str | list[int]
        if self.target.prompts == "text":
            prompt = words(planned, self._seed)
        else:
            prompt = token_ids(planned, self._seed, self.target.vocabulary)
        fields: Json = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": planned.output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if planned.tenant:
            fields["user"] = planned.tenant
        if self.dialect.extras:
            fields |= {"ignore_eos": True, "return_token_ids": True, "vllm_xargs": {"tenant": planned.tenant}}
            if self.target.prompts == "ids":
                fields["detokenize"] = False  # some servers of token ids have no tokenizer
        if self.dialect.priority and planned.priority:
            fields["priority"] = planned.priority
        return orjson.dumps(fields)

    async def ask(
        self, planned: PlannedRequest, body: bytes, caller: Caller, now_ns: Callable[[], int], answer: Answer
    ) -> None:
        """Sends one request and reads its stream into ``answer``. Whatever the server does is a status."""
        headers = {
            **_authorization(self.target.key_of(planned.tenant)),
            "Accept-Encoding": "identity",
            "Content-Type": "application/json",
            "X-Request-Id": planned.request_id,
            **({"X-Tenant": planned.tenant} if planned.tenant else {}),
            "traceparent": caller.traceparent,
        }
        try:
            async with self._http.post(self._path, headers, body) as response:
                answer.http_status = response.status
                if response.status == httpx.codes.OK:
                    await _read_stream(response, now_ns, answer)
                else:
                    await _read_refusal(response, answer)
        except Unreachable as error:
            _end(answer, UNREACHABLE, str(error))
        except Disconnected as error:
            _end(answer, DISCONNECTED, str(error))


def _end(answer: Answer, status: str, detail: str) -> None:
    """The end of an answer that has none yet."""
    if answer.status == ABANDONED:
        answer.status, answer.detail = status, detail[:_MOST_DETAIL]


async def _read_refusal(response: Response, answer: Answer) -> None:
    status = REJECTED if response.status == httpx.codes.TOO_MANY_REQUESTS else f"http_{response.status}"
    answer.retry_after_s = _retry_after(response)
    content = b""
    async for piece in response.pieces():
        content = (content + piece)[:_MOST_LINE_BYTES]
    _end(answer, status, _complaint(content))


def _retry_after(response: Response) -> float | None:
    """Seconds to wait before trying again, where the server says so (a date counts as nothing said)."""
    text = response.headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() else None


async def _read_stream(response: Response, now_ns: Callable[[], int], answer: Answer) -> None:
    """Server-sent events to token times: https://html.spec.whatwg.org/multipage/server-sent-events.html"""
    rest = b""
    finished = False
    async for piece in response.pieces():
        arrived_ns = now_ns()
        *lines, rest = (rest + piece).split(b"\n")
        try:
            for event in _events(lines):
                finished |= _take_event(event, arrived_ns, answer)
        except (KeyError, TypeError, ValueError, AttributeError):
            _end(answer, ERROR, "an event that is none of a completion")
        if len(rest) > _MOST_LINE_BYTES:
            _end(answer, ERROR, "an event without an end")
        if answer.status == ERROR:
            return
    # Some servers end without [DONE]; then the reason to finish tells that it is the end.
    if finished:
        _end(answer, OK, "")
    elif answer.token_times_ns:
        _end(answer, DISCONNECTED, "the stream ended before the answer did")
    else:
        _end(answer, ERROR, "a stream without any token")


def _events(lines: list[bytes]) -> Iterator[bytes]:
    return (line[5:].strip() for line in lines if line.startswith(b"data:"))


def _take_event(event: bytes, arrived_ns: int, answer: Answer) -> bool:
    """Counts the tokens of one event; whether it says that the answer is finished."""
    if event == b"[DONE]":
        answer.end_ns = answer.end_ns or arrived_ns
        _end(answer, OK, "")
        return True
    told: Json = orjson.loads(event)
    if "error" in told:
        _end(answer, ERROR, _message(told))
        return False
    usage = told.get("usage")
    if isinstance(usage, dict) and type(usage.get("completion_tokens")) is int:
        answer.output_tokens = usage["completion_tokens"]
    finished = False
    choices = told.get("choices", [])
    for choice in choices if isinstance(choices, list) else []:
        ids = choice.get("token_ids")
        tokens = len(ids) if isinstance(ids, list) else bool(choice["text"])
        answer.token_times_ns.extend([arrived_ns] * tokens)
        finished |= choice.get("finish_reason") is not None
    if finished:
        answer.end_ns = arrived_ns
    return finished


# --- before the run -----------------------------------------------------------------------------------------


async def connect(target: Target, seed: int, priorities: bool) -> Endpoint:
    """Finds out the model and, by a request of one token, what the endpoint takes.

    ``priorities``: whether requests will have some. Raises UsageError, in one line, where it can't be driven.
    """
    model = await _find_model(target)
    http = HttpClient(target.base)
    tried: list[Dialect] = [Dialect(True, True), Dialect(True, False), Dialect(False, False)]
    refusal = Answer()
    for dialect in tried if priorities else tried[1:]:
        endpoint = Endpoint(http, target, model, dialect, seed)
        refusal = await _try(endpoint, priorities)
        if refusal.status == OK:
            endpoint.notes = _notes(dialect, priorities)
            return endpoint
        if refusal.http_status not in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY):
            break
    raise UsageError(f"{target.url} did not answer a trial request: {refusal.status}{_hint(refusal, target)}")


def _notes(dialect: Dialect, priorities: bool) -> list[str]:
    notes = []
    if priorities and not dialect.priority:
        notes.append("the endpoint takes no priority: requests go without")
    if not dialect.extras:
        notes.append("the endpoint refuses ignore_eos: answers may end before their length")
    return notes


async def _try(endpoint: Endpoint, priorities: bool) -> Answer:
    target = endpoint.target
    tenant = next(iter(target.keys), "")
    trial = PlannedRequest(0, tenant, 1, 1, "trial", priority=int(priorities))
    answer = Answer()
    try:
        async with asyncio.timeout(_CHECK_S):
            await endpoint.ask(trial, endpoint.body(trial), Caller(1, 1), lambda: 0, answer)
    except TimeoutError:
        answer.detail = f"nothing within {_CHECK_S:.0f} s"
    return answer


def _hint(refusal: Answer, target: Target) -> str:
    said = f" ({refusal.detail})" if refusal.detail else ""
    if refusal.http_status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return f"{said}; give a key that it knows by --api-key-file or --api-keys"
    if refusal.http_status == httpx.codes.NOT_FOUND:
        return f"{said}; it needs /v1/completions, and the model that --model names"
    if refusal.http_status in (httpx.codes.BAD_REQUEST, httpx.codes.UNPROCESSABLE_ENTITY):
        other = "text" if target.prompts == "ids" else "ids"
        return f"{said}; --prompts {other} may suit it"
    return said


async def _find_model(target: Target) -> str:
    key = target.key or next(iter(target.keys.values()), "")
    try:
        async with httpx.AsyncClient(timeout=_CHECK_S) as http:
            response = await http.get(f"{target.base}/models", headers=_authorization(key))
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise UsageError(f"{target.url!r} is no URL: give one like http://127.0.0.1:8000") from error
    except httpx.RequestError as error:
        raise UsageError(f"nothing answers at {target.url} ({_reason(error)}): is the server up?") from error
    if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise UsageError(
            f"{target.url} refuses without a key that it knows ({response.status_code}): "
            "give one by --api-key-file or --api-keys"
        )
    served = _served(response)
    if not served:
        if target.model:
            return target.model
        raise UsageError(
            f"{target.base}/models names no model ({response.status_code}): give --model, or the URL of an "
            "OpenAI-compatible endpoint"
        )
    if not target.model and len(served) > 1:
        raise UsageError(f"{target.url} serves {', '.join(served)}: choose one by --model")
    if target.model and target.model not in served:
        raise UsageError(f"{target.url} serves no model {target.model!r}; {suggest(target.model, served)}")
    return target.model or served[0]


def _served(response: httpx.Response) -> list[str]:
    """Ids of the models that an answer lists; none where it is no such list."""
    try:
        return [str(model["id"]) for model in orjson.loads(response.content)["data"]]
    except (KeyError, TypeError, ValueError):
        return []


def _authorization(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _complaint(content: bytes) -> str:
    """What a refusal says, on one line."""
    try:
        said = _message(orjson.loads(content))
    except (TypeError, ValueError, AttributeError):
        said = content[:_MOST_DETAIL].decode(errors="replace")
    return " ".join(said.split())


def _message(answer: Json) -> str:
    error = answer.get("error", answer)
    message = error.get("message") or error.get("detail") if isinstance(error, dict) else error
    return str(message or "no reason given")


def _reason(error: httpx.RequestError) -> str:
    return str(error) or type(error).__name__
