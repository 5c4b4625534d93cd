"""Runs Debian's promtool, and reads what it got where that is not what a unit test expected."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stallscope.alerts.backtest.expressions import seconds
from stallscope.errors import UsageError
from stallscope.views.words import printable, shortened
from stallscope.watch.samples import Labels

RULES, TESTS = "rules.yaml", "tests.yaml"
_LONGEST_ERROR = 300
_SAME_SERIES = "duplicate sample for timestamp"
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


def find_promtool() -> str:
    """Raises UsageError where it is not installed."""
    found = shutil.which("promtool")
    if found is None:
        raise UsageError("promtool is not installed, and Prometheus itself is to evaluate: apt install prometheus")
    return found


def check_rules(rules: str, name: str) -> None:
    """Raises UsageError, with what promtool says, where rules are not as Prometheus has them."""
    with tempfile.TemporaryDirectory(prefix="stallscope-") as folder:
        (Path(folder) / RULES).write_text(rules, encoding="utf-8")
        ended = _promtool(["check", "rules", "--lint=none", RULES], Path(folder))
    if ended.returncode:
        raise UsageError(f"{name}: {_complaint(ended)}")


def run_tests(rules: str, tests: Iterable[str], name: str) -> list[Surprise]:
    """Runs unit tests (lines of a file that names ``RULES``), and gives all that was other than expected.

    Raises UsageError, with what promtool says, where a rule cannot be evaluated.
    """
    with tempfile.TemporaryDirectory(prefix="stallscope-") as folder:
        (Path(folder) / RULES).write_text(rules, encoding="utf-8")
        with (Path(folder) / TESTS).open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in tests)
        ended = _promtool(["test", "rules", TESTS], Path(folder))
    surprises = read_surprises(ended.stderr)
    if ended.returncode and not surprises:
        raise UsageError(f"{name}: {_complaint(ended)}")
    return surprises


def passes(tests: Path) -> bool:
    """Whether the unit tests of a file pass."""
    return _promtool(["test", "rules", tests.name], tests.parent).returncode == 0


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


def _promtool(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [find_promtool(), *arguments], cwd=folder, capture_output=True, check=False, encoding="utf-8", errors="replace"
    )


def _complaint(ended: subprocess.CompletedProcess[str]) -> str:
    """What promtool says of the first thing that is wrong, on one line."""
    lines = [line.strip() for line in ended.stderr.split("\n")]
    said = " ".join(line for line in lines if line and line != "FAILED:").replace(f"{RULES}: ", "", 1)
    if _SAME_SERIES in said:
        said += ": two alerts of this name have the same labels, and so one series; give them a label that differs"
    return shortened(printable(said or f"promtool ended with {ended.returncode}"), _LONGEST_ERROR)
