"""Whether a page that follows a folder for hours stays small and quick, in a real browser and in real time.

    python benchmarks/dashboard_live.py                # an hour
    python benchmarks/dashboard_live.py --minutes 15

A recording in virtual time is written into a folder as a collector would: ten minutes of it at once, then a file every
five seconds. ``stallscope dashboard --live`` follows it, and the overview stays open in Chromium (without a GPU). Each
row, by the medians of its part of the time: ``behind``, seconds from a file's writing until the page says that it has
come so far; ``click``, seconds until another percentile is drawn; ``heap``, MB of the page's JavaScript after garbage
was collected; ``nodes`` of its document, and ``server``, MB that the server's process holds.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from playwright.sync_api import CDPSession, Page, sync_playwright
from rich.console import Console
from rich.table import Table

import stallscope.bench
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario

SCENARIO = Path(stallscope.bench.__file__).parent / "scenarios" / "kv_pinning.yaml"
SHOWN_S, EVERY_S, SEED = 600, 5, 0
WAIT_MS = 120_000
UP_TO = "document.querySelector('#progress')?.innerText.match(/live, up to ([0-9:.]+)/)?.[1] ?? ''"
LEGEND = "document.querySelector('.js-plotly-plot .legendtext')?.textContent"


@dataclass(frozen=True)
class Look:
    behind: float
    click: float
    heap: float
    nodes: float
    server: float


def pieces(recording: Path) -> Iterator[tuple[float, bytes]]:
    """The recording in pieces of ``EVERY_S`` and when each ends, s since the epoch; the first is of ``SHOWN_S``."""
    due, lines = 0.0, b""
    for line in recording.read_bytes().splitlines(keepends=True):
        spans = [
            span for one in json.loads(line)["resourceSpans"] for scope in one["scopeSpans"] for span in scope["spans"]
        ]
        end = max(int(span["endTimeUnixNano"]) for span in spans) / 1e9
        due = due or end + SHOWN_S
        lines += line
        if end >= due:
            yield end, lines
            due, lines = due + EVERY_S, b""


def look(page: Page, session: CDPSession, server: int, end_s: float) -> Look:
    """After a file was written that ends at ``end_s``."""
    begun = time.perf_counter()
    wanted = datetime.fromtimestamp(end_s - 1.0, UTC).strftime("%H:%M:%S")
    page.wait_for_function(f"() => ({UP_TO}) >= {wanted!r}", timeout=WAIT_MS)
    behind = time.perf_counter() - begun
    page.wait_for_timeout(700)  # until what came is drawn
    chosen = "p50" if page.inner_text("#quantiles [aria-current]") == "p99" else "p99"
    before = page.evaluate(f"() => {LEGEND}")
    begun = time.perf_counter()
    page.click(f"#quantiles a:text-is('{chosen}')")
    page.wait_for_function(f"() => {LEGEND} !== {before!r}", timeout=WAIT_MS)
    click = time.perf_counter() - begun
    session.send("HeapProfiler.collectGarbage")
    told = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
    held = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server}/status").read_text(encoding="ascii"))
    assert held is not None
    return Look(behind, click, told["JSHeapUsedSize"] / 1e6, told["Nodes"], int(held[1]) / 1e3)


def follow(recording: Path, minutes: float) -> list[tuple[float, Look]]:
    """Looks, and after how many minutes each was."""
    found: list[tuple[float, Look]] = []
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        folder = Path(scratch)
        to_come = pieces(recording)
        (folder / "0.otlp.jsonl").write_bytes(next(to_come)[1])
        command = [sys.executable, "-m", "stallscope.cli", "dashboard", str(folder), "--live", "--port", "0"]
        server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert server.stderr is not None
        url = server.stderr.readline().split(": ", 1)[1].split()[0]
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 900}, timezone_id="UTC")
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable")
            page.goto(url)
            page.wait_for_selector("#answer .verdict", timeout=WAIT_MS)
            begun = time.monotonic()
            for number, (end_s, lines) in enumerate(to_come, start=1):
                if time.monotonic() > begun + minutes * 60:
                    break
                page.wait_for_timeout(max(begun + number * EVERY_S - time.monotonic(), 0) * 1000)
                written = folder / f"{number}.part"
                written.write_bytes(lines)
                written.rename(folder / f"{number}.otlp.jsonl")
                if number % 6 == 0:
                    found.append(((time.monotonic() - begun) / 60, look(page, session, server.pid, end_s)))
        finally:
            browser.close()
            server.terminate()
            server.wait()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--rows", type=int, default=4, help="parts of the time")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recording = Path(scratch) / "recording.otlp.jsonl"
        # A file holds more than five seconds, since it ends with a whole line: twice as much is enough.
        scenario = replace(load_scenario(str(SCENARIO)), duration_s=int(chosen.minutes * 120) + SHOWN_S + 60)
        record(scenario, recording, seed=SEED, executor="virtual")
        found = follow(recording, chosen.minutes)
    table = Table(title="a page that follows a folder: medians")
    for column in ("minutes", "looks", *Look.__annotations__):
        table.add_column(column, justify="right")
    for row in range(chosen.rows):
        low, high = (chosen.minutes * part / chosen.rows for part in (row, row + 1))
        looks = [one for minute, one in found if low <= minute < high]
        if looks:
            medians = [statistics.median(getattr(one, name) for one in looks) for name in Look.__annotations__]
            behind, click, heap, nodes, server = medians
            numbers = (f"{behind:.1f}", f"{click:.2f}", f"{heap:.1f}", f"{nodes:,.0f}", f"{server:.0f}")
            table.add_row(f"{low:.0f} to {high:.0f}", str(len(looks)), *numbers)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
