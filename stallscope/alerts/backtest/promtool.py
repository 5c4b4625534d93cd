"""Runs unit tests by promtool, and reads what it got where that is not what they expected."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stallscope.alerts.backtest.expressions import seconds
from stallscope.alerts.promtool import RULES, complaint, promtool
from stallscope.errors import UsageError
from stallscope.watch.samples import Labels

TESTS = "tests.yaml"
_ASKED = re.compile(r'    expr: "((?:[^"\\]|\\.)*)", time: (\w+),')
_GOT = "        got: "
_LABEL = re.compile(r'(?P<name>[a-zA-Z_][a-zA-Z0-9_]*)="(?P<value>(?:[^"\\]|\\.)*)"(?:, )?')
_ESCAPE = re.compile(r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(.))", re.DOTALL)
_CONTROLS = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}


@dataclass(frozen=True)
class Surprise:
    """What an expression gave at a time where something else was expected: labels and values."""

    expression: str
    elapsed_ms: int
    got: tuple[tuple[Labels, float], ...]


def run_tests(rules: str, tests: Iterable[str], name: str) -> list[Surprise]:
    """Runs unit tests (lines of a file that names ``RULES``), and gives all that was other than expected.

    Raises UsageError, with what promtool says, where a rule cannot be evaluated.
    """
    with tempfile.TemporaryDirectory(prefix="stallscope-") as folder:
        (Path(folder) / RULES).write_text(rules, encoding="utf-8")
        with (Path(folder) / TESTS).open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in tests)
        ended = promtool(["test", "rules", TESTS], Path(folder))
    surprises = read_surprises(ended.stderr)
    if ended.returncode and not surprises:
        raise UsageError(f"{name}: {complaint(ended)}")
    return surprises


def passes(tests: Path) -> bool:
    """Whether the unit tests of a file pass."""
    return promtool(["test", "rules", tests.name], tests.parent).returncode == 0


def read_surprises(text: str) -> list[Surprise]:
    """Of promtool's report, what was got instead of what was expected. Go quotes names, so that each is on one line."""
    found = []
    asked: tuple[str, int] | None = None
    for line in text.split("\n"):
        question = _ASKED.fullmatch(line)
        if question is not None:
            asked = unquoted(question[1]), round(seconds(question[2]) * 1e3)
        elif asked is not None and line.startswith(_GOT):
            found.append(Surprise(*asked, tuple(_samples(line.removeprefix(_GOT)))))
            asked = None
    return found


def unquoted(text: str) -> str:
    """What Go has quoted, without the quotes around it."""
    return _ESCAPE.sub(_character, text)


def _character(escape: re.Match[str]) -> str:
    code = escape[1] or escape[2] or escape[3]
    return chr(int(code, 16)) if code else _CONTROLS.get(escape[4], escape[4])


def _samples(text: str) -> list[tuple[Labels, float]]:
    """``{a="b", c="d"} 1E+00, {} 2.5E+00``, or ``nil``. Raises ValueError where it is something else."""
    found: list[tuple[Labels, float]] = []
    if text == "nil":
        return found
    at = 0
    while at < len(text):
        if text[at] != "{":
            raise ValueError(f"promtool's report is not understood from {text[at : at + 40]!r} on")
        at += 1
        labels = []
        while (label := _LABEL.match(text, at)) is not None:
            labels.append((label["name"], unquoted(label["value"])))
            at = label.end()
        end = text.find(", {", at)
        value = text[at : len(text) if end < 0 else end]
        if not value.startswith("} "):
            raise ValueError(f"promtool's report is not understood from {value[:40]!r} on")
        found.append((tuple(sorted(labels)), float(value[2:])))
        at = len(text) if end < 0 else end + 2
    return found
