"""From a counter that rises to a notification, and back: the example's Prometheus and Alertmanager, in seconds."""

from __future__ import annotations

import html
import runpy
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from stallscope.watch.families import BLAME, EVALUATION_S, SCRAPE_S
from tests.alerts.example import FOLDER, TEMPLATES, config, example
from tests.alerts.servers import (
    AMTOOL,
    NEEDS_ALERTMANAGER,
    NEEDS_PROMETHEUS,
    Exposition,
    exposing,
    prometheus,
    wait_for,
)

CULPRIT = 'the "reasoner" {{ $labels.x }}\n<b>\\ 🔥'
ALERT = "StallscopeTenantStallsOthers"
RULE = {
    "alert": ALERT,
    "expr": f"sum by (culprit) (rate({BLAME.name}[4s])) > 0.5",
    "labels": {"severity": "page", "tenant": "{{ $labels.culprit }}"},
    "annotations": {"summary": "{{ $labels.culprit }} is stalling others."},
}
RULES = yaml.safe_dump({"groups": [{"name": "blame", "rules": [RULE]}]})


def exposed(seconds: float) -> str:
    name = BLAME.name.removesuffix("_total")
    culprit = CULPRIT.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
    return (
        f"# TYPE {name} counter\n# UNIT {name} seconds\n"
        f'{name}_total{{victim="chat",culprit="{culprit}",mechanism="kv_pinning"}} {seconds}\n# EOF\n'
    )


@contextmanager
def rising(exposition: Exposition) -> Iterator[None]:
    """Meanwhile the counter rises, by two seconds each second."""
    over = threading.Event()
    begun = time.monotonic()

    def rise() -> None:
        while not over.wait(0.1):
            exposition.text = exposed(2 * (time.monotonic() - begun))

    thread = threading.Thread(target=rise)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@NEEDS_PROMETHEUS
@NEEDS_ALERTMANAGER
def test_blame_that_rises_fires_with_the_culprit_is_told_and_resolves(tmp_path: Path) -> None:
    with exposing() as exposition:
        exposition.text = exposed(0)
        with example(tmp_path, f"127.0.0.1:{exposition.port}", RULES, every="1s") as running:
            server = running.prometheus
            wait_for(lambda: server.query(BLAME.name), "first scrape")
            assert server.alerts(ALERT) == []
            with rising(exposition):
                (alert,) = wait_for(lambda: server.alerts(ALERT), "alert")
                assert alert["labels"]["culprit"] == CULPRIT
                (page,) = wait_for(lambda: running.messages("[PAGE]"), "notification")
            assert html.unescape(page["title"]) == f"[PAGE] {CULPRIT} is stalling others."
            (told,) = running.alertmanager.alerts()
            assert told["labels"]["tenant"] == CULPRIT

            wait_for(lambda: not server.alerts(ALERT), "end of the alert")
            (over,) = wait_for(lambda: running.messages("[OVER]"), "notification of the end")
            assert html.unescape(over["title"]) == f"[OVER] {CULPRIT} is stalling others."


@NEEDS_PROMETHEUS
def test_a_server_is_gone_when_its_block_is_left_by_an_error(tmp_path: Path) -> None:
    seen: list[str] = []

    def fail() -> None:
        with prometheus(tmp_path, {}) as server:
            assert server.query("vector(1)") == [({}, 1.0)]
            seen.append(server.url)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(httpx.ConnectError):
        httpx.get(seen[0])


# --- the example's configuration ----------------------------------------------------------------------------------


def test_the_example_scrapes_and_evaluates_as_often_as_the_latency_budget_says() -> None:
    assert config("prometheus.yml")["global"] == {
        "scrape_interval": f"{SCRAPE_S}s",
        "evaluation_interval": f"{EVALUATION_S}s",
    }


def test_the_example_starts_its_programs_where_its_configuration_looks_for_them() -> None:
    ports = runpy.run_path(str(FOLDER / "run.py"))
    scraping, notifying = config("prometheus.yml"), config("alertmanager.yml")
    (collector,) = scraping["scrape_configs"][0]["static_configs"][0]["targets"]
    (manager,) = scraping["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    printer = notifying["receivers"][0]["slack_configs"][0]["api_url"]
    assert collector == f"127.0.0.1:{ports['COLLECTOR']}"
    assert manager == f"127.0.0.1:{ports['ALERTMANAGER']}"
    assert printer == f"http://127.0.0.1:{ports['PRINTER']}/"
    assert all(file.exists() for file in ports["CONFIGURATION"])


@NEEDS_PROMETHEUS
@NEEDS_ALERTMANAGER
def test_the_example_is_sound_where_it_is_copied_to(tmp_path: Path) -> None:
    for file in (*FOLDER.glob("*.yml"), TEMPLATES / "stallscope.tmpl"):
        shutil.copy(file, tmp_path)
    (tmp_path / "stallscope.rules.yml").write_text(RULES, encoding="utf-8")
    for command in (["promtool", "check", "config", "prometheus.yml"], [AMTOOL, "check-config", "alertmanager.yml"]):
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
