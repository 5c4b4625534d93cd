"""``stallscope bench stall`` as its user meets it: a table, JSON, traces for others and scores of their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from stallscope.bench import runner
from stallscope.bench.command import app
from stallscope.bench.rivals import RULES
from stallscope.errors import UsageError
from stallscope.trace import read_trace
from tests.bench.stories import FLOOD, write_story

EXPECT = "{verdict: noisy_neighbor, culprits: [ember], mechanism: [prefill_queue, step_boundary, prefill_interference]}"


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenarios")
    write_story(folder, FLOOD, expect=EXPECT)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def bench(scenarios: Path, cache: Path, *arguments: str | Path) -> str:
    """What the command prints; it must end well."""
    given = ["stall", "--scenarios", scenarios, "--cache", cache, "--seeds", "1:3", "--processes", "1", *arguments]
    result = CliRunner().invoke(app, list(map(str, given)), catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def scores_of(out: str) -> dict[str, float]:
    return {score["name"]: score["value"] for score in json.loads(out)["scores"]}


def test_the_table_has_scores_rivals_and_families(scenarios: Path, cache: Path) -> None:
    out = bench(scenarios, cache)
    assert out.startswith("2 runs, 2 with harm")
    for word in ("right verdict", "false accusation, bystander", "tokens above usual", "story"):
        assert word in out


def test_json_holds_scores_and_every_run(scenarios: Path, cache: Path) -> None:
    found: dict[str, Any] = json.loads(bench(scenarios, cache, "--json"))
    assert [run["truth"]["seed"] for run in found["runs"]] == [1, 2]
    assert all(set(run["rivals"]) == set(RULES) for run in found["runs"])
    assert {"right verdict", "mechanism", "request"} <= {score["name"] for score in found["scores"]}
    assert found["families"]["story"]["runs"] == 2
    assert found["rivals"]["tokens above usual"]["doubled"]["value"] == 1


def test_others_get_traces_that_tell_nothing_and_are_scored_by_their_answers(
    scenarios: Path, cache: Path, tmp_path: Path
) -> None:
    out = bench(scenarios, cache, "--record", tmp_path / "out")
    assert out.startswith("2 traces in ")
    truths = {file.stem: json.loads(file.read_text()) for file in (tmp_path / "out" / "truth").glob("*.json")}
    traces = sorted((tmp_path / "out" / "traces").iterdir())
    assert [trace.name.partition(".")[0] for trace in traces] == sorted(truths)
    assert not any("story" in trace.name for trace in traces)
    assert len(read_trace(traces[0]).requests) > 50
    answers = {
        name: {"verdict": "noisy_neighbor", "culprits": truth["culprits"], "mechanism": "prefill_queue"}
        for name, truth in truths.items()
    }
    path = tmp_path / "answers.json"
    path.write_text(json.dumps(answers), encoding="utf-8")
    assert scores_of(bench(scenarios, cache, "--score", path, "--json"))["right verdict"] == 1
    path.write_text("{}", encoding="utf-8")
    assert scores_of(bench(scenarios, cache, "--score", path, "--json"))["right verdict"] == 0


def test_an_analyzer_that_crashes_is_wrong_about_one_case_and_ends_nothing(
    scenarios: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(runner, "diagnose", fails)
    out = bench(scenarios, cache)
    assert "said crashed: ZeroDivisionError: division by zero" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--seeds", "5"), "give A:B with A below B"),
        (("--seeds", "5:2"), "give A:B with A below B"),
        (("--record", "x", "--score", "y"), "give one of them"),
        (("--score", "missing.json"), "cannot be read as JSON"),
    ],
)
def test_wrong_use_is_an_error_of_one_line(scenarios: Path, cache: Path, arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        bench(scenarios, cache, *arguments)
    assert "\n" not in str(error.value)
