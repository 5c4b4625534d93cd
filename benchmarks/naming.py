"""Does the diagnosis name the right tenant? Bundled scenarios over many seeds on the virtual engine.

Each run is recorded to a file, read back and diagnosed as a user would; `expect` of the scenario says what is right.
The virtual engine's step cost is a roofline with heavy-tailed noise, not of the family that the diagnosis fits.
Thresholds were set on seeds from 1000 on.

    python benchmarks/naming.py --seeds 0:50
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from stallscope.diagnosis import diagnose
from stallscope.trace import read_trace
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario

SCENARIOS = ("reasoning_prompt", "kv_pinning", "batch_flood", "healthy")


@dataclass(frozen=True)
class Outcome:
    """What the diagnosis of one run said, beside what was right."""

    scenario: str
    seed: int
    verdict: str
    named: tuple[str, ...]
    mechanism: str | None
    right_verdict: bool
    right_tenants: bool
    right_mechanism: bool


def run(task: tuple[str, str, int, bool]) -> Outcome:
    """Records and diagnoses one scenario with one seed."""
    name, variant, seed, inject = task
    scenario = load_scenario(name, variant)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.otlp.jsonl"
        record(scenario, path, seed=seed, executor="virtual", inject=inject)
        diagnosis = diagnose(read_trace(path))
    named = tuple(sorted({culprit.tenant for incident in diagnosis.incidents for culprit in incident.culprits}))
    worst = diagnosis.incidents[0] if diagnosis.incidents else None
    mechanism = worst.mechanism if worst else None
    expect = scenario.expect
    culprits = tuple(sorted(expect.culprits)) if inject and expect else ()
    verdict = expect.verdict if inject and expect else "healthy"
    return Outcome(
        name if inject else f"{name}, not injected",
        seed,
        str(diagnosis.verdict),
        named,
        mechanism,
        str(diagnosis.verdict) == verdict,
        named == culprits,
        not culprits or (expect is not None and mechanism in expect.mechanism),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:50", help="A:B, from A to below B")
    parser.add_argument("--variant", default="sample", help="the scenarios' variant; 'cpu' for the whole length")
    parser.add_argument("--scenarios", nargs="*", default=SCENARIOS)
    parser.add_argument("--controls", action="store_true", help="also without the injection: nobody is to be named")
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args()
    first, last = (int(part) for part in chosen.seeds.split(":"))
    tasks = [
        (name, chosen.variant, seed, inject)
        for name in chosen.scenarios
        for inject in ((True, False) if chosen.controls and name != "healthy" else (True,))
        for seed in range(first, last)
    ]
    with ProcessPoolExecutor(chosen.processes) as pool:
        outcomes = list(track(pool.map(run, tasks), total=len(tasks), console=Console(stderr=True)))
    table = Table("scenario", "runs", "right tenants", "right verdict", "right mechanism", "verdicts")
    for name in dict.fromkeys(outcome.scenario for outcome in outcomes):
        mine = [outcome for outcome in outcomes if outcome.scenario == name]
        verdicts = ", ".join(f"{verdict} {count}" for verdict, count in Counter(o.verdict for o in mine).most_common())
        table.add_row(
            name,
            str(len(mine)),
            str(sum(o.right_tenants for o in mine)),
            str(sum(o.right_verdict for o in mine)),
            str(sum(o.right_mechanism for o in mine)),
            verdicts,
        )
    console = Console(width=140)
    console.print(table)
    for outcome in outcomes:
        if not (outcome.right_tenants and outcome.right_verdict and outcome.right_mechanism):
            console.print(
                f"{outcome.scenario} seed {outcome.seed}: {outcome.verdict}, named {outcome.named}, {outcome.mechanism}"
            )


if __name__ == "__main__":
    main()
