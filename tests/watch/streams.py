"""Spans cut into windows, and what the trace reader says of the same spans, computed independently of the watch."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import orjson

from stallscope.trace import Trace
from stallscope.trace.decode import Collected, collect
from stallscope.trace.findings import Findings
from stallscope.trace.otlp import SpanGroup
from stallscope.trace.otlp.json import JsonDecoder
from stallscope.trace.otlp.spans import Resources
from stallscope.trace.rebuild import SeenRequest
from stallscope.watch.stream import Stream, Window
from stallscope.watch.tally import Tenants, Waited, Waits, spent
from tests.trace.recording import Recording, as_batches

Lines = Sequence[bytes]


def groups_of(lines: Lines, resources: Resources | None = None) -> list[SpanGroup]:
    """Lines of an OTLP file as what a decoder makes of them."""
    decoder = JsonDecoder(Resources() if resources is None else resources)
    return [SpanGroup(resource, spans, "", "", bad) for line in lines for resource, spans, bad in decoder.groups(line)]


def cut_at(lines: Lines, cuts: Sequence[int], shuffle: random.Random | None = None) -> list[list[bytes]]:
    """The lines in windows that end at these positions; those of a window in any order."""
    bounds = [0, *sorted(min(cut, len(lines)) for cut in cuts), len(lines)]
    windows = [list(lines[low:high]) for low, high in pairwise(bounds)]
    if shuffle is not None:
        for window in windows:
            shuffle.shuffle(window)
    return windows


@dataclass
class Told:
    """What a stream and the tally said over all windows, by tenant."""

    prefill: Counter[str] = field(default_factory=Counter)
    decode: Counter[str] = field(default_factory=Counter)
    recomputed: Counter[str] = field(default_factory=Counter)
    kv_block_ns: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    steps: int = 0
    longest_ns: int = 0  # of all slices, host gaps and gaps between tokens
    lost: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    preemptions: Counter[str] = field(default_factory=Counter)
    first_ns: dict[tuple[int, str], int] = field(
        default_factory=dict
    )  # by life and request: from its arrival to its first token
    gaps: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))  # lengths, ns
    whole_ns: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))  # of who left with tokens
    batches: dict[tuple[int, int], dict[str, tuple[bool, bool, int, int]]] = field(default_factory=dict)
    stream: Stream = field(default_factory=lambda: Stream("r0"))

    def add(self, window: Window, tenants: Tenants, waited: Waited, block_tokens: int) -> None:
        code = tenants.codes(window.requests)
        new = spent(window, code, len(tenants.names), block_tokens, None)
        for number, tenant in enumerate(tenants.names):
            self.prefill[tenant] += int(new.prefill_tokens[number])
            self.decode[tenant] += int(new.decode_tokens[number])
            self.recomputed[tenant] += int(new.recomputed_tokens[number])
            self.kv_block_ns[tenant] += float(new.kv_block_ns[number])
        self.steps += len(window.ready)
        self.lost += window.lost
        amounts = (window.ready - window.begin, window.host_ns, window.gap_ns)
        self.longest_ns = max(self.longest_ns, *(int(amount.max()) for amount in amounts))
        self.requests.update(tenants.names[tenants.code(one)] for one in window.joined)
        for number, times in enumerate(window.preempted.tolist()):
            self.preemptions[tenants.names[code[number]]] += times
        self._add_requests(window.requests, window, tenants)
        for row in range(len(waited.kind)):
            if not waited.open[row] and waited.kind[row] % 3 == 1:
                self.gaps[tenants.names[waited.tenant[row]]][int(waited.length[row])] += int(waited.weight[row])
        self._add_batches(window)

    def _add_requests(self, requests: Sequence[SeenRequest], window: Window, tenants: Tenants) -> None:
        for one in requests:
            if window.has(one.first_token_step):
                assert one.first_token_step is not None
                key = self.stream.lives, one.info.request_id
                assert key not in self.first_ns
                self.first_ns[key] = window.ready_of(one.first_token_step) - one.info.arrival_ns
            if one.left_step is not None and one.output_tokens:
                whole = window.ready_of(one.left_step) - one.info.arrival_ns
                self.whole_ns[tenants.names[tenants.code(one)]].append(whole)

    def _add_batches(self, window: Window) -> None:
        rows, step = window.rows, window.columns["step"].tolist()
        for row in range(len(rows)):
            name = window.requests[int(rows.request[row])].info.request_id
            context = int(rows.context[row])
            for position in range(int(rows.first[row]), int(rows.last[row]) + 1):
                batch = self.batches.setdefault((self.stream.lives, step[position]), {})
                assert name not in batch, "a request is once in a step"
                batch[name] = (bool(rows.prefill[row]), bool(rows.decode[row]), int(rows.tokens[row]), context)
                context += int(rows.tokens[row])


def watched(windows: Sequence[Lines], block_tokens: int = 16) -> Told:
    """What is told of lines that come in these windows; two more are empty."""
    told, tenants, waits, collected, resources = Told(), Tenants(), Waits(), Collected(), Resources()
    for lines in [*windows, [], []]:
        collect(groups_of(lines, resources), Findings(), collected)
        for spans in collected.replicas.values():
            window = told.stream.advance(spans.taken().steps(Findings()))
            if window is not None:
                code = tenants.codes(window.requests)
                told.add(window, tenants, waits.of(window, code, None), block_tokens)
            told.stream.done()
    return told


# --- the same from the tables of the trace ----------------------------------------------------------------------------


def batches_in(trace: Trace) -> dict[tuple[int, int], dict[str, tuple[bool, bool, int, int]]]:
    """Who was in which step (life, index), from the trace's tables; steps with nobody are left out."""
    found = {}
    for life, replica in enumerate(lives_of(trace), 1):
        for step, doing in as_batches(trace, replica).items():
            if doing:
                found[life, step] = {
                    name: (phase == "prefill", phase == "decode", tokens, context)
                    for name, (phase, tokens, context, *_) in doing.items()
                }
    return found


def lives_of(trace: Trace) -> list[str]:
    return list(dict.fromkeys(trace.steps["replica"].to_pylist()))


def tenant_of(trace: Trace) -> dict[tuple[str, str], str]:
    return {(row["replica"], row["request"]): row["tenant"] or "(unknown)" for row in trace.requests.to_pylist()}


def tokens_in(trace: Trace) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Tokens of prefills, of decodes, and those that were computed again, by tenant, step by step."""
    prefill, decode, recomputed = Counter[str](), Counter[str](), Counter[str]()
    tenants = tenant_of(trace)
    for replica in lives_of(trace):
        reached: dict[str, int] = {}
        for _, doing in sorted(as_batches(trace, replica).items()):
            for name, (phase, tokens, context, *_) in doing.items():
                tenant = tenants[replica, name]
                if phase == "prefill":
                    prefill[tenant] += tokens
                    recomputed[tenant] += max(min(context + tokens, reached.get(name, 0)) - context, 0)
                if phase == "decode":
                    decode[tenant] += tokens
                if phase in ("prefill", "decode"):
                    reached[name] = max(reached.get(name, 0), context + tokens)
    return prefill, decode, recomputed


def kv_block_ns_in(trace: Trace, block_tokens: int) -> dict[str, float]:
    """KV blocks times ns that each tenant held, step by step: half of a request's last block is not full."""
    tenants, held = tenant_of(trace), defaultdict[str, float](float)
    for replica in lives_of(trace):
        times = {row["step"]: row for row in trace.steps.to_pylist() if row["replica"] == replica}
        for step, doing in as_batches(trace, replica).items():
            row, before = times[step], times.get(step - 1)
            since = before["ready"] if before is not None else min(row["dispatched"], row["ready"])
            for name, (phase, tokens, context, *_) in doing.items():
                if phase in ("prefill", "decode", "paused"):
                    blocks = (context + tokens) / block_tokens + 0.5
                    held[tenants[replica, name]] += blocks * (row["ready"] - since)
    return held


def gaps_in(trace: Trace) -> dict[str, tuple[int, int, Counter[int]]]:
    """Of each tenant's inter-token gaps: how many there are, their sum (ns), and the lengths of the long ones."""
    tenants = tenant_of(trace)
    found: dict[str, tuple[int, int, Counter[int]]] = defaultdict(lambda: (0, 0, Counter()))
    for row in trace.gaps.to_pylist():
        tenant = tenants[row["replica"], row["request"]]
        count, total, long = found[tenant]
        if row["count"] == 1:
            long[row["length_ns"]] += 1
        found[tenant] = (count + row["count"], total + row["count"] * row["length_ns"], long)
    return found


def restarted(first: Recording, second: Recording, pause_ns: int) -> list[bytes]:
    """Steps of a process that ended, and of the one that took its place: step indices begin anew."""
    shift = first.steps[-1].ready_ns + pause_ns - second.steps[0].scheduled_ns
    return [*first.step_lines(), *(shifted(line, shift) for line in second.step_lines())]


def shifted(line: bytes, by_ns: int) -> bytes:
    """A line with a span at another time."""
    data = orjson.loads(line)
    span = data["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    for name in ("startTimeUnixNano", "endTimeUnixNano"):
        span[name] = str(int(span[name]) + by_ns)
    return orjson.dumps(data)
