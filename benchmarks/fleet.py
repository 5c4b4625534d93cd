"""What it costs to diagnose a fleet in portions, and whether that says what the analysis of each whole day says.

    python benchmarks/fleet.py                          # 25 replicas of 8 hours, made once below --folder
    python benchmarks/fleet.py --replicas 4 --hours 3   # a small one
    python benchmarks/fleet.py --replayed 2             # so many replicas are diagnosed with replays, too

The fleet is the bundled engine in virtual time. In half of the hours somebody floods a replica, or its engine pauses;
who and when is drawn by seed. Each replica is recorded, read, and written to one dataset in Parquet. 2,000 requests are
enough for a portion here (in use: 20,000), so that each hour is one.

Processes and a Dask cluster (two workers on this machine) diagnose all portions, each in a process of its own, whose
results are compared byte by byte. Seconds are CPU time of all processes, since others may use the machine too: of map
and reduce, with the start of the workers. The reducer's memory is the peak of the process that adds up, beyond what it
has after its imports. ``found`` are the injected stalls that have an incident at that time with the right name.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stallscope.diagnosis import Diagnosis, diagnose
from stallscope.diagnosis.diagnose import Options
from stallscope.diagnosis.model import Incident
from stallscope.fleet import diagnose_dataset, plan
from stallscope.fleet.cluster import DaskCluster
from stallscope.fleet.processes import Processes
from stallscope.fleet.work import diagnose_task
from stallscope.reports.json import to_json
from stallscope.trace import Trace, read_trace, write_parquet
from stallscope.trace.parquet import write_metadata
from stallscope.trace.rename import renamed
from stallscope.trace.select import select
from stallscope.trace.stored import Part, StoredTables
from stallscope.workloads.recording import VIRTUAL_START_NS, record
from stallscope.workloads.scenario import load_scenario

HOUR_S = 3600
ENOUGH_REQUESTS = 2_000
FLOODERS = ("batch", "crawler", "reports", "embedder")
STORY = """
name: fleet
duration_s: {seconds}
engine: {{model: tiny-llama, max_num_seqs: 32, kv_blocks: 4096, max_num_batched_tokens: 2048}}
tenants:
  chat:
    arrivals: {{poisson_per_s: 0.5}}
    prompt_tokens: {{uniform: [40, 400]}}
    output_tokens: {{uniform: [6, 18]}}
  search:
    arrivals: {{poisson_per_s: 0.2}}
    prompt_tokens: {{uniform: [400, 900]}}
    output_tokens: {{uniform: [2, 6]}}
inject:
{injected}
"""
FLOOD = "  - {{tenant: {by}, at_s: {at}, count: 12, prompt_tokens: 12000, output_tokens: 20}}"
PAUSE = "  - {{engine: pause, at_s: {at}, for_s: 15}}"


# --- a fleet --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Injected:
    """A stall that was made: when (seconds), by whom ("": the engine)."""

    replica: str
    at_s: int
    by: str


def injected_in(replica: str, hours: int) -> list[Injected]:
    """Half of the hours have one; where hours meet, too."""
    rng = random.Random(replica)
    return [
        Injected(replica, rng.randint(max(hour * HOUR_S, 600), (hour + 1) * HOUR_S - 20), rng.choice((*FLOODERS, "")))
        for hour in range(hours)
        if rng.random() < 0.5
    ]


def make_replica(folder: Path, replica: str, hours: int) -> Path:
    """Records one replica and writes its dataset."""
    made = folder / f"{replica}.parquet"
    story, recording = folder / f"{replica}.yaml", folder / f"{replica}.otlp.jsonl"
    lines = [(FLOOD if one.by else PAUSE).format(by=one.by, at=one.at_s) for one in injected_in(replica, hours)]
    text = STORY.format(seconds=hours * HOUR_S, injected="\n".join(lines))
    story.write_text(text if lines else text.replace("inject:", ""), encoding="utf-8")
    record(load_scenario(str(story)), recording, seed=int(replica[1:]), executor="virtual", force=True)
    shutil.rmtree(made, ignore_errors=True)
    write_parquet(renamed(read_trace(recording), {"replica": lambda _: replica}), made)
    recording.unlink()
    return made


def make(folder: Path, replicas: Sequence[str], hours: int, jobs: int) -> Path:
    """The fleet's dataset: those of its replicas side by side."""
    dataset = folder / f"fleet-{len(replicas)}-{hours}"
    if dataset.exists():
        return dataset
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs) as pool:
        count = len(replicas)
        made = list(pool.map(make_replica, [folder] * count, replicas, [hours] * count))
    parts: list[Part] = []
    for one in made:
        tables = read_trace(one).tables
        assert isinstance(tables, StoredTables)
        parts += tables.parts
        (one / "trace.json").unlink()
        shutil.copytree(one, dataset, dirs_exist_ok=True)
        shutil.rmtree(one)
    write_metadata(dataset, "fleet", (), parts)
    return dataset


# --- measured in a process of its own -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One diagnosis of a fleet: CPU seconds of all processes, and what the one that adds up needed beyond imports."""

    portions: int
    steps: int
    requests: int
    incidents: int
    cpu_s: float
    reducer_mb: float
    partial_kb: float


def measure(dataset: Path, replicas: Sequence[str], scheduler: str, replay: bool, out: Path) -> Measured:
    trace = _of(read_trace(dataset), replicas)
    tasks = plan.plan(trace)
    options = Options(replay=replay)
    imported, before = _peak_mb(), _cpu_s()
    if scheduler == "dask":
        from distributed import LocalCluster

        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
            diagnosis = diagnose_dataset(trace, options, DaskCluster(cluster.scheduler_address))
    else:
        diagnosis = diagnose_dataset(trace, options, Processes(2))
    out.write_text(to_json(diagnosis), encoding="utf-8")
    cpu_s, reducer_mb = _cpu_s() - before, _peak_mb() - imported
    partial_kb = len(pickle.dumps(diagnose_task(tasks[0], Options(replay=False)))) / 1000
    seen = diagnosis.coverage
    return Measured(
        len(tasks),
        seen.steps,
        seen.requests,
        len(diagnosis.incidents),
        cpu_s,
        reducer_mb,
        partial_kb,
    )


def _of(trace: Trace, replicas: Sequence[str]) -> Trace:
    return trace.narrowed(replicas)


def _cpu_s() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(one.ru_utime + one.ru_stime for one in both)


def _peak_mb() -> float:
    """Most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def _in_a_process(dataset: Path, replicas: Sequence[str], scheduler: str, replay: bool) -> tuple[Measured, Diagnosis]:
    out = dataset.parent / f"diagnosis-{scheduler}.json"
    command = [sys.executable, __file__, "--measure", str(dataset), "--of", ",".join(replicas), "--out", str(out)]
    command += ["--scheduler", scheduler, *(["--replay"] if replay else [])]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return Measured(**json.loads(printed)), Diagnosis.from_dict(json.loads(out.read_bytes()))


# --- compared -------------------------------------------------------------------------------------------------------


def whole(dataset: Path, replica: str) -> tuple[Incident, ...]:
    """What the analysis of all hours of a replica at once finds."""
    return diagnose(select(read_trace(dataset), replica=replica), replay=False).incidents


def _like(one: Incident, others: Sequence[Incident]) -> bool:
    """Whether one of the others is the same stall, with the same verdict and the same names."""
    return any(
        one.replica == other.replica
        and one.start_ns <= other.end_ns
        and other.start_ns <= one.end_ns
        and one.verdict == other.verdict
        and _names(one) == _names(other)
        for other in others
    )


def _names(incident: Incident) -> set[str]:
    return {culprit.tenant for culprit in incident.culprits}


def _found(injected: Sequence[Injected], incidents: Sequence[Incident]) -> int:
    def is_there(one: Injected) -> bool:
        at = VIRTUAL_START_NS + one.at_s * 1_000_000_000
        return any(
            found.replica == one.replica
            and found.start_ns <= at + 10_000_000_000
            and found.end_ns >= at
            and _names(found) == ({one.by} if one.by else set())
            for found in incidents
        )

    return sum(map(is_there, injected))


def _stored_bytes(dataset: Path) -> int:
    return sum(file.stat().st_size for file in dataset.rglob("*.parquet"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=25)
    parser.add_argument("--hours", type=int, default=8, help="of each replica")
    parser.add_argument("--replayed", type=int, default=2, help="replicas that are diagnosed with replays, too")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "stallscope-fleet")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--of", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--scheduler", help=argparse.SUPPRESS)
    parser.add_argument("--replay", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    plan.ENOUGH_REQUESTS = ENOUGH_REQUESTS
    if chosen.measure:
        found = measure(chosen.measure, chosen.of.split(","), chosen.scheduler, chosen.replay, chosen.out)
        print(json.dumps(asdict(found)))
        return
    replicas = [f"r{number}" for number in range(chosen.replicas)]
    dataset = make(chosen.folder, replicas, chosen.hours, len(os.sched_getaffinity(0)))
    console = Console(width=160)
    console.print(_costs(chosen, dataset, replicas, console))
    console.print(_agreement(chosen, dataset, replicas))


def _costs(chosen: argparse.Namespace, dataset: Path, replicas: list[str], console: Console) -> Table:
    table = Table("scheduler", "replays", "replica-hours", "steps", "requests", "incidents", "CPU s",
                  "CPU s a replica-hour", "reducer MB beyond imports", "KB a partial sum")  # fmt: skip
    few = replicas[: chosen.replayed]
    parts = [replicas[: max(len(replicas) // share, 1)] for share in (4, 2, 1)]
    runs = [(some, "processes", False) for some in parts] + [(replicas, "dask", False)]
    runs += [(few, scheduler, True) for scheduler in ("processes", "dask")] if few else []
    said, cost = dict[tuple[str, bool], str](), dict[tuple[str, bool], float]()
    for some, scheduler, replay in runs:
        one, diagnosis = _in_a_process(dataset, some, scheduler, replay)
        said[scheduler, replay] = to_json(diagnosis)
        hours = len(some) * chosen.hours
        cost[scheduler, replay] = one.cpu_s / hours  # the last of its kind is of the whole fleet
        table.add_row(
            scheduler,
            "on" if replay else "off",
            *(f"{value:,}" for value in (hours, one.steps, one.requests, one.incidents)),
            f"{one.cpu_s:.1f}",
            f"{cost[scheduler, replay]:.2f}",
            f"{one.reducer_mb:.0f}",
            f"{one.partial_kb:.0f}",
        )
    same = all(said["processes", replay] == said["dask", replay] for _, _, replay in runs)
    console.print(f"processes and Dask say the same, byte for byte: {'yes' if same else 'NO'}")
    stored = _stored_bytes(dataset) / len(replicas) / chosen.hours
    console.print(f"stored: {stored / 1e6:.2f} MB a replica-hour")
    hours = " ".join(
        f"{24_000 * cost['processes', replay] / 3600:.1f} core-hours {'with' if replay else 'without'} replays,"
        for replay in (False, True)
        if ("processes", replay) in cost
    )
    console.print(f"1,000 such replicas a day: {hours} {24_000 * stored / 1e9:.0f} GB")
    return table


def _agreement(chosen: argparse.Namespace, dataset: Path, replicas: list[str]) -> Table:
    _, diagnosis = _in_a_process(dataset, replicas, "processes", False)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        wholes = [one for found in pool.map(whole, [dataset] * len(replicas), replicas) for one in found]
    injected = [one for replica in replicas for one in injected_in(replica, chosen.hours)]
    table = Table("analysis", "incidents", "of them the other has, too", "injected stalls found", "of")
    for name, mine, others in (
        (f"portions of 1 of {chosen.hours} hours", diagnosis.incidents, wholes),
        ("whole", wholes, diagnosis.incidents),
    ):
        shared = sum(_like(one, others) for one in mine)
        share = f"{shared} ({shared / max(len(mine), 1):.0%})"
        table.add_row(name, str(len(mine)), share, str(_found(injected, mine)), str(len(injected)))
    return table


if __name__ == "__main__":
    main()
