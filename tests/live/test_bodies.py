"""Whatever comes is a batch or a refusal, and what a batch counts is what the reader of traces finds in it."""

from __future__ import annotations

import contextlib
import gzip
import random
import zlib

import orjson
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData

from stallscope.live.bodies import ENCODINGS, JSON, PROTOBUF, batch_of, plain
from stallscope.live.refusals import Refusal, TooLarge, Wrong
from stallscope.trace.otlp.json import JsonDecoder
from stallscope.trace.otlp.protobuf import ProtobufDecoder
from stallscope.trace.otlp.spans import Resources
from tests.live.collecting import as_json, request

SOUND = orjson.loads(as_json(request(random.Random(1))))["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=8) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
SPANS = (
    st.just(SOUND)
    | ANYTHING
    | st.builds(lambda key, value: {**SOUND, key: value}, st.sampled_from(sorted(SOUND)), ANYTHING)
)


def found(message: bytes) -> tuple[int, int]:
    """Spans that the reader of traces takes, and that it does not."""
    decoder = (JsonDecoder if message.startswith(b"{") else ProtobufDecoder)(Resources())
    groups = list(decoder.groups(message))
    return sum(len(spans) for _, spans, _ in groups), sum(malformed for *_, malformed in groups)


@given(spans=st.lists(SPANS, max_size=4) | ANYTHING, resource=st.just({}) | ANYTHING)
def test_what_json_is_taken_can_be_read_and_no_span_vanishes(spans: object, resource: object) -> None:
    body = orjson.dumps({"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": spans}]}]})
    with contextlib.suppress(Wrong):
        batch = batch_of(b"\n " + body + b"\n", JSON)
        assert batch.spans + batch.refused == (len(spans) if isinstance(spans, list) else 0)
        if batch.spans:
            assert found(batch.message) == (batch.spans, 0)


@pytest.mark.parametrize("depth", [300, 1000])
def test_json_that_is_nested_deeply_is_refused_where_it_must_be_written_anew(depth: int) -> None:
    deep = b"[" * depth + b"null" + b"]" * depth
    span = orjson.dumps(SOUND)[:-1] + b',"status":null,"deep":' + deep + b"}"
    with pytest.raises(Wrong, match="deeply"):
        batch_of(b'{"resourceSpans":[{"scopeSpans":[{"spans":[' + span + b"]}]}]}", JSON)


@given(sound=st.lists(st.booleans(), min_size=1, max_size=6))
def test_unsound_spans_in_protobuf_are_left_out_and_counted(sound: list[bool]) -> None:
    message = request(random.Random(2), len(sound))
    for span, is_sound in zip(message.resource_spans[0].scope_spans[0].spans, sound, strict=True):
        span.trace_id = span.trace_id if is_sound else span.trace_id[:15]
    if not any(sound):
        with pytest.raises(Wrong):
            batch_of(message.SerializeToString(), PROTOBUF)
        return
    batch = batch_of(message.SerializeToString(), PROTOBUF)
    assert (batch.spans, batch.refused) == (sum(sound), len(sound) - sum(sound))
    assert found(batch.message) == (batch.spans, 0)
    assert bool(batch.remark) == (not all(sound))


@given(body=st.binary(max_size=200), content_type=st.sampled_from([JSON, PROTOBUF]))
def test_any_bytes_are_a_batch_or_a_refusal(body: bytes, content_type: str) -> None:
    with contextlib.suppress(Refusal):
        batch_of(body, content_type)
    for encoding in ENCODINGS:
        with contextlib.suppress(Refusal):
            plain(body, encoding, 1000)


@given(body=st.binary(max_size=3000), most=st.integers(0, 3000), cut=st.integers(1, 10))
def test_a_compressed_body_is_whole_or_refused(body: bytes, most: int, cut: int) -> None:
    compress = {"gzip": gzip.compress, "deflate": zlib.compress, "zlib": zlib.compress, "zstd": zstandard.compress}
    for encoding in ENCODINGS:
        sent = compress[encoding](body)
        if len(body) <= most:
            assert plain(sent, encoding, most) == body
        else:
            with pytest.raises(TooLarge):
                plain(sent, encoding, most)
        with pytest.raises(Refusal):
            plain(sent[:-cut], encoding, len(body))


def test_what_is_sound_is_kept_byte_for_byte() -> None:
    message = request(random.Random(3), 5)
    message.resource_spans[0].scope_spans[0].spans[0].ClearField("name")  # OTLP lets it be empty
    body = message.SerializeToString() + b"\xfa\x01\x02hi"  # and a field of a later version
    assert batch_of(body, PROTOBUF).message == body
    assert len(TracesData.FromString(body).resource_spans) == 1
