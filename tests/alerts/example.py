"""The example of ``examples/prometheus/`` on free ports: its Prometheus, its Alertmanager, who is notified."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.alerts.servers import Alertmanager, Inbox, Prometheus, alertmanager, prometheus, receiving

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "prometheus"
TEMPLATES = ROOT / "dashboards" / "alertmanager"


@dataclass(frozen=True)
class Example:
    prometheus: Prometheus
    alertmanager: Alertmanager
    inbox: Inbox

    def messages(self, title: str) -> list[dict[str, Any]]:
        """Notifications of which the title begins so, as they went to Slack: ``&``, ``<`` and ``>`` are entities."""
        told = [body["attachments"][0] for body in self.inbox.at("/")]
        return [one for one in told if one["title"].startswith(title)]


@contextmanager
def example(folder: Path, collector: str, rules: str, every: str = "") -> Iterator[Example]:
    """All of it for a collector (HOST:PORT) and rules (YAML), in ``folder``.

    ``every``: instead of the example's own intervals, for a test that is not about them.
    """
    (folder / "stallscope.rules.yml").write_text(rules, encoding="utf-8")
    with receiving() as inbox, alertmanager(folder, _notifying(inbox, every)) as manager:
        scraping = config("prometheus.yml")
        scraping["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [manager.url.removeprefix("http://")]
        scraping["scrape_configs"][0]["static_configs"][0]["targets"] = [collector]
        if every:
            scraping["global"] = {"scrape_interval": every, "evaluation_interval": every}
        with prometheus(folder, scraping) as server:
            yield Example(server, manager, inbox)


def _notifying(inbox: Inbox, every: str) -> dict[str, Any]:
    notifying = config("alertmanager.yml")
    notifying["templates"] = [str(TEMPLATES / name) for name in notifying["templates"]]
    notifying["receivers"][0]["slack_configs"][0]["api_url"] = f"http://127.0.0.1:{inbox.port}/"
    if every:
        notifying["route"]["group_interval"] = every
    return notifying


def config(name: str) -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    return read
