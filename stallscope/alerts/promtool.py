"""Prometheus' own promtool: whether it is there, what it says of rules, and whatever else it is asked."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from stallscope.errors import UsageError
from stallscope.views.words import printable, shortened

RULES = "rules.yaml"  # what a file of rules is called while promtool reads it
_LONGEST_ERROR = 300
_SAME_SERIES = "duplicate sample for timestamp"


def is_installed() -> bool:
    return shutil.which("promtool") is not None


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
        ended = promtool(["check", "rules", "--lint=none", RULES], Path(folder))
    if ended.returncode:
        raise UsageError(f"{name}: {complaint(ended)}")


def promtool(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs it in a folder. Raises UsageError where it is not installed."""
    return subprocess.run(
        [find_promtool(), *arguments], cwd=folder, capture_output=True, check=False, encoding="utf-8", errors="replace"
    )


def complaint(ended: subprocess.CompletedProcess[str]) -> str:
    """What promtool says of the first thing that is wrong, on one line."""
    lines = [line.strip() for line in ended.stderr.split("\n")]
    said = " ".join(line for line in lines if line and line != "FAILED:").replace(f"{RULES}: ", "", 1)
    if _SAME_SERIES in said:
        said += ": two alerts of this name have the same labels, and so one series; give them a label that differs"
    return shortened(printable(said or f"promtool ended with {ended.returncode}"), _LONGEST_ERROR)
