"""Whatever a client sends, it hears what is wrong in OpenAI's shape, and the engine goes on."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch", reason="torch is not installed (extra: engine)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: engine)")

from stallscope_engine.config import EngineConfig
from stallscope_engine.server.app import Settings
from tests.engine.server.running import Running, running

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def live() -> Iterator[Running]:
    with running(settings=Settings(max_body=64 * 1024)) as server:
        yield server
        server.still_works()


def check_error(status: int, content: bytes, param: str | None = None) -> str:
    """Asserts OpenAI's error shape; returns the message."""
    assert status >= 400
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param, error
    assert "\n" not in error["message"]
    message: str = error["message"]
    return message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"prompt": "a"', "not JSON"),
        (b'{"prompt": NaN}', "NaN"),
        (b"[1, 2]", "object"),
        (b'"text"', "object"),
        (b"null", "object"),
        (b'{"prompt": "\xff\xfe"}', "not UTF-8"),
        (b"[" * 50_000, "not JSON"),
        (b'{"prompt": [5], "max_tokens": ' + b"9" * 5000 + b"}", "not JSON"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(live: Running, content: bytes, says: str) -> None:
    answer = live.client.post(COMPLETIONS, content=content, headers=JSON)
    assert answer.status_code == 400
    assert says in check_error(answer.status_code, answer.content)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", None),
        ("prompt", ""),
        ("prompt", []),
        ("prompt", [[]]),
        ("prompt", ["a", "b"]),
        ("prompt", [[5], [6]]),
        ("prompt", 5),
        ("prompt", {"text": "a"}),
        ("prompt", [5, "a"]),
        ("prompt", [5, 6.0]),
        ("prompt", [True]),
        ("prompt", [-1]),
        ("prompt", [300]),
        ("prompt", [10**30]),
        ("prompt", "\ud800"),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("max_tokens", 1.5),
        ("max_tokens", "5"),
        ("max_tokens", True),
        ("max_tokens", 10**9),
        ("max_tokens", 10**400),
        ("max_completion_tokens", 0),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("seed", 1.5),
        ("seed", 2**70),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["a", 5]),
        ("stop", ["a"] * 17),
        ("n", 2),
        ("n", True),
        ("best_of", 3),
        ("top_p", 0.5),
        ("echo", True),
        ("logprobs", 1),
        ("logit_bias", {"5": 1}),
        ("stream", 1),
        ("stream", "true"),
        ("stream_options", {"include_usage": True}),
        ("stream_options", []),
        ("ignore_eos", 1),
        ("detokenize", "no"),
        ("priority", 0.5),
        ("priority", 2**31),
        ("user", 5),
        ("vllm_xargs", "a"),
        ("model", 5),
    ],
)
def test_a_wrong_field_is_named(live: Running, field: str, value: object) -> None:
    body = json.dumps({"prompt": [5], field: value})
    answer = live.client.post(COMPLETIONS, content=body, headers=JSON)
    assert answer.status_code == 400
    assert field in check_error(answer.status_code, answer.content, field)


@pytest.mark.parametrize("number", ["1e999", "-1e999", "1" + "0" * 400])
def test_a_temperature_beyond_numbers_is_refused(live: Running, number: str) -> None:
    answer = live.client.post(COMPLETIONS, content=f'{{"prompt": [5], "temperature": {number}}}', headers=JSON)
    check_error(answer.status_code, answer.content, "temperature")


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hello",
        ["hello"],
        [{"role": "user"}],
        [{"content": "hello"}],
        [{"role": 5, "content": "hello"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": {"text": "hello"}}],
    ],
)
def test_messages_must_be_a_conversation_of_text(live: Running, messages: object) -> None:
    answer = live.post(CHAT, messages=messages)
    assert answer.status_code == 400
    check_error(answer.status_code, answer.content, "messages")


def test_an_unknown_model_is_not_found(live: Running) -> None:
    answer = live.post(prompt=[5], model="gpt-9")
    assert answer.status_code == 404
    assert "'tiny' is served" in check_error(answer.status_code, answer.content, "model")
    assert answer.json()["error"]["code"] == "model_not_found"
    assert live.client.get("/v1/models/gpt-9").status_code == 404


def test_a_prompt_that_does_not_fit_hears_the_numbers(live: Running) -> None:
    answer = live.post(prompt=[5] * 3000)
    message = check_error(answer.status_code, answer.content, "prompt")
    assert "3,000 tokens" in message
    assert "KV cache of 2,048" in message
    answer = live.post(prompt=[5] * 2000, max_tokens=49)
    assert "at most 48" in check_error(answer.status_code, answer.content, "max_tokens")
    assert live.post(prompt=[5] * 2000, max_tokens=48, ignore_eos=True).status_code == 200


def test_without_chunked_prefill_the_step_is_the_limit() -> None:
    with running(EngineConfig(max_num_batched_tokens=64, chunked_prefill=False, kv_blocks=128)) as live:
        answer = live.post(prompt=[5] * 60, max_tokens=5)
        assert "a step of 64 tokens" in check_error(answer.status_code, answer.content, "max_tokens")
        assert live.post(prompt=[5] * 60, max_tokens=4).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", COMPLETIONS, 405),
        ("PUT", CHAT, 405),
        ("POST", "/v1/models", 405),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/", 404),
        ("GET", "/v1/completions/", 404),
    ],
)
def test_a_wrong_path_or_method_is_said(live: Running, method: str, path: str, status: int) -> None:
    answer = live.client.request(method, path)
    assert answer.status_code == status
    assert path in check_error(answer.status_code, answer.content)


def test_another_type_than_json_is_refused(live: Running) -> None:
    answer = live.client.post(COMPLETIONS, content=b'{"prompt": [5]}', headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415
    assert "application/json" in check_error(answer.status_code, answer.content)
    assert live.client.post(COMPLETIONS, content=b'{"prompt": [5]}').status_code == 200


def test_a_body_that_is_too_large_is_refused(live: Running) -> None:
    answer = live.client.post(COMPLETIONS, content=b" " * (64 * 1024 + 1), headers=JSON)
    assert answer.status_code == 413
    assert "65,536 bytes" in check_error(answer.status_code, answer.content)


def test_a_body_without_end_is_not_read_to_it(live: Running) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
        sent = 0
        try:
            while sent < 200:
                client.sendall(chunk)
                sent += 1
        except OSError:
            pass
        assert sent < 200


def test_bytes_that_are_no_http_end_the_connection_alone(live: Running) -> None:
    host, port = live.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(b"\x00\xff nonsense\r\n\r\n")
        assert b"400" in client.recv(4096)


def test_unknown_fields_are_let_pass(live: Running) -> None:
    assert live.complete(metadata={"a": 1}, top_p=1.0, n=1, logprobs=None)["usage"]["completion_tokens"] == 4


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-3, 400), st.floats(), st.text(max_size=20), st.just("tiny")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.sampled_from(
    [
        *("prompt", "max_tokens", "temperature", "stop", "seed", "stream", "stream_options", "model", "messages"),
        *("user", "priority", "vllm_xargs", "n", "ignore_eos", "detokenize", "return_token_ids", "logprobs"),
    ]
)
LIKELY = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.text(max_size=20) | st.lists(st.integers(-1, 310), max_size=20),
        "messages": st.lists(st.fixed_dictionaries({"role": st.just("user"), "content": st.text(max_size=9)})),
        "max_tokens": st.integers(-2, 12),
        "temperature": st.floats(-1, 3),
        "stop": st.text(max_size=2),
        "stream": st.booleans(),
    },
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(likely=LIKELY, odd=st.dictionaries(FIELDS, VALUES, max_size=3), path=st.sampled_from([COMPLETIONS, CHAT]))
def test_no_body_breaks_the_server(live: Running, likely: dict[str, object], odd: dict[str, object], path: str) -> None:
    body = {"max_tokens": 3} | likely | odd
    answer = live.client.post(path, content=json.dumps(body).encode(), headers=JSON)
    assert answer.status_code in {200, 400, 404}, answer.text
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    elif body.get("stream") is True:
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        assert answer.json()["choices"][0]["finish_reason"] in {"stop", "length"}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200), kind=st.sampled_from(["application/json", "text/plain", "", "\xe9"]))
def test_no_bytes_break_the_server(live: Running, content: bytes, kind: str) -> None:
    answer = live.client.post(COMPLETIONS, content=content, headers={"Content-Type": kind.encode("latin-1")})
    assert answer.status_code in {400, 415}
