"""Whether Prometheus takes the rules: its own promtool looks at every export."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from stallscope.errors import StallscopeError

PROMTOOL = "promtool"
HOW_TO_GET = "Debian's package prometheus brings it"
_WITHIN_S = 120.0


def promtool() -> str | None:
    """Its path, where it is installed."""
    return shutil.which(PROMTOOL)


def check_rules(rule_file: str, tool: str) -> None:
    """Raises StallscopeError where promtool refuses a rule file: it was made here, so that is an error of ours."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "stallscope.rules.yml")
        path.write_text(rule_file, encoding="utf-8")
        try:
            ran = subprocess.run(
                [tool, "check", "rules", str(path)], capture_output=True, text=True, check=False, timeout=_WITHIN_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise StallscopeError(f"{tool} could not check the rules ({error})") from error
    if ran.returncode:
        said = " ".join((ran.stdout + ran.stderr).replace(str(path), "the rules").split())
        raise StallscopeError(f"promtool refuses the rules, which is a fault of stallscope, please report it: {said}")
