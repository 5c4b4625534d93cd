"""A real vLLM as judge of the replay: its arithmetic here, vLLM itself where ``STALLSCOPE_VLLM_PYTHON`` names one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.vllm_judge import Judged, Setup, culprits_of, judge, main, record_run, waits_in
from stallscope.errors import UsageError
from stallscope.trace import Trace, read_trace
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario
from tests.vllm.serving import tiny_llama

VLLM = os.environ.get("STALLSCOPE_VLLM_PYTHON", "")
SCENARIO = Path("benchmarks/vllm_judge.yaml")

CHAT_TTFT = Judged("chat", "ttft", 0.9, 200, recorded_s=1.0, replayed_s=1.1, predicted_s=0.3, real_s=(0.2, 0.1, 0.25))


def test_an_error_is_a_share_of_the_recorded_percentile_against_the_median_of_the_real_runs() -> None:
    assert CHAT_TTFT.error == pytest.approx(0.1)
    assert replace(CHAT_TTFT, recorded_s=2.0).error == pytest.approx(0.05)


def test_a_prediction_holds_within_a_tenth_or_as_far_as_the_real_runs_lie_apart() -> None:
    assert CHAT_TTFT.spread == pytest.approx(0.15)
    assert replace(CHAT_TTFT, predicted_s=0.34).holds
    assert not replace(CHAT_TTFT, predicted_s=0.36).holds
    alike = replace(CHAT_TTFT, real_s=(0.2, 0.2, 0.2))
    assert alike.spread == 0
    assert replace(alike, predicted_s=0.29).holds
    assert not replace(alike, predicted_s=0.31).holds


@pytest.mark.parametrize("variant", ["cpu", "slow"])
def test_the_scenario_injects_newcomers_only(variant: str) -> None:
    scenario = load_scenario(SCENARIO, variant)

    assert culprits_of(scenario) == ("reasoner",)
    assert scenario.expect is not None
    assert scenario.expect.culprits == ("reasoner",)


def test_a_culprit_that_is_also_a_usual_tenant_is_refused() -> None:
    scenario = load_scenario(SCENARIO)
    usual = replace(scenario.tenants[0], name="reasoner")

    with pytest.raises(UsageError, match="tenants that send nothing else"):
        culprits_of(replace(scenario, tenants=(*scenario.tenants, usual)))


def test_what_vllm_cannot_be_sent_is_refused(tmp_path: Path) -> None:
    document = yaml.safe_load(SCENARIO.read_text(encoding="utf-8"))
    document["inject"] = [{"engine": "pause", "at_s": 30, "for_s": 2}]
    del document["expect"], document["variants"]
    (tmp_path / "pause.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")

    with pytest.raises(UsageError, match="no EnginePause"):
        culprits_of(load_scenario(tmp_path / "pause.yaml"))


def test_predictions_are_held_against_the_runs_without_the_culprit(tmp_path: Path) -> None:
    """The bundled engine in vLLM's place: in virtual time the real runs of one seed are one."""
    scenario = load_scenario(SCENARIO)
    traces = [_recorded(tmp_path, inject) for inject in (True, False)]
    real = waits_in(traces[1])

    judged = judge(traces[0], 1, culprits_of(scenario), [real, real])

    assert judged.check.trusted
    assert judged.culprits == ("reasoner",)
    assert {(one.tenant, one.metric) for one in judged.percentiles} == set(real)
    for one in judged.percentiles:
        assert one.requests == len(real[one.tenant, one.metric])
        assert one.spread == 0
        assert one.error < 0.2


def _recorded(folder: Path, inject: bool) -> Trace:
    path = folder / f"{inject}.otlp.jsonl"
    record(load_scenario(SCENARIO), path, seed=0, executor="virtual", inject=inject)
    return read_trace(path)


@pytest.mark.parametrize(
    ("python", "model", "said"),
    [("missing/python", "model", "--vllm-python"), ("python", "empty", "config.json")],
)
def test_what_is_not_there_is_said_in_one_line(
    tmp_path: Path,
    python: str,
    model: str,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "python").write_text("", encoding="utf-8")
    (tmp_path / "empty").mkdir()
    arguments = ["--vllm-python", str(tmp_path / python), "--model", str(tmp_path / model)]
    monkeypatch.setattr("sys.argv", ["vllm_judge.py", *arguments, "--scenario", str(SCENARIO)])

    assert main() == UsageError.exit_code
    output = capsys.readouterr()
    assert said in output.err
    assert output.err.count("\n") == 1


def test_a_folder_with_traces_is_not_written_over(tmp_path: Path) -> None:
    for name in ("python", "config.json"):
        (tmp_path / name).write_text("{}", encoding="utf-8")

    with pytest.raises(UsageError, match="not empty"):
        Setup(tmp_path / "python", tmp_path, tmp_path).check()
    Setup(tmp_path / "python", tmp_path, tmp_path / "traces" / "new").check()


@pytest.mark.skipif(not VLLM, reason="needs a vLLM 0.32: STALLSCOPE_VLLM_PYTHON=VENV/bin/python")
def test_a_real_vllm_is_recorded_so_that_the_replay_agrees_with_its_scheduler(tmp_path: Path) -> None:
    """With little memory and few slots, so that its requests wait for both and are preempted."""
    scenario = load_scenario(SCENARIO, "tight")
    setup = Setup(Path(VLLM), tiny_llama(tmp_path), tmp_path / "traces")
    setup.check()

    trace = read_trace(record_run(setup, scenario, 0, True, "with"))

    assert not trace.findings
    assert not trace.validate()
    requests = trace.requests.to_pandas()
    assert (requests["state"] == "finished").all()
    assert set(requests["tenant"]) == {"chat", "search", "reasoner"}
    reasons = set(trace.residency.to_pandas()["reason"].dropna())
    assert {"kv", "slots"} <= reasons
    assert requests["preemptions"].sum() > 0
    assert judge(trace, 1, ("reasoner",), []).check.forced_agreement >= 0.95
