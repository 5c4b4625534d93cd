"""A file of rules is anybody's, or a PrometheusRule; anything else is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from stallscope.alerts.backtest.rulefile import TAG, read_rules
from stallscope.alerts.promtool import check_rules
from stallscope.errors import UsageError
from tests.alerts.backtest.stories import PAGE, needs_promtool, rules

RESOURCE = """
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata: {name: stalls, labels: {release: kube}}
spec:
  groups:
  - name: blame
    limit: 5
    rules:
    - record: r:blame
      expr: sum(rate(stallscope_blame_seconds_total[1m]))
    - alert: Stalls
      expr: |
        r:blame > 0.2
        and r:blame > 0.1
      for: 30s
      labels: {severity: critical, enabled: yes, number: 010}
"""


def test_a_plain_file_and_a_resource_have_the_same_rules(tmp_path: Path) -> None:
    (alert,) = rules(tmp_path, RESOURCE).alerts
    assert alert.is_page
    assert alert.for_s == 30
    assert alert.interval_s is None
    assert alert.expression == "r:blame > 0.2\nand r:blame > 0.1\n"
    assert dict(alert.labels) == {"severity": "critical", "enabled": "yes", "number": "010"}
    assert rules(tmp_path, RESOURCE).recordings == {"r:blame": ["sum(rate(stallscope_blame_seconds_total[1m]))"]}
    (plain,) = rules(tmp_path, PAGE).alerts
    assert plain.catches == {"noisy_neighbor"}
    assert plain.interval_s == 10


@needs_promtool
@pytest.mark.parametrize("tagged", [False, True])
def test_a_resource_is_written_as_prometheus_reads_it(tmp_path: Path, tagged: bool) -> None:
    twice = f"{RESOURCE}---{RESOURCE}"
    text = rules(tmp_path, twice).text(tagged=tagged)
    check_rules(text, "rules")
    groups = yaml.safe_load(text)["groups"]
    assert [group["limit"] for group in groups] == [5, 5]
    labels = [rule["labels"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert [one.get(TAG) for one in labels] == (["0", "1"] if tagged else [None, None])
    assert labels[0]["enabled"] == "yes"


def test_a_changed_resource_stays_a_resource(tmp_path: Path) -> None:
    changed = rules(tmp_path, RESOURCE).with_expressions({0: "r:blame > 7"}, {0: "because: 7"}, "why")
    document = yaml.safe_load(changed.own_text())
    assert document["metadata"] == {"name": "stalls", "labels": {"release": "kube"}}
    rule = document["spec"]["groups"][0]["rules"][1]
    assert rule["expr"] == "r:blame > 7"
    assert rule["annotations"] == {"why": "because: 7"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no alert rules; give YAML with groups:"),
        ("just text", "no alert rules"),
        ("groups: []", "no alert rules"),
        ("groups: [{name: g, rules: [{record: r, expr: x}]}]", "no alert rules"),
        ("groups: 5", "groups is no list of mappings"),
        ("groups: [{name: g, rules: [{expr: x}]}]", "a rule has neither 'alert' nor record"),
        ("groups: [{name: g, rules: [{alert: A, expr: x, for: soon}]}]", "'soon' is no duration"),
        ("groups: [{name: g, rules: [{alert: A, expr: x, labels: [a]}]}]", "is no mapping of names to texts"),
        ("kind: Deployment", "a Deployment; of resources, only kind: PrometheusRule has rules"),
        ("a: [", "no YAML"),
        (f"{PAGE}---{PAGE}", "2 YAML documents, of which Prometheus reads the first"),
        ("a: !!python/object:os.system x", "no YAML"),
    ],
)
def test_what_is_no_file_of_rules_is_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as refused:
        rules(tmp_path, text)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_rules(tmp_path / "nothing.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        read_rules(tmp_path / "bytes.yaml")
