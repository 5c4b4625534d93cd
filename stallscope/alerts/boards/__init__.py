"""Grafana boards as code: ``make boards`` writes them into ``dashboards/grafana/``, and a test compares the two."""

from __future__ import annotations

from stallscope.alerts.boards.engines import ENGINES
from stallscope.alerts.boards.fleet import FLEET

BOARDS = {"fleet.json": FLEET, "engines.json": ENGINES}
