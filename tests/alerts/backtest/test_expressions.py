"""What an expression reads, how far it looks back, and which number is its threshold."""

from __future__ import annotations

import contextlib
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.alerts.backtest.expressions import needs, needs_of_recordings, seconds, threshold, tokens

NAMES = st.from_regex(r"[a-zA-Z_][a-zA-Z0-9_]{0,5}:?[a-z]{0,3}", fullmatch=True).map(lambda name: f"m_{name}")
# What a string or a comment may hold that looks like PromQL.
TRAPS = st.text(alphabet="m_x[5m](){}#'\\offset by @> \n\u2028é", max_size=12)
DURATIONS = st.sampled_from([("90s", 90), ("5m", 300), ("1h30m", 5400), ("1d", 86400), ("500ms", 0.5)])


def quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


@st.composite
def expressions(draw: st.DrawFn, depth: int = 3) -> tuple[str, set[str], float]:
    """An expression, the metrics that it reads, and how far back it looks."""
    kind = draw(st.sampled_from(["selector", "range", "subquery", "binary", "sum", "call"] if depth else ["selector"]))
    if kind == "selector":
        name = draw(NAMES)
        matcher = draw(st.sampled_from(["", "{}", "{by=~%s}", "{a!=%s, offset=%s}"]))
        text = name + matcher.replace("%s", quote(draw(TRAPS)))
        if draw(st.booleans()):
            duration, length = draw(DURATIONS)
            return f"{text} offset {duration}", {name}, length
        return text, {name}, 0.0
    if kind == "range":
        name, (duration, length) = draw(NAMES), draw(DURATIONS)
        return (
            f"rate({name}{{x={quote(draw(TRAPS))}}}[ {duration}] # {draw(TRAPS).replace(chr(10), '')}\n)",
            {name},
            length,
        )
    text, names, length = draw(expressions(depth=depth - 1))
    if kind == "subquery":
        duration, more = draw(DURATIONS)
        step = draw(st.sampled_from(["", "30s"]))
        return f"max_over_time(({text})[{duration}:{step}] @ end())", names, length + more
    if kind == "binary":
        other, others, back = draw(expressions(depth=depth - 1))
        joined = draw(
            st.sampled_from(["+", "> bool", "and on (by, m_no) ", "* ignoring(m_no) group_left(m_no)", "UNLESS"])
        )
        return f"({text}) {joined} ({other})", names | others, max(length, back)
    if kind == "sum":
        form = draw(st.sampled_from(["sum by (m_no) ({})", "TOPK without(m_no)(3, {})", "sum({}) BY (m_no)"]))
        return form.replace("{}", text, 1), names, length
    return f"label_replace({text}, {quote(draw(TRAPS))}, '$1', 'm_no', `m_no(.*)`)", names, length


@given(expressions())
def test_what_an_expression_reads_is_found_whatever_its_strings_and_comments_hold(
    made: tuple[str, set[str], float],
) -> None:
    text, names, length = made
    found = needs(text)
    assert found.names == names
    assert found.look_back_s == length
    assert not found.any_metric
    assert not found.clock


@given(expressions(), st.sampled_from([">", ">="]), st.floats(0, 1e6), st.sampled_from(["", " and (m_other)"]))
def test_raising_a_threshold_changes_that_number_alone(
    made: tuple[str, set[str], float], sign: str, value: float, rest: str
) -> None:
    left = f"({made[0]})"
    text = f"{left} {sign} {value!r}{rest}"
    found = threshold(text)
    assert found is not None
    assert found.value == value
    assert found.or_equal == (sign == ">=")
    assert text[: found.start] == f"{left} {sign} "
    assert text[found.end :] == rest


@pytest.mark.parametrize(
    "text",
    [
        "m_a < 5",
        "m_a > m_b",
        "m_a > 5 or m_b > 3",
        "m_a > 14.4 * 0.01",
        "m_a > bool 5",
        "5 < m_a",
        "m_a > 5 > 3",
        'm_a{x="> 5"}',
        "sum(m_a > 5)",
    ],
)
def test_other_forms_have_no_threshold_to_raise(text: str) -> None:
    assert threshold(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [("m_a > 5", 5), ("(m_a > -1.5e3) and on(x) (m_b > 2)", -1500), ("((m_a >= 0.2 unless m_c))", 0.2)],
)
def test_a_threshold_may_stand_in_parentheses_and_before_a_condition(text: str, value: float) -> None:
    found = threshold(text)
    assert found is not None
    assert found.value == value


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('{__name__="m_a", x="y"}', {"m_a"}),
        ("{__name__=`m_a`}", {"m_a"}),
        ("sum(vllm:num_requests_waiting)", {"vllm:num_requests_waiting"}),
        ("count(inf)", set()),
        ("sum", {"sum"}),
        ("m_a == Inf", {"m_a"}),
        ("-m_a ^ 2 atan2 m_b", {"m_a", "m_b"}),
    ],
)
def test_names_in_all_their_forms(text: str, names: set[str]) -> None:
    assert needs(text).names == names


def test_a_pattern_of_names_and_a_selector_without_a_name_are_told_apart() -> None:
    assert needs('{__name__=~"m_.*"}').patterns == {"m_.*"}
    assert not needs('{__name__=~"m_.*"}').any_metric
    assert needs('{job="x"}').any_metric
    assert needs('{__name__!="m_a"}').any_metric


@pytest.mark.parametrize("text", ["m_a and hour() > 8", "m_a @ 1609746000", "day_of_week(m_a) == 0"])
def test_a_question_for_the_date_is_seen(text: str) -> None:
    assert needs(text).clock


def test_time_and_at_the_end_are_no_question_for_the_date() -> None:
    assert not needs("time() - m_a[5m] @ end() offset 1h").clock
    assert needs("rate(m_a[5m] @ start() offset 1h)").look_back_s == 3900


def test_an_offset_into_the_future_looks_back_no_further() -> None:
    assert needs("rate(m_a[5m] offset -1h)").look_back_s == 300


def test_recording_rules_are_followed_to_what_they_read_and_add_their_windows() -> None:
    recorded = needs_of_recordings(
        {"r:one": ["rate(m_a[5m])"], "r:two": ["max_over_time(r:one[1h])"], "r:both": ["r:one", "m_b offset 2h"]}
    )
    assert needs("r:two > 1", recorded).names == {"m_a"}
    assert needs("r:two > 1", recorded).look_back_s == 3900
    assert needs("r:both offset 1m", recorded).names == {"m_a", "m_b"}
    assert needs("r:both offset 1m", recorded).look_back_s == 7260


def test_the_shortest_window_is_found_through_recording_rules_and_is_no_subquery() -> None:
    recorded = needs_of_recordings({"r:one": ["rate(m_a[20s])"]})
    assert needs("rate(m_b[5m]) > 0 and r:one > 0", recorded).shortest_s == 20
    assert needs("max_over_time(m_a[5s:1s])").shortest_s == math.inf


def test_recording_rules_that_read_each_other_end() -> None:
    recorded = needs_of_recordings({"r:a": ["r:b + m_a"], "r:b": ["r:a + rate(m_b[1m])"]})
    assert needs("r:a", recorded).names == {"m_a", "m_b"}
    assert needs("r:a", recorded).look_back_s == 60


@pytest.mark.parametrize("text", ["m_a > $x", "m_a[5]", "m_a offset", "rate(m_a[5 minutes])"])
def test_what_is_no_promql_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"no |too early"):
        needs(text)


@given(st.text(alphabet="ab:0.5[]{}()\"'`#\\ \n,<>=!~@-+offsetbym", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        read = tokens(text)
    except ValueError:
        return
    for token in read:
        assert text[token.start :].startswith(token.text)
    with contextlib.suppress(ValueError):
        needs(text)
    with contextlib.suppress(ValueError):
        threshold(text)


@pytest.mark.parametrize(("text", "length"), [("", 0), ("0", 0), ("1h30m", 5400), ("250ms", 0.25), ("1w", 604800)])
def test_durations(text: str, length: float) -> None:
    assert seconds(text) == length
