"""How much continuous batching gains over static batches, taken apart: slots, memory, and latency under load.

Both run on this engine, with the same executor, requests and lengths; only the policy differs (``policies.static``
against ``policies.fcfs``). (a) Equal slots, and KV memory enough for all: a slot whose request is done stays empty
until the longest of its batch is, so the gain can't exceed 1 / (utilisation of static batches). (b) Equal KV memory,
slots as many as fit: static batches reserve prompt + max_tokens for each. (c) The same open-loop load on both, in the
setting of (b). Static batches are treated kindly: an empty slot costs no computation, and tokens count when made.

    batching.py                       in virtual time, on a GPU-shaped cost model
    batching.py --executor torch      for real, on this machine (lengths scaled down)
    batching.py --executor torch --device cuda --model llama-8b

Lengths: ``azure`` are those of a public trace of a chat service (data/azure_conv_lengths.csv), ``heavy`` has prompts
of 32 to 512 tokens and exponential answers of 128 on average, at most 1,536. Each figure is the median over seeds, with
the least and the most.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from stallscope.workloads.recording import Simulation
from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Clock, Engine, Executor, VirtualClock, WallClock
from stallscope_engine.executors.virtual import VirtualExecutor, cost_for
from stallscope_engine.request import Request
from stallscope_telemetry.records import RequestInfo

AZURE = Path(__file__).parent / "data" / "azure_conv_lengths.csv"
POLICIES = ("static", "fcfs")
LOADS = (("half of what static batches can", "static", 0.5), ("90% of what static batches can", "static", 0.9),
         ("70% of what continuous batching can", "fcfs", 0.7))  # fmt: skip

Lengths = list[tuple[int, int]]  # prompt and output tokens


@dataclass(frozen=True, slots=True)
class Setting:
    """What the engine has, and what is asked of it. ``scale`` divides all lengths."""

    requests: int
    slots: int
    budget: int
    kv_tokens: int  # of (b) and (c)
    max_tokens: int  # that each request asks for, whatever it needs
    scale: int


SETTINGS = {
    # Llama-2-7B's cache (half a megabyte a token) in 20 GB: what such systems had when they were compared.
    "virtual": Setting(requests=1000, slots=32, budget=4096, kv_tokens=40_000, max_tokens=2048, scale=1),
    "torch": Setting(requests=160, slots=16, budget=2048, kv_tokens=5_000, max_tokens=256, scale=8),
    "cuda": Setting(requests=1000, slots=32, budget=8192, kv_tokens=40_000, max_tokens=2048, scale=1),
}


@dataclass(frozen=True, slots=True)
class Run:
    """What one policy did. ``utilization``: decoding slots of those there are, over the steps that decode."""

    tokens_per_s: float
    utilization: float
    mean_batch: float
    latencies_s: Sequence[float]
    preemptions: int


class Bench:
    """Runs requests of drawn lengths on one executor; ``engine`` makes a fresh engine for a configuration."""

    def __init__(self, setting: Setting, lengths: str, engine: Callable[[EngineConfig, int], Engine]) -> None:
        self.setting = setting
        self.lengths = lengths
        self.engine = engine

    def run(self, config: EngineConfig, seed: int, per_s: float | None = None) -> Run:
        """Serves a seed's requests: all there at the start, or arriving at random at a rate."""
        engine = self.engine(config, seed)
        simulation = Simulation()
        engine.recorder = simulation
        start_ns = engine.clock.now_ns()
        engine.run(self._requests(seed, start_ns, per_s))
        end_ns = max(step.ready_ns for step in simulation.steps)
        tokens = sum(len(one.token_times_ns) for one in simulation.requests)
        decoding = [step for step in simulation.steps if step.decode_tokens]
        # A static batch decodes alone; a continuous one decodes beside prefills.
        mean_batch = sum(step.decode_tokens for step in decoding) / len(decoding)
        return Run(
            tokens / ((end_ns - start_ns) / 1e9),
            mean_batch / config.max_num_seqs,
            mean_batch,
            [(one.end_ns - one.info.arrival_ns) / 1e9 for one in simulation.requests],
            sum(one.preemptions for one in simulation.requests),
        )

    def _requests(self, seed: int, start_ns: int, per_s: float | None) -> list[Request]:
        draw = random.Random(f"{self.lengths}/{seed}")
        drawn = draw_lengths(self.lengths, draw, self.setting)
        time_s, requests = 0.0, []
        for handle, (prompt, output) in enumerate(drawn, start=1):
            if per_s is not None:
                time_s += draw.expovariate(per_s)
            info = RequestInfo(handle, f"r{handle}", start_ns + int(time_s * 1e9), prompt, self.setting.max_tokens)
            requests.append(Request(info, [draw.randrange(3, 1000) for _ in range(prompt)], stop_after=output))
        return requests


def draw_lengths(name: str, draw: random.Random, setting: Setting) -> Lengths:
    """Prompt and output lengths of ``setting.requests`` requests, within what they may ask for."""
    if name == "azure":
        with AZURE.open(encoding="utf-8") as file:
            rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
        pairs = [
            (int(row["prompt_tokens"]), int(row["output_tokens"])) for row in draw.choices(rows, k=setting.requests)
        ]
    else:
        pairs = [
            (draw.randint(32, 512), min(1 + int(draw.expovariate(1 / 128)), 1536)) for _ in range(setting.requests)
        ]
    return [
        (max(1, prompt // setting.scale), min(max(1, output // setting.scale), setting.max_tokens))
        for prompt, output in pairs
    ]


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    return f"{form.format(statistics.median(values))} ({form.format(min(values))}-{form.format(max(values))})"


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def equal_slots(bench: Bench, seeds: Sequence[int]) -> None:
    setting = bench.setting
    ample = setting.slots * (setting.max_tokens + 16_384 // setting.scale) // 16
    config = EngineConfig(max_num_seqs=setting.slots, max_num_batched_tokens=setting.budget, kv_blocks=ample)
    runs = {policy: [bench.run(replace(config, policy=policy), seed) for seed in seeds] for policy in POLICIES}
    print(f"\n(a) equal slots ({setting.slots}), KV memory for all")
    print(f"    {'':12}{'slot utilisation':>26}{'useful tokens/s':>30}")
    for policy, done in runs.items():
        print(
            f"    {NAMES[policy]:12}{spread([run.utilization for run in done], '{:.0%}'):>26}"
            f"{spread([run.tokens_per_s for run in done], '{:,.0f}'):>30}"
        )
    gains = [ours.tokens_per_s / theirs.tokens_per_s for theirs, ours in zip(*runs.values(), strict=True)]
    bounds = [1 / run.utilization for run in runs["static"]]
    shares = [gain / bound for gain, bound in zip(gains, bounds, strict=True)]
    print(f"    gain {spread(gains)}x of a bound of {spread(bounds)}x: {spread(shares, '{:.0%}')} of it")
    slots = [ours.utilization / theirs.utilization for theirs, ours in zip(*runs.values(), strict=True)]
    shares = [gain / bound for gain, bound in zip(slots, bounds, strict=True)]
    print(f"    in slots filled {spread(slots)}x: {spread(shares, '{:.0%}')}; prompts, and fuller steps, cost the rest")


def equal_memory(bench: Bench, seeds: Sequence[int]) -> dict[str, float]:
    """Prints (b); returns what each policy can serve, in requests a second."""
    setting, config = bench.setting, memory_config(bench.setting)
    runs = {policy: [bench.run(replace(config, policy=policy), seed) for seed in seeds] for policy in POLICIES}
    print(
        f"\n(b) equal KV memory ({setting.kv_tokens:,} tokens), slots as many as fit; "
        f"max_tokens {setting.max_tokens:,} asked for"
    )
    print(f"    {'':12}{'requests decoding together':>30}{'useful tokens/s':>30}{'preemptions':>16}")
    for policy, done in runs.items():
        print(
            f"    {NAMES[policy]:12}{spread([run.mean_batch for run in done], '{:.1f}'):>30}"
            f"{spread([run.tokens_per_s for run in done], '{:,.0f}'):>30}"
            f"{statistics.median(run.preemptions for run in done):>16.0f}"
        )
    gains = [ours.tokens_per_s / theirs.tokens_per_s for theirs, ours in zip(*runs.values(), strict=True)]
    together = [ours.mean_batch / theirs.mean_batch for theirs, ours in zip(*runs.values(), strict=True)]
    print(f"    gain {spread(gains)}x; {spread(together)}x as many decode together, prompts cost both the same")
    outputs = [
        output
        for seed in seeds
        for _, output in draw_lengths(bench.lengths, random.Random(f"{bench.lengths}/{seed}"), setting)
    ]
    mean = statistics.mean(outputs)
    return {policy: statistics.median(run.tokens_per_s for run in done) / mean for policy, done in runs.items()}


def under_load(bench: Bench, seeds: Sequence[int], capacity: dict[str, float]) -> None:
    config = memory_config(bench.setting)
    print("\n(c) the same open-loop load on both, KV memory as in (b)")
    print(f"    {'load':46}{'':12}{'useful tokens/s':>26}{'latency p50, s':>26}{'latency p99, s':>26}")
    for name, whose, share in LOADS:
        per_s = share * capacity[whose]
        for policy in POLICIES:
            done = [bench.run(replace(config, policy=policy), seed, per_s) for seed in seeds]
            p50, p99 = ([percentile(run.latencies_s, q) for run in done] for q in (0.5, 0.99))
            label = f"{per_s:.2g}/s, {name}" if policy == POLICIES[0] else ""
            print(
                f"    {label:46}{NAMES[policy]:12}{spread([run.tokens_per_s for run in done], '{:,.0f}'):>26}"
                f"{spread(p50):>26}{spread(p99):>26}"
            )


NAMES = {"static": "static", "fcfs": "continuous"}


def memory_config(setting: Setting) -> EngineConfig:
    """Memory alone limits how many run."""
    return EngineConfig(max_num_seqs=512, max_num_batched_tokens=setting.budget, kv_blocks=setting.kv_tokens // 16)


def virtual_engine(model: str) -> Callable[[EngineConfig, int], Engine]:
    def make(config: EngineConfig, seed: int) -> Engine:
        clock = VirtualClock(0)
        executor = VirtualExecutor(clock, cost_for(model), seed)
        return Engine(config, executor, clock, before_dispatch=executor.spend_host_time)

    return make


def torch_engine(model: str, device: str) -> Callable[[EngineConfig, int], Engine]:
    """Engines on one executor for each size of cache: weights and warm-up are no part of a run."""
    from stallscope_engine.executors.choice import make_executor

    made: dict[tuple[int, int], Executor] = {}
    clock: Clock = WallClock()

    def make(config: EngineConfig, seed: int) -> Engine:
        key = (config.kv_blocks, config.max_num_seqs)
        if key not in made:
            made.clear()
            made[key] = make_executor(config, model, device)
        return Engine(config, made[key], clock)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executor", choices=("virtual", "torch"), default="virtual")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the torch executor")
    parser.add_argument("--model", help="default: 8b in virtual time, tiny-llama on torch")
    parser.add_argument("--lengths", nargs="*", choices=("azure", "heavy"), default=["azure", "heavy"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the torch executor")
    arguments = parser.parse_args()
    real = arguments.executor == "torch"
    kind = arguments.device if real and arguments.device == "cuda" else arguments.executor
    if real:
        import torch

        if kind == "cuda" and not torch.cuda.is_available():
            print("skipped: no CUDA device on this machine")
            return
        torch.set_num_threads(arguments.threads)
        make = torch_engine(arguments.model or "tiny-llama", arguments.device)
    else:
        make = virtual_engine(arguments.model or "8b")
    setting, seeds = SETTINGS[kind], range(arguments.seeds)
    for lengths in arguments.lengths:
        where = f"lengths divided by {setting.scale}" if setting.scale > 1 else "lengths as they are"
        print(
            f"\n{lengths}: {setting.requests:,} requests a run, {where}, {arguments.executor} {arguments.model or ''}"
        )
        bench = Bench(setting, lengths, make)
        if real:
            bench.run(memory_config(setting), -1)  # first calls allocate and compile
        equal_slots(bench, seeds)
        under_load(bench, seeds, equal_memory(bench, seeds))


if __name__ == "__main__":
    main()
