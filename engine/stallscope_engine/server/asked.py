"""What a client asks for: the JSON body of a completion or a chat, checked field by field.

``app`` hands the body's bytes in; all that is wrong comes back as an ApiError that names the field and the limit.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from typing import NoReturn

from stallscope_engine.config import EngineConfig
from stallscope_engine.models.tokenizer import Tokenizer
from stallscope_engine.request import Sampling
from stallscope_engine.server.errors import ApiError, wrong

Body = dict[str, object]

DEFAULT_TOKENS = 16  # of a completion that does not say max_tokens, as at OpenAI
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 256
MOST_TEMPERATURE = 2.0
MOST_PRIORITY = 2**31 - 1
MOST_SEED = 2**63 - 1

# What OpenAI's clients may send and this engine does not do, with the values that ask for nothing.
_NOTHING: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "logit_bias": ({},),
    "suffix": ("",),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "use_beam_search": (False,),
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may be: ``tokens`` is the most that prompt and answer can be together, ``text`` says why."""

    model: str
    vocab_size: int
    tokens: int
    text: str


def limits_of(model: str, config: EngineConfig, vocab_size: int, positions: int) -> Limits:
    """The tightest of what the model, the KV cache and, without chunked prefill, a step's budget allow."""
    bounds = [
        (positions, f"the model's context of {positions:,} tokens"),
        (config.kv_blocks * config.block_size, f"the KV cache of {config.kv_blocks * config.block_size:,} tokens"),
    ]
    if not config.chunked_prefill:
        budget = config.max_num_batched_tokens
        bounds.append((budget, f"a step of {budget:,} tokens (prompts are not cut into chunks here)"))
    tokens, text = min(bounds)
    return Limits(model, vocab_size, tokens, text)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it is to be served. ``user`` and ``claimed_tenant`` are what the body says of who sent it."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool
    return_token_ids: bool
    detokenize: bool
    priority: int
    user: str
    claimed_tenant: str


def parse_body(data: bytes) -> Body:
    """The JSON object in ``data``. Raises ApiError where it is none."""
    try:
        body = json.loads(data.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise wrong(None, f"the body is not UTF-8: byte {error.start} can't be read", "invalid_json") from None
    except (ValueError, RecursionError) as error:
        raise wrong(None, f"the body is not JSON: {str(error)[:200]}", "invalid_json") from None
    if not isinstance(body, dict):
        raise wrong(None, f"the body must be a JSON object, not {_kind(body)}", "invalid_json")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def parse_completion(body: Body, limits: Limits, tokenizer: Tokenizer) -> Asked:
    """The body of ``/v1/completions``. Raises ApiError."""
    _check_model(body, limits)
    return _parse(body, limits, _prompt(body, limits, tokenizer), DEFAULT_TOKENS)


def parse_chat(body: Body, limits: Limits, tokenizer: Tokenizer) -> Asked:
    """The body of ``/v1/chat/completions``; without a maximum, the answer may fill the context. Raises ApiError."""
    _check_model(body, limits)
    messages = _messages(body)
    try:
        prompt = tokenizer.chat(messages)
    except ValueError as error:
        raise wrong("messages", f"messages: {error}") from None
    return _parse(body, limits, prompt, max(1, limits.tokens - len(prompt)))


def _check_model(body: Body, limits: Limits) -> None:
    model = _text(body, "model", limits.model)
    if model != limits.model:
        raise ApiError(
            404, f"there is no model {model[:100]!r} here; {limits.model!r} is served", "model", "model_not_found"
        )


def _parse(body: Body, limits: Limits, prompt: list[int], default_tokens: int) -> Asked:
    for name, nothing in _NOTHING.items():
        value = body.get(name)
        if value is not None and not any(value == idle and type(value) in _alike(idle) for idle in nothing):
            values = " or ".join(map(json.dumps, nothing))
            raise wrong(name, f"{name}: not supported by this engine; leave it out" + (f" or {values}" * bool(values)))
    detokenize = _flag(body, "detokenize", True)
    stop = _stop(body)
    if stop and not detokenize:
        raise wrong("stop", "stop: strings can't be found with detokenize=false; leave out one of the two")
    temperature = _number(body, "temperature", 1.0, MOST_TEMPERATURE)
    options = _object(body, "stream_options")
    stream = _flag(body, "stream", False)
    if options and not stream:
        raise wrong("stream_options", "stream_options: only with stream=true")
    seed = _whole(body, "seed", -MOST_SEED - 1, MOST_SEED)
    return Asked(
        prompt=prompt,
        max_tokens=_max_tokens(body, limits, len(prompt), default_tokens),
        sampling=Sampling(
            temperature,
            seed if seed is not None else random.getrandbits(32),
            _flag(body, "ignore_eos", False),
        ),
        stop=stop,
        stream=stream,
        include_usage=_flag(options, "include_usage", False),
        return_token_ids=_flag(body, "return_token_ids", False),
        detokenize=detokenize,
        priority=_whole(body, "priority", -MOST_PRIORITY, MOST_PRIORITY) or 0,
        user=_text(body, "user", ""),
        claimed_tenant=_text(_object(body, "vllm_xargs"), "tenant", ""),
    )


def _prompt(body: Body, limits: Limits, tokenizer: Tokenizer) -> list[int]:
    """Token ids of ``prompt``: text, ids, or a list of one of either."""
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], (str, list)):
        if len(prompt) > 1:
            raise wrong("prompt", f"prompt: {len(prompt)} prompts; send one a request")
        prompt = prompt[0]
    if isinstance(prompt, str):
        try:
            ids = tokenizer.encode(prompt)
        except ValueError as error:  # a lone surrogate, or no text for this model
            raise wrong("prompt", f"prompt: {error}") from None
    elif isinstance(prompt, list):
        if any(type(token) is not int for token in prompt):
            raise wrong("prompt", "prompt: token ids must be whole numbers")
        if prompt and not (min(prompt) >= 0 and max(prompt) < limits.vocab_size):
            raise wrong("prompt", f"prompt: token ids must be from 0 to {limits.vocab_size - 1}")
        ids = prompt
    elif prompt is None:
        raise wrong("prompt", "prompt: missing; give text or token ids")
    else:
        raise wrong("prompt", f"prompt: must be text or a list of token ids, not {_kind(prompt)}")
    if not ids:
        raise wrong("prompt", "prompt: empty; give at least one token")
    return ids


def _messages(body: Body) -> list[dict[str, str]]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "messages: must be a list of at least one message")
    return [_message(message, f"messages[{number}]") for number, message in enumerate(messages)]


def _message(message: object, where: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise wrong("messages", f"{where}: must be an object, not {_kind(message)}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise wrong("messages", f"{where}.role: must be text, not {_kind(role)}")
    if isinstance(content, list):  # OpenAI's parts, of which this engine knows text
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else None
    if not isinstance(content, str):
        raise wrong("messages", f"{where}.content: must be text or parts of text")
    return {"role": role, "content": content}


def _max_tokens(body: Body, limits: Limits, prompt_tokens: int, default: int) -> int:
    if prompt_tokens >= limits.tokens:
        raise wrong(
            "prompt",
            f"the prompt of {prompt_tokens:,} tokens leaves no room for an answer in {limits.text}",
            "context_length_exceeded",
        )
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    asked = _whole(body, name, 1, None)
    if asked is None:
        return min(default, limits.tokens - prompt_tokens)
    if prompt_tokens + asked > limits.tokens:
        raise wrong(
            name,
            f"{prompt_tokens:,} tokens of prompt and {name}={str(asked)[:20]} do not fit {limits.text}; "
            f"ask for at most {limits.tokens - prompt_tokens:,}",
            "context_length_exceeded",
        )
    return asked


def _stop(body: Body) -> tuple[str, ...]:
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(one, str) for one in stops):
        raise wrong("stop", "stop: must be text or a list of texts")
    if len(stops) > MOST_STOPS or not all(0 < len(one) <= MOST_STOP_CHARACTERS for one in stops):
        raise wrong("stop", f"stop: at most {MOST_STOPS} texts of 1 to {MOST_STOP_CHARACTERS} characters")
    return tuple(stops)


# --- fields -------------------------------------------------------------------------------------------------------


def _flag(body: Body, name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise wrong(name, f"{name}: must be true or false, not {_kind(value)}")
    return value


def _text(body: Body, name: str, default: str) -> str:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, str):
        raise wrong(name, f"{name}: must be text, not {_kind(value)}")
    return value


def _object(body: Body, name: str) -> Body:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong(name, f"{name}: must be an object, not {_kind(value)}")
    return value


def _whole(body: Body, name: str, least: int, most: int | None) -> int | None:
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int:
        raise wrong(name, f"{name}: must be a whole number, not {_kind(value)}")
    if value < least:
        raise wrong(name, f"{name}: must be at least {least}, not {str(value)[:20]}")
    if most is not None and value > most:
        raise wrong(name, f"{name}: must be at most {most}, not {str(value)[:20]}")
    return value


def _number(body: Body, name: str, default: float, most: float) -> float:
    """A number in [0, ``most``]."""
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most or math.isnan(value):
        raise wrong(name, f"{name}: must be a number from 0 to {most:g}")
    return float(value)


def _alike(value: object) -> tuple[type, ...]:
    """Types of JSON that may say ``value``: 1 and 1.0 are one number, and neither is true."""
    return (int, float) if type(value) is int else (type(value),)


def _kind(value: object) -> str:
    names = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object")
