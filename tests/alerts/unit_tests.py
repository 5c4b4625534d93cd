"""Unit tests of rules as promtool runs them: Prometheus itself evaluates, nothing here knows PromQL."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isnan
from pathlib import Path

import pytest
import yaml

from stallscope.alerts.promql import quoted
from stallscope.alerts.rules import Owner
from stallscope.alerts.yaml_text import TextDumper

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt install prometheus)"
)
OWNER = Owner("inference", "https://example.org/runbooks", "spans")
STEP_S = 10
Labels = Mapping[str, str]


def series(name: str, labels: Labels) -> str:
    """A series as PromQL writes it."""
    return f"{name}{{{','.join(f'{label}={quoted(value)}' for label, value in labels.items())}}}"


@dataclass
class UnitTest:
    """What is scraped every ``STEP_S`` (NaN: nothing), and what is expected of it."""

    inputs: list[dict[str, str]] = field(default_factory=list)
    exprs: list[dict[str, object]] = field(default_factory=list)
    alerts: list[dict[str, object]] = field(default_factory=list)

    def scraped(self, name: str, labels: Labels, values: Sequence[float]) -> None:
        self.inputs.append(
            {
                "series": series(name, labels),
                "values": " ".join("_" if isnan(value) else f"{value:.17g}" for value in values),
            }
        )

    def firing(self, at_s: int, alert: str, labels: Sequence[Labels]) -> None:
        """These and no others fire, by all of their labels but the alert's name and state."""
        found = [series("ALERTS", {"alertname": alert, "alertstate": "firing", **each}) for each in labels]
        chosen = series("ALERTS", {"alertname": alert, "alertstate": "firing"})
        self.exprs.append(
            {
                "expr": chosen,
                "eval_time": f"{at_s}s",
                "exp_samples": [{"labels": labels_text, "value": 1} for labels_text in found],
            }
        )

    def about(self, expr: str, at_s: int, value: float) -> None:
        """The one value of an expression, to a millionth."""
        near = f"abs(({expr}) - {value!r}) < bool {abs(value) * 1e-6 + 1e-9!r}"
        self.exprs.append(
            {"expr": f"sum({near})", "eval_time": f"{at_s}s", "exp_samples": [{"labels": "{}", "value": 1}]}
        )

    def saying(self, at_s: int, alert: str, found: Sequence[tuple[Labels, Labels]]) -> None:
        """These alerts fire, by their labels and annotations."""
        expected = [{"exp_labels": dict(labels), "exp_annotations": dict(texts)} for labels, texts in found]
        self.alerts.append({"alertname": alert, "eval_time": f"{at_s}s", "exp_alerts": expected})

    def passes(self, rules: str, folder: Path) -> None:
        """Asserts that promtool finds all expectations met."""
        (folder / "rules.yml").write_text(rules, encoding="utf-8")
        test = {
            "interval": f"{STEP_S}s",
            "input_series": self.inputs,
            "promql_expr_test": self.exprs,
            "alert_rule_test": self.alerts,
        }
        document = {"rule_files": ["rules.yml"], "evaluation_interval": f"{STEP_S}s", "tests": [test]}
        (folder / "test.yml").write_text(yaml.dump(document, Dumper=TextDumper, allow_unicode=True), encoding="utf-8")
        ran = subprocess.run(
            ["promtool", "test", "rules", "test.yml"], cwd=folder, capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stdout + ran.stderr


def annotated(rules: str, *kept: str) -> str:
    """The same rules with these annotations alone: an expectation must name all that there are."""
    document = yaml.safe_load(rules)
    for group in document["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                rule["annotations"] = {name: text for name, text in rule["annotations"].items() if name in kept}
    return yaml.dump(document, Dumper=TextDumper, allow_unicode=True)
