"""The command as its user meets it: the answer in the first line, exit codes, files, and wrong use in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from stallscope import cli
from stallscope.alerts.backtest import Timeline
from stallscope.alerts.backtest import timeline as timelines
from stallscope.diagnosis.model import Incident
from stallscope.watch.samples import Samples
from tests.alerts.backtest.stories import PAGE, Stall, needs_promtool, timeline
from tests.alerts.backtest.test_rulefile import RESOURCE

Run = Callable[..., tuple[int, str, str]]
pytestmark = needs_promtool


@dataclass(frozen=True)
class Rehearsal:
    """As a rehearsal of a trace gives it."""

    samples: Samples
    incidents: tuple[Incident, ...]


TRACES: Mapping[str, Timeline] = {
    "stall": timeline(900, [Stall(100, 250), Stall(600, 700, 'a"b\n{{ x }}' + "🦙" * 300)]),
    "late": timeline(900, [Stall(100, 250, per_s=0.15)]),
    "short": timeline(300, [Stall(100, 140)]),
    "cut": timeline(110, [Stall(100, 170)]),
    "healthy": timeline(1800),
    "busy": timeline(1800, also=[Stall(300, 360, per_s=0.43)]),
}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs the command line in this process, in a folder of its own: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def rehearse(path: str, **_: object) -> Rehearsal:
        return Rehearsal(TRACES[path].samples, TRACES[path].incidents)

    monkeypatch.setattr(timelines, "rehearse", rehearse)
    (tmp_path / "rules.yaml").write_text(PAGE)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stallscope", "alerts", "backtest", *arguments])
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        written = capsys.readouterr()
        return int(str(code or 0)), written.out, written.err

    return call


def test_the_answer_is_the_first_line(run: Run) -> None:
    code, out, err = run("rules.yaml", "stall")
    assert code == 0
    assert (
        out.splitlines()[0] == "2 of 2 lasting incidents caught, after 25 s and 25 s; no false page in 0.12 h of calm"
    )
    assert "promtool" in out.splitlines()[1]
    assert err == ""
    assert "\x1b[" not in out


def test_a_hostile_name_is_one_line_of_a_table(run: Run) -> None:
    _, out, _ = run("rules.yaml", "stall")
    assert 'a"b\\n{{ x }}🦙🦙🦙…🦙' in out


def test_a_missed_incident_is_exit_code_3(run: Run) -> None:
    code, out, _ = run("rules.yaml", "stall", "late")
    assert code == 3
    assert out.startswith("2 of 3 lasting incidents caught, after 25 s and 25 s; 1 missed; no false page")
    assert "caught in time: 67% of 3 (95% interval 21% to 94%)" in out


def test_a_page_on_a_quiet_trace_is_exit_code_3_and_a_quiet_one_is_0(run: Run) -> None:
    code, out, _ = run("rules.yaml", "stall", "--quiet-on", "busy")
    assert code == 3
    assert out.splitlines()[0].endswith("; 1 page in 0.5 h that had to be quiet")
    code, out, _ = run("rules.yaml", "--quiet-on", "healthy")
    assert code == 0
    assert out.startswith("no page in 0.5 h that had to be quiet\n")
    assert "at most 1,001 a week (95%)" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["short"], "nothing had to be caught: no incident lasts longer than 60 s and has a page that is for it"),
        (["healthy"], "nothing to catch: the traces have no incident"),
        (["cut"], "1 not provable on this data (the trace ends before the latency budget does)"),
        (["stall", "vllm"], "2 not provable on this data (no page that is for it is provable here)"),
        (["stall", "ticket"], "nothing had to be caught: no rule is a page"),
        (["--quiet-on", "healthy", "vllm"], "no page that is provable on the quiet traces"),
    ],
)
def test_what_these_traces_can_not_tell_is_exit_code_4(run: Run, arguments: list[str], says: str) -> None:
    other = {
        "vllm": PAGE.replace("stallscope_blame_seconds_total", "vllm:num_requests_waiting"),
        "ticket": PAGE.replace("severity: page", "severity: ticket"),
    }
    if arguments[-1] in other:
        Path("rules.yaml").write_text(other[arguments.pop()])
    code, out, _ = run("rules.yaml", *arguments)
    assert code == 4
    assert says in out.splitlines()[0]


def test_a_rule_that_proves_nothing_says_what_it_needs(run: Run) -> None:
    more = PAGE + "  - {alert: Queue, expr: 'vllm:num_requests_waiting > 3'}\n"
    Path("rules.yaml").write_text(more + "  - {alert: Burn, expr: 'rate(stallscope_blame_seconds_total[6h]) > 3'}\n")
    code, out, _ = run("rules.yaml", "stall")
    assert code == 0
    assert "Queue is not provable on this data: needs vllm:num_requests_waiting" in out
    assert "Burn is not provable on this data: looks back 6 h, the trace has 15 min" in out


def test_a_window_that_one_late_scrape_empties_is_named(run: Run) -> None:
    says = "windows below 30 s, which one late or failed scrape empties, and no backtest shows: Stalls"
    assert says not in run("rules.yaml", "stall")[1]
    Path("rules.yaml").write_text(PAGE.replace("[1m]", "[20s]"))
    assert says in run("rules.yaml", "stall")[1]


def test_json_has_all_of_it(run: Run) -> None:
    code, out, _ = run("rules.yaml", "stall", "late", "--quiet-on", "busy", "--format", "json")
    made = json.loads(out)
    assert code == 3
    assert (made["required"], made["caught_in_time"], made["missed"]) == (3, 2, 1)
    assert made["calm"]["pages"] == 0
    assert made["quiet"]["pages"] == 1
    assert [one["answer"] for one in made["incidents"]] == ["caught", "caught", "missed"]
    assert made["firings"][1]["labels"]["tenant"] == 'a"b\n{{ x }}' + "🦙" * 300
    assert {one["outcome"] for one in made["firings"]} == {"caught", "false"}
    assert made["rules"][0]["fired"] == 3


def test_the_kept_proof_is_what_promtool_passes(run: Run) -> None:
    Path("ci").mkdir()
    code, _, _ = run("rules.yaml", "stall", "--quiet-on", "healthy", "--tests", "ci/tests.yaml")
    assert code == 0
    check = ["promtool", "test", "rules", "ci/tests.yaml"]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    Path("rules.yaml").write_text(PAGE.replace("> 0.2", "> 0.4"))
    assert subprocess.run(check, capture_output=True, check=False).returncode == 1


def test_the_proof_of_a_resource_has_its_rules_beside_it(run: Run) -> None:
    Path("rules.yaml").write_text(RESOURCE)
    assert run("rules.yaml", "stall", "--tests", "tests.yaml")[0] == 0
    assert (
        subprocess.run(["promtool", "check", "rules", "tests.rules.yaml"], capture_output=True, check=False).returncode
        == 0
    )
    code, _, err = run("rules.yaml", "stall", "--tests", "tests-2.yaml", "--force")
    assert code == 0
    os.remove("tests.yaml")
    code, _, err = run("rules.yaml", "stall", "--tests", "tests.yaml")
    assert code == 2
    assert "tests.rules.yaml exists" in err


def test_a_path_that_is_a_pattern_to_promtool_is_that_file(run: Run) -> None:
    os.rename("rules.yaml", "rules[1]*.yaml")
    assert run("rules[1]*.yaml", "stall", "--tests", "tests.yaml")[0] == 0


def test_tuned_rules_are_written_with_their_reason_and_both_sides_are_shown(run: Run) -> None:
    code, out, _ = run("rules.yaml", "stall", "--quiet-on", "busy", "--tune", "tuned.yaml", "--tests", "tests.yaml")
    assert code == 0
    assert "Stalls: raised from 0.2 to 0.43: " in out
    assert "tuned on" in out
    assert "held out" in out
    assert "threshold_tuned: 'raised from 0.2 to 0.43" in Path("tuned.yaml").read_text()
    assert Path("rules.yaml").read_text() == PAGE
    code, out, _ = run("tuned.yaml", "stall", "--quiet-on", "busy")
    assert code == 0


def test_a_report_goes_to_a_file_and_overwrites_none(run: Run) -> None:
    code, out, err = run("rules.yaml", "stall", "-o", "report.txt")
    assert (code, out) == (0, "")
    assert Path("report.txt").read_text().startswith("2 of 2 lasting incidents caught")
    code, _, err = run("rules.yaml", "stall", "-o", "report.txt")
    assert code == 2
    assert "report.txt exists" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rules.yaml"], "give at least one trace"),
        (["nothing.yaml", "stall"], "nothing.yaml: cannot be read"),
        (["rules.yaml", "stall", "--tune", "t.yaml"], "--quiet-on TRACE"),
        (["rules.yaml", "stall", "--within", "soon"], "--within soon: give a time such as 60s"),
        (["rules.yaml", "stall", "--tests", "rules.yaml", "--force"], "must be different files"),
        (["rules.yaml", "stall", "--slo", "ttft=5"], "is no limit at a percentile"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(run: Run, arguments: list[str], says: str) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "says"), [("0.2)", "could not parse expression"), ("0.2\n    fro: 5m", "fro not found")]
)
def test_rules_that_prometheus_refuses_are_refused_before_any_trace_is_read(run: Run, change: str, says: str) -> None:
    Path("rules.yaml").write_text(PAGE.replace("0.2", change))
    code, _, err = run("rules.yaml", "no such trace")
    assert code == 2
    assert says in err
    assert len(err.splitlines()) == 1


def test_without_promtool_nothing_is_read_and_it_says_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    code, out, err = run("rules.yaml", "no such trace")
    assert (code, out) == (2, "")
    assert "apt install prometheus" in err
