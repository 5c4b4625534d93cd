"""What the engine reaches on a GPU, each figure beside its bound, and Hugging Face's continuous batching beside it.

    python benchmarks/engine_gpu.py                                         # llama-8b, random weights
    python benchmarks/engine_gpu.py --device cpu --model tiny-llama --quick # the same code where there is no GPU

Decode: a step reads the weights once and the keys and values of every context; its bound is those bytes over the
device's bandwidth, measured by a copy (and as the data sheet has it). Prefill: the products of one long prompt, over
the rate of a large matrix product (and the data sheet's). Peers serve the same prompts to the same number of tokens,
in turns, in one process; the first pass of each is not counted. Host: what a step costs beyond the device's time, with
and without scheduling the next step meanwhile. On a CPU there are no device times, so a step's time is the host's.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import telemetry_overhead
import torch

from stallscope_engine.config import EngineConfig
from stallscope_engine.engine import Engine, StepResult, WallClock
from stallscope_engine.executors.choice import CUDA_BLOCK_SIZE, find_device
from stallscope_engine.executors.cuda.memory import block_bytes, weight_bytes
from stallscope_engine.executors.torch_cuda import TorchCudaExecutor
from stallscope_engine.models.configs import ModelConfig, load_config, random_prompt
from stallscope_engine.request import Request
from stallscope_engine.scheduler import Batch
from stallscope_telemetry.records import RequestInfo

DECODE_SHARE, PREFILL_SHARE, PEER_RATIO, EXPOSED_MS = 0.70, 0.50, 3.0, 1.0  # what the engine is to reach

#: By a part of the device's name, the first that fits: memory GB/s and dense bfloat16 TFLOP/s of the data sheets.
SPECS = {
    "B200": (8000, 2250),
    "H200": (4800, 989),
    "H100 PCIe": (2000, 756),
    "H100 NVL": (3900, 835),
    "H100": (3350, 989),
    "A100-SXM4-40GB": (1555, 312),
    "A100": (2039, 312),
    "L40S": (864, 362),
    "A10": (600, 125),
    "L4": (300, 121),
}


@dataclass(frozen=True)
class Sizes:
    """How much is run: contexts and prompts in tokens."""

    batches: tuple[int, ...]
    context: int
    decode_steps: int
    prefill: int
    repeats: int
    requests: int
    prompts: tuple[int, int]
    outputs: int
    copy_bytes: int
    matmul: int


FULL = Sizes((1, 2, 4, 8, 16, 32, 64), 1024, 48, 8192, 5, 256, (64, 1024), 128, 2**31, 8192)
QUICK = Sizes((1, 4, 16), 128, 12, 512, 3, 24, (16, 128), 24, 2**27, 1024)


@dataclass
class Step:
    """One step as it ran: its batch, its time on the device (a CPU: from dispatch to outputs), and the host's."""

    batch: Batch
    device_ns: int = -1
    dispatch_ns: int = 0
    wait_ns: int = 0


class TimedExecutor:
    """Passes steps through and keeps their times."""

    def __init__(self, executor: TorchCudaExecutor) -> None:
        self.executor = executor
        self.steps: list[Step] = []
        self._next = 0

    def dispatch(self, batch: Batch) -> None:
        start = time.perf_counter_ns()
        self.executor.dispatch(batch)
        self.steps.append(Step(batch, dispatch_ns=time.perf_counter_ns() - start))

    def collect(self, batch: Batch) -> StepResult:
        start = time.perf_counter_ns()
        result = self.executor.collect(batch)
        step = self.steps[self._next]
        self._next += 1
        step.wait_ns = time.perf_counter_ns() - start
        step.device_ns = result.device_ns if result.device_ns >= 0 else step.dispatch_ns + step.wait_ns
        return result


@dataclass(frozen=True)
class Run:
    steps: list[Step]
    wall_ns: int
    tokens: int


def run(executor: TorchCudaExecutor, config: EngineConfig, prompts: list[list[int]], outputs: int) -> Run:
    requests = [
        Request(RequestInfo(handle, f"r{handle}", 0, len(prompt), outputs), prompt)
        for handle, prompt in enumerate(prompts)
    ]
    timed = TimedExecutor(executor)
    start = time.perf_counter_ns()
    Engine(config, timed, WallClock()).run(requests)
    wall_ns = time.perf_counter_ns() - start
    return Run(timed.steps, wall_ns, sum(len(request.output_token_ids) for request in requests))


# --- the device ---------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median seconds of ``work`` on the device, which is warm."""
    taken = []
    for number in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        if number > 1:
            taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def measure_device(device: str, dtype: torch.dtype, sizes: Sizes) -> tuple[float, float]:
    """Bytes/s of a copy (read and written), and FLOP/s of a large matrix product."""
    source = torch.ones(sizes.copy_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * sizes.copy_bytes / seconds_of(lambda: target.copy_(source), device, 10)
    left = torch.randn(sizes.matmul, sizes.matmul, device=device, dtype=dtype)
    product = torch.empty_like(left)
    flops = 2 * sizes.matmul**3 / seconds_of(lambda: torch.mm(left, left, out=product), device, 10)
    return bandwidth, flops


def spec_of(device: str) -> tuple[float, float] | None:
    """Bytes/s and FLOP/s of the data sheet."""
    if device == "cpu":
        return None
    name = torch.cuda.get_device_name()
    for part, (gigabytes, teraflops) in SPECS.items():
        if part in name:
            return gigabytes * 1e9, teraflops * 1e12
    return None


def verdict(value: float, goal: float, device: str) -> str:
    """Goals are for a GPU."""
    return "" if device == "cpu" else f", goal {goal:g}: {'reached' if value >= goal else 'MISSED'}"


# --- the figures --------------------------------------------------------------------------------------------------


def report_decode(
    executor: TorchCudaExecutor, config: EngineConfig, sizes: Sizes, item_bytes: int, rates: list[tuple[str, float]]
) -> None:
    """A decode step against the bytes that it must read."""
    model, device = executor.model_config, executor.device.type
    weights = weight_bytes(model, item_bytes)
    if not model.tie_word_embeddings:
        weights -= model.vocab_size * model.hidden_size * item_bytes  # of the embedding a step reads a row a token
    token_bytes = block_bytes(1, model, item_bytes)
    print(f"\ndecode at {sizes.context} tokens of context: weights {weights / 1e9:.2f} GB a step")
    for size in sizes.batches:
        prompts = [random_prompt(model, sizes.context, seed) for seed in range(size)]
        done = run(executor, config, prompts, sizes.decode_steps)
        decodes = [step for step in done.steps if step.batch.decode_tokens == size and not step.batch.prefill_tokens]
        step = sorted(decodes, key=lambda step: step.device_ns)[len(decodes) // 2]
        step_bytes = weights + token_bytes * (sum(step.batch.starts) + size)
        shares = [(name, step_bytes / rate / (step.device_ns / 1e9)) for name, rate in rates]
        print(
            f"  batch {size:3}: {step.device_ns / 1e6:8.3f} ms, {step_bytes / 1e9:6.2f} GB, "
            + ", ".join(f"{share:.0%} of the bound ({name})" for name, share in shares)
            + verdict(shares[0][1], DECODE_SHARE, device)
        )


def report_prefill(
    executor: TorchCudaExecutor, config: EngineConfig, sizes: Sizes, rates: list[tuple[str, float]]
) -> None:
    """A whole prompt in one step against the rate of matrix products."""
    model, device = executor.model_config, executor.device.type
    runs = [
        run(executor, config, [random_prompt(model, sizes.prefill, seed)], 1).steps[0].device_ns
        for seed in range(sizes.repeats + 1)
    ]
    seconds = statistics.median(runs[1:]) / 1e9
    tied = 1 if model.tie_word_embeddings else 2
    products = weight_bytes(model, 1) - tied * model.vocab_size * model.hidden_size
    pairs = sizes.prefill * (sizes.prefill + 1) / 2
    attention = 4 * pairs * model.num_attention_heads * model.head_dim * model.num_hidden_layers
    flops = 2 * products * sizes.prefill + attention + 2 * model.vocab_size * model.hidden_size
    shares = [(name, flops / seconds / rate) for name, rate in rates]
    print(
        f"\nprefill of {sizes.prefill} tokens: {seconds * 1e3:.1f} ms, {flops / seconds / 1e12:.3g} TFLOP/s, "
        + ", ".join(f"{share:.0%} of peak ({name})" for name, share in shares)
        + verdict(shares[-1][1], PREFILL_SHARE, device)
    )


def report_host(executor: TorchCudaExecutor, config: EngineConfig, prompts: list[list[int]], outputs: int) -> None:
    """What a step costs beyond the device's time."""
    print("\nhost time a step, in a full run of the mix below:")
    for overlaps in (False, True):
        done = run(executor, replace(config, async_scheduling=overlaps), prompts, outputs)
        device_ns = sum(step.device_ns for step in done.steps)
        exposed_ms = (done.wall_ns - device_ns) / len(done.steps) / 1e6
        own_ms = (done.wall_ns - sum(step.wait_ns for step in done.steps)) / len(done.steps) / 1e6
        name = "with overlap" if overlaps else "without overlap"
        if executor.device.type == "cpu":
            dispatch_ns = sum(step.dispatch_ns for step in done.steps)
            rest_ms = (done.wall_ns - dispatch_ns) / len(done.steps) / 1e6
            print(f"  {name}: {rest_ms:.3f} ms around the steps; hidden: skipped, on a CPU the host is the device")
            continue
        reached = "reached" if exposed_ms <= EXPOSED_MS else "MISSED"
        goal = f", goal at most {EXPOSED_MS:g}: {reached}" if overlaps else ""
        print(f"  {name}: {own_ms:.3f} ms of the host's, {exposed_ms:.3f} ms of them not hidden by the device{goal}")


def report_peers(
    executor: TorchCudaExecutor, config: EngineConfig, sizes: Sizes, draw: Callable[[int], list[list[int]]]
) -> None:
    """Output tokens per second beside Hugging Face's ``generate_batch``, in turns."""
    try:
        theirs = hugging_face(executor.model_config, executor.device.type, config, executor.dtype)
    except ImportError as error:
        print(f"\nHugging Face: skipped, {error.name} is not installed")
        return
    print(
        f"\n{sizes.requests} requests of {sizes.prompts[0]}-{sizes.prompts[1]} tokens, {sizes.outputs} out each, "
        "output tokens/s:"
    )
    ratios = []
    for number in range(sizes.repeats + 1):
        prompts = draw(number)
        done = run(executor, config, prompts, sizes.outputs)
        ours = done.tokens / (done.wall_ns / 1e9)
        start = time.perf_counter()
        tokens = theirs(prompts, sizes.outputs)
        peer = tokens / (time.perf_counter() - start)
        if tokens != done.tokens:
            print(f"  Hugging Face made {tokens} tokens, not {done.tokens}: no comparison")
            return
        print(
            f"  {f'pass {number}' if number else 'warm-up'}: stallscope {ours:,.0f}, Hugging Face {peer:,.0f}",
            flush=True,
        )
        ratios.append(ours / peer)
    ratio = statistics.median(ratios[1:])
    print(
        f"  median of the ratios {ratio:.2f} ({min(ratios[1:]):.2f}-{max(ratios[1:]):.2f})"
        + verdict(ratio, PEER_RATIO, executor.device.type)
    )


def hugging_face(
    model: ModelConfig, device: str, config: EngineConfig, dtype: torch.dtype
) -> Callable[[list[list[int]], int], int]:
    """A function that serves prompts by continuous batching and says how many tokens it made."""
    import transformers

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)  # it comments on its settings in each pass
    family = "Qwen3" if model.qk_norm else "Llama"
    shape: dict[str, Any] = asdict(model)
    scaling = shape.pop("rope_scaling")
    rope = {"rope_theta": shape.pop("rope_theta"), "rope_type": "llama3" if scaling else "default"} | (scaling or {})
    shape |= {"rope_parameters": rope, "eos_token_id": None, "dtype": dtype}
    shape.pop("eos_token_ids")
    with torch.device(device):
        peer_config = getattr(transformers, f"{family}Config")(**shape)
        peer = transformers.AutoModelForCausalLM.from_config(peer_config, dtype=dtype).eval()
    peer.generation_config.eos_token_id = -1
    peer.generation_config.do_sample = False
    batching = transformers.ContinuousBatchingConfig(
        max_batch_tokens=config.max_num_batched_tokens,
        max_requests_per_batch=config.max_num_seqs,
        num_blocks=config.kv_blocks * config.block_size // 256,
        allow_block_sharing=False,
    )

    def serve(prompts: list[list[int]], outputs: int) -> int:
        answers = peer.generate_batch(
            prompts, continuous_batching_config=batching, max_new_tokens=outputs, persistent_manager=True
        )
        return sum(len(answer.generated_tokens) for answer in answers.values())

    return serve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-8b", help="a name or a Hugging Face folder (default llama-8b)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="short contexts and few passes")
    parser.add_argument("--no-graphs", action="store_true", help="launch decodes kernel by kernel")
    options = parser.parse_args()
    try:
        model = load_config(options.model)
    except ValueError as error:
        parser.error(str(error))
    try:
        device = find_device(options.device)
    except ValueError as error:
        print(f"skipped: {error}")
        return
    sizes = QUICK if options.quick else FULL
    dtype = "bfloat16" if device == "cuda" else "float32"
    longest = max(sizes.context + sizes.decode_steps, sizes.prompts[1] + sizes.outputs)
    block_size = CUDA_BLOCK_SIZE if device == "cuda" else 16
    seqs = max(sizes.batches)
    blocks = max(seqs * -(-longest // block_size), -(-(sizes.prefill + 1) // block_size))
    config = EngineConfig(
        model=options.model,
        max_num_seqs=seqs,
        max_num_batched_tokens=sizes.prefill,
        block_size=block_size,
        kv_blocks=blocks,
    )
    name = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(f"{options.model} in {dtype} on {name}, torch {torch.__version__}")
    kind = getattr(torch, dtype)
    bandwidth, flops = measure_device(device, kind, sizes)
    bytes_rates, flops_rates = [("measured", bandwidth)], [("measured", flops)]
    if (spec := spec_of(device)) is None:
        print(f"data sheet: skipped, {'not for a CPU' if device == 'cpu' else 'none known for this GPU'}")
    else:
        bytes_rates.append(("data sheet", spec[0]))
        flops_rates.append(("data sheet", spec[1]))
    print("bandwidth " + ", ".join(f"{rate / 1e9:,.0f} GB/s {what}" for what, rate in bytes_rates))
    print("products " + ", ".join(f"{rate / 1e12:.3g} TFLOP/s {what}" for what, rate in flops_rates), flush=True)

    start = time.perf_counter()
    try:
        executor = TorchCudaExecutor(config, options.model, dtype, device=device, graphs=not options.no_graphs)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"loaded and warm after {time.perf_counter() - start:.1f} s: {executor.description}")
    report_decode(executor, config, sizes, kind.itemsize, bytes_rates)
    report_prefill(executor, config, sizes, flops_rates)

    def draw(seed: int) -> list[list[int]]:
        lengths = range(sizes.prompts[0], sizes.prompts[1])
        step = len(lengths) / sizes.requests
        return [
            random_prompt(model, lengths[int(number * step)], seed * sizes.requests + number)
            for number in sorted(range(sizes.requests), key=lambda number: number * 7919 % sizes.requests)
        ]

    overlapping = replace(config, async_scheduling=True)
    report_host(executor, config, draw(0), sizes.outputs)
    print("\ntelemetry on the engine's thread (needs no GPU):")
    with tempfile.TemporaryDirectory() as folder:
        telemetry_overhead.sweep(Path(folder))
    report_peers(executor, overlapping, sizes, draw)


if __name__ == "__main__":
    main()
