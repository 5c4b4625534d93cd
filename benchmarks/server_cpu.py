"""Output tokens per second over HTTP: ``stallscope serve`` beside vLLM's server, on a CPU.

    python benchmarks/server_cpu.py --vllm-python VENV/bin/python

Both servers run from start to end and one is loaded at a time: 32 clients stream completions of token ids, each
sending its next request when its last is done. Clients live in a process of their own that hardly looks at what it
receives. Model, prompts and lengths are those of ``engine_cpu.py``: tiny-llama with random weights, at most 32
sequences and 2,048 tokens a step, no prefix cache. Each server runs with the threads (all cores, or half of them) and,
vLLM, in the data type that are fastest in a trial; ours chooses its type itself. Passes take turns, each with new
prompts, the same for both; the first is not counted. The result is the median, and the median of the ratios within a
pass. Run it on an idle machine: where others are on the cores, threads that wait for one another measure them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import TypedDict

from engine_cpu import DTYPES, MAX_NUM_BATCHED_TOKENS, MAX_NUM_SEQS, REQUESTS, TRIALS, Work, draw_work, write_config

CLIENTS = 32
START_S = 300.0
END = b"\r\n0\r\n\r\n"  # of a chunked body


class Pass(TypedDict):
    """What the clients saw: useful tokens per second, seconds to the first token (median), longest gaps (p99)."""

    tokens_per_s: float
    ttft_p50_s: float
    gap_p99_s: float


# --- the clients: a process that takes a pass a line, and answers with a line ---------------------------------------


class Client(asyncio.Protocol):
    """One connection: sends a request when told to, notes when something comes, and says when the answer is whole."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self._received: list[bytes] = []
        self._done: asyncio.Future[bytes] | None = None
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        if b"data: " in data:  # headers may come long before the first token
            self.times.append(time.perf_counter())
        self._received.append(data)
        if data.endswith(END[-5:]) and b"".join(self._received[-2:]).endswith(END) and self._done is not None:
            self._done.set_result(b"".join(self._received))

    def connection_lost(self, error: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(ConnectionError("the server closed the connection"))

    async def ask(self, request: bytes) -> bytes:
        assert self._transport is not None
        self.times, self._received = [time.perf_counter()], []
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._done


def as_request(prompt: list[int], tokens: int) -> bytes:
    body = json.dumps(
        {
            "model": "tiny-llama",
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "detokenize": False,
            "return_token_ids": True,
        }
    )
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


async def run_pass(port: int, work: Work) -> Pass:
    loop = asyncio.get_running_loop()
    waiting: Iterator[tuple[list[int], int]] = iter(zip(work["prompts"], work["outputs"], strict=True))
    firsts: list[float] = []
    gaps: list[float] = []
    made = 0

    async def work_off() -> None:
        nonlocal made
        transport, client = await loop.create_connection(Client, "127.0.0.1", port)
        for prompt, tokens in waiting:
            answer = await client.ask(as_request(prompt, tokens))
            counted = re.findall(rb'"completion_tokens":\s*(\d+)', answer)
            if not answer.startswith(b"HTTP/1.1 200") or not counted or int(counted[-1]) != tokens:
                raise SystemExit(f"not the answer to {tokens} tokens: {answer[:500]!r}")
            made += tokens
            firsts.append(client.times[1] - client.times[0])
            gaps.append(max((later - sooner for sooner, later in pairwise(client.times[1:])), default=0.0))
        transport.close()

    started = time.perf_counter()
    await asyncio.gather(*(work_off() for _ in range(CLIENTS)))
    seconds = time.perf_counter() - started
    return {
        "tokens_per_s": made / seconds,
        "ttft_p50_s": statistics.median(firsts),
        "gap_p99_s": statistics.quantiles(gaps, n=100)[-1],
    }


def run_clients() -> None:
    for line in sys.stdin:
        port, work = json.loads(line)
        print(json.dumps(asyncio.run(run_pass(port, work))), flush=True)


# --- the parent -----------------------------------------------------------------------------------------------------


class ServerUnderTest:
    """A server that runs; what it says goes to a log in ``folder``."""

    def __init__(self, name: str, command: list[str], port: int, folder: str, environment: dict[str, str]) -> None:
        self.name = name
        self.port = port
        self.log = Path(folder, f"{name}.log")
        with self.log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | environment)

    def is_ready(self) -> bool:
        """Waits until it answers; False if it ends instead."""
        deadline = time.monotonic() + START_S
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return True
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        return False

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def stallscope(folder: str, threads: int) -> ServerUnderTest:
    port = free_port()
    command = [sys.executable, "-m", "stallscope.cli", "serve", "--port", str(port), "--threads", str(threads)]
    command += ["--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)]
    command += ["--no-prefix-caching"]
    command += ["-o", str(Path(folder, f"{threads}.otlp.jsonl.zst"))]  # its telemetry is part of the price
    return ServerUnderTest(f"stallscope-{threads}t", command, port, folder, {})


def vllm(python: str, folder: str, dtype: str, threads: int) -> ServerUnderTest:
    port = free_port()
    command = [str(Path(python).parent / "vllm"), "serve", folder, "--served-model-name", "tiny-llama"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--load-format", "dummy", "--skip-tokenizer-init"]
    command += ["--dtype", dtype, "--max-model-len", "16384", "--enforce-eager", "--no-enable-prefix-caching"]
    command += ["--max-num-seqs", str(MAX_NUM_SEQS), "--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)]
    command += ["--disable-uvicorn-access-log"]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": str(threads),
    }
    return ServerUnderTest(f"vllm-{dtype}-{threads}t", command, port, folder, environment)


class Clients:
    """The process that loads one server at a time."""

    def __init__(self) -> None:
        command = [sys.executable, __file__, "--clients"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def load(self, server: ServerUnderTest, work: Work) -> Pass:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([server.port, work]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{server.name} failed:\n{server.log.read_text()[-2000:]}")
        seen: Pass = json.loads(line)
        return seen

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)


def fastest(starts: Sequence[Callable[[], ServerUnderTest]], clients: Clients, vocab: int) -> ServerUnderTest | None:
    """The fastest of the servers that ``starts`` start; None, and a line for each, if none does. Others are stopped."""
    best, most = None, -1.0
    for start in starts:
        server = start()
        if not server.is_ready():
            last = server.log.read_text().strip().splitlines()[-1:] or ["it said nothing"]
            print(f"{server.name}: skipped, it does not start: {last[0]}")
            server.stop()
            continue
        rate = 0.0
        for trial in range(TRIALS if len(starts) > 1 else 0):
            rate = clients.load(server, draw_work(-1 - trial, vocab, REQUESTS // 4))["tokens_per_s"]
            print(f"trial: {server.name} {rate:,.0f}", flush=True)
        slower = best if rate > most else server
        if rate > most:
            best, most = server, rate
        if slower is not None:
            slower.stop()
    return best


def report(seen: dict[ServerUnderTest, list[Pass]]) -> None:
    ours = next(iter(seen.values()))
    passes = "".join(f"{f'pass {number + 1}':>9}" for number in range(len(ours)))
    print(f"\n{'output tokens/s':18}{passes}{'median':>9}{'TTFT p50':>10}{'gap p99':>9}{'ours/peer':>11}  (min-max)")
    for server, values in seen.items():
        rates = [one["tokens_per_s"] for one in values]
        line = f"{server.name:18}" + "".join(f"{rate:9,.0f}" for rate in rates) + f"{statistics.median(rates):9,.0f}"
        line += f"{statistics.median(one['ttft_p50_s'] for one in values) * 1000:7,.0f} ms"
        line += f"{statistics.median(one['gap_p99_s'] for one in values) * 1000:6,.0f} ms"
        if values is not ours:
            ratios = [mine["tokens_per_s"] / rate for mine, rate in zip(ours, rates, strict=True)]
            line += f"{statistics.median(ratios):11.2f}  ({min(ratios):.2f}-{max(ratios):.2f})"
        print(line)


def main() -> None:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", default=os.environ.get("STALLSCOPE_VLLM_PYTHON"), metavar="PATH")
    parser.add_argument("--vllm-dtypes", nargs="*", choices=DTYPES, default=DTYPES, help="for vLLM to try")
    parser.add_argument("--threads", nargs="*", type=int, default=sorted({cores, max(1, cores // 2)}), help="to try")
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.clients:
        run_clients()
        return
    with tempfile.TemporaryDirectory() as folder:
        vocab = write_config(folder)
        starts = {"stallscope": [partial(stallscope, folder, threads) for threads in arguments.threads]}
        python = arguments.vllm_python
        if python is None or not Path(python).exists():
            print("vllm: skipped, name its interpreter with --vllm-python or STALLSCOPE_VLLM_PYTHON")
        else:
            settings = product(arguments.vllm_dtypes, arguments.threads)
            starts["vllm"] = [partial(vllm, python, folder, dtype, threads) for dtype, threads in settings]
        clients = Clients()
        seen: dict[ServerUnderTest, list[Pass]] = {}
        try:
            for tried in starts.values():
                if (server := fastest(tried, clients, vocab)) is not None:
                    seen[server] = []
            for number in range(arguments.passes + 1):
                work = draw_work(1000 * arguments.seed + number, vocab)
                for server, passes in seen.items():
                    one = clients.load(server, work)
                    if number:
                        passes.append(one)
                    name = f"pass {number}" if number else "warm-up"
                    print(f"{name}: {server.name} {one['tokens_per_s']:,.0f}", flush=True)
        finally:
            for server in seen:
                server.stop()
            clients.stop()
    if not seen or not next(iter(seen)).name.startswith("stallscope"):
        raise SystemExit("stallscope itself does not start")
    report(seen)


if __name__ == "__main__":
    main()
