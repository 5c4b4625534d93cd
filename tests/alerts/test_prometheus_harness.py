"""From a counter that rises to a notification, and back: a real Prometheus, a real Alertmanager, in seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from stallscope.watch.families import BLAME
from tests.alerts.servers import (
    NEEDS_ALERTMANAGER,
    NEEDS_PROMETHEUS,
    Exposition,
    alertmanager,
    exposing,
    prometheus,
    receiving,
    wait_for,
)

CULPRIT = 'the "reasoner" {{ $labels.x }}\n<b>\\ 🔥'
ALERT = "StallscopeTenantStallsOthers"
RULE = {
    "alert": ALERT,
    "expr": f"sum by (culprit) (rate({BLAME.name}[4s])) > 0.5",
    "labels": {"severity": "page"},
    "annotations": {"summary": "{{ $labels.culprit }} is stalling others."},
}


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
def test_blame_that_rises_fires_with_the_culprit_reaches_the_webhook_and_resolves(tmp_path: Path) -> None:
    (tmp_path / "rules.yml").write_text(
        yaml.safe_dump({"groups": [{"name": "blame", "interval": "1s", "rules": [RULE]}]}), encoding="utf-8"
    )
    with receiving() as inbox, exposing() as exposition:
        notified = {
            "route": {"receiver": "hook", "group_by": ["culprit"], "group_wait": "0s", "group_interval": "1s"},
            "receivers": [{"name": "hook", "webhook_configs": [{"url": f"http://127.0.0.1:{inbox.port}/hook"}]}],
        }
        exposition.text = exposed(0)
        with alertmanager(tmp_path, notified) as manager:
            scraped = {
                "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
                "rule_files": [str(tmp_path / "rules.yml")],
                "alerting": {
                    "alertmanagers": [{"static_configs": [{"targets": [manager.url.removeprefix("http://")]}]}]
                },
                "scrape_configs": [
                    {"job_name": "watch", "static_configs": [{"targets": [f"127.0.0.1:{exposition.port}"]}]}
                ],
            }
            with prometheus(tmp_path, scraped) as server:
                wait_for(lambda: server.query(BLAME.name), "first scrape")
                assert server.alerts(ALERT) == []
                with rising(exposition):
                    (alert,) = wait_for(lambda: server.alerts(ALERT), "alert")
                    assert alert["labels"]["culprit"] == CULPRIT
                    (told,) = wait_for(lambda: inbox.at("/hook"), "notification")
                assert told["status"] == "firing"
                assert told["groupLabels"] == {"culprit": CULPRIT}
                (said,) = told["alerts"]
                assert said["labels"]["severity"] == "page"
                assert said["annotations"]["summary"] == f"{CULPRIT} is stalling others."

                wait_for(lambda: not server.alerts(ALERT), "end of the alert")
                over = wait_for(lambda: [one for one in inbox.at("/hook") if one["status"] == "resolved"], "resolution")
                assert over[0]["alerts"][0]["labels"]["culprit"] == CULPRIT


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
