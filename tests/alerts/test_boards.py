"""The boards: made from code, of metrics and labels that exist, in PromQL that Prometheus takes, none upon another."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stallscope.alerts.boards import BOARDS
from stallscope.alerts.boards.engines import PLAIN, SCRAPED
from stallscope.alerts.boards.fleet import COMMAND_PANEL
from stallscope.alerts.boards.grafana import ANY, WIDTH, to_json
from stallscope.alerts.plain_pack import ENGINES
from stallscope.alerts.promql import quoted
from stallscope.watch.families import BLAME, FAMILIES, Family, Kind
from tests.alerts.unit_tests import needs_promtool

FOLDER = Path(__file__).parents[2] / "dashboards" / "grafana"
JSONS: dict[str, Any] = {name: to_json(board) for name, board in BOARDS.items()}
# What Prometheus itself says of alerts, with the labels that the exported rules give them.
ALERTS = Family("ALERTS", Kind.GAUGE, ("alertname", "alertstate", "severity", "team", "tenant", "replica"), "", "")
KNOWN: dict[str, dict[str, tuple[str, ...]]] = {
    "fleet.json": {family.name: family.labels for family in (*FAMILIES, ALERTS)},
    "engines.json": {family.name: (*family.labels, *SCRAPED) for family in PLAIN},
}
HISTOGRAMS = {family.name for family in (*FAMILIES, *PLAIN) if family.kind is Kind.HISTOGRAM}
NAME = re.compile(r"\b(?:stallscope_|vllm:|sglang:|ALERTS\b)\w*")
HOSTILE = ['a"b', "back\\slash", "new\nline", "{{ $value }}", "{x}", "🔥" * 75, "(other)", "$tenant", ""]


def substituted(expr: str, chosen: str = ANY) -> str:
    """An expression as Grafana sends it, with ``chosen`` (already escaped) for each of the board's choices."""
    fixed = {"__rate_interval": "40s", "__range": "1800s", "percentile": "0.99"}
    return re.sub(r"\$(\w+)", lambda found: fixed.get(found[1], found[0] if found[1].isdigit() else chosen), expr)


def panels(board: str) -> list[dict[str, Any]]:
    return [panel for panel in JSONS[board]["panels"] if panel["type"] != "row"]


def asked(board: str) -> Iterator[str]:
    """Every expression of a board: of panels, of what is marked on them, and of variables."""
    for panel in panels(board):
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (one["expr"] for one in JSONS[board]["annotations"]["list"])
    for variable in JSONS[board]["templating"]["list"]:
        if variable["type"] == "query":
            query = variable["query"]["query"]
            found = re.fullmatch(r"label_values\((.*), (\w+)\)|query_result\((.*)\)", query, re.DOTALL)
            assert found, query
            yield f"sum by ({found[2]}) ({found[1]})" if found[1] else found[3]


def strings_left_out(expr: str) -> str:
    return re.sub(r'"(?:[^"\\]|\\.)*"', '""', expr)


@pytest.mark.parametrize("name", BOARDS)
def test_a_board_is_what_the_code_makes(name: str) -> None:
    text = runpy.run_path(str(FOLDER / "generate.py"))["text"]
    assert (FOLDER / name).read_text(encoding="utf-8") == text(BOARDS[name]), "run `make boards`"


def test_no_board_is_left_over() -> None:
    assert {path.name for path in FOLDER.glob("*.json")} == set(BOARDS)


@pytest.mark.parametrize("name", BOARDS)
def test_every_metric_exists_and_has_the_labels_that_are_asked_of_it(name: str) -> None:
    known = KNOWN[name]
    for expr in asked(name):
        bare = strings_left_out(expr)
        metrics = NAME.findall(bare) or NAME.findall(expr)  # of several by a regular expression: {__name__=~"..."}
        assert metrics, expr
        families = {metric.removesuffix("_bucket") for metric in metrics}
        assert families <= set(known), expr
        assert {metric for metric in metrics if metric.endswith("_bucket")} == {
            f"{family}_bucket" for family in families & HISTOGRAMS
        }, expr
        for metric, matchers in re.findall(r"([\w:]+)\{([^}]*)\}", bare):
            labels = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", matchers))
            assert labels <= {*known[metric.removesuffix("_bucket")]}, expr
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", bare) for label in group.split(", ")}
        assert grouped <= {"le"}.union(*(known[family] for family in families)), expr


@pytest.mark.parametrize("name", BOARDS)
def test_every_variable_that_is_used_exists(name: str) -> None:
    variables = {variable["name"] for variable in JSONS[name]["templating"]["list"]}
    used = set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(JSONS[name])))
    assert used <= variables
    assert variables <= used


@pytest.mark.parametrize("name", BOARDS)
def test_a_legend_names_labels_that_the_result_has(name: str) -> None:
    for panel in panels(name):
        for target in panel.get("targets", ()):
            outer = re.search(r"(?:by|histogram_quantile\(\$percentile, sum by) \(([^)]*)\)", target["expr"])
            grouped = set(outer[1].split(", ")) if outer else set()
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= grouped, target
            for label in re.findall(r"__field\.labels\.(\w+)", json.dumps(panel["fieldConfig"])):
                assert label in grouped, panel["title"]


@pytest.mark.parametrize("name", BOARDS)
def test_all_that_a_watch_exposes_is_on_its_board_and_all_that_is_known_of_engines_on_theirs(name: str) -> None:
    shown = {metric.removesuffix("_bucket") for expr in asked(name) for metric in NAME.findall(expr)}
    assert set(KNOWN[name]) == shown


@pytest.mark.parametrize("name", BOARDS)
def test_panels_do_not_overlap_and_stay_within_the_board(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in JSONS[name]["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert cells
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < WIDTH
        taken |= cells
    numbers = [panel["id"] for panel in JSONS[name]["panels"]]
    assert len(numbers) == len(set(numbers))


@pytest.mark.parametrize("name", BOARDS)
def test_every_panel_asks_a_question_and_says_what_it_shows_and_in_which_unit(name: str) -> None:
    titles = [panel["title"] for panel in panels(name)]
    assert len(titles) == len(set(titles))
    for panel in panels(name):
        assert panel["title"].endswith("?")
        if panel["type"] != "text":
            assert panel["description"].endswith(".")
            assert panel["fieldConfig"]["defaults"]["unit"]
        steps = [
            step["value"]
            for step in panel.get("fieldConfig", {}).get("defaults", {}).get("thresholds", {"steps": []})["steps"]
        ]
        assert steps[1:] == sorted(steps[1:])


def test_what_the_rules_on_plain_metrics_look_at_is_on_the_board_of_plain_metrics() -> None:
    shown = {metric for expr in asked("engines.json") for metric in NAME.findall(expr)}
    assert {metric for engine in ENGINES for metric in engine.metrics} <= shown


def test_links_lead_to_the_panel_with_the_command() -> None:
    shown = {panel["id"]: panel for panel in panels("fleet.json")}
    command = shown[COMMAND_PANEL]["options"]["content"]
    assert "stallscope analyze ${folder} ${only} --since ${__from:date:iso} --until ${__to:date:iso}" in command
    led = {int(number) for number in re.findall(r"viewPanel=(\d+)", json.dumps(JSONS["fleet.json"]))}
    assert led == {COMMAND_PANEL}


def test_the_board_of_plain_metrics_says_that_it_names_no_tenant() -> None:
    board = JSONS["engines.json"]
    assert "without tenants" in board["title"]
    assert any("can't name a tenant" in panel["options"].get("content", "") for panel in panels("engines.json"))
    assert "stallscope_" not in json.dumps(board)


# --- with Prometheus' own parser ----------------------------------------------------------------------------------


def promtool(*arguments: str | Path) -> None:
    run = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@needs_promtool
def test_every_expression_is_promql(tmp_path: Path) -> None:
    exprs = [substituted(expr) for name in BOARDS for expr in asked(name)]
    rules = [{"record": f"board:{at}", "expr": expr} for at, expr in enumerate(exprs)]
    file = tmp_path / "boards.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "boards", "rules": rules}]}), encoding="utf-8")
    promtool("check", "rules", file)


@needs_promtool
def test_who_stalled_whom_shows_hostile_names_whole_and_apart(tmp_path: Path) -> None:
    """All of them where nobody is chosen: a name with a newline too. And only that one where one is."""
    (matrix,) = [panel for panel in panels("fleet.json") if panel["title"] == "Who stalled whom?"]
    names = [*HOSTILE[:-1], 'a\\"b']
    inputs = [
        {
            "series": f'{BLAME.name}{{victim="chat", culprit={quoted(name)}, mechanism="kv_pinning"}}',
            "values": f"0+{at + 1}x180",
        }
        for at, name in enumerate(names)
    ]
    expr = matrix["targets"][0]["expr"]
    everybody = [
        {"labels": f'{{victim="chat", culprit={quoted(name)}}}', "value": 180.0 * (at + 1)}
        for at, name in enumerate(names)
    ]
    # Grafana escapes what is chosen for a regular expression, and that for a string.
    chosen = [re.sub(r"[\\^$.*+?()|\[\]{}]", r"\\\g<0>", name) for name in names]
    tests = [{"expr": substituted(expr), "eval_time": "1800s", "exp_samples": everybody}]
    tests += [
        {
            "expr": substituted(expr.replace('"$tenant"', f'"{ANY}"'), quoted(one)[1:-1].replace("\\n", "\\\\n")),
            "eval_time": "1800s",
            "exp_samples": [sample],
        }
        for one, sample in zip(chosen, everybody, strict=True)
    ]
    file = tmp_path / "test.yml"
    unit = {"interval": "10s", "input_series": inputs, "promql_expr_test": tests}
    file.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "10s", "tests": [unit]}), encoding="utf-8")
    promtool("test", "rules", file)


@needs_promtool
@pytest.mark.parametrize(
    ("replicas", "flag"),
    [
        (["engine-0"], "--replica engine-0"),
        (["http://10.0.0.7:8000/v1"], "--replica http://10.0.0.7:8000/v1"),
        (["engine-0", "engine-1"], None),
        (["x; rm -rf ~"], None),
        (["$(reboot)"], None),
        (["--force"], None),
        (["two\nlines"], None),
    ],
)
def test_a_command_to_paste_names_a_replica_only_if_it_is_one_and_its_name_is_plain(
    tmp_path: Path, replicas: list[str], flag: str | None
) -> None:
    (only,) = [one for one in JSONS["fleet.json"]["templating"]["list"] if one["name"] == "only"]
    expr = only["query"]["query"].removeprefix("query_result(").removesuffix(")")
    labels = [f"replica={quoted(replica)}" for replica in replicas]
    expected = [] if len(labels) > 1 else [", ".join([*labels, *([f"flag={quoted(flag)}"] if flag else [])])]
    unit = {
        "interval": "10s",
        "input_series": [{"series": f"stallscope_steps_total{{{label}}}", "values": "0+1x6"} for label in labels],
        "promql_expr_test": [
            {
                "expr": substituted(expr),
                "eval_time": "60s",
                "exp_samples": [{"labels": f"{{{label}}}", "value": 1} for label in expected],
            }
        ],
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [], "evaluation_interval": "10s", "tests": [unit]}), encoding="utf-8")
    promtool("test", "rules", file)
    # Grafana looks for the flag in the series as text.
    pattern = re.compile(only["regex"].strip("/"))
    assert [found[1] for label in expected if (found := pattern.search(f"{{{label}}}"))] == ([flag] if flag else [])
