"""PromQL and Go templates as text: how names that come from outside are written so that they stay what they are."""

from __future__ import annotations

from collections.abc import Sequence

_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
_UNITS_S = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))


def quoted(text: str) -> str:
    """A string literal that PromQL and Go's templates both read as ``text``, on one line and in visible characters.

    Raises ValueError where ``text`` has surrogates: no UTF-8, and so no label's value.
    """
    text.encode()
    return f'"{"".join(map(_escaped, text))}"'


def _escaped(one: str) -> str:
    if one in _ESCAPES:
        return _ESCAPES[one]
    if one.isprintable():
        return one
    return f"\\u{ord(one):04x}" if ord(one) < 0x10000 else f"\\U{ord(one):08x}"


def equal(label: str, value: str) -> str:
    return f"{label}={quoted(value)}"


def unequal(label: str, value: str) -> str:
    return f"{label}!={quoted(value)}"


def one_of(label: str, values: Sequence[str]) -> str:
    """A matcher of words: names of mechanisms and verdicts, which a regular expression takes as they are."""
    if not all(value.isidentifier() for value in values):
        raise ValueError(f"{values} are no plain words")
    return equal(label, values[0]) if len(values) == 1 else f'{label}=~"{"|".join(values)}"'


def selector(name: str, *matchers: str) -> str:
    return f"{name}{{{','.join(matchers)}}}" if matchers else name


def span(seconds: int) -> str:
    """A duration in the largest unit that divides it: 90s, 5m, 1h, 3d."""
    return next(f"{seconds // length}{unit}" for unit, length in _UNITS_S if seconds % length == 0)


def number(value: float) -> str:
    """A number of at most six digits."""
    return f"{value:.6g}"
