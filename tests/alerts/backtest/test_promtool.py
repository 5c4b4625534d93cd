"""What promtool reports is read as it was meant, and what it refuses becomes one line."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.alerts.backtest.promtool import Surprise, read_surprises, unquoted
from stallscope.alerts.promtool import check_rules, find_promtool
from stallscope.errors import UsageError
from tests.alerts.backtest.stories import PAGE, needs_promtool

SHORT = {"\a": "a", "\b": "b", "\f": "f", "\n": "n", "\r": "r", "\t": "t", "\v": "v", "\\": "\\", '"': '"'}


def go_quoted(text: str) -> str:
    """As Go's strconv.Quote: what cannot be printed is escaped (https://pkg.go.dev/strconv#Quote)."""
    made = []
    for one in text:
        if one in SHORT:
            made.append("\\" + SHORT[one])
        elif one == " " or unicodedata.category(one)[0] in "LMNPS":
            made.append(one)
        elif ord(one) < 0x80:
            made.append(f"\\x{ord(one):02x}")
        else:
            made.append(f"\\u{ord(one):04x}" if ord(one) < 0x10000 else f"\\U{ord(one):08x}")
    return '"' + "".join(made) + '"'


NAMES = st.text() | st.sampled_from(['"} 1E+00, {a="', "nil", "\n        got: nil", "\\", "{{ x }}"])
LABELS = st.dictionaries(st.from_regex(r"[a-zA-Z_]\w{0,5}", fullmatch=True).filter(str.isascii), NAMES, max_size=4)
SAMPLES = st.lists(st.tuples(LABELS, st.floats(allow_nan=False)), max_size=4)


@given(NAMES)
def test_what_go_quotes_is_unquoted_to_what_it_was(text: str) -> None:
    assert unquoted(go_quoted(text)[1:-1]) == text


@given(st.lists(st.tuples(NAMES, st.integers(1, 10**6), SAMPLES), max_size=4))
def test_a_report_is_read_whatever_is_in_names(
    reported: list[tuple[str, int, list[tuple[dict[str, str], float]]]],
) -> None:
    lines = ["Unit Testing:  tests.yaml", "  FAILED:"]
    for expression, elapsed_s, samples in reported:
        minutes, rest = divmod(elapsed_s, 60)
        lines.append(f"    expr: {go_quoted(expression)}, time: {minutes}m{rest}s,")
        lines.append('        exp: {a="another"} 1E+00')
        sets = [
            "{" + ", ".join(f"{name}={go_quoted(value)}" for name, value in one.items()) + "}" for one, _ in samples
        ]
        values = [f"{value:E}" if abs(value) == float("inf") else repr(value) for _, value in samples]
        got = ", ".join(f"{labels} {value}" for labels, value in zip(sets, values, strict=True))
        lines.append(f"        got: {got or 'nil'}")
    expected = [
        Surprise(expression, elapsed_s * 1000, tuple((tuple(sorted(one.items())), value) for one, value in samples))
        for expression, elapsed_s, samples in reported
    ]
    assert read_surprises("\n".join(lines)) == expected


def test_a_report_in_another_form_is_not_guessed_at() -> None:
    with pytest.raises(ValueError, match="not understood"):
        read_surprises('    expr: "x", time: 1m,\n        exp: nil\n        got: {a=b} 1')


@needs_promtool
@pytest.mark.parametrize(
    ("text", "says"),
    [
        (PAGE.replace("0.2", "0.2)"), r'group "blame", rule 1, "Stalls": could not parse expression: .* parse error'),
        (PAGE.replace("interval", "intervall"), "field intervall not found"),
        (PAGE.replace("{severity", "{a-b: x, severity"), "invalid label name: a-b"),
    ],
)
def test_rules_that_are_not_sound_are_refused_in_promtools_words(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as refused:
        check_rules(text, "rules.yaml")
    assert str(refused.value).startswith("rules.yaml: ")
    assert "\n" not in str(refused.value)


def test_without_promtool_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(UsageError, match="apt install prometheus"):
        find_promtool()
