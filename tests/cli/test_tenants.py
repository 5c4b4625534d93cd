"""--tenants: every command that reads a trace knows tenants by the gateway's log, and says what is doubtful."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stallscope.diagnosis import Diagnosis
from stallscope.trace import read_trace
from tests.cli.conftest import Run


@pytest.fixture(scope="session")
def gateway(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a gateway logged of the demo's stall: its own names for the tenants, as LiteLLM writes them."""
    requests = read_trace(trace).requests.select(["request", "tenant"]).to_pylist()
    rows = (
        {"request_id": row["request"], "metadata": {"user_api_key_team_alias": f"team {row['tenant']}"}}
        for row in requests
    )
    path = tmp_path_factory.mktemp("gateway") / "spend.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_the_culprit_has_the_name_that_the_gateway_gives_it(run: Run, trace: Path, gateway: Path) -> None:
    code, out, _ = run("analyze", "--no-replay", trace, "--tenants", gateway)
    assert code == 0
    assert out.startswith("NOISY NEIGHBOR: team reasoner stalled team chat")
    assert "tenant named by gateway:spend.jsonl" in out


def test_the_verdict_is_that_of_the_engines_own_names(run: Run, trace: Path, gateway: Path) -> None:
    plain, told = (
        Diagnosis.from_dict(json.loads(run("analyze", "--no-replay", trace, "--format", "json", *more)[1]))
        for more in ((), ("--tenants", gateway))
    )
    assert told.verdict == plain.verdict
    assert [one.charged_s for one in told.incidents] == [one.charged_s for one in plain.incidents]


def test_every_command_that_reads_a_trace_takes_it(run: Run, trace: Path, gateway: Path) -> None:
    request = read_trace(trace).requests["request"][0].as_py()
    _, out, _ = run("explain", trace, request, "--tenants", gateway)
    assert "gateway:spend.jsonl" in out or "team " in out
    _, out, _ = run("whatif", trace, "--without", "team reasoner", "--tenants", gateway)
    assert "team chat" in out
    _, out, _ = run("compare", trace, trace, "--tenants", gateway)
    assert "team chat" in out


def test_doctor_shows_whose_names_they_are(run: Run, trace: Path, gateway: Path, tmp_path: Path) -> None:
    lines = gateway.read_text(encoding="utf-8").splitlines()
    half = tmp_path / "half.jsonl"
    half.write_text("\n".join([*lines[: len(lines) // 2], "{broken"]), encoding="utf-8")
    code, out, _ = run("doctor", trace, "--tenants", half)
    assert code == 0
    assert f"gateway:half.jsonl {len(lines) // 2} of " in out
    assert "requests not in the gateway's log (50% are, by request_id to metadata.user_api_key_team_alias)" in out
    assert f"{half}:{len(lines) // 2 + 1}, once" in out


def test_a_kept_diagnosis_is_not_that_of_another_log(run: Run, trace: Path, gateway: Path, tmp_path: Path) -> None:
    mine = tmp_path / "spend.jsonl"
    mine.write_bytes(gateway.read_bytes())
    options = ["--no-replay", trace, "--tenants", mine, "-o", tmp_path / "report.txt", "--force", "--save"]
    assert "kept:" in run("analyze", *options)[2]
    assert "diagnosed earlier" in run("analyze", *options)[2]
    mine.write_bytes(gateway.read_bytes().replace(b"team chat", b"crew chat"))
    _, _, err = run("analyze", *options)
    assert "diagnosed earlier" not in err
    assert "crew chat" in (tmp_path / "report.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\x00\xff\x17" * 400, "neither text nor Parquet"),
        (b"path,status\n/v1,200\n", "no column that names requests; it has 'path', 'status'"),
        (b"request_id,tenant\nother-1,a\n", "it has 'other-1', the trace '"),
    ],
)
def test_a_log_of_no_use_is_one_line_and_exit_code_2(
    run: Run, trace: Path, tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "gw.csv"
    path.write_bytes(content)
    code, out, err = run("analyze", trace, "--tenants", path)
    assert (code, out) == (2, "")
    assert says in err
    assert str(path) in err
    assert len(err.splitlines()) == 1


def test_hostile_names_reach_no_terminal(run: Run, trace: Path, tmp_path: Path) -> None:
    ids = read_trace(trace).requests["request"].to_pylist()
    rows = [{"id": one, "tenant": ["\x1b[2Jmine", "a\nb"][n % 2]} for n, one in enumerate(ids[:-1])]
    (tmp_path / "gw.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for command in (("doctor",), ("analyze", "--no-replay")):
        _, out, err = run(*command, trace, "--tenants", tmp_path / "gw.jsonl")
        assert "\x1b" not in out + err
