"""Do the exported alerts page in time, with the right name, and stay quiet when nothing is wrong?

    python benchmarks/alerts.py                                # seeds 1000 to 1019, 200 replica-hours of calm
    python benchmarks/alerts.py --seeds 0:5 --healthy-hours 4  # to work on
    python benchmarks/alerts.py --healthy-hours 0 --json alerts.json

Each case of StallBench that has a culprit is watched in virtual time as a collector would, scraped every 10 s; promtool
evaluates the rules of ``stallscope alerts export --pack both`` (floors, nothing learned). Harmed are requests of others
that wait longer than in the same run without the injection (by 50 ms and 20%). A stall is a stretch of such waits of
which none begins more than 5 s after the others; it begins with its third, and ends with the third last. A case's
incident is its longest stall. Those longer than the latency budget (60 s) must be caught: by a page within 60 s of the
start. Few of StallBench's are; so its scenarios are run a second time, with what they inject going on for 60 s more.

Three packs run over the same times: on blame; on the metrics that vLLM exports (made from the trace's tables, with
vLLM's buckets); and one rule on the p99 of TTFT over a minute, whose threshold is the highest that calm traffic shows
on seeds nobody reports on (``QUIET_SEEDS``): what a careful team would set by hand. ``named``: of the caught, the first
page has a culprit's name (the rules on plain metrics have none). ``wrong``: pages with the name of somebody else.

Healthy traffic is that of StallBench's scenarios without what they inject, an hour each, drawn by seed; the bound is
that of Poisson's distribution at 95%, for an endpoint of ten replicas.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from stallscope.alerts.backtest.figures import calm, share
from stallscope.alerts.backtest.firing import evaluate
from stallscope.alerts.backtest.provable import Reads, reads
from stallscope.alerts.backtest.rulefile import Alert, RuleFile, read_rules
from stallscope.alerts.backtest.timeline import Grid, Timeline
from stallscope.alerts.choices import Format, Pack
from stallscope.alerts.export import export
from stallscope.alerts.rules import Owner
from stallscope.alerts.thresholds import NoTeacher
from stallscope.bench.cache import default_folder, make
from stallscope.bench.cases import families, make_case
from stallscope.bench.paired import FEW_REQUESTS, LEAST_HARM_S, LEAST_HARM_SHARE
from stallscope.bench.policies import registered
from stallscope.bench.truth import Truth
from stallscope.diagnosis.incidents import SLACK_NS
from stallscope.diagnosis.replica import BATCHES_SEEN
from stallscope.trace import Trace, read_trace
from stallscope.trace.findings import Findings
from stallscope.trace.otlp import Reader, find_sources
from stallscope.watch.rehearsal import watch_spans
from stallscope.watch.samples import Samples, Series
from stallscope.workloads.recording import record
from stallscope_engine.server.metrics import FIRST_TOKEN_BUCKETS, TOKEN_GAP_BUCKETS

BUDGET_S = 60.0
HOUR_S = 3600
LONGER_S = 60  # that prolonged scenarios go on
KINDS = ("unchanged", "prolonged")
REPLICAS = 10  # of the endpoint that the bound on false pages is for
QUIET_SEEDS, QUIET_S = range(2), 600  # of healthy traffic that the static threshold is set on
UNHEALTHY = ("flare_up", "overload")  # whose usual traffic overflows by itself
TELEMETRY = (  # by the share of time in which every batch is known
    ("every batch told", 0.999, 1.0),
    ("steps lost, so that some batches are unknown", 1e-9, 0.999),
    ("steps tell sums alone, or only requests are told", 0.0, 0.0),
)
PACKS = ("blame", "plain", "static p99")
STATIC = """
- name: static
  interval: 10s
  rules:
  - alert: StaticP99
    expr: histogram_quantile(0.99, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket[1m]))) > {threshold}
    labels: {{severity: page, pack: static}}
"""
LABELS = (("engine", "0"), ("instance", "engine:8000"), ("job", "vllm"), ("model_name", "model"))
Result = TypeVar("Result")


@dataclass(frozen=True)
class Page:
    """A page that fired: seconds from the case's start, and whom it names ("" where it can't)."""

    pack: str
    alert: str
    at_s: float
    until_s: float
    tenant: str


@dataclass(frozen=True)
class Judged:
    """A case: its incident (seconds from its start), who did it, who may be named, what fired; and for which share of
    its time telemetry tells every batch."""

    family: str
    seed: int
    start_s: float
    end_s: float
    lost_s: float
    culprits: tuple[str, ...]
    excused: tuple[str, ...]
    pages: tuple[Page, ...]
    tickets: tuple[Page, ...]
    batches_seen: float

    @property
    def lasts(self) -> bool:
        return self.end_s - self.start_s > BUDGET_S

    def first(self, pack: str) -> Page | None:
        """The page that catches it: the first that is there within the budget."""
        there = [one for one in self.pages if one.pack == pack and one.until_s >= self.start_s]
        return next((one for one in there if one.at_s <= self.start_s + BUDGET_S), None)

    def wrong(self, pack: str) -> list[Page]:
        allowed = {*self.culprits, *self.excused, ""}
        return [one for one in self.pages if one.pack == pack and one.tenant not in allowed]


# --- rules and what they see --------------------------------------------------------------------------------------


def rule_file(folder: Path, static_s: float) -> RuleFile:
    made = export(NoTeacher(), [], Owner("benchmark", "docs/runbooks", "spans"), Pack.BOTH, Format.PROMETHEUS)
    path = folder / f"rules-{os.getpid()}.yml"
    path.write_text(made.checkable + STATIC.format(threshold=static_s), encoding="utf-8")
    return read_rules(path)


class AsItRuns(Reads):
    """A Prometheus that has just begun to scrape evaluates rules whose windows are longer than that, too."""

    def reason(self, alert: Alert, timeline: Timeline, grid: Grid) -> str:
        found = super().reason(alert, timeline, grid)
        return "" if found.startswith("looks back") else found


def fired(rules: RuleFile, samples: Samples, start_ns: int) -> tuple[list[Page], list[Page]]:
    """Pages and tickets."""
    run = evaluate(rules, AsItRuns(**vars(reads(rules))), Timeline("case", samples, ()))
    pages: list[Page] = []
    tickets: list[Page] = []
    for firing in run.firings:
        alert, labels = rules.alerts[firing.alert], dict(firing.labels)
        pack = {"static": "static p99", "plain": "plain"}.get(alert.labels.get("pack", ""), "blame")
        times = ((time - start_ns) / 1e9 for time in (firing.start_ns, firing.end_ns))
        made = Page(pack, alert.name, *times, labels.get("tenant", ""))
        (pages if alert.is_page else tickets).append(made)
    return pages, tickets


def plain_samples(trace: Trace, times: np.ndarray) -> dict[Series, np.ndarray]:
    """What vLLM would have exported at these times (ns): its queue, its cache, preemptions, and latencies."""
    steps = trace.steps.select(["ready", "waiting", "kv_used", "kv_total"]).to_pandas().sort_values("ready")
    at = np.searchsorted(steps["ready"].to_numpy(), times, side="right") - 1
    blocks = max(int(steps["kv_total"].max()), 1)

    def gauge(values: pd.Series[float]) -> np.ndarray:
        return np.where(at >= 0, values.to_numpy(np.float64)[np.maximum(at, 0)], np.nan)

    requests = trace.requests.select(["arrival", "first_token", "end", "preemptions"]).to_pandas()
    ends = requests["end"].fillna(np.inf).to_numpy(np.float64)
    lost = requests["preemptions"].fillna(0).to_numpy(np.float64)
    order = np.argsort(ends)
    preempted = np.append(0.0, np.cumsum(lost[order]))[np.searchsorted(ends[order], times, side="right")]
    first = requests["first_token"].notna().to_numpy()
    came = requests["first_token"].to_numpy(np.float64)[first]
    ttft = (came - requests["arrival"].to_numpy(np.float64)[first]) / 1e9
    gaps = trace.gaps.select(["start", "length_ns", "count"]).to_pandas()
    gap_end = (gaps["start"] + gaps["length_ns"]).to_numpy(np.float64)
    found = {
        ("vllm:num_requests_waiting", LABELS): gauge(steps["waiting"]),
        ("vllm:kv_cache_usage_perc", LABELS): gauge(steps["kv_used"] / blocks),
        ("vllm:num_preemptions_total", LABELS): preempted,
    }
    found |= histogram("vllm:time_to_first_token_seconds", FIRST_TOKEN_BUCKETS, came, ttft, np.ones(len(ttft)), times)
    length, weight = gaps["length_ns"].to_numpy(np.float64) / 1e9, gaps["count"].to_numpy(np.float64)
    return found | histogram("vllm:inter_token_latency_seconds", TOKEN_GAP_BUCKETS, gap_end, length, weight, times)


def histogram(
    name: str, bounds: Iterable[float], when: np.ndarray, value: np.ndarray, weight: np.ndarray, times: np.ndarray
) -> dict[Series, np.ndarray]:
    order = np.argsort(when)
    when, value, weight = when[order], value[order], weight[order]
    seen = np.searchsorted(when, times, side="right")
    found: dict[Series, np.ndarray] = {}
    for bound in (*bounds, np.inf):
        total = np.append(0.0, np.cumsum(weight * (value <= bound)))[seen]
        le = "+Inf" if np.isinf(bound) else str(bound)
        found[f"{name}_bucket", tuple(sorted((*LABELS, ("le", le))))] = total
    return found


def seen(path: Path) -> tuple[Samples, Trace]:
    """What a scraper of the collector and of the engine sees of a recording, and its tables."""
    samples = watch_spans(Reader(Findings()).read(find_sources(path)))
    trace = read_trace(path)
    plain = plain_samples(trace, samples.times_ns)
    return Samples(samples.times_ns, {**samples.values, **plain}), trace


# --- cases with a culprit -----------------------------------------------------------------------------------------


def incidents(pairs: pd.DataFrame, truth: Truth, trace: Trace) -> list[tuple[float, float, float]]:
    """Start, end, and seconds lost (all in s from the case's start) of each stall of others than the culprits."""
    others = pairs[~pairs["tenant"].isin(truth.culprits)]
    gaps = trace.gaps.select(["request", "start", "length_ns"]).to_pandas().astype({"request": str})
    longest = gaps.loc[gaps.groupby("request")["length_ns"].idxmax()].set_index("request")
    parts = []
    for metric in ("ttft", "itl"):
        excess, without = others[metric] - others[f"{metric}_without"], others[f"{metric}_without"]
        harmed = others[(excess >= LEAST_HARM_S) & (excess >= LEAST_HARM_SHARE * without)].set_index("request")
        begin, length = harmed["arrival_s"], harmed[metric]
        if metric == "itl":
            begin = (longest["start"].reindex(harmed.index) - truth.start_ns) / 1e9
        lost = harmed[metric] - harmed[f"{metric}_without"]
        parts.append(pd.DataFrame({"begin": begin, "end": begin + length, "lost": lost}))
    waits = pd.concat(parts).dropna().sort_values("begin")
    reach = waits["end"].cummax().shift(fill_value=-np.inf)
    stall = (waits["begin"] > reach + SLACK_NS / 1e9).cumsum()
    found = []
    for _, each in waits.groupby(stall):
        if len(each) >= FEW_REQUESTS:
            ends = np.sort(each["end"].to_numpy())
            found.append((float(each["begin"].iloc[FEW_REQUESTS - 1]), float(ends[-FEW_REQUESTS]), each["lost"].sum()))
    return found


def judge(job: tuple[Path, int], static_s: float) -> Judged | None:
    """None where there is no culprit, or nobody would have noticed."""
    made = make(make_case(*job), default_folder(), "virtual")
    truth = made.truth
    if not truth.culprits or not truth.is_harmful:
        return None
    samples, trace = seen(made.trace)
    found = max(incidents(made.pairs, truth, trace), key=lambda one: one[1] - one[0], default=None)
    if found is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        pages, tickets = fired(rule_file(Path(scratch), static_s), samples, truth.start_ns)
    names = (truth.culprits, truth.excused)
    return Judged(truth.family, truth.seed, *found, *names, tuple(pages), tuple(tickets), batches_seen(trace))


def batches_seen(trace: Trace) -> float:
    """The share of time in which every batch is known."""
    stretches = trace.coverage.to_pandas()
    length = (stretches["end"] - stretches["start"]).to_numpy(np.float64)
    known = length[(stretches["fidelity"] == BATCHES_SEEN).to_numpy()].sum()
    return float(known / length.sum()) if length.sum() else 0.0


def prolonged(folder: Path) -> list[Path]:
    """StallBench's scenarios, in which what is injected goes on for ``LONGER_S`` more."""
    made = []
    for file in families():
        scenario = yaml.safe_load(file.read_text(encoding="utf-8"))
        for one in (scenario, *scenario.get("variants", {}).values()):
            if "duration_s" in one:
                one["duration_s"] += LONGER_S
            for injected in one.get("inject", ()):
                if "to_s" in injected:
                    injected["to_s"] = later(injected["to_s"])
        made.append(folder / file.name)
        made[-1].write_text(yaml.safe_dump(scenario, sort_keys=False), encoding="utf-8")
    return made


def later(time_s: float | dict[str, list[float]]) -> float | dict[str, list[float]]:
    if isinstance(time_s, dict):
        return {kind: [one + LONGER_S for one in times] for kind, times in time_s.items()}
    return time_s + LONGER_S


# --- healthy traffic ----------------------------------------------------------------------------------------------


def healthy_hour(job: tuple[Path, int], seconds: int, static_s: float | None) -> tuple[str, int, list[Page], float]:
    """What pages in an hour of a scenario's usual traffic; and the highest p99 of TTFT, s."""
    file, seed = job
    case = make_case(file, seed)
    scenario = replace(case.scenario, duration_s=seconds)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "healthy.otlp.jsonl"
        with registered():
            record(scenario, path, seed=seed, executor="virtual", inject=False, force=True)
        samples, _ = seen(path)
        highest = highest_p99(samples)
        pages: list[Page] = []
        if static_s is not None:
            pages, _ = fired(rule_file(Path(folder), static_s), samples, int(samples.times_ns[0]))
    return case.family, seed, pages, highest


def highest_p99(samples: Samples) -> float:
    """Of TTFT over a minute, as a rule computes it: interpolated between bounds."""
    rows = sorted(
        (float(labels["le"]), values) for labels, values in samples.of("vllm:time_to_first_token_seconds_bucket")
    )
    bounds, counts = np.array([le for le, _ in rows]), np.stack([values for _, values in rows])
    minute = counts[:, 6:] - counts[:, :-6]
    highest = 0.0
    for column in minute.T:
        if column[-1] > 0:
            rank = 0.99 * column[-1]
            at = min(int(np.searchsorted(column, rank)), len(bounds) - 2)
            low, before = (bounds[at - 1], column[at - 1]) if at else (0.0, 0.0)
            inside = max(column[at] - before, 1e-9)
            highest = max(highest, float(low + (bounds[at] - low) * min((rank - before) / inside, 1.0)))
    return highest


def usual_traffic() -> list[Path]:
    return [file for file in families() if file.stem not in UNHEALTHY]


def in_processes(
    work: Callable[[tuple[Path, int]], Result], jobs: list[tuple[Path, int]], what: str, processes: int
) -> Iterator[Result]:
    with ProcessPoolExecutor(processes) as pool:
        yield from track(pool.map(work, jobs), what, len(jobs), console=Console(stderr=True))


# --- the table ------------------------------------------------------------------------------------------------------


def percent(hits: int, of: int) -> str:
    found = share(hits, of)
    return f"{found.hits} of {found.of}: {hits / of:.0%} ({found.low:.0%} to {found.high:.0%})" if found else "none"


def print_incidents(cases: list[Judged], kind: str, console: Console) -> None:
    lasting = [one for one in cases if one.lasts]
    for title, chosen in (("longer than 60 s", lasting), ("of any length", cases)):
        table = Table(title=f"{len(chosen)} incidents with a culprit, {title}; {kind} scenarios")
        for column in ("pack", "paged within 60 s", "after, median / p90", "named", "wrong"):
            table.add_column(column)
        for pack in PACKS:
            pages = [(one, page) for one in chosen if (page := one.first(pack)) is not None]
            delays = [max(page.at_s - one.start_s, 0.0) for one, page in pages]
            named = sum(page.tenant in one.culprits for one, page in pages)
            spread = f"{statistics.median(delays):.0f} s / {np.quantile(delays, 0.9):.0f} s" if delays else "-"
            wrong = sum(len(one.wrong(pack)) for one in chosen)
            table.add_row(pack, percent(len(pages), len(chosen)), spread, percent(named, len(pages)), str(wrong))
        console.print(table)
    for title, low, high in TELEMETRY:
        chosen = [one for one in lasting if low <= one.batches_seen <= high]
        caught = [page for one in chosen if (page := one.first("blame")) is not None]
        if chosen:
            console.print(f"  of those longer than 60 s, {title}: {percent(len(caught), len(chosen))}")
    short = [one for one in cases if not one.lasts]
    found = sum(any(page.tenant in one.culprits for page in (*one.tickets, *one.pages)) for one in short)
    console.print(f"shorter ones with a page or ticket on a culprit: {percent(found, len(short))}")
    for one in cases:
        page = one.first("blame")
        if one.wrong("blame") or (one.lasts and (page is None or page.tenant not in one.culprits)):
            pages = ", ".join(f"{page.tenant} at {page.at_s:.0f}" for page in one.pages if page.pack == "blame")
            console.print(
                f"  {one.family} {one.seed}: {one.start_s:.0f} to {one.end_s:.0f} s, lost {one.lost_s:.1f} s, by "
                f"{', '.join(one.culprits)}; pages: {pages or 'none'}",
                markup=False,
            )


def print_healthy(
    healthy: list[tuple[str, int, list[Page], float]], seconds: int, static_s: float, console: Console
) -> None:
    hours = len(healthy) * seconds / HOUR_S
    table = Table(title=f"{hours:,.0f} replica-hours of healthy traffic; static p99 at {static_s:.2f} s")
    for column in ("pack", "false pages", f"a week, for {REPLICAS} replicas: at most (95%)"):
        table.add_column(column)
    for pack in PACKS:
        pages = sum(page.pack == pack for _, _, fired, _ in healthy for page in fired)
        most = calm(hours * HOUR_S, pages).most_per_week
        table.add_row(pack, str(pages), f"{(most or 0) * REPLICAS:,.1f}")
    console.print(table)
    for family, seed, fired, _ in healthy:
        for page in fired:
            if page.pack == "blame":
                console.print(f"  {family} {seed}: {page.alert} {page.tenant} at {page.at_s:.0f} s", markup=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1000:1020", help="A:B, from A to before B")
    parser.add_argument("--families", nargs="*", default=[], help="all by default")
    parser.add_argument("--healthy-hours", type=int, default=200)
    parser.add_argument("--healthy-seconds", type=int, default=HOUR_S, help="of one run")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS, help="of scenarios")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="all cases and pages, for machines")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    low, high = map(int, arguments.seeds.split(":"))
    with tempfile.TemporaryDirectory() as scratch:
        kinds = dict(zip(KINDS, (families(), prolonged(Path(scratch))), strict=True))
        measure(arguments, range(low, high), {kind: kinds[kind] for kind in arguments.kinds})


def measure(arguments: argparse.Namespace, seeds: range, kinds: Mapping[str, list[Path]]) -> None:
    console = Console(width=150)
    many = arguments.processes
    quiet = [(file, seed) for file in usual_traffic()[::3] for seed in QUIET_SEEDS]
    work = partial(healthy_hour, seconds=QUIET_S, static_s=None)
    static_s = max(highest for _, _, _, highest in in_processes(work, quiet, "what p99 is usual", many))
    kept: dict[str, object] = {}
    for kind, files in kinds.items():
        jobs = [
            (file, seed)
            for file in files
            for seed in seeds
            if not arguments.families or file.stem in arguments.families
        ]
        found = in_processes(partial(judge, static_s=static_s), jobs, f"{kind} scenarios", many)
        judged = [one for one in found if one is not None]
        kept[kind] = [asdict(one) for one in judged]
        print_incidents(judged, kind, console)
        save(arguments.json, kept)
    runs = round(arguments.healthy_hours * HOUR_S / arguments.healthy_seconds)
    if runs:
        usual = usual_traffic()
        hours = [(usual[number % len(usual)], seeds.start + number // len(usual)) for number in range(runs)]
        work = partial(healthy_hour, seconds=arguments.healthy_seconds, static_s=static_s)
        healthy = []
        for family, seed, pages, highest in in_processes(work, hours, "healthy traffic", many):
            healthy.append((family, seed, pages, highest))
            kept["healthy"] = [[of, number, [asdict(page) for page in fired]] for of, number, fired, _ in healthy]
            save(arguments.json, kept)  # so that an hour that was watched is not lost with the next
        print_healthy(healthy, arguments.healthy_seconds, static_s, console)


def save(path: Path | None, kept: Mapping[str, object]) -> None:
    if path is not None:
        path.write_text(json.dumps(kept, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
