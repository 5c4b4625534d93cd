"""How fast OTLP is read into canonical tables, beside the parsers alone on the same bytes.

    python benchmarks/ingest.py                       # batches of about 8, 64 and 256; JSON lines and protobuf
    python benchmarks/ingest.py --batches 64 --passes 5

Each recording is made once with the bundled engine in virtual time, by the exporter that users have. Then reading it
(``read_trace``: all tables), ``orjson.loads`` of each line and protobuf's parser (upb) on the same spans take turns, on
one core; shown are medians. What the parsers return is dropped at once. "share of parser" is how much of the parser's
own rate is left when tables come out of it; "without GC": of the parser's rate with Python's garbage collector switched
off, as it is while a trace is read. Seconds are CPU time, since others may use the machine too. Peak memory is that of
reading in a process of its own.
"""

from __future__ import annotations

import argparse
import base64
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import orjson
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.trace.v1.trace_pb2 import TracesData
from rich.console import Console
from rich.progress import track
from rich.table import Table

from stallscope.trace import read_trace
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario

BATCHES = (8, 64, 256)
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
SCENARIO = """
name: ingest
duration_s: {duration}
engine: {{model: 8b, max_num_seqs: {slots}, max_num_batched_tokens: 2048, kv_blocks: 200000}}
tenants:
  chat:
    closed_loop: {{clients: {clients}, think_s: {{uniform: [0, 0.2]}}}}
    prompt_tokens: {{lognormal: {{median: 200, sigma: 0.8}}}}
    output_tokens: {{lognormal: {{median: 200, sigma: 0.6}}}}
  search:
    closed_loop: {{clients: {clients}, think_s: {{uniform: [0, 0.2]}}}}
    prompt_tokens: {{lognormal: {{median: 400, sigma: 0.8}}}}
    output_tokens: {{lognormal: {{median: 200, sigma: 0.6}}}}
"""


@dataclass(frozen=True)
class Figures:
    """Of one form of one recording: bytes, spans, and CPU seconds of reading and of the parser alone, with and without
    garbage collection."""

    form: str
    batch: float
    spans: int
    size: int
    read_s: float
    parse_s: float
    quiet_parse_s: float
    memory_mb: float


def make_recording(batch: int, seconds: float, folder: Path) -> Path:
    """A recording with batches of about ``batch``, since so many clients wait for answers, as JSON lines."""
    text = SCENARIO.format(duration=seconds, slots=2 * batch, clients=round(0.6 * batch))
    (folder / "scenario.yaml").write_text(text)
    out = folder / f"batch-{batch}.otlp.jsonl"
    record(load_scenario(str(folder / "scenario.yaml")), out, seed=0, executor="virtual", force=True)
    return out


def as_protobuf(lines: list[bytes]) -> list[bytes]:
    """The same, a message a line."""
    messages = []
    for line in lines:
        data = orjson.loads(line)
        for one in data["resourceSpans"]:
            for span in (span for scope in one["scopeSpans"] for span in scope["spans"]):
                for name in ("traceId", "spanId", "parentSpanId"):
                    if span.get(name):
                        span[name] = base64.b64encode(bytes.fromhex(span[name])).decode()
        messages.append(ParseDict(data, TracesData(), ignore_unknown_fields=True).SerializeToString())
    return messages


def measure(lines: Path, passes: int, folder: Path) -> list[Figures]:
    """Reading and parsing take turns, both forms in each pass."""
    texts = lines.read_bytes().splitlines()
    messages = as_protobuf(texts)
    binary = folder / f"{lines.stem}.binpb"
    binary.write_bytes(b"".join(messages))
    spans = sum(len(s["spans"]) for t in texts for r in orjson.loads(t)["resourceSpans"] for s in r["scopeSpans"])
    work: dict[str, tuple[Path, Callable[[], object]]] = {
        "JSON lines": (lines, partial(_each, orjson.loads, texts)),
        "protobuf": (binary, partial(_each, TracesData.FromString, messages)),
    }
    took: dict[str, list[tuple[float, float, float]]] = {form: [] for form in work}
    for _ in range(passes):
        for form, (path, parse) in work.items():
            took[form].append((_cpu(partial(read_trace, path)), _cpu(parse), _cpu(parse, collect_garbage=False)))
    steps = read_trace(lines).steps["batch_size"].to_numpy()
    return [
        Figures(
            form,
            float(steps.mean()),
            spans,
            path.stat().st_size,
            *(statistics.median(column) for column in zip(*took[form], strict=True)),
            _memory_mb(path),
        )
        for form, (path, _) in work.items()
    ]


def _each(parse: Callable[[bytes], object], texts: list[bytes]) -> None:
    for text in texts:
        parse(text)


def _cpu(work: Callable[[], object], *, collect_garbage: bool = True) -> float:
    if not collect_garbage:
        gc.disable()
    start = time.process_time()
    work()
    took = time.process_time() - start
    gc.enable()
    return took


def _memory_mb(path: Path) -> float:
    """Peak memory of a process that reads the file, above one that reads nothing."""
    peaks = [
        float(
            subprocess.run(
                [sys.executable, __file__, "--read", *arguments], check=True, capture_output=True, text=True
            ).stdout
        )
        for arguments in ([str(path)], [])
    ]
    return peaks[0] - peaks[1]


def _read_and_tell(paths: list[str]) -> None:
    for path in paths:
        read_trace(path)
    # Not getrusage: that counts what the process was before it became this program.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(peak.split()[1]) / 1024)


def show(figures: list[Figures], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in (
        "form",
        "batch",
        "spans",
        "bytes/span",
        "spans/s",
        "MB/s",
        "parser spans/s",
        "share of parser",
        "without GC",
        "MB",
    ):
        table.add_column(name, justify="left" if name == "form" else "right")
    for one in figures:
        table.add_row(
            one.form,
            f"{one.batch:.0f}",
            f"{one.spans:,}",
            f"{one.size / one.spans:,.0f}",
            f"{one.spans / one.read_s:,.0f}",
            f"{one.size / one.read_s / 1e6:.1f}",
            f"{one.spans / one.parse_s:,.0f}",
            f"{one.parse_s / one.read_s:.0%}",
            f"{one.quiet_parse_s / one.read_s:.0%}",
            f"{one.memory_mb:,.0f}",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=120.0, help="of traffic in each recording")
    parser.add_argument("--read", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.update(ONE_CORE)
    if arguments.read is not None:
        _read_and_tell(arguments.read)
        return
    figures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for batch in track(arguments.batches, "recording and reading", console=Console(stderr=True)):
            figures += measure(make_recording(batch, arguments.seconds, folder), arguments.passes, folder)
    show(figures, Console(width=120))


if __name__ == "__main__":
    main()
