"""What a backtest of alert rules costs, and how near it is to a Prometheus that lives through the same.

    python benchmarks/backtest.py            # costs, then five minutes of a real Prometheus
    python benchmarks/backtest.py --no-life  # costs alone

Costs: one rule on so many series for so many hours, a scrape every 10 s; CPU time is that of both runs of promtool and
of writing their files, since others may use the machine too; memory is promtool's most.

Life: a Prometheus on loopback scrapes a small exporter and evaluates rules, each every 10 s, while two tenants are
blamed for a while; the exporter notes when it was scraped and what it said. The backtest has exactly those scrapes.
Seconds are from the exporter's start to the first and the last evaluation in which an alert fired; the real ones are
read off ALERTS to a second, and last until the evaluation after. Needs Debian's prometheus.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from stallscope.alerts.backtest import Timeline, read_rules
from stallscope.alerts.backtest.firing import evaluate
from stallscope.alerts.backtest.provable import reads
from stallscope.watch.families import BLAME
from stallscope.watch.samples import Labels, Samples, Series, samples_of

SIZES = ((20, 1), (100, 1), (20, 24), (100, 24))
SCRAPE_S, START_S = 10, 1_800_000_000
LIFE_S = 300
# From when to when each is blamed, s, and for how many seconds of waiting in each second.
STALLS = {"reasoner": (60, 150, 1.0), 'a "b"\\n{{ $labels.x }}\nlast': (100, 140, 0.7)}
ONE_RULE = f"""
groups:
- name: cost
  rules:
  - {{alert: Stalls, expr: 'sum by (culprit) (rate({BLAME.name}[1m])) > 0.2', labels: {{severity: page}}}}
"""
RULES = f"""
groups:
- name: life
  interval: {SCRAPE_S}s
  rules:
  - {{record: 'r:blame', expr: 'sum by (culprit) (rate({BLAME.name}[1m]))'}}
  - {{alert: Kept, expr: 'r:blame > 0.2', keep_firing_for: 30s}}
  - {{alert: Waited, expr: 'rate({BLAME.name}[20s]) > 0', for: 30s}}
  - {{alert: OneScrape, expr: 'rate({BLAME.name}[10s]) > 0'}}
"""
Fired = dict[tuple[str, str], tuple[float, float]]  # by alert and culprit: first and last, s


def pair(culprit: str) -> Series:
    labels: Labels = (("culprit", culprit), ("mechanism", "prefill_queue"), ("victim", "chat"))
    return BLAME.name, labels


# --- costs --------------------------------------------------------------------------------------------------


def cost(series: int, hours: float) -> tuple[int, float, float]:
    """Samples, CPU seconds, and megabytes of promtool, in this process."""
    count = int(hours * 3600 / SCRAPE_S) + 1
    times = (START_S + SCRAPE_S * np.arange(count, dtype=np.int64)) * 10**9
    draws = np.random.default_rng(0)
    values = {pair(f"tenant-{at}"): np.cumsum(draws.random(count) * 1e-2) for at in range(series)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rules.yaml"
        path.write_text(ONE_RULE)
        rules = read_rules(path)
        begun_s = time.process_time()
        evaluate(rules, reads(rules), Timeline("cost", Samples(times, values), ()))
        own_s = time.process_time() - begun_s
    promtool = resource.getrusage(resource.RUSAGE_CHILDREN)
    return series * count, own_s + promtool.ru_utime + promtool.ru_stime, promtool.ru_maxrss / 1e3


def print_costs(console: Console) -> None:
    table = Table("series", "hours", "samples", "CPU s", "promtool, MB", box=None)
    for series, hours in SIZES:
        command = [sys.executable, __file__, "--cost", str(series), str(hours)]  # a peak of its own
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        samples, taken_s, megabytes = json.loads(run.stdout)
        table.add_row(str(series), str(hours), f"{samples:,}", f"{taken_s:.1f}", f"{megabytes:.0f}")
    console.print(table)


# --- life ---------------------------------------------------------------------------------------------------


class Exporter:
    """Says what blame there is by now, and remembers when it was asked."""

    def __init__(self) -> None:
        self.began_s = time.time()
        self.scrapes: list[tuple[int, dict[Series, float]]] = []
        exporter = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                text = exporter.scrape().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def scrape(self) -> str:
        now_s = time.time()
        exposed = {
            pair(culprit): per_s * min(max(now_s - self.began_s - from_s, 0.0), to_s - from_s)
            for culprit, (from_s, to_s, per_s) in STALLS.items()
        }
        self.scrapes.append((round(now_s * 1e9), exposed))
        return "".join(f"{name}{{{_labels(labels)}}} {value!r}\n" for (name, labels), value in exposed.items())


def _labels(labels: Labels) -> str:
    escaped = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
    return ",".join(f'{name}="{value.translate(escaped)}"' for name, value in labels)


def lived(folder: Path, exporter: Exporter, port: int) -> Fired:
    """What fired in a Prometheus that scraped the exporter for ``LIFE_S``."""
    target = f"127.0.0.1:{exporter.server.server_port}"
    (folder / "prometheus.yaml").write_text(
        f"global: {{scrape_interval: {SCRAPE_S}s, evaluation_interval: {SCRAPE_S}s}}\n"
        "rule_files: [rules.yaml]\n"
        f"scrape_configs: [{{job_name: story, static_configs: [{{targets: ['{target}']}}]}}]\n"
    )
    command = ["prometheus", "--config.file=prometheus.yaml", "--storage.tsdb.path=data", "--log.level=error"]
    process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], cwd=folder)
    try:
        time.sleep(LIFE_S)
        asked = {"query": 'ALERTS{alertstate="firing"}', "start": exporter.began_s, "end": time.time(), "step": 1}
        url = f"http://127.0.0.1:{port}/api/v1/query_range?{urllib.parse.urlencode(asked)}"
        with urllib.request.urlopen(url) as answer:
            found = json.load(answer)["data"]["result"]
    finally:
        process.terminate()
        process.wait()
    fired: Fired = {}
    for one in found:
        times = [float(at) - exporter.began_s for at, _ in one["values"]]
        fired[one["metric"]["alertname"], one["metric"]["culprit"]] = times[0], times[-1]
    return fired


def backtested(folder: Path, exporter: Exporter) -> Fired:
    """What fires by the backtest of the same scrapes."""
    rules = read_rules(folder / "rules.yaml")
    run = evaluate(rules, reads(rules), Timeline("life", samples_of(exporter.scrapes), ()))
    return {
        (rules.alerts[one.alert].name, dict(one.labels)["culprit"]): (
            one.start_ns / 1e9 - exporter.began_s,
            one.end_ns / 1e9 - exporter.began_s,
        )
        for one in run.firings
    }


def print_life(console: Console, port: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rules.yaml").write_text(RULES)
        exporter = Exporter()
        real = lived(folder, exporter, port)
        exporter.server.shutdown()
        made = backtested(folder, exporter)
    table = Table("alert", "culprit", "Prometheus, s", "backtest, s", "start differs by, s", box=None)
    for alert, culprit in sorted({*real, *made}):
        both = real.get((alert, culprit)), made.get((alert, culprit))
        cells = ["-" if one is None else f"{one[0]:.0f} to {one[1]:.0f}" for one in both]
        differs = "-" if both[0] is None or both[1] is None else f"{both[0][0] - both[1][0]:+.1f}"
        table.add_row(alert, repr(culprit), *cells, differs)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--no-life", action="store_true", help="costs alone")
    parser.add_argument("--port", type=int, default=19390, help="of the Prometheus, on loopback")
    parser.add_argument("--cost", nargs=2, type=float, metavar=("SERIES", "HOURS"), help="one cost, as JSON")
    options = parser.parse_args()
    if options.cost is not None:
        print(json.dumps(cost(int(options.cost[0]), options.cost[1])))
        return
    console = Console(highlight=False)
    print_costs(console)
    if not options.no_life:
        print_life(console, options.port)


if __name__ == "__main__":
    main()
