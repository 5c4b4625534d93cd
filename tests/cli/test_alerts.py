"""`alerts export` as its user meets it: a checked file or stdout, nothing overwritten, one-line errors."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from tests.alerts.unit_tests import needs_promtool
from tests.cli.conftest import Run


@needs_promtool
@pytest.mark.parametrize("form", ["prometheus", "prometheusrule", "grafana"])
def test_rules_go_to_stdout_as_yaml(run: Run, form: str) -> None:
    code, out, err = run("alerts", "export", "--format", form, "--slo", "ttft=500ms@p99", "--pack", "both")
    assert (code, err) == (0, "")
    assert "groups" in yaml.safe_load(out).get("spec", yaml.safe_load(out))


@needs_promtool
def test_a_file_is_written_once_and_overwritten_only_when_forced(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "stallscope.rules.yml"
    assert run("alerts", "export", "-o", out)[0] == 0
    before = out.read_text()
    code, _, err = run("alerts", "export", "-o", out, "--team", "other")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--force" in err
    assert out.read_text() == before
    code, written, err = run("alerts", "export", "-o", out, "--team", "other", "--force")
    assert (code, written) == (0, "")
    assert err == f"{out}: 12 alerts\n"
    assert "team: other" in out.read_text()


@needs_promtool
def test_what_the_collector_must_be_told_is_a_note(run: Run) -> None:
    code, _, err = run("alerts", "export", "--slo", "my chat:ttft=300ms@p99")
    assert code == 0
    assert "stallscope collect --slo 'my chat:ttft=300ms@p99'" in err


@needs_promtool
def test_a_trace_with_too_little_calm_leaves_the_floors_and_says_so(run: Run, trace: Path) -> None:
    code, out, err = run("alerts", "export", "--from", trace)
    assert code == 0
    assert err.startswith("note: 0 of 11 thresholds were learned, the others are floors")
    (page, *_) = [rule for rule in yaml.safe_load(out)["groups"][0]["rules"] if "alert" in rule]
    assert "too short to learn from (10 min are needed)" in page["annotations"]["threshold_reason"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--slo", "ttft=soon"], "is no limit at a percentile"),
        (["--slo", "ttft=1s@p99", "--slo", "ttft=2s@p99"], "contradict each other"),
        (["--from", "a", "--from-prometheus", "http://b"], "give one"),
        (["--from-prometheus", "http://127.0.0.1:1"], "does not answer"),
        (["-o", "nowhere/rules.yml"], "there is no folder nowhere"),
        (["--team", ""], "--team is empty"),
        (["--team", "\udcff"], "is no valid UTF-8"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(run: Run, arguments: list[str], said: str) -> None:
    code, out, err = run("alerts", "export", *arguments)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert said in err


def test_without_promtool_the_rules_are_written_and_the_warning_comes_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    code, out, err = run("alerts", "export")
    assert code == 0
    assert yaml.safe_load(out)["groups"]
    assert (err.count("warning"), len(err.splitlines())) == (1, 1)


@needs_promtool
def test_rules_that_promtool_refuses_are_not_written(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("stallscope.alerts.tenant_rules.PAIRS", "no name of a metric")
    code, out, err = run("alerts", "export", "-o", tmp_path / "rules.yml")
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert "promtool refuses what was made, please report that: " in err
    assert not (tmp_path / "rules.yml").exists()
