"""Completions and chats come in OpenAI's shape, whole or as events, and their telemetry says when they left."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

pytest.importorskip("torch", reason="torch is not installed (extra: engine)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: engine)")

from stallscope_engine.models.tokenizer import ByteTokenizer
from stallscope_telemetry.records import FinishReason
from tests.engine.server.running import TINY, Running, eventually, running

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def live() -> Iterator[Running]:
    with running() as server:
        yield server


def test_a_completion_has_openais_shape(live: Running) -> None:
    answer = live.complete(model="tiny", prompt="hello", max_tokens=5)
    assert answer["id"].startswith("cmpl-")
    assert answer["object"] == "text_completion"
    assert answer["model"] == "tiny"
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["index"] == 0
    assert isinstance(choice["text"], str)


def test_a_chat_has_openais_shape(live: Running) -> None:
    answer = live.post(CHAT, messages=HELLO, max_completion_tokens=5, ignore_eos=True).json()
    assert answer["id"].startswith("chatcmpl-")
    assert answer["object"] == "chat.completion"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert answer["usage"]["completion_tokens"] == 5


def test_parts_of_text_make_the_same_chat_as_text(live: Running) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]
    contents = [
        live.post(CHAT, messages=messages, max_tokens=5, temperature=0, ignore_eos=True).json()["choices"]
        for messages in (HELLO, parts)
    ]
    assert contents[0] == contents[1]


@pytest.mark.parametrize("prompt", ["abc", ["abc"], [100, 101, 102], [[100, 101, 102]]])
def test_each_form_of_a_prompt_says_the_same(live: Running, prompt: object) -> None:
    answer = live.complete(prompt=prompt, temperature=0, return_token_ids=True)
    assert answer["choices"][0]["prompt_token_ids"] == ByteTokenizer(TINY).encode("abc")
    assert answer["choices"][0] == live.complete(prompt="abc", temperature=0, return_token_ids=True)["choices"][0]


def test_events_carry_the_answer_in_parts(live: Running) -> None:
    asked = {"prompt": "abc", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    whole = live.complete(**asked)["choices"][0]
    choices = [event["choices"][0] for event in live.events(**asked)]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [token for choice in choices for token in choice.get("token_ids", [])] == whole["token_ids"]
    assert choices[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]


def test_events_of_a_chat_begin_with_who_speaks(live: Running) -> None:
    events = live.events(CHAT, messages=HELLO, max_tokens=6, ignore_eos=True)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("content" in event["choices"][0]["delta"] for event in events)


def test_usage_comes_last_where_it_is_asked_for(live: Running) -> None:
    events = live.events(prompt=[5, 6], max_tokens=3, ignore_eos=True, stream_options={"include_usage": True})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)


def test_without_detokenizing_there_are_ids_and_no_text(live: Running) -> None:
    (choice,) = live.complete(detokenize=False, return_token_ids=True)["choices"]
    assert choice["text"] == ""
    assert len(choice["token_ids"]) == 4


def test_the_same_seed_draws_the_same_tokens_and_another_one_others(live: Running) -> None:
    texts = [live.complete(temperature=1.5, seed=seed, max_tokens=12)["choices"][0]["text"] for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_before_it(live: Running, stream: bool) -> None:
    asked = {"prompt": "abc", "max_tokens": 40, "temperature": 1, "seed": 3, "ignore_eos": True}
    text = live.complete(**asked)["choices"][0]["text"]
    stop = text[8:11]
    if stream:
        choices = [event["choices"][0] for event in live.events(**asked, stop=[stop, "never said"])]
    else:
        choices = live.complete(**asked, stop=stop)["choices"]
    assert "".join(choice["text"] for choice in choices) == text[: text.index(stop)]
    assert choices[-1]["finish_reason"] == "stop"
    live.still_works()


def test_an_end_of_text_ends_the_answer_unless_it_is_ignored(live: Running) -> None:
    (end,) = TINY.eos_token_ids
    asked = {"prompt": [7], "max_tokens": 300, "temperature": 2, "return_token_ids": True}
    for seed in range(20):
        ids = live.complete(**asked, seed=seed)["choices"][0]["token_ids"]
        if end in ids:
            break
    (choice,) = live.complete(**asked, seed=seed, ignore_eos=False)["choices"]
    assert choice["token_ids"] == ids[: ids.index(end) + 1]
    assert choice["finish_reason"] == "stop"


def test_the_model_is_listed(live: Running) -> None:
    (model,) = live.client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("tiny", "model", 2048)
    assert live.client.get("/v1/models/tiny").json() == model
    assert live.client.get("/health").status_code == 200


# --- telemetry ----------------------------------------------------------------------------------------------------


def test_a_request_has_its_callers_trace_and_id(live: Running) -> None:
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    headers = {"traceparent": f"00-{trace}-{parent}-01", "X-Request-Id": "mine-1"}
    answer = live.client.post("/v1/completions", json={"prompt": [5], "max_tokens": 2}, headers=headers)
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "cmpl-mine-1"
    eventually(lambda: live.recorded.requests[-1].info.request_id == "mine-1")
    info = live.recorded.requests[-1].info
    assert (f"{info.trace_id:032x}", f"{info.parent_span_id:016x}") == (trace, parent)


@pytest.mark.parametrize("bad", ["", "00-0-0-01", f"00-{'0' * 32}-00f067aa0ba902b7-01", "nonsense", "ff" + "-0" * 30])
def test_a_broken_traceparent_is_none(live: Running, bad: str) -> None:
    headers = {"traceparent": bad, "X-Request-Id": f"broken-{len(live.recorded.requests)}"}
    assert live.client.post("/v1/completions", json={"prompt": [5]}, headers=headers).status_code == 200
    eventually(lambda: live.recorded.requests[-1].info.request_id == headers["X-Request-Id"])
    assert live.recorded.requests[-1].info.trace_id == 0


def test_a_request_is_delivered_after_its_last_token(live: Running) -> None:
    live.events(prompt=[5, 6], max_tokens=3, ignore_eos=True)
    before = len(live.recorded.requests)
    live.complete()
    eventually(lambda: len(live.recorded.requests) > before)
    record = live.recorded.requests[-1]
    assert record.finish_reason is FinishReason.LENGTH
    assert record.info.arrival_ns < record.token_times_ns[0] <= record.end_ns < record.delivered_ns


def test_time_without_requests_is_idle_in_the_next_step(live: Running) -> None:
    live.complete()
    steps = len(live.recorded.steps)
    ended_ns = live.recorded.steps[-1].ready_ns
    live.complete()
    first = live.recorded.steps[steps]
    assert 0 < first.idle_ns <= first.scheduled_ns - ended_ns


def test_many_clients_at_once_get_each_their_own(live: Running) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def ask(number: int) -> list[int]:
        body = {"prompt": [3 + number] * 9, "max_tokens": 20, "temperature": 0, "ignore_eos": True, "stream": True}
        with live.client.stream("POST", "/v1/completions", json=body | {"return_token_ids": True}) as answer:
            events = [json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: {")]
        return [token for event in events for token in event["choices"][0].get("token_ids", [])]

    alone = [ask(number) for number in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert [*pool.map(ask, range(12))] == alone
    assert len(set(map(tuple, alone))) > 1
