"""What the hook costs vLLM: microseconds that it adds to a step on the engine's thread, beside vLLM's own scheduling.

vLLM's scheduler, without a model: bare and with the hook in turns, in one process, with the same requests made anew for
each pass. So many run at any time (and as many wait, in every second case): who ends is followed by another. Keyframes
count in. Between scheduling and its outputs a step sleeps for 2 ms, as an engine's thread does while the device works.

    vllm_hook.py --vllm-python VENV/bin/python      (vLLM 0.32)

Medians over passes, a step, all of the engine's thread's processor time: vLLM's own scheduling, and the hook's methods,
as a share of it, too; how much more a pass with the hook took than one without (a small difference of large numbers,
with all that its objects do to caches and to the garbage collector); bytes of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from stallscope.errors import StallscopeError, UsageError

ROOT = Path(__file__).parents[1]
BUDGET_US = {16: 20, 64: 30, 256: 60, 1024: 200}


def measure(python: Path, cases: list[dict[str, Any]]) -> tuple[float, list[dict[str, Any]]]:
    """What importing the hook takes after vLLM (ms), and the passes. Raises UsageError where vLLM can't run."""
    with tempfile.TemporaryDirectory() as folder:
        plan, errors = Path(folder) / "cases.json", Path(folder) / "errors"
        plan.write_text(json.dumps(cases), encoding="utf-8")
        with errors.open("wb") as said:
            process = subprocess.Popen(
                [python, Path(__file__).with_name("vllm_steps.py"), plan],
                env=os.environ | {"PYTHONPATH": f"{ROOT / 'telemetry'}{os.pathsep}{ROOT}", "VLLM_TARGET_DEVICE": "cpu"},
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
            )
        assert process.stdout is not None
        lines = (json.loads(line) for line in process.stdout if line.startswith("{"))
        passes = sum(2 * case["passes"] for case in cases)
        found = list(track(lines, "vLLM's scheduler", total=passes + 1, console=Console(stderr=True)))
        if process.wait() or len(found) <= passes:
            raise UsageError(f"{python}: {_last_line(errors)}; it is to have vLLM 0.32")
    return found[0]["import_ms"], found[1:]


def _last_line(path: Path) -> str:
    return next(iter(reversed(path.read_text(encoding="utf-8", errors="replace").strip().splitlines())), "it ended")


def table(cases: Sequence[dict[str, Any]], passes: Sequence[dict[str, Any]]) -> Table:
    shown = Table("running", "waiting", "vLLM us", "hook us", "share", "budget us", "in turns us", "bytes")
    for place, case in enumerate(cases):
        bare, hooked = (
            [one for one in passes if one["case"] == place and one["hooked"] is is_hooked]
            for is_hooked in (False, True)
        )
        own = statistics.median(one["cpu_us"] for one in bare)
        adds = statistics.median(one["hook_us"] for one in hooked)
        budget = BUDGET_US.get(case["running"])
        shown.add_row(
            str(case["running"]),
            str(statistics.median(one["waiting"] for one in hooked)),
            f"{own:.0f}",
            f"{adds:.1f}",
            f"{adds / own:.1%}",
            "" if budget is None else f"{budget} {'met' if adds <= budget else 'MISSED'}",
            f"{statistics.median(one['cpu_us'] for one in hooked) - own:.1f}",
            f"{statistics.fmean(one['bytes'] for one in hooked):.0f}",
        )
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, required=True, help="the python of an environment with vLLM 0.32")
    parser.add_argument("--running", type=int, nargs="+", default=list(BUDGET_US), help="how many run (default: all)")
    parser.add_argument("--passes", type=int, default=5, help="passes with and without (default 5)")
    parser.add_argument("--steps", type=int, default=600, help="steps of a pass (default 600: three keyframes)")
    parser.add_argument("--synchronous", action="store_true", help="as with vllm serve --no-async-scheduling")
    chosen = parser.parse_args()
    cases = [
        {
            "running": running,
            "waiting": waiting,
            "asynchronous": not chosen.synchronous,
            "passes": chosen.passes,
            "steps": chosen.steps,
        }
        for running in chosen.running
        for waiting in (0, running)
    ]
    try:
        import_ms, passes = measure(chosen.vllm_python, cases)
    except StallscopeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    Console().print(table(cases, passes))
    print(
        f"dropped records: {sum(one['dropped'] for one in passes)}; importing the hook after vLLM: {import_ms:.0f} ms"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
