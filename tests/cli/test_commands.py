"""The command line as its user meets it: answers on stdout, one-line errors on stderr, exit codes."""

import json
from pathlib import Path

import pytest

from stallscope.cli import shared
from stallscope.diagnosis import Diagnosis
from tests.cli.conftest import Run


def test_the_verdict_is_the_first_line_and_the_coverage_the_second(run: Run, trace: Path) -> None:
    code, out, err = run("analyze", trace)
    first, second = out.splitlines()[:2]
    assert code == 0
    assert first.startswith("NOISY NEIGHBOR: reasoner stalled chat")
    assert "fidelity 3" in second
    assert "none lost" in second
    assert err == ""
    assert "\x1b[" not in out


def test_json_is_the_diagnosis_with_its_schema_version(run: Run, trace: Path) -> None:
    code, out, _ = run("analyze", trace, "--format", "json")
    diagnosis = Diagnosis.from_dict(json.loads(out))
    assert code == 0
    assert [culprit.tenant for culprit in diagnosis.incidents[0].culprits] == ["reasoner"]


def test_explain_shows_who_a_request_waited_for(run: Run, trace: Path) -> None:
    _, out, _ = run("analyze", trace, "--format", "json")
    worst = Diagnosis.from_dict(json.loads(out)).incidents[0].victims[0].worst_request
    code, out, _ = run("explain", trace, worst)
    assert code == 0
    assert out.startswith(worst)
    assert "reasoner" in out


def test_explain_names_the_nearest_ids(run: Run, trace: Path) -> None:
    code, out, err = run("explain", trace, "chat-0000011")
    assert (code, out) == (2, "")
    assert "did you mean" in err
    assert "chat-000001" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"\x00\xff\x17not a trace\n" * 40, "no OTLP"),
        (b'{"resourceSpans":[{"scopeSpans":[{"spans":[{"name":"llm_request"}]}]}]}\n', "no engine.step spans"),
    ],
)
def test_a_file_without_anything_sound_is_one_line_and_exit_code_2(
    run: Run, tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "bad.otlp.jsonl"
    path.write_bytes(content)
    code, out, err = run("analyze", path)
    assert (code, out) == (2, "")
    assert says in err
    assert str(path) in err
    assert len(err.splitlines()) == 1


def test_a_missing_file_is_one_line_and_exit_code_2(run: Run, tmp_path: Path) -> None:
    code, _, err = run("analyze", tmp_path / "nowhere.otlp.jsonl")
    assert code == 2
    assert "nowhere.otlp.jsonl" in err
    assert len(err.splitlines()) == 1


def test_a_truncated_trace_is_used_and_the_loss_is_said(run: Run, trace: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.otlp.jsonl"
    cut.write_bytes(trace.read_bytes()[:-1000])
    code, out, err = run("analyze", cut)
    assert code == 0
    assert out.startswith("NOISY NEIGHBOR: reasoner")
    assert "note:" in out
    assert err.startswith("warning:")


def test_a_misspelt_key_of_a_scenario_names_the_right_one(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\nabout: x\nduration_s: 5\n"
        "tenants: {chat: {arrivals: {poisson_per_s: 1}, promt_tokens: 5, output_tokens: 5}}\n"
    )
    code, _, err = run("record", path, "-o", tmp_path / "t.otlp.jsonl", "--executor", "virtual")
    assert code == 2
    assert "promt_tokens" in err
    assert "prompt_tokens" in err
    assert len(err.splitlines()) == 1


def test_a_recording_is_not_overwritten_unless_told(run: Run, trace: Path) -> None:
    before = trace.read_bytes()
    code, _, err = run("record", "healthy", "-o", trace, "--executor", "virtual")
    assert code == 2
    assert "--force" in err
    assert trace.read_bytes() == before


def test_the_demo_without_torch_says_so_and_names_the_culprit(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shared.importlib.util, "find_spec", lambda name: None)
    code, out, err = run("demo", "--out", tmp_path / "demo")
    assert code == 0
    assert "virtual executor" in err
    assert "control, diagnosed: healthy" in out
    assert "NOISY NEIGHBOR: reasoner stalled chat" in out
