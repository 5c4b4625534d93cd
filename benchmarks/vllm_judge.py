"""A real vLLM as judge of the replay: is what it predicts for vLLM without the culprit what then happens?

The same traffic is served with and without what the scenario injects, in turns, each run in a process of its own. From
each recording with the culprit the tenants' percentiles without it are predicted, by replay through our scheduler, and
held against those of the runs in which it was really not there. Errors are shares of the recorded percentile, as is the
spread: how far the real runs without the culprit lie apart.

    vllm_judge.py --vllm-python VENV/bin/python --model FOLDER      (a vLLM 0.32; the folder holds a config.json)

Weights are random. The default variant's prompts take about a second on a processor with AMX; ``slow`` is for others.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from stallscope.diagnosis import diagnose
from stallscope.diagnosis.metrics import ITL, METRICS, TTFT
from stallscope.diagnosis.model import ReplayCheck
from stallscope.diagnosis.replay.harm import recorded_outcomes, waits_of
from stallscope.diagnosis.replay.interventions import MEDIAN
from stallscope.diagnosis.replay.replayer import prepare_replay
from stallscope.diagnosis.replica import replicas
from stallscope.diagnosis.timeline import Floats
from stallscope.diagnosis.whatif import Question, what_if
from stallscope.errors import InconclusiveError, StallscopeError, UsageError
from stallscope.trace import Trace, read_trace
from stallscope.workloads.scenario import AddedRequests, AddedTraffic, Scenario, load_scenario, tenants_of
from stallscope.workloads.traffic import PlannedRequest, plan

HERE = Path(__file__).parent
LEAST_ERROR = 0.1  # an error up to here is no failure, however alike the real runs are
RUN_S = 900  # a run that takes longer hangs

# One thread: two that wait for one another at every operator stand still where others want the processor too.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

Waits = dict[tuple[str, str], Floats]  # seconds, by tenant and metric


@dataclass(frozen=True, slots=True)
class Judged:
    """One percentile of one tenant, in seconds: recorded with the culprit, replayed unchanged, predicted without it,
    and what it was without it in each real run."""

    tenant: str
    metric: str
    quantile: float
    requests: int
    recorded_s: float
    replayed_s: float
    predicted_s: float
    real_s: tuple[float, ...]

    @property
    def error(self) -> float:
        """Of the prediction, as a share of the recorded percentile."""
        return abs(self.predicted_s - statistics.median(self.real_s)) / self.recorded_s

    @property
    def spread(self) -> float:
        """Of the real runs, as a share of the recorded percentile."""
        return (max(self.real_s) - min(self.real_s)) / self.recorded_s

    @property
    def holds(self) -> bool:
        return self.error <= max(LEAST_ERROR, self.spread)


@dataclass(frozen=True, slots=True)
class RunJudged:
    """One recording with the culprit: what the analysis said, and its predictions (none where no replay counts)."""

    run: int
    steps: int
    longest_step_s: float
    verdict: str
    culprits: tuple[str, ...]
    mechanism: str
    check: ReplayCheck
    percentiles: tuple[Judged, ...]


@dataclass(frozen=True, slots=True)
class Setup:
    """vLLM's Python, the model's folder, and the folder for traces."""

    python: Path
    model: Path
    traces: Path

    def check(self) -> None:
        """Raises UsageError where something is not there."""
        if not self.python.is_file():
            raise UsageError(
                f"--vllm-python {self.python}: no such file; give the python of an environment with vLLM 0.32"
            )
        if not (self.model / "config.json").is_file():
            raise UsageError(f"--model {self.model}: holds no config.json; give the folder of a model")
        self.traces.mkdir(parents=True, exist_ok=True)
        if any(self.traces.iterdir()):
            raise UsageError(f"--traces {self.traces}: is not empty, and traces are never written over; name another")


# --- real runs ----------------------------------------------------------------------------------------------------


def record_runs(setup: Setup, scenario: Scenario, seed: int, repeats: int) -> tuple[list[Path], list[Path]]:
    """Traces with and without what is injected, recorded in turns, so that what changes on the machine meets both."""
    found: dict[bool, list[Path]] = {True: [], False: []}
    turns = [(repeat, inject) for repeat in range(repeats) for inject in (True, False)]
    for repeat, inject in track(turns, "running vLLM", console=Console(stderr=True)):
        name = f"{'with' if inject else 'without'}-{repeat}"
        found[inject].append(record_run(setup, scenario, seed, inject, name))
    return found[True], found[False]


def record_run(setup: Setup, scenario: Scenario, seed: int, inject: bool, name: str) -> Path:
    """The trace of one run. Raises UsageError where vLLM can't run."""
    trace, log = setup.traces / f"{name}.otlp.jsonl.gz", setup.traces / f"{name}.log"
    workload = setup.traces / f"{name}.json"
    workload.write_text(json.dumps(_workload(setup, scenario, seed, inject)), encoding="utf-8")
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent / 'telemetry'}"}
    with log.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                [setup.python, HERE / "vllm_run.py", workload, trace],
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=RUN_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise UsageError(f"vLLM was not done after {RUN_S} s; on a slow processor try --variant slow") from None
    if code:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        raise UsageError(
            f"vLLM did not run: {said[-1] if said else f'exit code {code}'} (with --traces FOLDER its log is kept)"
        )
    return trace


def _workload(setup: Setup, scenario: Scenario, seed: int, inject: bool) -> dict[str, object]:
    """What ``vllm_run`` reads: EngineArgs, what to warm up with, alike for both kinds of run, and requests."""
    config, planned = scenario.engine, plan(scenario, seed)
    return {
        "engine": {
            "model": str(setup.model),
            "dtype": "float32",
            "max_model_len": max(one.prompt_tokens + one.output_tokens for one in planned),
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "enable_chunked_prefill": config.chunked_prefill,
            "enable_prefix_caching": config.prefix_caching,
            "long_prefill_token_threshold": config.long_prefill_token_threshold,
            "scheduling_policy": config.policy,
            "watermark": config.watermark,
            "block_size": config.block_size,
            "num_gpu_blocks_override": config.kv_blocks + 1,  # vLLM keeps one for itself
        },
        "warm_up": [_request(max(planned, key=lambda one: one.prompt_tokens)) | {"due_ns": 0}],
        "requests": [_request(one) for one in plan(scenario, seed, inject)],
    }


def _request(one: PlannedRequest) -> dict[str, object]:
    return {
        "id": one.request_id,
        "tenant": one.tenant,
        "due_ns": one.offset_ns,
        "prompt_tokens": one.prompt_tokens,
        "output_tokens": one.output_tokens,
        "priority": one.priority,
    }


# --- predicted against real -----------------------------------------------------------------------------------------


def judge(trace: Trace, run: int, culprits: Sequence[str], real: Sequence[Waits]) -> RunJudged:
    """Analyses a recording with the culprits, and holds what it predicts without them against the real runs' waits."""
    replica = next(replicas(trace))
    diagnosis = diagnose(trace)
    worst = diagnosis.incidents[0] if diagnosis.incidents else None
    return RunJudged(
        run=run,
        steps=len(replica.timeline),
        longest_step_s=float(replica.timeline.duration.max()) / 1e9,
        verdict=f"{diagnosis.verdict} ({diagnosis.confidence})",
        culprits=tuple(culprit.tenant for culprit in worst.culprits) if worst else (),
        mechanism=(worst.mechanism or "") if worst else "",
        check=prepare_replay(replica).check,
        percentiles=tuple(_judge_percentiles(trace, culprits, real)),
    )


def _judge_percentiles(trace: Trace, culprits: Sequence[str], real: Sequence[Waits]) -> Iterator[Judged]:
    try:
        predictions = what_if(trace, Question(without=tuple(culprits))).answer.predictions
    except InconclusiveError:
        return  # the check says why
    for one in predictions:
        if one.tenant not in culprits and one.quantile != MEDIAN:  # a stall is in the tail
            yield Judged(
                one.tenant,
                one.metric,
                one.quantile,
                one.requests,
                one.recorded_s,
                one.replayed_s,
                one.predicted_s,
                tuple(_quantile(waits[one.tenant, one.metric], one.quantile) for waits in real),
            )


def waits_in(trace: Trace) -> Waits:
    """What all requests of a recording waited, as the predictions count it: to the first token, and longest gaps."""
    replica = next(replicas(trace))
    outcomes = recorded_outcomes(replica)
    tenant = outcomes["tenant"].to_numpy()
    return {
        (name, METRICS[metric]): waits_of(outcomes[tenant == code], metric) / 1e9
        for code, name in enumerate(replica.tenants)
        for metric in (TTFT, ITL)
    }


def _quantile(waits: Floats, quantile: float) -> float:
    return float(np.quantile(waits, quantile, method="higher"))


# --- for people ---------------------------------------------------------------------------------------------------


def show(runs: Sequence[RunJudged]) -> None:
    """Prints what each run came to, and the table."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for run in runs:
        check = run.check
        console.print(
            f"run {run.run}: {run.verdict}, {', '.join(run.culprits) or 'nobody'} by {run.mechanism or 'nothing'}; "
            f"{run.steps} steps, the longest {run.longest_step_s:.2f} s; forced agreement {check.forced_agreement:.1%} "
            f"of {check.forced_steps}; step cost error {check.step_cost_error:.1%}"
        )
        if check.reason:
            console.print(f"  no predictions: {check.reason}")
    table = Table("run", "tenant", "metric", "n")
    for name in ("recorded with, s", "replayed", "predicted without", "real without", "error", "spread"):
        table.add_column(name, justify="right")
    table.add_column("holds")
    judged = [(run.run, one) for run in runs for one in run.percentiles]
    for run_number, one in judged:
        table.add_row(
            str(run_number),
            one.tenant,
            f"{one.metric} p{one.quantile * 100:.0f}",
            str(one.requests),
            f"{one.recorded_s:.3f}",
            f"{one.replayed_s:.3f}",
            f"{one.predicted_s:.3f}",
            f"{statistics.median(one.real_s):.3f}",
            f"{one.error:.1%}",
            f"{one.spread:.1%}",
            "yes" if one.holds else "no",
        )
    console.print(table)
    holding = sum(one.holds for _, one in judged)
    console.print(f"{holding} of {len(judged)} predictions are within max({LEAST_ERROR:.0%}, spread) of the real runs")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", type=Path, required=True, help="python of an environment with vLLM 0.32")
    parser.add_argument("--model", type=Path, required=True, help="folder with the model's config.json")
    parser.add_argument("--scenario", default=HERE / "vllm_judge.yaml", help="what is sent; culprits are newcomers")
    parser.add_argument("--variant", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind")
    parser.add_argument("--traces", type=Path, help="an empty folder to keep traces and logs in")
    parser.add_argument("--json", type=Path, help="file to write what was found to")
    chosen = parser.parse_args()
    try:
        runs = run(chosen)
    except StallscopeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    show(runs)
    if chosen.json:
        chosen.json.write_text(json.dumps([as_json(one) for one in runs], indent=1) + "\n", encoding="utf-8")
    return 0


def run(chosen: argparse.Namespace) -> list[RunJudged]:
    """Records and judges. Raises UsageError where that can't be done."""
    scenario = load_scenario(chosen.scenario, chosen.variant)
    culprits = culprits_of(scenario)
    if chosen.repeats < 1:
        raise UsageError(f"--repeats {chosen.repeats}: at least 1")
    if chosen.json and not chosen.json.absolute().parent.is_dir():
        raise UsageError(f"--json {chosen.json}: there is no such folder; make it first")
    with tempfile.TemporaryDirectory() as temporary:
        setup = Setup(chosen.vllm_python, chosen.model.resolve(), chosen.traces or Path(temporary))
        setup.check()
        with_them, without = record_runs(setup, scenario, chosen.seed, chosen.repeats)
        real = [waits_in(read_trace(path)) for path in without]
        judging = track(with_them, "judging", console=Console(stderr=True))
        return [judge(read_trace(path), number, culprits, real) for number, path in enumerate(judging, start=1)]


def culprits_of(scenario: Scenario) -> tuple[str, ...]:
    """Whom the scenario injects. Raises UsageError where a run without what is injected is not one without them."""
    usual = {tenant.name for tenant in scenario.tenants}
    found: dict[str, None] = {}
    for injection in scenario.inject:
        if not isinstance(injection, AddedRequests | AddedTraffic):
            raise UsageError(f"{scenario.name}: vLLM can only be sent requests, and no {type(injection).__name__}")
        found |= dict.fromkeys(tenants_of(injection))
    if not found or usual & found.keys():
        raise UsageError(f"{scenario.name}: must inject requests of tenants that send nothing else")
    return tuple(found)


def as_json(one: RunJudged) -> dict[str, object]:
    percentiles = [
        asdict(row) | {"error": row.error, "spread": row.spread, "holds": row.holds} for row in one.percentiles
    ]
    return asdict(one) | {"percentiles": percentiles}


if __name__ == "__main__":
    sys.exit(main())
