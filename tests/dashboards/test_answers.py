"""Answers of a dashboard's jobs are those of the command line, and each finds what the other has kept."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest

from stallscope.asking import Asked
from stallscope.diagnosis.slo import parse_slo
from stallscope.diagnosis.whatif import Question
from stallscope.errors import UsageError
from stallscope.reports.json import to_json
from stallscope_dash.answers import diagnosed, what_if
from stallscope_dash.jobs import Job, State
from tests.cli.conftest import Run
from tests.dashboards import errands
from tests.dashboards.processes import eventually, is_alive, needs_proc, session_of


def silent(stage: str) -> nullcontext[object]:
    return nullcontext(lambda share: None)


@pytest.fixture
def copy(trace: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(trace, tmp_path))


def test_a_job_finds_what_analyze_finds(run: Run, trace: Path) -> None:
    job = Job(diagnosed, trace, Asked(), False)
    job.start()
    assert to_json(job.result()) == run("analyze", trace, "--format", "json")[1]
    assert job.progress.stage == "looking for who did it"


ASKED = Asked("+2s", "-2s", "engine-0", None, "chat", (parse_slo("ttft=350ms@p99"),), False)
SAME = [
    *("--since", "+2s", "--until", "-2s", "--replica", "engine-0"),
    *("--redact-for", "chat", "--slo", "ttft=350ms@p99", "--no-replay"),
]


@pytest.mark.parametrize(("asked", "same"), [(Asked(replay=False), ["--no-replay"]), (ASKED, SAME)])
def test_each_face_finds_what_the_other_has_kept(run: Run, copy: Path, asked: Asked, same: list[str]) -> None:
    _, out, err = run("analyze", copy, *same, "--format", "json", "--save")
    assert "kept: " in err
    (kept,) = copy.parent.glob("*.json")
    altered = {**json.loads(kept.read_text()), "source": "somewhere else"}
    kept.write_text(json.dumps(altered))
    assert diagnosed(copy, asked, True, silent).source == "somewhere else"  # it is really read

    kept.unlink()
    assert to_json(diagnosed(copy, asked, True, silent)) == out
    assert list(copy.parent.glob("*.json")) == [kept]
    assert f"diagnosed earlier: {kept}" in run("analyze", copy, *same)[2]


def test_nothing_is_kept_unless_told(copy: Path) -> None:
    diagnosed(copy, Asked(replay=False), False, silent)
    assert list(copy.parent.iterdir()) == [copy]


def test_what_cannot_be_kept_is_said_before_the_work(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    stages: list[str] = []

    def told(stage: str) -> nullcontext[object]:
        stages.append(stage)
        return silent(stage)

    with pytest.raises(UsageError, match="nothing can be kept there"):
        diagnosed(copy, Asked(replay=False), True, told)
    assert stages == []


def test_a_job_predicts_what_whatif_predicts(run: Run, trace: Path) -> None:
    job = Job(what_if, trace, Asked(since="+1s"), Question(without=("reasoner",)))
    job.start()
    asked = ("whatif", trace, "--without", "reasoner", "--since", "+1s", "--format", "json")
    assert to_json(job.result()) == run(*asked)[1]
    assert (job.progress.stage, job.progress.share) == ("replaying", 1.0)


def test_what_if_of_a_redacted_trace_knows_nobody_else_by_name(trace: Path) -> None:
    asked = Asked(redact_for="chat")
    answer = what_if(trace, asked, Question(without=("tenant-1",)), silent)
    assert "chat" in to_json(answer)
    assert "reasoner" not in to_json(answer)
    with pytest.raises(UsageError, match="no tenant 'reasoner'"):
        what_if(trace, asked, Question(without=("reasoner",)), silent)


def test_a_question_that_has_no_answer_is_one_line(trace: Path) -> None:
    job = Job(what_if, trace, Asked(), Question(without=("nobody\n",)))
    job.start()
    with pytest.raises(UsageError, match="no tenant 'nobody") as error:
        job.result()
    assert len(str(error.value).splitlines()) == 1


@needs_proc
def test_a_cancelled_replay_ends(trace: Path) -> None:
    job = Job(what_if, trace, Asked(), Question(usual=("reasoner",)))
    job.start()
    assert eventually(lambda: job.progress.stage == "replaying")
    assert job.state is State.RUNNING
    job.cancel()
    assert job.state is State.CANCELLED
    assert job.progress.share < 1.0


# --- a dataset ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("hourly")
def test_a_dataset_is_diagnosed_in_portions_by_processes_of_the_job(run: Run, dataset: Path, tmp_path: Path) -> None:
    job = Job(errands.diagnosed_hourly, dataset, tmp_path / "pid")
    job.start()
    assert to_json(job.result()) == run("analyze", dataset, "--no-replay", "--format", "json")[1]


@needs_proc
def test_with_a_cancelled_job_all_that_work_on_portions_end(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    job = Job(errands.diagnosed_hourly, dataset, tmp_path / "pid")
    job.start()
    assert eventually(lambda: (tmp_path / "pid").exists() and len(session_of(pid_in(tmp_path / "pid"))) > 1)
    pids = session_of(pid_in(tmp_path / "pid"))
    job.cancel()
    assert job.state is State.CANCELLED
    assert eventually(lambda: not any(map(is_alive, pids)))
    assert capfd.readouterr().err == ""


def pid_in(path: Path) -> int:
    return int(path.read_text())
