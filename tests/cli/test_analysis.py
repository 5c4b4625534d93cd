"""analyze, doctor and compare: parts of traces, formats, files, exit codes, what is kept, and what is not told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stallscope.diagnosis import Diagnosis
from stallscope.trace import read_trace
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario
from stallscope_engine.config import EngineConfig
from tests.cli.conftest import Run
from tests.trace.recording import Arrival, Workload, write
from tests.trace.recording import run as run_engine

SAMPLES = Path(__file__).parents[2] / "sample_traces"
STALL, HEALTHY = SAMPLES / "stall.otlp.jsonl.zst", SAMPLES / "healthy.otlp.jsonl.zst"


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The KV-pinning stall with tenants whose names occur nowhere else."""
    bundled = Path(__file__).parents[2] / "stallscope" / "workloads" / "scenarios" / "kv_pinning.yaml"
    text = bundled.read_text(encoding="utf-8")
    for name, animal in (("chat", "quokka"), ("search", "wombat"), ("archive", "okapi")):
        text = text.replace(f"{name}:", f"{animal}:").replace(f"tenant: {name}", f"tenant: {animal}")
        text = text.replace(f"[{name}]", f"[{animal}]")
    folder = tmp_path_factory.mktemp("zoo")
    (folder / "zoo.yaml").write_text(text, encoding="utf-8")
    record(load_scenario(str(folder / "zoo.yaml"), "sample"), folder / "t.otlp.jsonl", seed=1000, executor="virtual")
    return folder / "t.otlp.jsonl"


def diagnosis(out: str) -> Diagnosis:
    return Diagnosis.from_dict(json.loads(out))


# --- parts --------------------------------------------------------------------------------------------------------


def test_a_part_without_the_stall_has_no_incident(run: Run, zoo: Path) -> None:
    _, out, _ = run("analyze", "--no-replay", zoo, "--until", "+12s", "--format", "json")
    before = diagnosis(out)
    assert before.incidents == ()
    _, out, _ = run("analyze", "--no-replay", zoo, "--since", "+10s", "--format", "json")
    after = diagnosis(out)
    assert after.incidents
    assert after.start_ns >= before.start_ns + 10_000_000_000


def test_incidents_can_be_those_of_one_tenant(run: Run, zoo: Path) -> None:
    _, out, _ = run("analyze", "--no-replay", zoo, "--format", "json")
    everyones = diagnosis(out).incidents
    _, out, _ = run("analyze", "--no-replay", zoo, "--tenant", "wombat", "--format", "json")
    mine = diagnosis(out).incidents
    assert set(mine) < set(everyones) or mine == everyones
    assert all("wombat" in {victim.tenant for victim in incident.victims} for incident in mine)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tenant", "wombatt"], "no tenant 'wombatt'; it has wombat"),
        (["--redact-for", "wombatt"], "no tenant 'wombatt'; it has wombat"),
        (["--replica", "engine-9"], "no replica 'engine-9'; it has engine-0"),
        (["--model", "gpt"], "no model 'gpt'; it has tiny-llama"),
        (["--since", "teatime"], "time 'teatime' can't be read; give"),
        (["--since", "-2s", "--until", "+2s"], "--since -2s is not before --until +2s"),
        (["--slo", "ttft=fast"], "'fast' is no limit at a percentile"),
        (["--slo", "wombatt:ttft=1s@p99"], "SLO for 'wombatt': the trace has no such tenant, but"),
        (["-o", "/nowhere/at/all.txt"], "there is no folder /nowhere/at; make it first"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(run: Run, zoo: Path, options: list[str], says: str) -> None:
    code, out, err = run("analyze", "--no-replay", zoo, *options)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


# --- formats and files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "begins"),
    [("text", "NOISY NEIGHBOR: okapi"), ("json", "{"), ("markdown", "# Post-mortem"), ("html", "<!doctype html>")],
)
def test_each_format_goes_to_stdout_or_a_file(run: Run, zoo: Path, tmp_path: Path, output: str, begins: str) -> None:
    code, out, _ = run("analyze", "--no-replay", zoo, "--format", output)
    assert code == 0
    assert out.startswith(begins)
    file = tmp_path / "report"
    code, nothing, err = run("analyze", "--no-replay", zoo, "--format", output, "-o", file)
    assert (code, nothing) == (0, "")
    assert file.read_text(encoding="utf-8") == out
    assert str(file) in err


def test_a_report_is_not_overwritten_unless_told(run: Run, zoo: Path, tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    file.write_text("mine")
    code, _, err = run("analyze", "--no-replay", zoo, "--format", "markdown", "-o", file)
    assert code == 2
    assert "--force" in err
    assert file.read_text() == "mine"
    code, _, _ = run("analyze", "--no-replay", zoo, "--format", "markdown", "-o", file, "--force")
    assert code == 0
    assert file.read_text().startswith("# Post-mortem")


# --- exit codes ---------------------------------------------------------------------------------------------------


def test_incidents_and_too_little_data_fail_a_check_only_where_asked(run: Run, zoo: Path) -> None:
    part = ["--until", "+1s"]
    assert run("analyze", "--no-replay", zoo)[0] == 0
    assert run("analyze", "--no-replay", zoo, "--fail-on-incident")[0] == 3
    assert run("analyze", "--no-replay", zoo, "--until", "+12s", "--fail-on-incident")[0] == 0
    assert run("analyze", "--no-replay", zoo, *part)[1].startswith("INSUFFICIENT DATA")
    assert run("analyze", "--no-replay", zoo, *part)[0] == 0
    assert run("analyze", "--no-replay", zoo, *part, "--fail-on-incident")[0] == 4


# --- what is kept -------------------------------------------------------------------------------------------------


def copied(trace: Path, folder: Path) -> Path:
    copy = folder / trace.name
    copy.write_bytes(trace.read_bytes())
    return copy


def test_a_kept_diagnosis_is_loaded_by_later_calls(run: Run, zoo: Path, tmp_path: Path) -> None:
    trace = copied(zoo, tmp_path)
    _, first, err = run("analyze", "--no-replay", trace, "--save")
    (kept,) = tmp_path.glob("*.json")
    assert f"kept: {kept}" in err
    _, second, err = run("analyze", "--no-replay", trace)
    assert second == first
    assert f"diagnosed earlier: {kept}" in err
    altered = json.loads(kept.read_text())
    altered["incidents"] = []
    kept.write_text(json.dumps(altered))
    assert diagnosis(run("analyze", "--no-replay", trace, "--format", "json")[1]).incidents == ()  # it is really read


def test_what_was_kept_is_of_one_content_and_one_question(run: Run, zoo: Path, tmp_path: Path) -> None:
    trace = copied(zoo, tmp_path)
    run("analyze", "--no-replay", trace, "--save")
    assert "earlier" not in run("analyze", "--no-replay", trace, "--until", "-1s")[2]
    assert "earlier" not in run("analyze", "--no-replay", trace, "--redact-for", "quokka")[2]
    with trace.open("ab") as file:
        file.write(b"\n")
    assert "earlier" not in run("analyze", "--no-replay", trace)[2]


def test_it_is_kept_beside_the_report_where_one_is_written(run: Run, zoo: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.txt"
    run("analyze", "--no-replay", zoo, "--save", "-o", report)
    assert len(list(tmp_path.glob("*.diagnosis-*.json"))) == 1
    assert not list(zoo.parent.glob("*.json"))
    assert "earlier" in run("analyze", "--no-replay", zoo, "-o", report, "--force")[2]


def test_a_damaged_kept_diagnosis_is_made_anew(
    run: Run, zoo: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace = copied(zoo, tmp_path)
    _, first, _ = run("analyze", "--no-replay", trace, "--save")
    (kept,) = tmp_path.glob("*.json")
    kept.write_text("{")
    assert run("analyze", "--no-replay", trace, "--save")[1] == first
    assert "diagnosed anew" in caplog.text
    assert diagnosis(kept.read_text()).incidents


def test_a_folder_with_kept_diagnoses_is_still_a_trace(run: Run, zoo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "traces"
    folder.mkdir()
    copied(zoo, folder)
    _, first, _ = run("analyze", "--no-replay", folder, "--save")
    assert "earlier" in run("analyze", "--no-replay", folder)[2]
    assert run("analyze", "--no-replay", folder)[1] == first


# --- what is not told ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", ["text", "json", "markdown", "html"])
def test_a_redacted_report_holds_no_name_or_id_of_another_tenant(run: Run, zoo: Path, output: str) -> None:
    requests = read_trace(zoo).requests.to_pylist()
    others = {row["request"] for row in requests if row["tenant"] != "quokka"} | {"okapi", "wombat"}
    sessions = {row[name] for row in requests for name in ("trace_id",) if row["tenant"] != "quokka" and row[name]}
    code, out, err = run("analyze", "--no-replay", zoo, "--redact-for", "quokka", "--format", output)
    assert code == 0
    assert "quokka" in out
    assert [name for name in others | sessions if name in out + err] == []
    assert str(zoo) not in out


def test_labels_are_the_same_in_every_format(run: Run, zoo: Path) -> None:
    _, out, _ = run("analyze", "--no-replay", zoo, "--redact-for", "quokka", "--format", "json")
    (culprit,) = diagnosis(out).incidents[0].culprits
    for output in ("text", "markdown", "html"):
        _, out, _ = run("analyze", "--no-replay", zoo, "--redact-for", "quokka", "--format", output)
        assert culprit.tenant in out
        assert culprit.requests[0].request in out


# --- doctor and compare -------------------------------------------------------------------------------------------


def test_doctor_says_what_a_trace_can_not_answer(run: Run) -> None:
    code, out, _ = run("doctor", STALL)
    assert code == 0
    assert out.startswith("USABLE: 7 of 11 questions answered")
    assert "no GPU samples; run the GPU sampler" in out


def test_doctor_ends_with_4_where_no_tenant_is_known(run: Run, tmp_path: Path) -> None:
    arrivals = [Arrival(30_000_000, 20, 8, "") for _ in range(30)]
    trace = write(tmp_path / "t.otlp.jsonl", run_engine(Workload(EngineConfig(), arrivals, 20, 10_000)).lines())
    code, out, _ = run("doctor", trace, "--format", "json")
    answers = json.loads(out)
    assert code == 4
    assert answers["usable"] is False
    assert answers["questions"][0]["answer"] == "no"
    assert "100% of the requests are of no known tenant" in answers["questions"][0]["why"]
    assert run("doctor", trace)[1].startswith("NOT USABLE")


def test_compare_says_better_and_that_the_load_differs(run: Run) -> None:
    code, out, _ = run("compare", STALL, HEALTHY)
    assert code == 0
    assert out.startswith("BETTER: ")
    assert "load differs: reasoner" in out


def test_a_recording_is_no_different_from_itself(run: Run) -> None:
    code, out, _ = run("compare", HEALTHY, HEALTHY)
    assert code == 0
    assert out.startswith("NO DIFFERENCE that chance doesn't explain")
    assert "better" not in out


def test_compare_of_next_to_nothing_is_inconclusive(run: Run, zoo: Path, tmp_path: Path) -> None:
    lines = zoo.read_bytes().splitlines(keepends=True)
    short = tmp_path / "short.otlp.jsonl"
    short.write_bytes(b"".join(lines[:2]))
    code, out, _ = run("compare", short, HEALTHY)
    assert code == 4
    assert out.startswith("INCONCLUSIVE")


# --- portions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--scheduler", "dask"), "--scheduler dask and --address tcp://HOST:8786 go together"),
        (("--address", "tcp://localhost:8786"), "go together"),
        (("--jobs", "2"), "is no dataset; make one: stallscope convert TRACE FOLDER"),
    ],
)
def test_only_a_dataset_has_portions(run: Run, options: tuple[str, ...], says: str) -> None:
    code, out, error = run("analyze", HEALTHY, *options)
    assert (code, out) == (2, "")
    assert says in error.splitlines()[-1]


def test_a_dataset_of_one_portion_says_what_its_recording_says(run: Run, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    run("convert", HEALTHY, stored)
    asked = ("--no-replay", "--format", "json")
    outs = [run("analyze", *asked, *how)[1] for how in ((HEALTHY,), (stored,), (stored, "--scheduler", "processes"))]
    assert outs[0] == outs[1] == outs[2]


def test_a_report_for_one_tenant_is_made_of_the_whole(run: Run, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    run("convert", HEALTHY, stored)
    code, _, error = run("analyze", stored, "--redact-for", "chat", "--scheduler", "processes")
    assert (code, "leave out --scheduler" in error) == (2, True)
