"""How fast a trace is analysed: steps a second and peak memory against the number of steps, on one core.

    python benchmarks/analysis.py                          # 10^4 to 5x10^6 steps; writes 2 GB below --folder
    python benchmarks/analysis.py --sizes 10000 100000     # some sizes only
    python benchmarks/analysis.py --stall-every 20000      # steps; one stall in 100,000 unless said
    python benchmarks/analysis.py --sizes --replays 10000 100000   # replays alone
    python benchmarks/analysis.py --sizes --replays --day   # a day of a busy replica, by the command, on two processes

Each size is written to Parquet once (a made-up engine with a batch of 64 and 20 tenants; its traces pass
``Trace.validate``) and then read and analysed in a process of its own, held to one core, so that its peak memory is
that of this trace alone. Seconds are CPU time, since others may use the machine too. Without replays. ``partition`` is
Parquet to segments of lives, cost model and running totals; ``incidents`` is every wait's delay, the charges and the
stretches with stalled waits; ``verdicts`` is who is named. Bytes a step are those of steps and residency in Parquet,
and of all tables.

Replays are measured on recordings of the bundled engine in virtual time with a batch of about 16, which grow with the
steps: each is read, and replayed as a whole.

The day has 4.3 million steps and 1.1 million requests in 24 hours, and goes from Parquet to the report without replays
through ``stallscope analyze --jobs 2``. Wall time is beside whatever else runs on the machine; half the CPU time is
what two cores of its own would take at least. Memory is the most that all its processes held at one time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from stallscope.diagnosis import Diagnosis
from stallscope.trace import Trace, read_trace, write_parquet
from stallscope.trace.gaps import GAP_FLOOR_STEPS
from stallscope.trace.schema import TABLES
from stallscope.trace.tables import encode, names_at, plain_table, same

Ints = npt.NDArray[np.int64]

SIZES = (10_000, 100_000, 1_000_000, 5_000_000)
BATCH, TENANTS = 64, 20
HEAVY = TENANTS - 1  # sends the prompts that stall everybody
START_NS = 1_800_000_000_000_000_000
MS = 1_000_000
DAY_STEPS, DAY_FIXED_NS = 4_320_000, 12_750_000  # 20 ms a step
FIXED_NS, PREFILL_NS, DECODE_NS, CONTEXT_NS = 4 * MS, 10_000, 60_000, 80
LARGEST_CHECKED = 1_000_000  # above, checking the trace takes longer than it is worth
ONE_CORE = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
PHASES = ("waiting", "prefill", "decode", "paused", "preempted")
WAITING, PREFILL, DECODE, PAUSED, PREEMPTED = range(len(PHASES))
REASONS = ("budget", "kv", "slots", "head")


# --- a trace ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Requests:
    """What was asked for, one entry a request; lengths in steps, ``start`` is the step in which it gets a slot."""

    slot: Ints
    tenant: Ints
    start: Ints
    waits: Ints
    chunks: Ints
    chunk_tokens: Ints
    pauses: Ints
    decodes: Ints
    preempted_after: Ints  # decode steps; -1: never
    preempted_for: Ints


@dataclass(frozen=True, eq=False)
class _Rows:
    """Residency rows; ``part`` is the position in the life."""

    request: Ints
    phase: Ints
    first: Ints
    last: Ints
    tokens: Ints
    context: Ints
    part: Ints


def synthetic(steps: int, stalled: int, seed: int = 0, fixed_ns: int = FIXED_NS) -> Trace:
    """A trace of ``steps`` steps, in ``stalled`` stretches of which a tenant's huge prompts or a pause hold all up;
    ``fixed_ns`` is what a step takes whatever is in it."""
    rng = np.random.default_rng(seed)
    heavy_at = np.linspace(0, steps, stalled + 2, dtype=np.int64)[1:-1]
    requests = _requests(rng, steps, heavy_at[::2])
    rows = _rows(requests, steps)
    present = np.unique(rows.request)
    if len(present) < len(requests.start):  # beyond the last step
        requests = _Requests(**{name: column[present] for name, column in vars(requests).items()})
        rows = _Rows(**{**vars(rows), "request": np.searchsorted(present, rows.request)})
    table, dispatched, ready = _step_table(rng, rows, steps, heavy_at[1::2], fixed_ns)
    scheduled = table["scheduled"]
    names = [f"cmpl-{value:032x}" for value in rng.integers(0, 2**62, len(requests.start)).tolist()]
    first_of = np.searchsorted(rows.request, np.arange(len(names)))  # rows are ordered by request and step
    entered = rows.first[first_of]
    # They arrive while the step before is in flight.
    before = np.maximum(entered - 1, 0)
    spread = rng.random(len(names)) * (ready[before] - scheduled[before])
    arrival = np.where(entered > 0, ready[before] - spread.astype(np.int64), scheduled[0] - MS)
    by_arrival = np.argsort(arrival, kind="stable")
    gaps = _gap_columns(rng, rows, requests, ready)
    tenants = [f"tenant-{code:02d}" for code in range(TENANTS)]
    parts = {
        "replicas": _replica_table(scheduled[0]),
        "steps": plain_table("steps", {"replica": same("r0", steps), **table}, steps),
        "residency": _residency_table(rng, rows, requests, names, tenants),
        "requests": _request_table(rows, requests, names, tenants, arrival, scheduled, ready).take(by_arrival),
        "gaps": plain_table(
            "gaps",
            {"replica": same("r0", len(gaps["start"])), **gaps, "request": names_at(names, gaps["request"])},
            len(gaps["start"]),
        ),
        "coverage": plain_table(
            "coverage",
            {
                "replica": ["r0"], "start": [scheduled[0]], "end": [ready[-1]], "fidelity": [3],
                "steps_seen": [steps], "steps_lost": [0], "spans_dropped": [0], "sampled_share": [1.0],
            },
            1,
        ),
    }  # fmt: skip
    assert (dispatched <= ready).all()
    return Trace({name: encode(name, [parts[name]] if name in parts else []) for name in TABLES}, "synthetic")


def _requests(rng: np.random.Generator, steps: int, heavy_at: Ints) -> _Requests:
    """Requests follow one another in each of the slots; the heavy tenant's large ones come at given steps."""
    count = steps // 150 + 4  # a slot: enough to fill all steps
    shape = (BATCH, count)
    waits = np.where(rng.random(shape) < 0.3, rng.geometric(0.3, shape), 0)
    chunks = np.where(rng.random(shape) < 0.1, rng.integers(2, 6, shape), 1)
    chunk_tokens = rng.integers(20, 400, shape)
    pauses = np.where(rng.random(shape) < 0.03, rng.integers(1, 5, shape), 0)
    decodes = 20 + rng.geometric(1 / 220, shape)
    preempted = rng.random(shape) < 0.02
    preempted_after = np.where(preempted, np.maximum(decodes // 2, 1), -1)
    preempted_for = np.where(preempted, rng.integers(1, 20, shape), 0)
    length = chunks + pauses + decodes + preempted_for + preempted
    start = 5 + rng.integers(0, 200, (BATCH, 1)) + np.cumsum(length + rng.integers(0, 3, shape), axis=1) - length
    tenant = rng.integers(0, HEAVY, shape)
    # In each stalled stretch the heavy tenant gets some slots' next requests, with prompts a hundred times as long.
    for step in heavy_at:
        for slot in rng.choice(BATCH, 6, replace=False):
            one = slot, min(int(np.searchsorted(start[slot], step)), count - 1)
            tenant[one], chunk_tokens[one] = HEAVY, 20_000
    slot = np.repeat(np.arange(BATCH), count)
    columns = (tenant, start, waits, chunks, chunk_tokens, pauses, decodes, preempted_after, preempted_for)
    kept = np.flatnonzero(start.ravel() - waits.ravel() < steps)
    order = kept[np.argsort((start - waits).ravel()[kept], kind="stable")]
    return _Requests(slot[order], *(np.ascontiguousarray(column.ravel()[order], dtype=np.int64) for column in columns))


def _rows(r: _Requests, steps: int) -> _Rows:
    """Rows of all requests, cut where the trace ends, ordered by request and step."""
    request = np.arange(len(r.start))
    prompt = r.chunks * r.chunk_tokens
    early = np.where(r.preempted_after >= 0, r.preempted_after, r.decodes)
    late = r.decodes - early
    redo = (r.preempted_after >= 0).astype(np.int64)
    zero, one = np.zeros_like(request), np.ones_like(request)
    parts = (
        (WAITING, r.waits, zero, zero),
        (PREFILL, r.chunks, r.chunk_tokens, zero),
        (PAUSED, r.pauses, zero, prompt),
        (DECODE, early, one, prompt),
        (PREEMPTED, r.preempted_for, zero, zero),
        (PREFILL, redo, prompt + early, zero),
        (DECODE, late, one, prompt + early),
    )
    lengths = np.stack([length for _, length, _, _ in parts], axis=1)
    first = (r.start - r.waits)[:, None] + np.cumsum(lengths, axis=1) - lengths
    last = np.minimum(first + lengths, steps) - 1
    phase = np.broadcast_to(np.array([phase for phase, _, _, _ in parts]), lengths.shape)
    part = np.broadcast_to(np.arange(len(parts)), lengths.shape)
    tokens, context = (np.stack([each[which] for each in parts], axis=1) for which in (2, 3))
    kept = last >= first
    return _Rows(
        *(
            np.ascontiguousarray(column[kept], dtype=np.int64)
            for column in (np.broadcast_to(request[:, None], lengths.shape), phase, first, last, tokens, context, part)
        )
    )


def _sums(rows: _Rows, chosen: npt.NDArray[np.bool_], amount: Ints, steps: int, slope: Ints | None = None) -> Ints:
    """Of each step, the sum of ``amount + slope * (step - first)`` over the chosen rows."""

    def spread(value: Ints) -> Ints:
        change = np.bincount(rows.first[chosen], value[chosen], steps + 1)
        change -= np.bincount(rows.last[chosen] + 1, value[chosen], steps + 1)
        return np.rint(np.cumsum(change)[:steps]).astype(np.int64)

    if slope is None:
        return spread(amount)
    return spread(amount - slope * rows.first) + spread(slope) * np.arange(steps)


def _step_table(
    rng: np.random.Generator, rows: _Rows, steps: int, paused_at: Ints, fixed_ns: int
) -> tuple[dict[str, Ints], Ints, Ints]:
    """Columns of the steps, and when they were dispatched and ready; before each of ``paused_at`` lies a pause."""
    ones = np.ones_like(rows.tokens)
    is_prefill, is_decode, is_paused = rows.phase == PREFILL, rows.phase == DECODE, rows.phase == PAUSED
    prefill_tokens = _sums(rows, is_prefill, rows.tokens, steps)
    decode_tokens = _sums(rows, is_decode, rows.tokens, steps)
    running = _sums(rows, is_prefill | is_decode | is_paused, ones, steps)
    context = _sums(rows, is_decode, rows.context, steps, slope=rows.tokens)
    held = _sums(rows, is_prefill | is_decode | is_paused, rows.context + rows.tokens, steps, slope=rows.tokens)
    cost = fixed_ns + PREFILL_NS * prefill_tokens + DECODE_NS * decode_tokens + CONTEXT_NS * context
    taken = (cost * rng.lognormal(0, 0.05, steps)).astype(np.int64) + 1000
    host = rng.integers(50_000, 300_000, steps)
    delay = rng.integers(20_000, 100_000, steps)
    host[paused_at] += 3000 * MS
    ready = START_NS + np.cumsum(host + delay + taken)
    dispatched = ready - taken
    columns = {
        "step": np.arange(steps),
        "scheduled": dispatched - delay,
        "dispatched": dispatched,
        "ready": ready,
        "idle_ns": np.zeros(steps, dtype=np.int64),
        "sched_ns": host // 2,
        "prefill_tokens": prefill_tokens,
        "decode_tokens": decode_tokens,
        "batch_size": _sums(rows, is_prefill | is_decode, ones, steps),
        "running": running,
        "waiting": _sums(rows, (rows.phase == WAITING) | (rows.phase == PREEMPTED), ones, steps),
        "kv_used": held // 16 + running,
        "kv_cached": np.zeros(steps, dtype=np.int64),
        "kv_total": np.full(steps, 1_000_000),
        "budget": np.full(steps, 8192),
    }
    return columns, dispatched, ready


def _residency_table(
    rng: np.random.Generator, rows: _Rows, requests: _Requests, names: list[str], tenants: list[str]
) -> pa.Table:
    waits = (rows.phase == WAITING) | (rows.phase == PREEMPTED)
    reason = np.where(waits, rng.integers(0, len(REASONS), len(waits)), -1)
    # Who took the blocks: somebody who came a little earlier.
    taken = (rows.phase == PREEMPTED) | ((rows.phase == PREFILL) & (rows.part > 1))
    holder = np.where(taken, np.maximum(rows.request - 1, 0), -1)
    order = np.lexsort((rows.request, rows.first))
    table = plain_table(
        "residency",
        {
            "replica": same("r0", len(waits)),
            "request": names_at(names, rows.request),
            "tenant": names_at(tenants, requests.tenant[rows.request]),
            "phase": names_at(PHASES, rows.phase),
            "reason": names_at(REASONS, reason),
            "first_step": rows.first,
            "last_step": rows.last,
            "tokens": rows.tokens,
            "context_start": rows.context,
            "kv_blocks": np.where(waits, 0, (rows.context + rows.tokens) // 16 + 1),
            "holder": names_at(names, holder),
        },
        len(waits),
    )
    return table.take(order)


def _request_table(
    rows: _Rows, r: _Requests, names: list[str], tenants: list[str], arrival: Ints, scheduled: Ints, ready: Ints
) -> pa.Table:
    count, steps = len(names), len(ready)
    prefilled = r.start + r.chunks - 1  # the last step of its prefill
    ended = r.start + r.chunks + r.pauses + r.decodes + r.preempted_for + (r.preempted_after >= 0) - 1

    def at(times: Ints, step: Ints) -> pa.Array:
        return pa.array(times[np.minimum(step, steps - 1)], mask=step >= steps)

    decoded = np.zeros(count, dtype=np.int64)
    is_decode = rows.phase == DECODE
    np.add.at(decoded, rows.request[is_decode], (rows.last - rows.first + 1)[is_decode])
    done = ended < steps
    return plain_table(
        "requests",
        {
            "replica": same("r0", count),
            "request": pa.array(names),
            "handle": np.arange(count),
            "tenant": names_at(tenants, r.tenant),
            "tenant_source": same("api_key", count),
            "model": same("made-up", count),
            "arrival": arrival,
            "queued": at(scheduled, r.start - r.waits),
            "scheduled": at(scheduled, r.start),
            "first_token": at(ready, prefilled),
            "end": at(ready, ended),
            "prompt_tokens": r.chunks * r.chunk_tokens,
            "cached_tokens": np.zeros(count, dtype=np.int64),
            "max_tokens": r.decodes + 1,
            "output_tokens": np.where(prefilled < steps, decoded + 1, 0),
            "preemptions": (r.preempted_after >= 0).astype(np.int64),
            "state": names_at(("open", "finished"), done.astype(np.int64)),
            "finish_reason": names_at(("length",), np.where(done, 0, -1)),
        },
        count,
    )


def _gap_columns(rng: np.random.Generator, rows: _Rows, r: _Requests, ready: Ints) -> dict[str, Ints]:
    """Gaps from the floor on one by one, and of each request two octaves of shorter ones."""
    length = np.diff(ready, prepend=ready[0])
    floor = GAP_FLOOR_STEPS * int(np.median(length))
    decodes = np.flatnonzero(rows.phase == DECODE)
    long_steps = np.flatnonzero(length >= floor)
    # Every decode in a long step has a long gap there.
    low = np.searchsorted(long_steps, rows.first[decodes])
    high = np.searchsorted(long_steps, rows.last[decodes], side="right")
    inside = high - low
    one = np.repeat(decodes, inside)
    at = long_steps[np.repeat(low - (np.cumsum(inside) - inside), inside) + np.arange(inside.sum())]
    first, last = rows.first[decodes], rows.last[decodes]
    usual = np.maximum((ready[last] - ready[np.maximum(first - 1, 0)]) // (last - first + 1), 1)
    usual = np.minimum(usual, floor - 1)
    few = (last - first + 1) // 5
    some = few > 0
    request = np.concatenate([rows.request[one], rows.request[decodes], rows.request[decodes[some]]])
    start = np.concatenate([ready[at - 1], ready[np.maximum(first - 1, 0)], ready[first[some]]])
    gap = np.concatenate([length[at], usual, (usual * 3 // 2)[some]])
    count = np.concatenate([np.ones_like(at), np.maximum(last - first + 1 - few, 2), few[some] + 1])
    order = np.lexsort((gap, start, request))
    return {"request": request[order], "start": start[order], "length_ns": gap[order], "count": count[order]}


def _replica_table(since: int) -> pa.Table:
    columns = {"replica": ["r0"], "since": [int(since)], "model": ["made-up"], "policy": ["fcfs"], "block_size": [16]}
    return plain_table("replicas", columns, 1)


# --- measured in a process of its own -----------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One analysis: CPU seconds of its parts, peak memory of its process in MB."""

    steps: int
    requests: int
    rows: int
    stalled_waits: int
    incidents: int
    partition_s: float
    incidents_s: float
    verdicts_s: float
    peak_mb: float
    imported_mb: float

    @property
    def steps_per_s(self) -> float:
        """Through partition, charges and incidents."""
        return self.steps / (self.partition_s + self.incidents_s)


def analyse(folder: Path, verdicts: bool) -> Measured:
    """Reads and analyses the trace in ``folder``, as ``diagnose`` does without replays; verdicts only if asked for."""
    from stallscope.diagnosis.changes import find_changes
    from stallscope.diagnosis.incidents import find_episodes, find_windows, measure_waits
    from stallscope.diagnosis.replica import replicas
    from stallscope.diagnosis.verdict import judge

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    imported = _peak_mb()
    begin = time.process_time()
    (replica,) = replicas(read_trace(folder))
    partition = time.process_time()
    changes = find_changes(replica)
    waits = measure_waits(replica, changes=changes)
    episodes = find_episodes(waits)
    windows = find_windows(waits, episodes, replica)
    incidents = time.process_time()
    if verdicts:
        list(judge(replica, waits, changes, episodes, windows))
    end = time.process_time()
    return Measured(
        len(replica.timeline),
        len(replica.requests),
        len(replica.ledger.stretches),
        int(waits.table["stalled"].sum()),
        len(windows),
        partition - begin,
        incidents - partition,
        end - incidents,
        _peak_mb(),
        imported,
    )


# --- replays ------------------------------------------------------------------------------------------------

STEPS_A_SECOND = 80  # of the story below, about
STORY = """
name: replayed
about: A batch of about 16, some prompts in chunks, a cache that is full now and then.
duration_s: {seconds}
engine: {{model: 8b, max_num_seqs: 48, max_num_batched_tokens: 1024, kv_blocks: 3000}}
tenants:
  chat:
    arrivals: {{poisson_per_s: 7}}
    prompt_tokens: {{lognormal: {{median: 260, sigma: 0.75}}}}
    output_tokens: {{lognormal: {{median: 170, sigma: 0.5}}}}
  search:
    arrivals: {{poisson_per_s: 2.5}}
    prompt_tokens: {{lognormal: {{median: 900, sigma: 0.6}}}}
    output_tokens: {{lognormal: {{median: 12, sigma: 0.5}}}}
expect: {{verdict: healthy}}
"""


@dataclass(frozen=True)
class Replayed:
    """One replay: recorded steps and their mean batch, and CPU seconds to prepare it and to run it."""

    steps: int
    batch: float
    agreement: float
    prepare_s: float
    replay_s: float


def replayed(folder: Path, steps: int) -> Replayed:
    """Records about so many steps into ``folder``, if they are not there, and replays them."""
    from stallscope.diagnosis.replay.replayer import prepare_replay
    from stallscope.diagnosis.replay.run import replay
    from stallscope.diagnosis.replay.usual import as_recorded
    from stallscope.diagnosis.replica import replicas
    from stallscope.workloads.recording import record
    from stallscope.workloads.scenario import load_scenario

    recording, story = folder / f"replay-{steps}.otlp.jsonl", folder / f"replay-{steps}.yaml"
    if not recording.exists():
        folder.mkdir(parents=True, exist_ok=True)
        story.write_text(STORY.format(seconds=max(steps // STEPS_A_SECOND, 10)), encoding="utf-8")
        record(load_scenario(story), recording, seed=0, executor="virtual")
    (replica,) = replicas(read_trace(recording))
    timeline = replica.timeline
    begin = time.process_time()
    replayer = prepare_replay(replica)
    prepared = time.process_time()
    if replayer.history is None or replayer.machine is None:
        raise ValueError(f"{recording} can't be replayed: {replayer.check.reason}")
    last = int(timeline.end[-1])
    outcome = replay(
        replayer.history, replayer.machine, as_recorded(replayer.history, int(timeline.before[0]), last, last), 0
    )
    end = time.process_time()
    batch = float(replica.steps["batch_size"].mean())
    return Replayed(outcome.steps, batch, replayer.check.forced_agreement, prepared - begin, end - prepared)


def _peak_mb() -> float:
    """Most memory that this process has held so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1000


def make(folder: Path, steps: int, stalled: int, fixed_ns: int) -> None:
    """Writes the trace once; raises ValueError if it is not sound."""
    trace = synthetic(steps, stalled, fixed_ns=fixed_ns)
    findings = trace.validate() if steps <= LARGEST_CHECKED else []
    if findings:
        raise ValueError(f"the made-up trace is not sound: {findings}")
    write_parquet(trace, folder)


def _in_a_process(*arguments: str) -> str:
    command = [sys.executable, __file__, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **ONE_CORE}).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="steps")
    parser.add_argument("--stall-every", type=int, default=100_000, help="steps from one stall to the next; at least 2")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "stallscope-analysis")
    parser.add_argument("--passes", type=int, default=3, help="analyses of each size; the fastest counts")
    parser.add_argument("--verdicts", action="store_true", help="judge the incidents, too")
    parser.add_argument("--replays", type=int, nargs="*", default=SIZES[:2], help="steps of the recordings to replay")
    parser.add_argument("--replay", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--day", action="store_true", help="a day of one replica, too")
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--fixed-ns", type=int, default=FIXED_NS, help=argparse.SUPPRESS)
    parser.add_argument("--analyse", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.make:
        make(chosen.folder, chosen.make, max(2, chosen.make // chosen.stall_every), chosen.fixed_ns)
        return
    if chosen.analyse:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(json.dumps(asdict(analyse(chosen.analyse, chosen.verdicts))))
        return
    if chosen.replay:
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        print(json.dumps(asdict(replayed(chosen.folder, chosen.replay))))
        return
    console = Console(width=160)
    if chosen.sizes:
        console.print(_analyses(chosen))
    if chosen.replays:
        console.print(_replays(chosen))
    if chosen.day:
        console.print(_day(chosen, console))


def _analyses(chosen: argparse.Namespace) -> Table:
    table = Table("steps", "requests", "rows", "stalled waits", "incidents", "partition s", "incidents s", "verdicts s",
                  "steps/s", "peak MB", "of it imports", "bytes a step", "of all tables")  # fmt: skip
    for steps in chosen.sizes:
        folder = chosen.folder / f"{steps}-{chosen.stall_every}"
        if not folder.exists():
            _in_a_process("--make", str(steps), "--stall-every", str(chosen.stall_every), "--folder", str(folder))
        command = ("--analyse", str(folder), *(["--verdicts"] if chosen.verdicts else []))
        runs = [Measured(**json.loads(_in_a_process(*command))) for _ in range(chosen.passes)]
        one = max(runs, key=lambda run: run.steps_per_s)
        table.add_row(
            *(f"{value:,}" for value in (one.steps, one.requests, one.rows, one.stalled_waits, one.incidents)),
            *(f"{value:.2f}" for value in (one.partition_s, one.incidents_s, one.verdicts_s)),
            *(f"{value:,.0f}" for value in (one.steps_per_s, max(run.peak_mb for run in runs), one.imported_mb)),
            f"{_stored_bytes(folder, 'steps', 'residency') / one.steps:.1f}",
            f"{_stored_bytes(folder, *TABLES) / one.steps:.1f}",
        )
    return table


def _day(chosen: argparse.Namespace, console: Console) -> Table:
    folder = chosen.folder / f"day-{chosen.stall_every}"
    if not folder.exists():
        made = ("--make", str(DAY_STEPS), "--fixed-ns", str(DAY_FIXED_NS), "--stall-every", str(chosen.stall_every))
        _in_a_process(*made, "--folder", str(folder))
    table = Table(
        "steps", "requests", "hours", "incidents", "wall s", "CPU s", "of it a core of two", "peak MB together"
    )
    costs = []
    for _ in range(chosen.passes):
        wall, cpu, peak, diagnosis = _analysed_by_command(folder)
        seen = diagnosis.coverage
        hours = (diagnosis.end_ns - diagnosis.start_ns) / 3.6e12
        table.add_row(
            f"{seen.steps:,}", f"{seen.requests:,}", f"{hours:.1f}", str(len(diagnosis.incidents)),
            f"{wall:.1f}", f"{cpu:.1f}", f"{cpu / 2:.1f}", f"{peak:,.0f}",
        )  # fmt: skip
        costs.append(cpu)
    stored = _stored_bytes(folder, *TABLES) / 1e6
    console.print(
        f"1,000 such replicas a day: {statistics.median(costs) / 3.6:,.1f} core-hours, {stored:,.0f} GB of Parquet"
    )
    return table


def _analysed_by_command(folder: Path) -> tuple[float, float, float, Diagnosis]:
    """Wall and CPU seconds of ``stallscope analyze``, the most MB that its processes held together, what it says."""
    command = [sys.executable, "-m", "stallscope.cli", "analyze", str(folder)]
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryFile() as out:
        with subprocess.Popen([*command, "--no-replay", "--format", "json", "--jobs", "2"], stdout=out) as running:
            peak = 0.0
            while running.poll() is None:
                peak = max(peak, _held_mb(running.pid))
                time.sleep(0.05)
        wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        if running.returncode:
            raise subprocess.CalledProcessError(running.returncode, command)
        out.seek(0)
        diagnosis = Diagnosis.from_dict(json.loads(out.read()))
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, peak, diagnosis


def _held_mb(pid: int) -> float:
    """What a process and those that it started hold now; pages that they share count for each."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return pages * resource.getpagesize() / 1e6 + sum(_held_mb(int(child)) for child in children)


def _stored_bytes(folder: Path, *tables: str) -> int:
    return sum(file.stat().st_size for table in tables for file in (folder / table).rglob("*.parquet"))


def _replays(chosen: argparse.Namespace) -> Table:
    table = Table("steps replayed", "mean batch", "scheduler agrees", "prepare s", "replay s", "steps/s")
    for steps in chosen.replays:
        command = ("--replay", str(steps), "--folder", str(chosen.folder))
        runs = [Replayed(**json.loads(_in_a_process(*command))) for _ in range(chosen.passes)]
        one = min(runs, key=lambda run: run.replay_s)
        table.add_row(
            f"{one.steps:,}", f"{one.batch:.1f}", f"{one.agreement:.1%}", f"{one.prepare_s:.2f}", f"{one.replay_s:.2f}",
            f"{one.steps / one.replay_s:,.0f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
