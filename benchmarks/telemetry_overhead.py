"""What telemetry costs the engine: microseconds of its thread a step, throughput with and without, bytes a step.

    python benchmarks/telemetry_overhead.py                     # 32 running requests, tiny-llama on torch
    python benchmarks/telemetry_overhead.py --executor busy     # the same without torch: 5 ms of work a step
    python benchmarks/telemetry_overhead.py --sweep             # 16 to 1,024 running, an executor that does nothing

"Engine's thread" is all that it would not do without telemetry: asking for keyframes, snapshots, building records and
queueing them, with whatever the background thread and the garbage collector do to it meanwhile. Throughput is the
median over pairs of passes, one with and one without telemetry, in turns and in alternating order. Where others use the
machine too, wall time says little: there, look at the median of the engine's thread and at the CPU time.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, Executor, Recorder, StepInFlight, StepResult, WallClock
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch
from stallscope_telemetry.emitter import Emitter
from stallscope_telemetry.files import OtlpFileExporter
from stallscope_telemetry.records import RequestInfo, RequestSnapshot
from stallscope_telemetry.spans import EngineDescription, resource_attributes

BUDGET_US = {16: 20.0, 32: 30.0, 64: 30.0, 256: 60.0, 1024: 200.0}
BUDGET_BYTES = 150.0
BUDGET_SLOWDOWN = 0.03
STEP_S = 0.005
SLICE_S = 0.0001


class TimedEngine(Engine):
    """Times what its thread does for telemetry; ``telemetry_ns`` has one entry a step."""

    def __init__(self, config: EngineConfig, executor: Executor, recorder: Recorder | None) -> None:
        super().__init__(config, executor, WallClock(), recorder)
        self.telemetry_ns: list[int] = []
        self._keyframe_ns = 0

    def _keyframe(self, batch: Batch) -> list[RequestSnapshot] | None:
        start = time.perf_counter_ns()
        snapshot = super()._keyframe(batch)
        self._keyframe_ns = time.perf_counter_ns() - start
        return snapshot

    def _record(self, step: StepInFlight, finished: list[Request], ready_ns: int, device_ns: int) -> None:
        start = time.perf_counter_ns()
        super()._record(step, finished, ready_ns, device_ns)
        self.telemetry_ns.append(self._keyframe_ns + time.perf_counter_ns() - start)


class BusyExecutor:
    """Takes 5 ms, and in turns holds the GIL and lets it go, as an executor of many small operations does."""

    def dispatch(self, batch: Batch) -> None:
        end = time.perf_counter() + STEP_S
        while time.perf_counter() < end:
            time.sleep(SLICE_S)
            busy = time.perf_counter() + SLICE_S
            while time.perf_counter() < min(busy, end):
                pass

    def collect(self, batch: Batch) -> StepResult:
        return StepResult()


class NoExecutor:
    """Does nothing: all time is the scheduler's and telemetry's."""

    def dispatch(self, batch: Batch) -> None:
        pass

    def collect(self, batch: Batch) -> StepResult:
        return StepResult()


@dataclass(frozen=True, slots=True)
class Pass:
    """One run over the workload. ``telemetry_ns`` is empty and ``file_bytes`` 0 without telemetry."""

    seconds: float
    cpu_seconds: float  # of all threads
    steps: int
    output_tokens: int
    telemetry_ns: Sequence[int]
    file_bytes: int
    dropped: int


def workload(requests: int, seed: int) -> list[Request]:
    """Prompts of 32-512 and outputs of 16-128 tokens, of eight tenants, all there at the start; ids as a server's."""
    draw = random.Random(seed)
    now_ns = WallClock().now_ns()
    made = []
    for handle in range(requests):
        prompt = draw.randint(32, 512)
        info = RequestInfo(
            handle,
            f"cmpl-{draw.getrandbits(128):032x}",
            now_ns,
            prompt,
            draw.randint(16, 128),
            tenant=f"tenant-{draw.randrange(8)}",
            tenant_source="api_key",
        )
        made.append(Request(info, [draw.randrange(3, 250) for _ in range(prompt)]))
    return made


def serve(config: EngineConfig, executor: Executor, requests: Sequence[Request], path: Path | None) -> Pass:
    """One pass over ``requests``; telemetry goes to ``path``, or nowhere."""
    gc.collect()
    with ExitStack() as stack:
        emitter = None
        if path is not None:
            description = EngineDescription(
                replica="benchmark",
                model=config.model,
                engine_version="0.1.0",
                executor=type(executor).__name__,
                block_size=config.block_size,
                total_blocks=config.kv_blocks,
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                chunked_prefill=config.chunked_prefill,
            )
            emitter = stack.enter_context(
                Emitter(resource_attributes(description), [OtlpFileExporter(path)], random.Random(0))
            )
        engine = TimedEngine(config, executor, emitter)
        start, cpu_start = time.perf_counter(), time.process_time()
        engine.run(requests)
        seconds = time.perf_counter() - start
    cpu_seconds = time.process_time() - cpu_start  # with the last of the background's work
    return Pass(
        seconds,
        cpu_seconds,
        engine.steps,
        sum(request.output_tokens for request in requests),
        engine.telemetry_ns if emitter is not None else (),
        path.stat().st_size if path is not None else 0,
        emitter.dropped if emitter is not None else 0,
    )


def verdict(figure: float, budget: float) -> str:
    return "within" if figure <= budget else "OVER"


def thread_cost(telemetry_ns: Sequence[int]) -> tuple[float, str]:
    """The mean in us a step, and in words with median and 99th percentile."""
    ordered = sorted(telemetry_ns)
    mean, median, p99 = (
        figure / 1e3
        for figure in (statistics.fmean(ordered), ordered[len(ordered) // 2], ordered[len(ordered) * 99 // 100])
    )
    return mean, f"{mean:.1f} us a step (median {median:.1f}, p99 {p99:.1f})"


def compare(make_executor: Callable[[EngineConfig], Executor], pairs: int, running: int, folder: Path) -> None:
    """Passes with and without telemetry in turns, and the figures of the budget."""
    config = EngineConfig(max_num_seqs=running, max_num_batched_tokens=2048)
    executor = make_executor(config)
    serve(config, executor, workload(16, seed=1), folder / "warmup.otlp.jsonl.zst")
    ratios, cpu_ratios, on = [], [], []
    for pair in range(pairs):
        passes: dict[bool, Pass] = {}
        for telemetry in (pair % 2 == 0, pair % 2 == 1):
            path = folder / f"{pair}.otlp.jsonl.zst" if telemetry else None
            passes[telemetry] = serve(config, executor, workload(128, seed=0), path)
        with_, without = (passes[telemetry].output_tokens / passes[telemetry].seconds for telemetry in (True, False))
        ratios.append(with_ / without)
        cpu_ratios.append(passes[True].cpu_seconds / passes[False].cpu_seconds)
        on.append(passes[True])
        print(f"pair {pair + 1}: {with_:8.1f} output tokens/s with, {without:8.1f} without, ratio {ratios[-1]:.4f}")
    steps = sum(run.steps for run in on)
    mean_us, cost = thread_cost([ns for run in on for ns in run.telemetry_ns])
    ratio = statistics.median(ratios)
    step_bytes = sum(run.file_bytes for run in on) / steps
    step_ms = sum(run.seconds for run in on) / steps * 1e3
    print(f"{steps} steps of {step_ms:.1f} ms with up to {running} running, {sum(run.dropped for run in on)} dropped")
    budget = BUDGET_US.get(running, BUDGET_US[1024])
    print(f"engine's thread  {cost}; budget {budget:g}: {verdict(mean_us, budget)}")
    print(f"throughput       {ratio:.4f} of that without; budget 0.97: {verdict(1 - ratio, BUDGET_SLOWDOWN)}")
    print(f"CPU time         {statistics.median(cpu_ratios):.4f} of that without, all threads")
    print(f"file             {step_bytes:.0f} bytes a step; budget 150: {verdict(step_bytes, BUDGET_BYTES)}")


def sweep(folder: Path) -> None:
    """The engine's thread and the file against the number of running requests."""
    for running in (16, 64, 256, 1024):
        config = EngineConfig(
            max_num_seqs=running, max_num_batched_tokens=max(2048, 2 * running), kv_blocks=64 * running
        )
        requests = workload(4 * running, seed=running)
        run = serve(config, NoExecutor(), requests, folder / f"{running}.otlp.jsonl.zst")
        mean_us, cost = thread_cost(run.telemetry_ns)
        print(
            f"{running:5} running: {cost}, budget {BUDGET_US[running]:g}: "
            f"{verdict(mean_us, BUDGET_US[running])}; {run.file_bytes / run.steps:.0f} bytes a step, "
            f"{run.steps} steps, {len(requests)} requests, {run.dropped} dropped"
        )


def torch_executor(config: EngineConfig) -> Executor:
    from stallscope_engine.executors.torch_cpu import TorchExecutor

    return TorchExecutor(config, "tiny-llama")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", choices=("torch", "busy"), default="torch")
    parser.add_argument("--pairs", type=int, default=5, help="pairs of passes (default 5)")
    parser.add_argument("--running", type=int, default=32, help="max_num_seqs (default 32)")
    parser.add_argument("--sweep", action="store_true", help="16, 64, 256, 1024 running without any executor")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.sweep:
            sweep(Path(folder))
        else:
            make = torch_executor if options.executor == "torch" else lambda config: BusyExecutor()
            compare(make, options.pairs, options.running, Path(folder))


if __name__ == "__main__":
    main()
