"""The example with the intervals of the latency budget: an engine stalls while it is watched, and a page names who."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stallscope.alerts.choices import Format, Pack
from stallscope.alerts.export import export
from stallscope.alerts.thresholds import NoTeacher
from tests.alerts.example import example
from tests.alerts.servers import NEEDS_ALERTMANAGER, NEEDS_PROMETHEUS, wait_for
from tests.alerts.unit_tests import OWNER
from tests.live.collecting import collecting

ALERT = "StallscopeTenantStallsOthers"
SHOWN_S, OVER_S = (
    300.0,
    600.0,
)  # a minute of calm and a stall on a slow machine; until the windows of the rule are empty
LINGERS = "keep_firing_for: 5m"  # nothing of the budget: the test need not wait for it


@NEEDS_PROMETHEUS
@NEEDS_ALERTMANAGER
def test_a_stall_by_a_tenant_never_seen_before_pages_with_its_name_and_resolves(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="PyTorch is absent: in virtual time a stall is over before it is scraped")
    rules = export(NoTeacher(), [], OWNER, Pack.BLAME, Format.PROMETHEUS).text
    assert LINGERS in rules
    rules = rules.replace(LINGERS, "keep_firing_for: 10s")
    recorded = tmp_path / "recorded.otlp.jsonl"
    command = ["record", "reasoning_prompt", "--variant", "lasting", "-o", str(recorded)]
    record = [sys.executable, "-m", "stallscope.cli", *command]
    with collecting(tmp_path / "spans") as collector:
        address = collector.url.removeprefix("http://").removesuffix("/v1/traces")
        with example(tmp_path, address, rules) as running:
            env = {**os.environ, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.url}
            with subprocess.Popen(record, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as engine:
                try:
                    alerts = wait_for(lambda: running.prometheus.alerts(ALERT), "page", SHOWN_S)
                finally:
                    engine.kill()
            said = {(one["labels"]["culprit"], one["labels"]["tenant"], one["labels"]["severity"]) for one in alerts}
            assert said == {("reasoner", "reasoner", "page")}
            (page,) = wait_for(lambda: running.messages("[PAGE]"), "notification")
            assert page["title"].startswith("[PAGE] reasoner is stalling ")
            wait_for(lambda: not running.prometheus.alerts(ALERT), "end of it", OVER_S)
            wait_for(lambda: running.messages("[OVER] reasoner is stalling "), "notification of the end")
