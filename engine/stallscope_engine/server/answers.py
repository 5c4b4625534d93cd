"""An answer in OpenAI's words: a JSON object at the end, or an event a step, made of bytes that are built beforehand.

``app`` writes what this makes. An event costs one join; only text, token ids and the reason of the end vary.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as quote

from stallscope_engine.server.asked import Asked
from stallscope_engine.server.errors import ApiError
from stallscope_telemetry.records import FinishReason

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Kind:
    """One of the two APIs: how its ids begin, what its objects are called, and where in a choice the text stands."""

    prefix: str
    whole: str
    chunk: str
    text_before: str
    text_after: str


COMPLETION = Kind("cmpl-", "text_completion", "text_completion", '"text":', "")
CHAT = Kind("chatcmpl-", "chat.completion", "chat.completion.chunk", '"delta":{"content":', "}")


def reason_text(reason: FinishReason) -> str:
    """OpenAI's ``finish_reason``."""
    return reason.name.lower()


class Answer:
    """Makes the objects of one request's answer."""

    def __init__(self, kind: Kind, asked: Asked, request_id: str, model: str, created_s: int) -> None:
        self._kind = kind
        self._asked = asked
        self._head = f'"id":{quote(kind.prefix + request_id)},"created":{created_s},"model":{quote(model)}'
        usage = ',"usage":null' if asked.include_usage else ""
        self._chunk_head = f'data: {{{self._head},"object":"{kind.chunk}","choices":[{{"index":0,'
        self._chunk_tail = f"}}]{usage}}}\n\n"

    def opening(self) -> bytes:
        """Events before the first token: who speaks, and the prompt's ids if they were asked for; often nothing."""
        extra = f',"prompt_token_ids":{_numbers(self._asked.prompt)}' if self._asked.return_token_ids else ""
        if self._kind is CHAT:
            delta = '"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null'
        elif extra:
            delta = '"text":"","logprobs":null,"finish_reason":null'
        else:
            return b""
        return f"{self._chunk_head}{delta}{extra}{self._chunk_tail}".encode()

    def event(self, text: str, token_ids: Sequence[int], finish: str | None) -> bytes:
        """One event: what a step brought, and with ``finish`` the end."""
        kind = self._kind
        ids = f',"token_ids":{_numbers(token_ids)}' if self._asked.return_token_ids else ""
        reason = f'"{finish}"' if finish else "null"
        return (
            f'{self._chunk_head}{kind.text_before}{quote(text)}{kind.text_after},"logprobs":null,'
            f'"finish_reason":{reason}{ids}{self._chunk_tail}'
        ).encode()

    def closing(self, completion_tokens: int) -> bytes:
        """What follows the last token: usage if it was asked for, and the end of events."""
        if not self._asked.include_usage:
            return DONE
        usage = json.dumps(self._usage(completion_tokens))
        return f'data: {{{self._head},"object":"{self._kind.chunk}","choices":[],"usage":{usage}}}\n\n'.encode() + DONE

    def whole(self, text: str, token_ids: Sequence[int], finish: str) -> bytes:
        """The answer in one object."""
        said = {"message": {"role": "assistant", "content": text}} if self._kind is CHAT else {"text": text}
        choice: dict[str, object] = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        if self._asked.return_token_ids:
            choice |= {"token_ids": token_ids, "prompt_token_ids": self._asked.prompt}
        usage = json.dumps(self._usage(len(token_ids)))
        body = f'{{{self._head},"object":"{self._kind.whole}","choices":[{json.dumps(choice)}],"usage":{usage}}}'
        return body.encode()

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        prompt_tokens = len(self._asked.prompt)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }


def error_event(error: ApiError) -> bytes:
    """An error after the answer has begun: an event, and no ``[DONE]``."""
    return b"data: " + error.body() + b"\n\n"


def _numbers(values: Sequence[int]) -> str:
    return f"[{','.join(map(str, values))}]"
