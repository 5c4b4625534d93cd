"""Does one core keep up with a fleet? The watch of a collector, fed as fast as it takes it.

    python benchmarks/live.py                        # 200 replicas, 30 steps a second, batches of 64
    python benchmarks/live.py --replicas 50 --stalled 1

Recordings in virtual time, healthy ones and one in which a newcomer's prompts stall the others, are sent by
``--replicas`` replicas, each some seconds later than the one before; ``--stalled`` of them send the stalled one. What a
collector would hand over (protobuf, a message a second from each) is made outside of what is measured.

Printed is CPU time as a share of the time that the spans cover: below 1, one core keeps up. "decode" is from bytes to
spans, "windows" all that is counted, "diagnoses" looking into stalls, "score" what the collector's own process does
with it, "scrape" one exposition every ten seconds. "bare" is protobuf's parser alone. Diagnoses get what is left of a
core; those that were due then and had to wait are "put off", once a window. "named after" is how long after the
injection blame was first exposed, in the time of the spans.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, TracesData
from rich.console import Console
from rich.progress import track
from rich.table import Table

from stallscope.trace import read_trace
from stallscope.trace.otlp.protobuf import ProtobufDecoder
from stallscope.trace.otlp.spans import Resources, SpanGroup
from stallscope.watch.changes import Changes
from stallscope.watch.families import BLAME, SCRAPE_S, WINDOW_S
from stallscope.watch.replica import WatchedReplica
from stallscope.watch.scores import Scores
from stallscope.watch.watch import Watch
from stallscope.workloads.recording import VIRTUAL_START_NS, record
from stallscope.workloads.scenario import load_scenario
from stallscope_telemetry import names

CALM_S, STALL_S = 90, 60
STORY = """
name: live
duration_s: {seconds}
engine: {{model: 8b, max_num_seqs: 128, kv_blocks: 8192, max_num_batched_tokens: 2048}}
tenants:
  chat:
    arrivals: {{poisson_per_s: 5}}
    prompt_tokens: {{lognormal: {{median: 200, sigma: 0.6}}}}
    output_tokens: {{lognormal: {{median: 300, sigma: 0.3}}}}
  search:
    arrivals: {{poisson_per_s: 1.5}}
    prompt_tokens: {{lognormal: {{median: 500, sigma: 0.6}}}}
    output_tokens: {{lognormal: {{median: 80, sigma: 0.4}}}}
  agents:
    arrivals: {{poisson_per_s: 0.8}}
    prompt_tokens: {{lognormal: {{median: 900, sigma: 0.4}}}}
    output_tokens: {{lognormal: {{median: 250, sigma: 0.4}}}}
inject:
  - {{engine: throttle, from_s: 0, to_s: {seconds}, factor: {slowdown}}}
{injected}
"""
FLOOD = (
    "  - {{tenant: reports, from_s: {at}, to_s: {until}, poisson_per_s: 0.5, prompt_tokens: 12000, output_tokens: 40}}"
)
SLOWDOWN = 2.15  # so that a step with such a batch takes 33 ms
SEEDS = 4  # recordings of healthy traffic, in turns


@dataclass
class Recording:
    """A replica's spans by second, as messages without a resource, and the attributes of that."""

    by_second: list[bytes]
    resource: TracesData
    steps: int
    batch: float  # requests in a step, on average


@dataclass
class Spent:
    """CPU seconds by part, and what came of it."""

    bare: float = 0.0
    decode: float = 0.0
    windows: float = 0.0
    diagnoses: float = 0.0
    score: float = 0.0
    scrapes: list[float] = field(default_factory=list)
    looks: int = 0
    put_off: int = 0
    spans: int = 0
    named_after: dict[str, float] = field(default_factory=dict)


def make(folder: Path, seed: int, injected: str = "") -> Recording:
    story, out = folder / "story.yaml", folder / "live.otlp.jsonl"
    text = STORY.format(seconds=CALM_S + STALL_S, slowdown=SLOWDOWN, injected=injected)
    story.write_text(text, encoding="utf-8")
    record(load_scenario(str(story)), out, seed=seed, executor="virtual", force=True)
    return by_second(out, float(read_trace(out).steps["batch_size"].to_numpy().mean()))


def by_second(path: Path, batch: float) -> Recording:
    """The spans of a file, as protobuf, by the second in which each ended."""
    import orjson
    from google.protobuf.json_format import ParseDict

    seconds: dict[int, ResourceSpans] = {}
    head = TracesData()
    steps = 0
    for line in path.read_bytes().splitlines():
        data = orjson.loads(line)
        for resource in data["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                for span in scope["spans"]:
                    for key in ("traceId", "spanId", "parentSpanId"):
                        if span.get(key):
                            span[key] = base64_of(span[key])
            message = ParseDict({"resourceSpans": [resource]}, TracesData(), ignore_unknown_fields=True)
            if not head.resource_spans:
                head.resource_spans.add().resource.CopyFrom(message.resource_spans[0].resource)
            for scope_spans in message.resource_spans[0].scope_spans:
                for one in scope_spans.spans:
                    second = (one.end_time_unix_nano - VIRTUAL_START_NS) // 1_000_000_000
                    there = seconds.setdefault(second, ResourceSpans())
                    if not there.scope_spans:
                        there.scope_spans.add().scope.CopyFrom(scope_spans.scope)
                    there.scope_spans[0].spans.append(one)
                    steps += one.name == names.STEP_SPAN
    empty = ResourceSpans()
    return Recording(
        [seconds.get(number, empty).SerializeToString() for number in range(CALM_S + STALL_S)], head, steps, batch
    )


def base64_of(text: str) -> str:
    import base64

    return base64.b64encode(bytes.fromhex(text)).decode()


def messages(recording: Recording, replica: str, second: int) -> bytes:
    """What a replica sends in a second: its name in place of the recorded one."""
    if not 0 <= second < len(recording.by_second):
        return b""
    data = TracesData()
    spans = data.resource_spans.add()
    spans.ParseFromString(recording.by_second[second])
    if not spans.scope_spans:
        return b""
    spans.resource.CopyFrom(recording.resource.resource_spans[0].resource)
    for attribute in spans.resource.attributes:
        if attribute.key == names.REPLICA:
            attribute.value.string_value = replica
    return data.SerializeToString()


def run(healthy: list[Recording], stalled: Recording, replicas: int, bad: int, seconds: int) -> Spent:
    spent = Spent()
    now = VIRTUAL_START_NS
    changes, scores = Changes(), Scores(clock=lambda: now)
    watch = Watch(changes)
    decoder = ProtobufDecoder(Resources())
    look = WatchedReplica.look

    def timed_look(self: WatchedReplica) -> None:
        begun = time.process_time()
        look(self)
        spent.diagnoses += time.process_time() - begun
        spent.looks += 1

    WatchedReplica.look = timed_look  # type: ignore[method-assign]
    gc.disable()
    for window in track(range(seconds // WINDOW_S), "watching", console=Console(stderr=True)):
        batch = list(sent(healthy, stalled, replicas, bad, window))
        begun = time.process_time()
        for message in batch:
            TracesData.FromString(message)
        spent.bare += time.process_time() - begun
        begun = time.process_time()
        groups = [SpanGroup(of, spans, "", "", wrong) for one in batch for of, spans, wrong in decoder.groups(one)]
        spent.decode += time.process_time() - begun
        spent.spans += sum(len(group.spans) for group in groups)
        now = VIRTUAL_START_NS + (window + 1) * WINDOW_S * 1_000_000_000
        before, left = spent.diagnoses, WINDOW_S - (time.process_time() - begun)
        begun = time.process_time()
        until = begun + left
        watch.take(groups)
        watch.close_window(now, partial(_is_before, until))
        spent.put_off += sum(one.wants_look for one in watch.replicas.values())
        spent.windows += time.process_time() - begun - (spent.diagnoses - before)
        begun = time.process_time()
        changes.taken().apply(scores)
        spent.score += time.process_time() - begun
        if (window + 1) * WINDOW_S % SCRAPE_S == 0:
            begun = time.process_time()
            text = scores.exposition()
            spent.scrapes.append(time.process_time() - begun)
            if b'culprit="reports"' in text and not spent.named_after:
                for line in text.decode().splitlines():
                    if line.startswith(BLAME.name) and 'culprit="reports"' in line and not line.endswith(" 0.0"):
                        spent.named_after["reports"] = (window + 1) * WINDOW_S - CALM_S
        del groups, batch
        gc.collect()
    WatchedReplica.look = look  # type: ignore[method-assign]
    return spent


def _is_before(until: float) -> bool:
    """A core has as much time for a window as the window is long."""
    return time.process_time() < until


def sent(healthy: list[Recording], stalled: Recording, replicas: int, bad: int, window: int) -> Iterator[bytes]:
    for number in range(replicas):
        recording = stalled if number < bad else healthy[number % len(healthy)]
        for second in range(window * WINDOW_S, (window + 1) * WINDOW_S):
            if message := messages(recording, f"replica-{number}", second - number % 10):
                yield message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=200)
    parser.add_argument("--stalled", type=int, nargs="*", default=[0, 4], help="of them; a row each")
    parser.add_argument("--seconds", type=int, default=CALM_S + STALL_S)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as scratch:
        healthy = [make(Path(scratch), seed) for seed in range(SEEDS)]
        stalled = make(Path(scratch), SEEDS, FLOOD.format(at=CALM_S, until=CALM_S + STALL_S))
    rate = sum(one.steps for one in healthy) / SEEDS / (CALM_S + STALL_S)
    batch = sum(one.batch for one in healthy) / SEEDS
    table = Table(
        title=f"{arguments.replicas} replicas, {rate:.0f} steps a second of {batch:.0f} requests: CPU time over time"
    )
    for name in ("stalled", "spans/s", "bare", "decode", "windows", "diagnoses", "watch in all", "score", "scrape ms"):
        table.add_column(name, justify="right")
    table.add_column("diagnoses made, put off", justify="right")
    table.add_column("named after", justify="right")
    for bad in arguments.stalled:
        spent = run(healthy, stalled, arguments.replicas, bad, arguments.seconds)
        shares = [part / arguments.seconds for part in (spent.bare, spent.decode, spent.windows, spent.diagnoses)]
        table.add_row(
            str(bad),
            f"{spent.spans / arguments.seconds:,.0f}",
            *(f"{share:.3f}" for share in shares),
            f"{sum(shares[1:]):.3f}",
            f"{spent.score / arguments.seconds:.3f}",
            f"{statistics.median(spent.scrapes) * 1000:.0f}",
            f"{spent.looks}, {spent.put_off}",
            ", ".join(f"{name}: {after:.0f} s" for name, after in spent.named_after.items()) or "-",
        )
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
