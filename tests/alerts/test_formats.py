"""What each program loads: the metrics exist, the files are whole, and Grafana's lean on nothing that it lacks."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from stallscope.alerts.choices import Format, Pack
from stallscope.alerts.export import export
from stallscope.alerts.plain_pack import ENGINES
from stallscope.alerts.promtool import check_rules
from stallscope.alerts.rules import Owner
from stallscope.alerts.thresholds import NoTeacher
from stallscope.diagnosis.slo import parse_slo
from stallscope.errors import UsageError
from stallscope.watch import families as f
from tests.alerts.unit_tests import OWNER, needs_promtool

ROOT = Path(__file__).parents[2]
SLOS = [parse_slo(text) for text in ("ttft=500ms@p99", "chat:ttft=500ms@p99", "b:ttft=500ms@p99", "chat:itl=90ms@p99")]
MADE = {form: export(NoTeacher(), SLOS, OWNER, Pack.BOTH, form) for form in Format}
GROUPS = yaml.safe_load(MADE[Format.PROMETHEUS].text)["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
ALERTS = sorted({rule["alert"] for rule in RULES if "alert" in rule})
OWN_METRIC = re.compile(r"\bstallscope_[a-z0-9_]+")
RECORDED = re.compile(r"\bstallscope:[a-z0-9_:]+")
PLAIN_METRIC = re.compile(r"\b(?:vllm|sglang):[a-z0-9_]+")
PARTS = ("_bucket", "_count", "_sum")
FAMILIES = {family.name: family for family in f.FAMILIES}


def family_of(name: str) -> f.Family | None:
    if name in FAMILIES:
        return FAMILIES[name]
    found = [FAMILIES.get(name.removesuffix(part)) for part in PARTS if name.endswith(part)]
    return next((family for family in found if family is not None and family.kind is f.Kind.HISTOGRAM), None)


def expressions() -> list[str]:
    """All PromQL of a rule: what it compares and what its texts look up."""
    return [text for rule in RULES for text in (rule["expr"], *rule.get("annotations", {}).values())]


def test_each_metric_that_a_rule_names_is_exposed_by_a_watch_or_by_an_engine_of_the_list() -> None:
    recorded = {rule["record"] for rule in RULES if "record" in rule}
    plain = {name for engine in ENGINES for name in engine.metrics}
    own = [name for text in expressions() for name in OWN_METRIC.findall(text)]
    assert own
    assert [name for name in own if family_of(name) is None] == []
    assert {name for text in expressions() for name in RECORDED.findall(text)} == recorded
    assert {name for text in expressions() for name in PLAIN_METRIC.findall(text)} == plain


def test_each_metric_has_the_labels_by_which_it_is_chosen_and_summed() -> None:
    """In each aggregation over one metric: its ``by`` labels, and those of its matchers."""
    summed = re.compile(r"sum by \(([a-z, ]+)\) \(+(?:rate|increase)\((stallscope_[a-z_]+)(?:\{([^}]*)\})?\[")
    found = [match for text in expressions() for match in summed.findall(text.replace('\\"', '"'))]
    assert len(found) > 20
    for by, name, matchers in found:
        family = family_of(name)
        assert family is not None
        known = {*family.labels, *(["le"] if name.endswith("_bucket") else [])}
        assert set(by.split(", ")) <= known, name
        assert set(re.findall(r"([a-z_]+)(?:=~|!=|=)", matchers)) <= known, name


def test_the_alerts_are_those_that_boards_and_templates_know() -> None:
    assert [name for name in ALERTS if not name.startswith("StallscopePlain")] == [
        "StallscopeEngineStall",
        "StallscopeGpuThrottled",
        "StallscopeKvPinned",
        "StallscopeOverload",
        "StallscopePreemptionStorm",
        "StallscopeRecomputeTax",
        "StallscopeSloFastBurn",
        "StallscopeSloSlowBurn",
        "StallscopeTelemetryLost",
        "StallscopeTelemetryStopped",
        "StallscopeTenantStalledOthers",
        "StallscopeTenantStallsOthers",
    ]


def test_each_alert_has_a_runbook_and_each_runbook_an_alert() -> None:
    assert sorted(path.stem for path in (ROOT / "docs" / "runbooks").glob("*.md")) == ALERTS


@pytest.mark.parametrize("name", ALERTS)
def test_a_runbook_says_what_how_to_confirm_what_now_and_what_to_change(name: str) -> None:
    text = (ROOT / "docs" / "runbooks" / f"{name}.md").read_text(encoding="utf-8")
    headings = ["## What it means", "## How to confirm", "## What to do now", "## What to change"]
    assert [line for line in text.splitlines() if line.startswith("#")] == [f"# {name}", *headings]
    assert [found for found in OWN_METRIC.findall(text) if family_of(found) is None] == []
    known = {metric for engine in ENGINES for metric in engine.metrics}
    assert set(PLAIN_METRIC.findall(text)) <= known


@needs_promtool
def test_the_queries_of_runbooks_and_docs_are_promql(tmp_path: Path) -> None:
    pages = [*(ROOT / "docs" / "runbooks").glob("*.md"), ROOT / "docs" / "alerts.md"]
    blocks = [
        block for page in pages for block in re.findall(r"```promql\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    ]
    queries = [query for block in blocks for query in block.strip().split("\n\n")]
    assert len(queries) >= len(ALERTS)
    rules = [{"record": f"q:{number}", "expr": query} for number, query in enumerate(queries)]
    check_rules(yaml.safe_dump({"groups": [{"name": "q", "rules": rules}]}), "promtool")


def test_a_rule_file_names_each_group_once_and_reads_well() -> None:
    text = MADE[Format.PROMETHEUS].text
    assert text.startswith("# Alert rules of stallscope")
    names = [group["name"] for group in GROUPS]
    assert len(names) == len(set(names))
    assert "\\n" not in text.partition("groups:")[2].partition("annotations")[0]


def test_a_prometheusrule_is_the_rule_file_within_a_resource() -> None:
    resource = yaml.safe_load(MADE[Format.PROMETHEUSRULE].text)
    assert (resource["apiVersion"], resource["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert resource["spec"] == {"groups": GROUPS}


def test_grafana_s_rules_stand_alone() -> None:
    document = yaml.safe_load(MADE[Format.GRAFANA].text)
    json.dumps(document)
    rules = [rule for group in document["groups"] for rule in group["rules"]]
    assert len(rules) == sum("alert" in rule for rule in RULES)
    assert len({rule["uid"] for rule in rules}) == len(rules)
    for group in document["groups"]:
        assert len({rule["title"] for rule in group["rules"]}) == len(group["rules"])
    for rule in rules:
        assert re.fullmatch(r"[a-z0-9-]{1,40}", rule["uid"])
        asked, condition = rule["data"]
        assert rule["condition"] == condition["refId"] == "B"
        assert not RECORDED.search(asked["model"]["expr"])
        for text in (rule["title"], *rule["labels"].values(), *rule["annotations"].values()):
            assert "$" not in text
            assert "query" not in text


@needs_promtool
def test_what_promtool_refuses_is_told_on_one_line() -> None:
    with pytest.raises(UsageError, match=r"the rules: .*could not parse expression") as raised:
        check_rules("groups: [{name: a, rules: [{record: b, expr: 'sum('}]}]", "the rules")
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_prometheus_starts_with_the_rules(tmp_path: Path) -> None:
    """promtool checks what a configuration names: the file is found, and its rules are taken."""
    (tmp_path / "stallscope.rules.yml").write_text(MADE[Format.PROMETHEUS].text, encoding="utf-8")
    (tmp_path / "prometheus.yml").write_text("rule_files: [stallscope.rules.yml]\n", encoding="utf-8")
    ran = subprocess.run(
        ["promtool", "check", "config", "prometheus.yml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("SUCCESS") == 3
    assert "duplicate" not in ran.stdout


def test_a_team_and_a_folder_may_have_any_name() -> None:
    owner = Owner("{{ a }}: $b", "https://example.org/{{ x }}", "my traces/it's")
    rule = next(
        rule
        for group in yaml.safe_load(export(NoTeacher(), [], owner, Pack.BLAME, Format.PROMETHEUS).text)["groups"]
        for rule in group["rules"]
        if "alert" in rule
    )
    assert rule["labels"]["team"] == '{{ "{" }}{{ "{" }} a }}: $b'
    assert "'my traces/it'\"'\"'s'" in rule["annotations"]["command"]
