"""whatif: the answer for people and for machines, and exit codes 2 and 4 with one line where there is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stallscope.errors import InconclusiveError
from tests.cli.conftest import Run


@pytest.fixture(scope="module")
def untrusted(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same recording, saying that it was made by another scheduler."""
    text = trace.read_text(encoding="utf-8")
    told = '"stallscope.scheduler.policy","value":{"stringValue":"fcfs"}'
    assert told in text
    path = tmp_path_factory.mktemp("untrusted") / "stall.otlp.jsonl"
    path.write_text(text.replace(told, told.replace("fcfs", "static")), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("question", "headline"),
    [
        (["--without", "reasoner"], "without reasoner: 100% of the stalls gone"),
        (["--usual", "reasoner"], "reasoner as usual: 100% of the stalls gone"),
        (["--set", "max_num_seqs=32"], "max_num_seqs=32: 0% of the stalls gone"),
    ],
)
def test_the_answer_has_a_headline_and_every_tenants_percentiles(
    run: Run, trace: Path, question: list[str], headline: str
) -> None:
    code, out, err = run("whatif", trace, *question)
    assert (code, err) == (0, "")
    assert out.startswith(headline)
    for tenant in ("chat", "search", "reasoner"):
        rows = [line for line in out.splitlines()[1:] if line.startswith(f"{tenant} ")]
        names = ("TTFT p50", "TTFT p9", "longest gap p50", "longest gap p9")
        assert [name in row for name, row in zip(names, rows, strict=True)] == [True] * 4


def test_of_a_tenant_that_is_not_there_no_wait_is_predicted(run: Run, trace: Path) -> None:
    _, out, _ = run("whatif", trace, "--without", "reasoner")
    gone = [line for line in out.splitlines() if line.startswith("reasoner")]
    assert len(gone) == 4
    assert all("no request left" in line for line in gone)


def test_json_has_the_answer_and_how_far_it_is_to_be_trusted(run: Run, trace: Path) -> None:
    code, out, _ = run("whatif", trace, "--without", "reasoner", "--format", "json")
    found = json.loads(out)
    assert code == 0
    assert found["answer"]["what"] == "without reasoner"
    assert found["answer"]["restored"] > 0.9
    assert found["check"]["trusted"] is True
    assert found["check"]["forced_agreement"] >= 0.95


@pytest.mark.parametrize(
    ("question", "says"),
    [
        ([], "ask one thing: --usual TENANT, --without TENANT, --without-request ID, or --set NAME=VALUE"),
        (["--usual", "chat", "--without", "search"], "ask one thing"),
        (["--without", "reasonr"], "no tenant 'reasonr' in the trace, but"),
        (["--set", "max_num_seqs"], "--set 'max_num_seqs': write NAME=VALUE, such as"),
        (["--set", "slots=9"], "no setting 'slots'; there are"),
        (["--set", "max_num_seqs=-1"], "max_num_seqs must be at least 1, not -1"),
        (["--set", "max_num_batched_tokens=512"], "would be rejected; give more room"),
        (["--without", "chat", "--replica", "engine-9"], "no replica 'engine-9'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run: Run, trace: Path, question: list[str], says: str) -> None:
    code, out, err = run("whatif", trace, *question)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_a_replay_that_is_not_trusted_gives_no_answer_and_exit_code_4(run: Run, untrusted: Path) -> None:
    code, out, err = run("whatif", untrusted, "--without", "reasoner")
    assert (code, out) == (InconclusiveError.exit_code, "")
    assert "can't be replayed: its scheduler chose otherwise in" in err
    assert len(err.splitlines()) == 1


def test_where_no_replay_is_trusted_the_verdict_rests_on_charges_and_says_so(run: Run, untrusted: Path) -> None:
    code, out, _ = run("analyze", untrusted, "--format", "json")
    found = json.loads(out)
    assert code == 0
    (check,) = found["replays"]
    assert not check["trusted"]
    assert found["confidence"] != "high"
    assert all(not one["interventions"] and not one["remedies"] for one in found["incidents"])
