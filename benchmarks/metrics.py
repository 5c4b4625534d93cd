"""What it costs to keep the score of a fleet and to be scraped, and for how long a scrape stops the event loop.

    python benchmarks/metrics.py                      # 200 tenants on 200 replicas: about 20,000 series
    python benchmarks/metrics.py --tenants 50 --replicas 20

A window is all that a watch says every 5 s. A scrape takes a snapshot (updates wait meanwhile) and writes the text in a
thread; "loop stood still" is the longest time between two turns of an event loop that does nothing else meanwhile.
Medians of the passes.
"""

from __future__ import annotations

import argparse
import asyncio
import gzip
import random
import statistics
import time
from collections.abc import Callable

import numpy as np
from opentelemetry.sdk.resources import Resource
from rich.console import Console
from rich.table import Table

from stallscope.watch.exposition import classic, openmetrics
from stallscope.watch.families import FAMILIES, Kind
from stallscope.watch.otlp import request_of
from stallscope.watch.scores import POSSIBLE, Scores

BLAMES = 500


def window(scores: Scores, tenants: list[str], replicas: list[str], draws: random.Random) -> None:
    """All families of all tenants and replicas, and blame among some."""
    for family in FAMILIES:
        names = {"tenant": tenants, "victim": tenants, "replica": replicas}.get("".join(family.labels), [])
        for name in names:
            if family.kind is Kind.GAUGE:
                scores.set(family, (name,), draws.random())
            elif family.kind is Kind.COUNTER:
                scores.add(family, (name,), draws.random())
            else:
                scores.observe(family, (name,), np.ones(len(scores.bounds[family.name]) + 1), draws.random())
    for _ in range(BLAMES):
        scores.blame(draws.choice(tenants), draws.choice(tenants), draws.choice(POSSIBLE), draws.random())


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


async def stillness(work: Callable[[], object]) -> float:
    """The longest pause of the event loop, s, while a thread works."""
    running = asyncio.create_task(asyncio.to_thread(work))
    longest, last = 0.0, time.perf_counter()
    while not running.done():
        await asyncio.sleep(0)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenants", type=int, default=200)
    parser.add_argument("--replicas", type=int, default=200)
    parser.add_argument("--passes", type=int, default=7)
    options = parser.parse_args()
    tenants = [f"tenant-{number:03d}" for number in range(options.tenants)]
    replicas = [f"replica-{number:03d}" for number in range(options.replicas)]
    scores, draws = Scores(), random.Random(1)
    admitting = seconds(lambda: [scores.admit(tenant, tenants[:at]) for at, tenant in enumerate(tenants)])
    window(scores, tenants, replicas, draws)
    snapshot = scores.snapshot()
    rows: dict[str, Callable[[], object]] = {
        "a window's updates": lambda: window(scores, tenants, replicas, draws),
        "snapshot": scores.snapshot,
        "OpenMetrics text": lambda: openmetrics(snapshot),
        "text format 0.0.4": lambda: classic(snapshot),
        "plain numbers": snapshot.values,
        "OTLP request": lambda: request_of(snapshot, Resource({})).SerializeToString(),
    }
    table = Table("", "ms", title=f"{len(snapshot.values()):,} series")
    table.add_row("admission of all tenants, once", f"{admitting * 1e3:.0f}")
    for name, work in rows.items():
        table.add_row(name, f"{statistics.median(seconds(work) for _ in range(options.passes)) * 1e3:.0f}")
    text = openmetrics(snapshot)
    table.add_row(f"gzip of {len(text) / 1e6:.1f} MB", f"{seconds(lambda: gzip.compress(text, 1)) * 1e3:.0f}")
    still = [asyncio.run(stillness(lambda: openmetrics(scores.snapshot()))) for _ in range(options.passes)]
    table.add_row("loop stood still while a scrape was written", f"{statistics.median(still) * 1e3:.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()
