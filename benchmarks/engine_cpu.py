"""Output tokens per second of the bundled engine on a CPU, beside vLLM and Hugging Face ``generate``.

    python benchmarks/engine_cpu.py --vllm-python VENV/bin/python

Every peer is a process of its own with the same threads, model (tiny-llama, random weights), at most 32 sequences and
2,048 tokens a step, and no prefix cache. Each runs in its fastest data type, found by a trial: bfloat16 where the
processor multiplies it, float32 where it is emulated. All are started and warmed before passes take turns; each pass
brings new prompts, the same for all peers. The first pass is not counted; the result is the median of the others, and
the median of the ratios within a pass, so that whatever else the machine does hits all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

REQUESTS = 128
PROMPT_TOKENS = (32, 512)
OUTPUT_TOKENS = (16, 128)
MAX_NUM_SEQS = 32
MAX_NUM_BATCHED_TOKENS = 2048
PEERS = ("stallscope", "vllm", "transformers")
DTYPES = ("bfloat16", "float32")
TRIALS = 2  # a quarter of a pass each; the last one counts, since first calls compile


class Work(TypedDict):
    """A pass: one prompt (token ids) and one number of output tokens a request."""

    prompts: list[list[int]]
    outputs: list[int]


Serve = Callable[[Work], int]


def draw_work(seed: int, vocab_size: int, requests: int = REQUESTS) -> Work:
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, vocab_size) for _ in range(draw.randint(*PROMPT_TOKENS))] for _ in range(requests)]
    return {"prompts": prompts, "outputs": [draw.randint(*OUTPUT_TOKENS) for _ in prompts]}


# --- the peers: each returns a function that serves a pass and says how many useful tokens it made -----------------


def stallscope(folder: str, dtype: str) -> Serve:
    from stallscope_engine.config import EngineConfig
    from stallscope_engine.engine import Engine, WallClock
    from stallscope_engine.executors.torch_cpu import TorchExecutor
    from stallscope_engine.request import Request
    from stallscope_telemetry.records import RequestInfo

    config = EngineConfig(max_num_seqs=MAX_NUM_SEQS, max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS)
    executor = TorchExecutor(config, "tiny-llama", dtype)

    def serve(work: Work) -> int:
        requests = [
            Request(RequestInfo(handle, f"r{handle}", 0, len(prompt), output), prompt)
            for handle, (prompt, output) in enumerate(zip(work["prompts"], work["outputs"], strict=True))
        ]
        Engine(config, executor, WallClock()).run(requests)
        return sum(len(request.output_token_ids) for request in requests)

    return serve


def vllm(folder: str, dtype: str) -> Serve:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(
        folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=dtype,
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
        enforce_eager=True,
        enable_prefix_caching=False,
    )

    def serve(work: Work) -> int:
        prompts = [{"prompt_token_ids": prompt} for prompt in work["prompts"]]
        sampling = [
            SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
            for output in work["outputs"]
        ]
        return sum(len(done.outputs[0].token_ids) for done in llm.generate(prompts, sampling, use_tqdm=False))

    return serve


def transformers(folder: str, dtype: str) -> Serve:
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder)).to(getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0

    def serve(work: Work) -> int:
        useful = 0
        for first in range(0, len(work["prompts"]), MAX_NUM_SEQS):
            prompts = work["prompts"][first : first + MAX_NUM_SEQS]
            outputs = work["outputs"][first : first + MAX_NUM_SEQS]
            longest = max(map(len, prompts))
            ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
            mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
            made = model.generate(ids, attention_mask=mask, max_new_tokens=max(outputs), do_sample=False)
            assert made.shape[1] == longest + max(outputs)
            useful += sum(outputs)
        return useful

    return serve


def work_for_parent(peer: str, folder: str, dtype: str) -> None:
    """A peer's process: a line of JSON in for each pass, ``[useful tokens, seconds]`` out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    serve = {"stallscope": stallscope, "vllm": vllm, "transformers": transformers}[peer](folder, dtype)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        work: Work = json.loads(line)
        started = time.perf_counter()
        tokens = serve(work)
        print(json.dumps([tokens, time.perf_counter() - started]), file=answers, flush=True)


# --- the parent ----------------------------------------------------------------------------------------------------


class Peer:
    """A running peer. Its own output goes to a log in ``folder``."""

    def __init__(self, name: str, python: str, folder: str, dtype: str, threads: int | None) -> None:
        self.name = name
        self.dtype = dtype
        self.log = Path(folder, f"{name}-{dtype}.log")
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # as ours, and nearly twice as fast on two cores
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        }
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        with self.log.open("w") as errors:
            self._process = subprocess.Popen(
                [python, __file__, "--worker", name, "--folder", folder, "--dtype", dtype],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )

    def is_ready(self) -> bool:
        """Waits until the peer has loaded; False if it can't."""
        return self._answer() == "ready"

    def serve(self, work: Work) -> float:
        """Useful output tokens per second of one pass."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(work) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if not answer:
            raise SystemExit(f"{self.name} died:\n{self.log.read_text()[-2000:]}")
        tokens, seconds = json.loads(answer)
        assert tokens == sum(work["outputs"]), f"{self.name} made {tokens} tokens"
        return float(tokens / seconds)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


def write_config(folder: str) -> int:
    """Writes tiny-llama as a Hugging Face ``config.json``; returns its vocabulary size."""
    from dataclasses import asdict

    from stallscope_engine.models.configs import NAMED

    shape = asdict(NAMED["tiny-llama"])
    extra = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": shape.pop("dtype"),
        "bos_token_id": 1,
        "eos_token_id": shape.pop("eos_token_ids")[0],
    }
    Path(folder, "config.json").write_text(json.dumps(shape | extra), encoding="utf-8")
    return NAMED["tiny-llama"].vocab_size


def start_peer(name: str, python: str, folder: str, threads: int | None, vocab_size: int) -> Peer | None:
    """The peer in its fastest data type; None, and a line that says why, if it does not start."""
    fastest, most = None, 0.0
    for dtype in DTYPES:
        peer = Peer(name, python, folder, dtype, threads)
        if not peer.is_ready():
            last = peer.log.read_text().strip().splitlines()[-1:] or ["it said nothing"]
            print(f"{name} in {dtype}: skipped, it does not start: {last[0]}")
            continue
        for trial in range(TRIALS):
            rate = peer.serve(draw_work(-1 - trial, vocab_size, REQUESTS // 4))
        print(f"trial: {name} in {dtype} {rate:,.0f}", flush=True)
        slower = fastest if rate > most else peer
        if rate > most:
            fastest, most = peer, rate
        if slower is not None:
            slower.stop()
    return fastest


def report(rates: dict[Peer, list[float]]) -> None:
    ours = next(iter(rates.values()))
    print(f"\n{'output tokens/s':24}" + "".join(f"{f'pass {n + 1}':>9}" for n in range(len(ours))), end="")
    print(f"{'median':>9}{'ours/peer':>11}  (min-max)")
    for peer, values in rates.items():
        line = f"{f'{peer.name}, {peer.dtype}':24}" + "".join(f"{value:9,.0f}" for value in values)
        line += f"{statistics.median(values):9,.0f}"
        if values is not ours:
            ratios = [mine / theirs for mine, theirs in zip(ours, values, strict=True)]
            line += f"{statistics.median(ratios):11.2f}  ({min(ratios):.2f}-{max(ratios):.2f})"
        print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", default=os.environ.get("STALLSCOPE_VLLM_PYTHON"), metavar="PATH")
    parser.add_argument("--peers", nargs="*", choices=PEERS[1:], default=list(PEERS[1:]))
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of each peer; without it, what each takes by itself")
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work_for_parent(arguments.worker, arguments.folder, arguments.dtype)
        return
    with tempfile.TemporaryDirectory() as folder:
        vocab_size = write_config(folder)
        peers = []
        for name in ("stallscope", *arguments.peers):
            python = arguments.vllm_python if name == "vllm" else sys.executable
            if python is None or not Path(python).exists():
                print("vllm: skipped, name its interpreter with --vllm-python or STALLSCOPE_VLLM_PYTHON")
            elif (peer := start_peer(name, python, folder, arguments.threads, vocab_size)) is not None:
                peers.append(peer)
        if not peers or peers[0].name != "stallscope":
            raise SystemExit("stallscope itself does not start")
        rates: dict[Peer, list[float]] = {peer: [] for peer in peers}
        try:
            for number in range(arguments.passes + 1):
                work = draw_work(1000 * arguments.seed + number, vocab_size)
                for peer in peers:
                    rate = peer.serve(work)
                    if number:
                        rates[peer].append(rate)
                    print(f"{f'pass {number}' if number else 'warm-up'}: {peer.name} {rate:,.0f}", flush=True)
        finally:
            for peer in peers:
                peer.stop()
    report(rates)


if __name__ == "__main__":
    main()
