"""The demonstration: the same traffic recorded twice, with one tenant's huge prompts and without, both diagnosed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from stallscope.diagnosis import Diagnosis, diagnose
from stallscope.diagnosis.model import Quantile
from stallscope.reports.text import print_diagnosis
from stallscope.trace import read_trace
from stallscope.views import words
from stallscope.workloads.recording import record, time_prefill
from stallscope.workloads.replica import ExecutorName
from stallscope.workloads.scenario import Scenario, load_scenario

SCENARIO, VARIANT, SLOW_VARIANT, WATCHED = "reasoning_prompt", "demo", "demo_slow", "chat"
PROBE_TOKENS, SLOW_S = 3000, 0.3  # beyond, the demo's own prompts would stall the engine for longer than anyone waits
Progress = Callable[[str], AbstractContextManager[Callable[[float], None]]]


def run_demo(seed: int | None, executor: ExecutorName, out: Path, console: Console, progress: Progress) -> None:
    """Records control and stall into ``out``, and prints the comparison and the diagnosis of the stall."""
    scenario = choose_scenario(executor, console)
    chosen = scenario.seed if seed is None else seed
    out.mkdir(parents=True, exist_ok=True)
    clock = "in real time on torch" if executor == "torch" else "in virtual time"
    console.print(
        Text(
            f"Recording {scenario.duration_s:.0f} s of traffic twice, {clock}: without the reasoning tenant, then with."
        )
    )
    diagnoses: dict[str, Diagnosis] = {}
    for name, inject in (("control", False), ("stall", True)):
        path = out / f"{name}.otlp.jsonl.zst"
        with progress(f"recording {name}") as advance:
            record(scenario, path, seed=chosen, executor=executor, inject=inject, force=True, progress=advance)
        diagnoses[name] = diagnose(read_trace(path))
    _compare(diagnoses["control"], diagnoses["stall"], console)
    console.print()
    print_diagnosis(diagnoses["stall"], console)


def choose_scenario(executor: ExecutorName, console: Console) -> Scenario:
    """The demo's scenario: with shorter prompts where this machine would take too long for them, and a word on it."""
    scenario = load_scenario(SCENARIO, VARIANT)
    if executor != "torch" or (seconds := time_prefill(scenario.engine, PROBE_TOKENS)) <= SLOW_S:
        return scenario
    console.print(
        Text(f"This processor takes {seconds:.1f} s for {PROBE_TOKENS:,} tokens of prompt: 5,000 will do, not 15,000.")
    )
    return load_scenario(SCENARIO, SLOW_VARIANT)


def _compare(control: Diagnosis, stall: Diagnosis, console: Console) -> None:
    """What the watched tenant saw in both runs, and the verdict of the control."""
    for metric in ("ttft", "itl"):
        without, with_it = _quantile(control, metric), _quantile(stall, metric)
        if without is None or with_it is None or not without.value_s:
            continue
        console.print(
            Text(
                f"{WATCHED} {words.METRIC_WORDS[metric]}: {words.quantile(without)} without it "
                f"({words.counted(without.requests, 'request')}), {words.quantile(with_it)} with it "
                f"({words.counted(with_it.requests, 'request')}): {with_it.value_s / without.value_s:.1f}x"
            )
        )
    console.print(Text(f"control, diagnosed: {control.verdict}: {words.headline(control)}"))


def _quantile(diagnosis: Diagnosis, metric: str) -> Quantile | None:
    watched = (tenant for tenant in diagnosis.tenants if tenant.tenant == WATCHED)
    return next((q for tenant in watched for q in tenant.quantiles if q.metric == metric), None)
