"""OTLP as JSON: a line read as a whole says what it says read part by part, however odd its parts are."""

import orjson
from hypothesis import given
from hypothesis import strategies as st

from stallscope.trace.otlp.json import JsonDecoder
from stallscope.trace.otlp.spans import MALFORMED, Resource, Resources, Span

INTEGERS = st.one_of(st.integers(-(1 << 63), (1 << 63) - 1), st.floats(allow_nan=False, allow_infinity=False))
NUMBERS = st.one_of(INTEGERS, INTEGERS.map(str), st.sampled_from(["", " 7", "7 ", "0x7", "1e3", "-0", "9" * 30]))
TEXTS = st.one_of(st.text(max_size=5), st.sampled_from(["true", "1", "a\u2028b", '"\\']))
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
KINDS = ("intValue", "stringValue", "boolValue", "doubleValue", "bytesValue")
ANY_VALUES = st.dictionaries(st.sampled_from(KINDS), PLAIN, max_size=2)
ARRAYS = st.fixed_dictionaries(
    {"arrayValue": st.one_of(PLAIN, st.fixed_dictionaries({"values": st.lists(ANY_VALUES, max_size=3)}))}
)
ATTRIBUTES = st.one_of(
    PLAIN,
    st.lists(
        st.one_of(
            st.just({"key": "n", "value": {"intValue": "5"}}),
            st.fixed_dictionaries({"key": TEXTS, "value": st.one_of(ANY_VALUES, ARRAYS, PLAIN)}),
            st.fixed_dictionaries({"key": PLAIN}),
        ),
        max_size=4,
    ),
)
SOUND = {"name": "x", "startTimeUnixNano": "1", "endTimeUnixNano": "2"}
SPANS = st.one_of(
    st.fixed_dictionaries({"attributes": ATTRIBUTES}).map(lambda more: SOUND | more),
    st.dictionaries(st.sampled_from([*SOUND, "traceId", "traceState", "kind"]), PLAIN).map(lambda odd: SOUND | odd),
    PLAIN,
)


def spans(decoder: JsonDecoder, text: bytes) -> list[tuple[dict[str, object], list[object], int]] | str:
    """What is read of a text, or that it is unreadable."""
    try:
        return [
            (resource.attributes, list(map(content, found)), more) for resource, found, more in decoder.groups(text)
        ]
    except MALFORMED:
        return "unreadable"


def content(span: Span) -> object:
    return (span.name, span.trace_id, span.trace_state, span.start, span.end, span.attributes, span.bad)


def document(resource: object, *found: object) -> dict[str, object]:
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": list(found)}]}]}


@given(resource=st.fixed_dictionaries({"attributes": ATTRIBUTES}), span=SPANS)
def test_a_span_reads_the_same_beside_one_that_is_unsound(resource: object, span: object) -> None:
    decoder = JsonDecoder(Resources())
    alone = spans(decoder, orjson.dumps(document(resource, span)))
    beside = spans(decoder, orjson.dumps(document(resource, span, 7)))  # no line of the declared types
    assert not isinstance(alone, str)
    assert not isinstance(beside, str)
    ((attributes, found, malformed),), ((again, found_beside, malformed_beside),) = alone, beside
    assert (attributes, found, malformed + 1) == (again, found_beside, malformed_beside)


def test_a_line_nested_without_end_is_unreadable() -> None:
    deep = b'{"resourceSpans": [], "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert spans(JsonDecoder(Resources()), deep) in ("unreadable", [])


def test_a_line_that_is_no_utf_8_is_unreadable_wherever_it_is_not() -> None:
    sound = orjson.dumps(document({"attributes": []}, SOUND | {"skipped": "é"}))
    assert spans(JsonDecoder(Resources()), sound) != "unreadable"
    assert spans(JsonDecoder(Resources()), sound.replace("é".encode(), b"\xff")) == "unreadable"


def test_resources_of_the_same_attributes_are_one() -> None:
    resources = Resources()
    one = orjson.dumps(document({"attributes": [{"key": "a", "value": {"stringValue": "b"}}]}, SOUND))
    spaced = orjson.dumps(orjson.loads(one), option=orjson.OPT_INDENT_2)
    found: list[Resource] = [
        resource for text in (one, spaced) for resource, _, _ in JsonDecoder(resources).groups(text)
    ]
    assert found[0] is found[1]
