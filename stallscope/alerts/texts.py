"""What an alert says, as parts: literal text, labels, values, and what is looked up when it fires.

Rendered for Prometheus (whose templates can query) and for Grafana (whose can't). Names of tenants come in as data:
through labels, or as string literals, never as template code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from stallscope.alerts.promql import quoted
from stallscope.watch.families import OTHER


@dataclass(frozen=True)
class Label:
    """The value of one of the alert's labels."""

    name: str


@dataclass(frozen=True)
class ShellWord:
    """A label's value as one word of a shell's command; ``option`` stands before it, and both are left out for (other)
    and (unknown), which no trace has."""

    option: str
    name: str


@dataclass(frozen=True)
class Value:
    """The value of the alert's expression, three digits of it and no exponent; it is to be 0, or 0.0001 at least."""


@dataclass(frozen=True)
class Percent:
    """The value of the alert's expression, a share."""


@dataclass(frozen=True)
class ByLabel:
    """A text for some values of a label, another for all others."""

    name: str
    texts: Mapping[str, str]
    otherwise: str


@dataclass(frozen=True)
class Found:
    """What a query finds when the alert fires, highest first, joined by commas: a label of each, or words for it.

    ``query`` has ``%[1]q`` where the value of the alert's label ``given`` belongs, quoted. ``valued``: with what it
    found after each label, as ``Value`` has it. ``otherwise`` where it finds nothing.
    """

    query: str
    given: str
    label: str
    otherwise: str
    words: Mapping[str, str] = field(default_factory=dict)
    valued: bool = False


@dataclass(frozen=True)
class Since:
    """A time by ISO 8601 that a query finds (its value: s since the epoch); ``otherwise`` where it finds none."""

    query: str
    given: str
    otherwise: str


Part = str | Label | ShellWord | Value | Percent | ByLabel | Found | Since
Text = tuple[Part, ...]
_ISO = "2006-01-02T15:04:05Z"  # as Go names a format
_QUOTE, _QUOTE_WITHIN = "'", "'\\''"  # of a shell
_NOBODY = (OTHER, "(unknown)", "")


def for_prometheus(text: Text) -> str:
    """The text as a template of an alerting rule of Prometheus."""
    return "".join(map(_in_prometheus, text))


def for_grafana(text: Text) -> str:
    """The text as a template of Grafana's, in which files of provisioning expand what follows a dollar sign."""
    return "".join(map(_in_grafana, text))


def for_people(text: Text) -> str:
    """The text with the name of what is not known before the alert fires: ``<culprit>``, ``<value>``."""
    return "".join(map(_in_words, text))


def cases(text: Text) -> tuple[tuple[str, str], ...]:
    """What the text says ``for_people``, for each value of the label that it has words by; "" for all others."""
    by = next((part for part in text if isinstance(part, ByLabel)), None)
    if by is None:
        return (("", for_people(text)),)
    return tuple(
        (value, for_people(tuple(words if part is by else part for part in text)))
        for value, words in (*by.texts.items(), ("", by.otherwise))
    )


def _in_words(part: Part) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, ShellWord):
        return f" {part.option}=<{part.name}>"
    if isinstance(part, Found):
        return f"<{part.label}>"
    if isinstance(part, Label | ByLabel):
        return f"<{part.name}>"
    return "<time>" if isinstance(part, Since) else "<value>"


def _in_prometheus(part: Part) -> str:
    if isinstance(part, Found):
        each = _worded(f"(label {quoted(part.label)} $e)", part.words)
        each += f" {_number('(value $e)')}" if part.valued else ""
        return (
            f"{_do('with ' + _asked(part.query, part.given))}"
            f"{_do('range $i, $e := .')}{_do('if $i')}, {_do('end')}{each}{_do('end')}"
            f"{_do('else')}{_literal(part.otherwise)}{_do('end')}"
        )
    if isinstance(part, Since):
        time = f"(. | first | value | toTime).Format {quoted(_ISO)}"
        asked = _asked(part.query, part.given)
        return f"{_do('with ' + asked)}{_do(time)}{_do('else')}{_literal(part.otherwise)}{_do('end')}"
    return _plain(part, ".Value", _literal)


def _in_grafana(part: Part) -> str:
    if isinstance(part, Found | Since):
        return _without_dollars(part.otherwise)
    return _plain(part, ".Values.A.Value", _without_dollars)


def _plain(part: str | Label | ShellWord | Value | Percent | ByLabel, value: str, literal: Callable[[str], str]) -> str:
    """A part that both render alike, but for the expression of the value and for literal text."""
    if isinstance(part, str):
        return literal(part)
    if isinstance(part, Label):
        return _do(f".Labels.{part.name}")
    if isinstance(part, ShellWord):
        label = f".Labels.{part.name}"
        nobody = " ".join(f"(eq {label} {quoted(name)})" for name in _NOBODY)
        word = _do(f"{label} | reReplaceAll {quoted(_QUOTE)} {quoted(_QUOTE_WITHIN)}")
        return f"{_do(f'if not (or {nobody})')} {literal(part.option)}='{word}'{_do('end')}"
    if isinstance(part, Value):
        return _number(value)
    if isinstance(part, Percent):
        return _do(f"{value} | humanizePercentage")
    return _cases(f".Labels.{part.name}", part.texts, literal(part.otherwise), literal)


def _do(action: str) -> str:
    """An action of Go's templates."""
    return "{{ " + action + " }}"


def _cases(what: str, texts: Mapping[str, str], otherwise: str, literal: Callable[[str], str]) -> str:
    if not texts:
        return otherwise
    tests = [f"if eq {what} {_string(value)}" for value in texts]
    tests[1:] = [f"else {test}" for test in tests[1:]]
    found = "".join(_do(test) + literal(text) for test, text in zip(tests, texts.values(), strict=True))
    return f"{found}{_do('else')}{otherwise}{_do('end')}"


def _worded(what: str, words: Mapping[str, str]) -> str:
    return _cases(what, words, _do(what), _literal)


def _number(value: str) -> str:
    """``%.3g`` alone would say 2.08e+03 of 2080."""
    few, many = (_do(f"printf {quoted(form)} {value}") for form in ("%.3g", "%.0f"))
    return f"{_do(f'if lt {value} 100.0')}{few}{_do('else')}{many}{_do('end')}"


def _asked(query: str, given: str) -> str:
    return f"printf {quoted(query)} .Labels.{given} | query" if given else f"query {quoted(query)}"


def _string(text: str) -> str:
    """A string literal without a dollar sign."""
    return quoted(text).replace("$", "\\x24")


def _literal(text: str) -> str:
    """Text of a template that is nothing but itself; each brace alone, or one before an action would open another."""
    return text.replace("{", _do('"{"'))


def _without_dollars(text: str) -> str:
    return re.sub(r"[{$]", lambda found: _do(_string(found[0])), text)
