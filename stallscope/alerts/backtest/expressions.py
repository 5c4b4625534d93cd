"""What a PromQL expression asks of the data: the metrics it names, how far it looks back, and its threshold.

Prometheus evaluates; this only reads as much of the language as tells beforehand whether it can (``provable``) and
which number to raise (``tuning``): words, strings, comments, parentheses and durations, as in Prometheus' documentation
of the language. Not covered: a metric that is named like an operator (``by``, ``and``, ``offset``).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce

_DURATION = r"(?:\d+(?:ms|[smhdwy]))+"
_TOKEN = re.compile(
    rf"""
      (?P<space>\s+|\#[^\n]*)
    | (?P<string>"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|`[^`]*`)
    | (?P<range>\[(?:\#[^\n]*|[^\]\#])*\])
    | (?P<duration>{_DURATION})
    | (?P<number>0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    | (?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)
    | (?P<sign>==|!=|=~|!~|>=|<=|[-+*/%^<>=@(){{}},])
    """,
    re.VERBOSE | re.DOTALL,
)
_RANGE = re.compile(rf"({_DURATION})(?::(?:{_DURATION})?)?")
_PART = re.compile(r"(\d+)(ms|[smhdwy])")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800, "y": 31536000}
_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_SETS = {"and", "or", "unless"}
_WORDS = _SETS | {"atan2", "bool", "inf", "nan"}
_AGGREGATIONS = {"avg", "bottomk", "count", "count_values", "group", "max", "min", "quantile"}
_AGGREGATIONS |= {"stddev", "stdvar", "sum", "topk", "limitk", "limit_ratio"}
_OF_THE_CALENDAR = {"day_of_month", "day_of_week", "day_of_year", "days_in_month", "hour", "minute", "month", "year"}
_COMPARISONS = {">", ">=", "<", "<=", "==", "!="}


@dataclass(frozen=True, slots=True)
class Token:
    """``kind``: string, range, duration, number, name or sign; ``start`` is where ``text`` begins."""

    kind: str
    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Needs:
    """What an expression reads: ``names`` of metrics, ``patterns`` that are to match whole names, how far back, s.

    ``any_metric``: it selects by labels alone; ``clock``: what of it asks for the date ("" where nothing does);
    ``shortest_s``: its shortest window, subqueries apart.
    """

    names: frozenset[str] = frozenset()
    patterns: frozenset[str] = frozenset()
    look_back_s: float = 0.0
    any_metric: bool = False
    clock: str = ""
    shortest_s: float = math.inf

    def and_(self, other: Needs) -> Needs:
        """What both together read."""
        return Needs(
            self.names | other.names,
            self.patterns | other.patterns,
            max(self.look_back_s, other.look_back_s),
            self.any_metric or other.any_metric,
            self.clock or other.clock,
            min(self.shortest_s, other.shortest_s),
        )


@dataclass(frozen=True, slots=True)
class Threshold:
    """The number of ``EXPR > NUMBER``: ``value``, and where it stands in the text; ``or_equal``: it is ``>=``."""

    value: float
    start: int
    end: int
    or_equal: bool


def seconds(text: str) -> float:
    """A duration such as ``1h30m``, or ``0``. Raises ValueError."""
    if text in ("", "0"):
        return 0.0
    if re.fullmatch(_DURATION, text) is None:
        raise ValueError(f"{text!r} is no duration, such as 5m or 1h30m")
    return sum(int(amount) * _SECONDS[unit] for amount, unit in _PART.findall(text))


def tokens(expression: str) -> list[Token]:
    """Without spaces and comments. Raises ValueError where there is something that PromQL does not have."""
    found, at = [], 0
    while at < len(expression):
        match = _TOKEN.match(expression, at)
        if match is None:
            raise ValueError(f"{expression[at : at + 20]!r} is no PromQL")
        if match.lastgroup != "space":
            found.append(Token(str(match.lastgroup), match[0], at))
        at = match.end()
    return found


def needs(expression: str, recorded: Mapping[str, Needs] | None = None) -> Needs:
    """What an expression reads; a name in ``recorded`` stands for what its recording rules read. Raises ValueError."""
    walk = _Walk(tokens(expression), recorded or {})
    look_back = walk.operands()
    patterns = frozenset(walk.patterns)
    own = Needs(frozenset(walk.names), patterns, look_back, walk.any_metric, walk.clock, walk.shortest_s)
    followed = [needed for name, needed in (recorded or {}).items() if name in walk.names]
    read = reduce(Needs.and_, followed, own)
    return dataclasses.replace(read, names=read.names - set(recorded or {}), look_back_s=look_back)


def needs_of_recordings(recordings: Mapping[str, list[str]]) -> dict[str, Needs]:
    """What recording rules read, by name, through those that they read themselves; one that reads itself ends there."""
    found: dict[str, Needs] = {}

    def follow(name: str, above: frozenset[str]) -> Needs:
        if name in found:
            return found[name]
        inner = {
            other: follow(other, above | {name})
            for expression in recordings[name]
            for other in _Walk.of(expression).names
            if other in recordings and other not in above | {name}
        }
        inner |= {own: Needs() for own in above | {name}}
        made = reduce(Needs.and_, (needs(expression, inner) for expression in recordings[name]), Needs())
        if not above:
            found[name] = made
        return made

    for name in recordings:
        follow(name, frozenset())
    return found


def threshold(expression: str) -> Threshold | None:
    """The number of an alert that is ``EXPR > NUMBER``, alone or before ``and`` or ``unless``; None where it isn't.

    What raising it does is plain then: the alert gives EXPR's own value, and stays quiet where that is lower.
    """
    operand = tokens(expression)
    while True:
        levels = _levels(operand)
        top = [token.text.lower() if not level else "" for token, level in zip(operand, levels, strict=True)]
        if "or" in top:
            return None
        ends = [at for at, text in enumerate(top) if text in _SETS]
        if ends:
            operand = operand[: ends[0]]
        elif operand and operand[0].text == "(" and operand[-1].text == ")" and 0 not in levels[1:-1]:
            operand = operand[1:-1]
        else:
            break
    comparisons = [at for at, text in enumerate(top) if text in _COMPARISONS]
    if len(comparisons) != 1 or top[comparisons[0]] not in (">", ">="):
        return None
    right = operand[comparisons[0] + 1 :]
    sign = [token.text for token in right[:-1]]
    if not right or right[-1].kind != "number" or sign not in ([], ["-"], ["+"]) or "x" in right[-1].text.lower():
        return None
    value = float("".join([*sign, right[-1].text]))
    return Threshold(value, right[0].start, right[-1].start + len(right[-1].text), top[comparisons[0]] == ">=")


def _levels(listed: list[Token]) -> list[int]:
    """How many parentheses and braces each token is in, not counting itself."""
    levels, level = [], 0
    for token in listed:
        level -= token.text in (")", "}") and token.kind == "sign"
        levels.append(level)
        level += token.text in ("(", "{") and token.kind == "sign"
    return levels


@dataclass
class _Walk:
    """Reads tokens once, from left to right."""

    tokens: list[Token]
    recorded: Mapping[str, Needs]
    at: int = 0
    names: set[str] = field(default_factory=set)
    patterns: set[str] = field(default_factory=set)
    any_metric: bool = False
    clock: str = ""
    shortest_s: float = math.inf

    @staticmethod
    def of(expression: str) -> _Walk:
        walk = _Walk(tokens(expression), {})
        walk.operands()
        return walk

    def operands(self) -> float:
        """All up to the end or the closing parenthesis: how far back the farthest operand looks, s."""
        farthest = last = 0.0  # a range or an offset is of the operand just before it
        while self.at < len(self.tokens):
            token = self._next()
            if token.text == ")":
                break
            if token.kind == "name":
                last = self._word(token, last)
            elif token.text == "(":
                last = self.operands()
            elif token.text == "{":
                last = self._selector(None)
            elif token.kind == "range":
                last += self._range(token)
            elif token.text == "@":
                self._at_time()
            farthest = max(farthest, last)
        return farthest

    def _word(self, token: Token, last: float) -> float:
        word = token.text.lower()
        if word == "offset":
            back = self._peek() != "-"
            self.at += self._peek() in ("-", "+")
            offset = seconds(self._next().text)
            return last + offset if back else last
        if word in _GROUPING:
            if self._peek() == "(":
                self._skip()
            return last
        if self._peek() == "(" or (word in _AGGREGATIONS and self._peek().lower() in _GROUPING):
            if word in _OF_THE_CALENDAR:
                self.clock = self.clock or f"{word}()"
            return 0.0
        if word in _WORDS:
            return 0.0
        if self._peek() == "{":
            self.at += 1
            return self._selector(token.text)
        return self._named(token.text)

    def _selector(self, name: str | None) -> float:
        """Matchers up to the closing brace; a metric may be named by one of them."""
        found = name
        while self.at < len(self.tokens):
            token = self._next()
            if token.text == "}":
                break
            if token.text == "__name__" and self.at + 1 < len(self.tokens):
                sign, text = self._next().text, _unquoted(self._next().text)
                if sign == "=":
                    found = text
                elif sign == "=~":
                    self.patterns.add(text)
                    found = found or ""
        if found is None:
            self.any_metric = True
        if not found:
            reached = [one.look_back_s for one in self.recorded.values()] if self.recorded else [0.0]
            return max(reached)
        return self._named(found)

    def _named(self, name: str) -> float:
        self.names.add(name)
        return self.recorded[name].look_back_s if name in self.recorded else 0.0

    def _range(self, token: Token) -> float:
        inside = re.sub(r"#[^\n]*|\s+", "", token.text[1:-1])
        found = _RANGE.fullmatch(inside)
        if found is None:
            raise ValueError(f"{token.text!r} is no range, such as [5m] or [1h:30s]")
        if ":" not in inside:
            self.shortest_s = min(self.shortest_s, seconds(found[1]))
        return seconds(found[1])

    def _at_time(self) -> None:
        """Past ``@ start()`` and ``@ end()``, which are now for a rule, or a fixed time."""
        self.at += self._peek() in ("-", "+")
        if self._next().text.lower() in ("start", "end"):
            self._skip()
        else:
            self.clock = self.clock or f"@ {self.tokens[self.at - 1].text}"

    def _skip(self) -> None:
        """Past a list of labels in parentheses."""
        while self.at < len(self.tokens) and self._next().text != ")":
            pass

    def _next(self) -> Token:
        if self.at == len(self.tokens):
            raise ValueError("the expression ends too early")
        self.at += 1
        return self.tokens[self.at - 1]

    def _peek(self) -> str:
        return self.tokens[self.at].text if self.at < len(self.tokens) else ""


def _unquoted(text: str) -> str:
    """A name, or a pattern of names, in PromQL's quotes: escapes of quotes and backslashes are all that one needs."""
    return text[1:-1] if text.startswith("`") else re.sub(r"\\(.)", r"\1", text[1:-1], flags=re.DOTALL)
