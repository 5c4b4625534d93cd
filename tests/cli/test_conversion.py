"""`convert` and `sql` as their user meets them: whole files or none, answers on stdout, one-line errors."""

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stallscope.diagnosis import Diagnosis
from stallscope.trace import read_trace
from tests.cli.conftest import Run
from tests.reports.perfetto_file import read_perfetto
from tests.trace.recording import steady, write

ROOT = Path(__file__).parents[2]
Answers = Callable[..., list[dict[str, object]]]


@pytest.fixture
def ask(run: Run, trace: Path) -> Answers:
    """What `sql --format json` says of the trace."""

    def call(query: str) -> list[dict[str, object]]:
        code, out, err = run("sql", trace, query, "--format", "json")
        assert (code, err) == (0, "")
        found: list[dict[str, object]] = json.loads(out)
        return found

    return call


# --- convert ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stall.pftrace", "stall.perfetto-trace"])
def test_a_trace_becomes_a_perfetto_file_with_its_diagnosis(run: Run, trace: Path, tmp_path: Path, name: str) -> None:
    code, out, err = run("convert", trace, tmp_path / name, "--no-replay")
    assert (code, out) == (0, "")
    assert "ui.perfetto.dev" in err
    read = read_perfetto(tmp_path / name)
    assert read.on("incidents")[0].name.startswith("noisy_neighbor: reasoner stalled chat")
    assert any(one.out for one in read.slices)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_without_analysis_there_are_requests_and_steps_but_no_incidents(run: Run, trace: Path, tmp_path: Path) -> None:
    assert run("convert", trace, tmp_path / "bare.pftrace", "--no-analysis")[0] == 0
    read = read_perfetto(tmp_path / "bare.pftrace")
    assert len(read.on("steps")) == read_trace(trace).steps.num_rows
    assert not read.on("incidents")


@pytest.mark.parametrize("name", ["tables", "tables.parquet", "tables.of.today/"])
def test_a_folder_becomes_a_dataset_that_is_analysed_alike(run: Run, trace: Path, tmp_path: Path, name: str) -> None:
    code, _, err = run("convert", trace, f"{tmp_path}/{name}")
    assert code == 0
    assert "steps" in err
    first, second = (
        Diagnosis.from_dict(json.loads(run("analyze", path, "--no-replay", "--format", "json")[1]))
        for path in (trace, tmp_path / name)
    )
    assert first.incidents == second.incidents


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_dataset_becomes_otlp_again(run: Run, trace: Path, tmp_path: Path, suffix: str) -> None:
    assert run("convert", trace, tmp_path / "data")[0] == 0
    path = tmp_path / f"again.otlp.jsonl{suffix}"
    code, out, err = run("convert", tmp_path / "data", path)
    assert (code, out) == (0, "")
    assert "steps" in err
    assert read_trace(path).tables == read_trace(trace).tables
    code, _, err = run("convert", trace, path)
    assert (code, len(err.splitlines())) == (2, 1)
    assert run("convert", trace, path, "--until", "+10s", "--force")[0] == 0
    assert read_trace(path).steps.num_rows < read_trace(trace).steps.num_rows
    assert {one.name for one in tmp_path.iterdir()} == {"data", path.name}
    assert run("convert", trace, path, "--append")[0] == 2


def test_two_processes_that_begin_a_dataset_are_both_in_it(tmp_path: Path) -> None:
    for name in ("r0", "r1"):
        write(tmp_path / f"{name}.otlp.jsonl", steady().lines(name))
    command = [sys.executable, "-m", "stallscope.cli", "convert", "--append"]
    files = [tmp_path / f"{name}.otlp.jsonl" for name in ("r0", "r1")]
    started = [subprocess.Popen([*command, file, tmp_path / "data"], stderr=subprocess.PIPE) for file in files]
    assert [one.communicate(timeout=120)[1] is not None and one.returncode for one in started] == [0, 0]
    assert sorted(read_trace(tmp_path / "data").steps["replica"].unique().to_pylist()) == ["r0", "r1"]


def test_a_part_of_a_trace_can_be_converted(run: Run, trace: Path, tmp_path: Path) -> None:
    assert run("convert", trace, tmp_path / "part", "--since", "+10s", "--until", "+20s")[0] == 0
    steps = read_trace(tmp_path / "part").steps.to_pandas()
    assert 5e9 < steps["ready"].max() - steps["scheduled"].min() <= 10e9


def test_a_file_is_not_overwritten_unless_told(run: Run, trace: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.pftrace"
    path.write_bytes(b"mine")
    code, _, err = run("convert", trace, path, "--no-analysis")
    assert code == 2
    assert "--force" in err
    assert path.read_bytes() == b"mine"
    assert run("convert", trace, path, "--no-analysis", "--force")[0] == 0
    assert read_perfetto(path).on("steps")


def test_a_dataset_is_not_overwritten_unless_told_and_another_folder_never(
    run: Run, trace: Path, tmp_path: Path
) -> None:
    assert run("convert", trace, tmp_path / "data", "--until", "+10s")[0] == 0
    few = read_trace(tmp_path / "data").steps.num_rows
    code, _, err = run("convert", trace, tmp_path / "data")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "--force" in err
    assert run("convert", trace, tmp_path / "data", "--force")[0] == 0
    assert read_trace(tmp_path / "data").steps.num_rows > few
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.png").write_bytes(b"cat")
    code, _, err = run("convert", trace, other, "--force")
    assert (code, len(err.splitlines())) == (2, 1)
    assert [path.name for path in other.iterdir()] == ["cat.png"]


def test_what_fails_leaves_what_was_there(
    run: Run, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.pftrace"
    path.write_bytes(b"mine")
    monkeypatch.setitem(sys.modules, "perfetto.trace_builder.proto_builder", None)
    with pytest.raises(ModuleNotFoundError):
        run("convert", trace, path, "--no-analysis", "--force")
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["trace.csv", "trace.json", "trace.otlp.pb"])
def test_an_unknown_suffix_is_told_which_there_are(run: Run, trace: Path, tmp_path: Path, name: str) -> None:
    code, out, err = run("convert", trace, tmp_path / name)
    assert (code, out) == (2, "")
    assert ".pftrace" in err
    assert ".perfetto-trace" in err
    assert ".otlp.jsonl.zst" in err
    assert len(err.splitlines()) == 1


def test_options_of_perfetto_are_refused_for_a_dataset(run: Run, trace: Path, tmp_path: Path) -> None:
    code, _, err = run("convert", trace, tmp_path / "data", "--no-replay")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "data").exists()


def test_a_shared_file_has_no_name_of_anybody(run: Run, trace: Path, tmp_path: Path) -> None:
    names = {str(name) for name in read_trace(trace).requests.column("tenant").to_pylist()}
    names |= {str(name) for name in read_trace(trace).replicas.column("replica").to_pylist()}
    assert run("convert", trace, tmp_path / "shared.pftrace", "--anonymize", "--no-replay")[0] == 0
    assert run("convert", trace, tmp_path / "shared", "--anonymize")[0] == 0
    written = (tmp_path / "shared.pftrace").read_bytes()
    assert b"tenant-1" in written
    assert b"request-1 " in written
    for name in names:
        assert name.encode() not in written
    for file in (tmp_path / "shared").rglob("*"):
        assert str(trace) not in (file.read_text() if file.suffix == ".json" else "")
    shared = read_trace(tmp_path / "shared")
    assert set(shared.requests.column("tenant").to_pylist()) == {f"tenant-{n}" for n in range(1, len(names))}


# --- sql ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_a_table_for_people_csv_or_json(run: Run, trace: Path) -> None:
    requests = read_trace(trace).requests.to_pandas()
    most = requests["tenant"].astype(str).value_counts()
    query = "select tenant, count(*) as requests from requests group by tenant order by requests desc"
    code, out, err = run("sql", trace, query)
    assert (code, err) == (0, "")
    assert out.split()[:4] == ["tenant", "requests", most.index[0], str(most.iloc[0])]
    rows = list(csv.DictReader(io.StringIO(run("sql", trace, query, "--format", "csv")[1])))
    assert {row["tenant"]: int(row["requests"]) for row in rows} == most.to_dict()
    answer = json.loads(run("sql", trace, query, "--format", "json")[1])
    assert {row["tenant"]: row["requests"] for row in answer} == most.to_dict()


def test_the_same_is_answered_from_a_dataset(run: Run, ask: Answers, trace: Path, tmp_path: Path) -> None:
    assert run("convert", trace, tmp_path / "data")[0] == 0
    query = "select replica, count(*) steps, sum(prefill_tokens) tokens, max(ready) last from steps group by replica"
    stored = json.loads(run("sql", tmp_path / "data", query, "--format", "json")[1])
    assert stored == ask(query)
    assert stored[0]["last"] == read_trace(trace).steps.to_pandas()["ready"].max()


def test_every_table_can_be_asked(ask: Answers) -> None:
    names = [row["name"] for row in ask("show tables")]
    assert {"steps", "residency", "requests", "gaps", "coverage"} <= set(names)
    for name in names:
        assert ask(f"select count(*) n from {name}")[0]["n"] is not None
    assert {"column_name": "tenant", "column_type": "VARCHAR"}.items() <= ask("describe requests")[3].items()


def test_json_has_null_for_what_is_no_number_and_each_column_once(ask: Answers) -> None:
    assert ask("select 'nan'::double a, 1 a, [1.5, null] b, {'k': 2::hugeint} c, 3.0::decimal(9, 1) d, null e") == [
        {"a": None, "a_2": 1, "b": [1.5, None], "c": {"k": 2}, "d": 3, "e": None}
    ]
    assert ask("select make_timestamp_ns(1790000000000000000) t") == [{"t": "2026-09-21T14:13:20"}]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("select nosuch from steps", "nosuch"),
        ("select * from nothing", "tables: replicas, steps"),
        ("selec 1", "syntax error"),
        ("", "one SELECT"),
        ("select 1; select 2", "one SELECT"),
        ("drop table steps", "one SELECT"),
        ("copy steps to '/tmp/steps.csv'", "one SELECT"),
        ("set enable_external_access = true", "one SELECT"),
        ("install httpfs", "one SELECT"),
        ("select * from read_csv('/etc/passwd')", "disabled"),
        ("select * from '/etc/passwd'", "does not exist"),
        ("select * from glob('/*')", "disabled"),
        ("select cast(tenant as integer) from requests", "Could not convert"),
    ],
)
def test_what_is_no_question_to_the_tables_is_refused_in_one_line(run: Run, trace: Path, query: str, says: str) -> None:
    code, out, err = run("sql", trace, query)
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_without_duckdb_the_error_says_what_to_install(run: Run, trace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stallscope.trace.query.find_spec", lambda name: None)
    code, _, err = run("sql", trace, "select 1")
    assert code == 2
    assert err == "stallscope: SQL needs the package duckdb, which is not installed: pip install duckdb\n"


def test_a_long_answer_is_cut_on_a_terminal_only_and_says_so(run: Run, trace: Path) -> None:
    code, out, err = run("sql", trace, "select step from steps order by step")
    assert code == 0
    assert len(out.splitlines()) == 501
    assert "--format csv" in err
    steps = read_trace(trace).steps.num_rows
    assert len(run("sql", trace, "select step from steps", "--format", "csv")[1].splitlines()) == steps + 1


def test_a_row_too_wide_for_a_table_has_its_columns_one_below_the_other(run: Run, trace: Path) -> None:
    code, out, _ = run("sql", trace, "select * from steps order by step limit 2")
    first = read_trace(trace).steps.to_pylist()[0]
    lines = out.splitlines()
    assert code == 0
    assert lines[0] == "row 1"
    assert f"scheduled  {first['scheduled']}" in out
    assert len(lines) == 2 * (1 + len(first))


def test_hostile_text_is_no_command_to_the_terminal(run: Run, trace: Path) -> None:
    code, out, _ = run("sql", trace, "select chr(27) || '[31mred[bold]' || chr(10) as x")
    assert code == 0
    assert "\x1b" not in out
    assert out.splitlines()[1].strip() == "\\x1b[31mred[bold]\\n"


QUERIES = re.findall(r"```sql\n(.*?)```", (ROOT / "docs" / "convert.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("query", QUERIES)
def test_the_queries_of_the_page_are_answered(run: Run, query: str) -> None:
    code, out, _ = run("sql", ROOT / "sample_traces" / "pinned.otlp.jsonl.zst", query, "--format", "json")
    assert code == 0
    assert json.loads(out)


def test_the_page_has_queries_that_name_the_culprit(ask: Answers) -> None:
    assert len(QUERIES) == 3
    longest = ask(QUERIES[1])[0]
    assert (longest["phase"], longest["tenant"]) == ("prefill", "reasoner")
