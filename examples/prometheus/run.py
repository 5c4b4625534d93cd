"""The example in one go: all of it on loopback, a stall is recorded, what pages is printed; Ctrl-C ends it.

    python examples/prometheus/run.py [FOLDER]

FOLDER (by default stallscope-prometheus) gets the configuration, the rules, the spans and the logs.
"""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

HERE = Path(__file__).parent
CONFIGURATION = (
    HERE / "prometheus.yml",
    HERE / "alertmanager.yml",
    HERE.parents[1] / "dashboards" / "alertmanager" / "stallscope.tmpl",
)
STALLSCOPE = [sys.executable, "-m", "stallscope.cli"]
COLLECTOR, PROMETHEUS, ALERTMANAGER, PRINTER = 4318, 19090, 19093, 19095
READY_S, OVER_S = 60, 900  # an alert keeps firing for five minutes, and its windows have to empty


class Printer(BaseHTTPRequestHandler):
    """Prints what Slack would show."""

    paged = threading.Event()
    over = threading.Event()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        for message in body["attachments"]:
            title, text = html.unescape(message["title"]), html.unescape(message["text"])
            say("\n".join([title, *(f"         {line}" for line in text.splitlines())]))
            if title.startswith("[PAGE]"):
                self.paged.set()
            if title.startswith("[OVER]"):
                self.over.set()
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "stallscope-prometheus")
    programs = {
        "prometheus": shutil.which("prometheus"),
        "Alertmanager": shutil.which("prometheus-alertmanager") or shutil.which("alertmanager"),
    }
    for name, found in programs.items():
        if found is None:
            sys.exit(f"{name} is not installed (Debian: apt install prometheus prometheus-alertmanager)")
    folder.mkdir(parents=True, exist_ok=True)
    for file in CONFIGURATION:
        shutil.copy(file, folder)
    rules = folder / "stallscope.rules.yml"
    subprocess.run([*STALLSCOPE, "alerts", "export", "-o", str(rules), "--force"], check=True)

    with ExitStack() as started:
        printer = HTTPServer(("127.0.0.1", PRINTER), Printer)
        threading.Thread(target=printer.serve_forever, daemon=True).start()
        started.callback(printer.shutdown)
        start(started, folder, "collector", [*STALLSCOPE, "collect", "-o", "spans", "--grpc", "off"])
        start(
            started,
            folder,
            "alertmanager",
            [
                str(programs["Alertmanager"]),
                "--config.file=alertmanager.yml",
                "--storage.path=alertmanager",
                "--cluster.listen-address=",
                f"--web.listen-address=127.0.0.1:{ALERTMANAGER}",
            ],
        )
        start(
            started,
            folder,
            "prometheus",
            [
                str(programs["prometheus"]),
                "--config.file=prometheus.yml",
                "--storage.tsdb.path=prometheus",
                f"--web.listen-address=127.0.0.1:{PROMETHEUS}",
            ],
        )
        for url in (
            f"http://127.0.0.1:{COLLECTOR}/metrics",
            f"http://127.0.0.1:{ALERTMANAGER}/-/ready",
            f"http://127.0.0.1:{PROMETHEUS}/-/ready",
        ):
            wait_until_ready(url, folder)
        say(f"ready: Prometheus at http://127.0.0.1:{PROMETHEUS}, Alertmanager at http://127.0.0.1:{ALERTMANAGER}")
        say("recording two tenants for two and a half minutes; after one a third comes, which nobody has seen before")
        endpoint = f"http://127.0.0.1:{COLLECTOR}/v1/traces"
        subprocess.run(
            [
                *STALLSCOPE,
                "record",
                "reasoning_prompt",
                "--variant",
                "lasting",
                "--force",
                "-o",
                str(folder / "recorded.otlp.jsonl.zst"),
            ],
            env={**os.environ, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": endpoint},
            check=True,
        )
        say("recorded; waiting for the pages to be over")
        until = time.monotonic() + OVER_S
        while (pages := open_pages()) or not Printer.over.is_set():
            if time.monotonic() > until:
                sys.exit(f"still firing after {OVER_S} s: {', '.join(pages)}" if pages else "nothing paged")
            time.sleep(1)
    say("all pages are over" if Printer.paged.is_set() else "nothing paged")


def open_pages() -> list[str]:
    """Names of the pages that fire now, by Alertmanager."""
    url = f"http://127.0.0.1:{ALERTMANAGER}/api/v2/alerts?filter=severity%3D%22page%22"
    with urllib.request.urlopen(url, timeout=5) as answer:
        return [alert["labels"]["alertname"] for alert in json.load(answer)]


def start(started: ExitStack, folder: Path, name: str, command: list[str]) -> None:
    """A program in the folder, its output in NAME.log; it is ended with the rest."""
    log = started.enter_context((folder / f"{name}.log").open("wb"))
    process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    started.callback(end, process)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_until_ready(url: str, folder: Path) -> None:
    until = time.monotonic() + READY_S
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > until:
                sys.exit(f"{url} does not answer ({error}); the logs are in {folder}")
        time.sleep(0.2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
