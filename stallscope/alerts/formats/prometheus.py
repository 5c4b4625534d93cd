"""Rules as Prometheus loads them: a rule file, or the same within a PrometheusRule for its operator on Kubernetes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stallscope.alerts.formats.document import annotations_of, labels_of, write_yaml
from stallscope.alerts.promql import span
from stallscope.alerts.rules import Group, Owner, RecordingRule, Rule
from stallscope.alerts.texts import for_prometheus

Plain = Mapping[str, object]


def rule_file(groups: Sequence[Group], owner: Owner, heading: str) -> str:
    """A file for ``rule_files`` (Prometheus 2.42 or later: keep_firing_for)."""
    return write_yaml(_groups(groups, owner), heading)


def prometheus_rule(groups: Sequence[Group], owner: Owner, heading: str) -> str:
    """A custom resource of the Prometheus operator (0.67 or later: keep_firing_for)."""
    resource = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "stallscope", "labels": {"app.kubernetes.io/name": "stallscope"}},
        "spec": _groups(groups, owner),
    }
    return write_yaml(resource, heading)


def _groups(groups: Sequence[Group], owner: Owner) -> dict[str, object]:
    return {
        "groups": [
            {
                "name": group.name,
                "interval": span(group.interval_s),
                "rules": [*map(_recording, group.recordings), *(_alert(rule, owner) for rule in group.rules)],
            }
            for group in groups
        ]
    }


def _recording(rule: RecordingRule) -> Plain:
    with_labels = {"labels": dict(rule.labels)} if rule.labels else {}
    return {"record": rule.name, "expr": rule.expr, **with_labels}


def _alert(rule: Rule, owner: Owner) -> Plain:
    waits = {"for": span(rule.for_s)} if rule.for_s else {}
    stays = {"keep_firing_for": span(rule.keep_firing_s)} if rule.keep_firing_s else {}
    return {
        "alert": rule.name,
        "expr": rule.expr,
        **waits,
        **stays,
        "labels": labels_of(rule, owner, for_prometheus),
        "annotations": annotations_of(rule, owner, for_prometheus),
    }
