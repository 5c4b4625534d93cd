"""Rules as Grafana provisions them from a file: its own alerting over a Prometheus that only stores.

There, rules can't query in their texts, and record nothing: the pack comes without recording rules, and summaries
without what only a query finds.
"""

from __future__ import annotations

from collections.abc import Sequence

from stallscope.alerts.formats.document import annotations_of, labels_of, write_yaml
from stallscope.alerts.promql import span
from stallscope.alerts.rules import Group, Owner, Rule
from stallscope.alerts.texts import for_grafana

FOLDER = "stallscope"
DATASOURCE = "prometheus"  # the uid of the data source: to be edited where it is another
_MOST_UID = 40
_LOOKBACK_S = 600  # of an instant query only its end counts


def provisioning(groups: Sequence[Group], owner: Owner, heading: str) -> str:
    """A file for provisioning/alerting (Grafana 12 or later: keepFiringFor)."""
    document = {"apiVersion": 1, "groups": [_group(group, owner) for group in groups]}
    return write_yaml(document, heading)


def _group(group: Group, owner: Owner) -> dict[str, object]:
    names = [rule.name for rule in group.rules]
    rules = []
    for position, rule in enumerate(group.rules):
        nth = names[:position].count(rule.name)
        rules.append(_rule(rule, group, owner, f" {nth + 1}" if names.count(rule.name) > 1 else ""))
    return {
        "orgId": 1,
        "name": group.name,
        "folder": FOLDER,
        "interval": span(group.interval_s),
        "rules": rules,
    }


def _rule(rule: Rule, group: Group, owner: Owner, nth: str) -> dict[str, object]:
    title = f"{rule.name}{nth}"
    stays = {"keepFiringFor": span(rule.keep_firing_s)} if rule.keep_firing_s else {}
    return {
        "uid": _uid(group.name, title),
        "title": title,
        "condition": "B",
        "data": [_query(rule.expr), _has_value()],
        "noDataState": "OK",  # an expression that holds nowhere has no series
        "execErrState": "Error",
        "for": span(rule.for_s) if rule.for_s else "0s",
        **stays,
        "labels": labels_of(rule, owner, for_grafana),
        "annotations": annotations_of(rule, owner, for_grafana),
    }


def _query(expr: str) -> dict[str, object]:
    return {
        "refId": "A",
        "relativeTimeRange": {"from": _LOOKBACK_S, "to": 0},
        "datasourceUid": DATASOURCE,
        "model": {"refId": "A", "expr": expr, "instant": True, "range": False},
    }


def _has_value() -> dict[str, object]:
    """Each series that the expression leaves is above its threshold already."""
    return {
        "refId": "B",
        "datasourceUid": "__expr__",
        "model": {"refId": "B", "type": "math", "expression": "is_number($A)"},
    }


def _uid(group: str, title: str) -> str:
    return f"{group}-{title}".replace("Stallscope", "").replace(" ", "-").lower()[:_MOST_UID]
