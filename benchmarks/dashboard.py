"""How fast the dashboard is in a real browser, against the number of steps of the trace.

    python benchmarks/dashboard.py                         # 10^4 to 5x10^6 steps; writes 2 GB below --folder
    python benchmarks/dashboard.py --sizes 10000 1000000 --passes 3

Each size is the made-up trace of ``benchmarks/analysis.py`` in Parquet. Each pass starts ``stallscope dashboard``
anew, with a Chromium that is open already (without a GPU: it draws in software); seconds are by the wall clock, medians
of the passes, and the two share the machine with whatever else runs on it.

``charts``: from the command's start until the overview has drawn its lines; ``verdict``: until the answer stands there,
found anew by charges alone (``--no-replay``), and ``kept``: the same where ``--save`` has kept it. Clicks, each until
what was asked for is there, the first two by the page's own clock: ``incident`` (who did it, in words), ``batch`` (the
same click: the batch around the worst step is drawn), ``zoom`` (both charts of the overview in a tenth of the trace),
``back`` (all of it again), ``request`` (its waterfall). ``server``: the most memory that the server's process has held;
what diagnoses is a process of its own.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from analysis import FIXED_NS, SIZES, make
from playwright.sync_api import Browser, Page, ViewportSize, sync_playwright
from rich.console import Console
from rich.table import Table

from stallscope.trace import read_trace

STALL_EVERY = 100_000  # steps
WAIT_MS = 120_000
WINDOW = ViewportSize(width=1280, height=900)
TALL = ViewportSize(width=1280, height=2200)  # both charts of the overview are in sight, or one would not be drawn
SEARCH = "form[data-ask=request] input"
LINES = ".js-plotly-plot .scatterlayer .trace"
SECOND_RANGE = "document.querySelectorAll('.js-plotly-plot')[1]?.layout?.xaxis?.range?.[0]"
WATCH = """
window.came = {};
document.addEventListener("click", () => { window.clicked = performance.now(); }, { once: true, capture: true });
new MutationObserver(() => {
  for (const one of wanted) if (!window.came[one] && document.querySelector(one)) window.came[one] = performance.now();
}).observe(document, { childList: true, subtree: true });
"""


@dataclass(frozen=True)
class Seen:
    """Seconds, and MB."""

    charts: float
    verdict: float
    kept: float
    incident: float
    batch: float
    zoom: float
    back: float
    request: float
    server: float


class Server:
    """``stallscope dashboard`` on a trace, from its start on."""

    def __init__(self, trace: Path, *options: str) -> None:
        self.begun = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "stallscope.cli",
            "dashboard",
            str(trace),
            "--port",
            "0",
            "--no-replay",
            *options,
        ]
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self._process.stderr is not None
        said = self._process.stderr.readline()
        if "http://" not in said:
            raise RuntimeError(said)
        self.url = said.split(": ", 1)[1].split()[0]

    def peak_mb(self) -> float:
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        (line,) = [line for line in status.splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1000

    def end(self) -> None:
        self._process.terminate()
        self._process.wait()


def look(browser: Browser, trace: Path) -> Seen:
    """One pass: a server that has kept nothing, then one that has."""
    page = browser.new_page(viewport=WINDOW)
    page.set_default_timeout(WAIT_MS)
    for old in trace.parent.glob(f"{trace.name}.diagnosis-*.json"):
        old.unlink()
    server = Server(trace, "--save")
    page.goto(server.url)
    page.wait_for_selector(LINES, state="attached")
    charts = time.perf_counter() - server.begun
    page.wait_for_selector("#answer .verdict")
    verdict = time.perf_counter() - server.begun
    page.wait_for_selector("#incidents a")
    settle(page)

    incident, batch = clicked(page, "#incidents a", "#incident-head dl", "#swimlanes .barlayer .trace")
    settle(page)
    page.set_viewport_size(TALL)
    page.goto(server.url)
    page.wait_for_selector(LINES, state="attached")
    settle(page)
    zoom = zoomed(page)
    settle(page)
    inside = page.evaluate(f"() => {SECOND_RANGE}")
    back = timed_until(page, page.go_back, f"{SECOND_RANGE} !== {inside!r}")
    settle(page)
    names = read_trace(trace).columns("requests", ["request"])["request"]
    request = asked(page, str(names[len(names) // 2].as_py()))
    peak = server.peak_mb()
    server.end()

    again = Server(trace, "--save")
    page.goto(again.url)
    page.wait_for_selector("#answer .verdict")
    kept = time.perf_counter() - again.begun
    again.end()
    page.close()
    return Seen(charts, verdict, kept, incident, batch, zoom, back, request, peak)


def clicked(page: Page, link: str, *wanted: str) -> list[float]:
    """From a click until each of the selectors is there, s, by the page's own clock: from outside one looks only when
    the page has time, which it has not while it draws."""
    page.evaluate(f"wanted => {{ {WATCH} }}", list(wanted))
    page.click(link)
    page.wait_for_function("wanted => wanted.every((one) => window.came[one])", arg=list(wanted))
    times: list[float] = page.evaluate(
        "wanted => wanted.map((one) => (window.came[one] - window.clicked) / 1000)", list(wanted)
    )
    return times


def settle(page: Page) -> None:
    """Until nothing is asked of the server for a while but whether there is news."""
    page.wait_for_timeout(2500)


def timed_until(page: Page, act: Callable[[], object], holds: str) -> float:
    begun = time.perf_counter()
    act()
    page.wait_for_function(f"() => {holds}")
    return time.perf_counter() - begun


def zoomed(page: Page) -> float:
    """From letting go of the mouse until the chart below is in the new window, too."""
    box = page.locator(".js-plotly-plot .nsewdrag").first.bounding_box()
    assert box is not None
    before = page.evaluate(f"() => {SECOND_RANGE}")
    page.mouse.move(box["x"] + 0.45 * box["width"], box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + 0.55 * box["width"], box["y"] + 20, steps=6)
    return timed_until(page, page.mouse.up, f"{SECOND_RANGE} !== {before!r}")


def asked(page: Page, request: str) -> float:
    """A request by its id, from Enter until its waterfall is there."""
    page.fill(SEARCH, request)
    begun = time.perf_counter()
    page.press(SEARCH, "Enter")
    page.wait_for_selector("#waterfall table")
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES, help="steps")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "stallscope-analysis")
    parser.add_argument("--passes", type=int, default=3)
    chosen = parser.parse_args()
    table = Table(title=f"the dashboard in a browser: medians of {chosen.passes} passes, s (server: MB)")
    for column in ("steps", *Seen.__annotations__):
        table.add_column(column, justify="right")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for steps in chosen.sizes:
            trace = chosen.folder / f"dashboard-{steps}"
            if not trace.exists():
                make(trace, steps, max(1, steps // STALL_EVERY), FIXED_NS)
            passes = [asdict(look(browser, trace)) for _ in range(chosen.passes)]
            medians = {name: statistics.median(one[name] for one in passes) for name in Seen.__annotations__}
            table.add_row(
                f"{steps:,}",
                *(f"{value:.0f}" if name == "server" else f"{value:.2f}" for name, value in medians.items()),
            )
        browser.close()
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
