"""The load driver against a real server: what is sent, how answers can end, and what is kept of them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from stallscope import cli
from stallscope.cli import traffic
from stallscope.errors import UsageError
from stallscope.trace.clients import ClientSpan
from stallscope.trace.decode import collect
from stallscope.trace.findings import Findings
from stallscope.trace.otlp import Reader, find_sources
from stallscope.workloads.clients import FILE_NAME
from stallscope.workloads.draws import Literal
from stallscope.workloads.endpoint import Target, read_key, read_keys
from stallscope.workloads.load import LoadSummary, load
from stallscope.workloads.scenario import (
    AddedRequests,
    ClosedLoop,
    EnginePause,
    Every,
    Lengths,
    Poisson,
    Scenario,
    Tenant,
)
from stallscope.workloads.traffic import plan
from stallscope_engine.config import EngineConfig
from tests.workloads.endpoint import Endpoint, serving

CHAT = Tenant("chat", Every(Literal(0.1)), Lengths(Literal(20), Literal(5)))
Command = Callable[..., tuple[int, str, str]]
STORY = Scenario("story", "", 0.5, 0, EngineConfig(), (CHAT,), (), None)


def story(*tenants: Tenant, duration_s: float = 0.5) -> Scenario:
    return replace(STORY, tenants=tenants, duration_s=duration_s)


def spans(path: Path) -> list[ClientSpan]:
    """Sound client spans, in the order of sending; anything else in the file is an error."""
    findings = Findings()
    collected = collect(Reader(findings).read(find_sources(path)), findings)
    assert (findings.all(), collected.foreign, collected.replicas.keys()) == ((), 0, {"(unknown)"})
    return sorted(collected.clients, key=lambda span: span.sent)


def statuses(summary: LoadSummary) -> dict[str, dict[str, int]]:
    return {one.tenant: dict(one.statuses) for one in summary.tenants}


# --- what is sent -------------------------------------------------------------------------------------------


def test_requests_are_those_of_the_plan_and_say_who_they_are() -> None:
    with serving(Endpoint()) as endpoint:
        summary = load(STORY, Target(endpoint.url), seed=3)
    planned = {one.request_id: one for one in plan(STORY, 3)}
    assert statuses(summary) == {"chat": {"ok": 5}}
    assert summary.tenants[0].output_tokens == 25
    assert (summary.model, summary.notes) == ("tiny", ())
    assert {headers["x-request-id"] for headers, _ in endpoint.sent} == planned.keys()
    for headers, body in endpoint.sent:
        assert headers["x-tenant"] == body["user"] == "chat"
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", headers["traceparent"])
        assert (body["model"], body["max_tokens"], body["stream"], body["ignore_eos"]) == ("tiny", 5, True, True)
        assert len(body["prompt"]) == 20
        assert all(3 <= token < 2000 for token in body["prompt"])
    assert len({str(body["prompt"]) for _, body in endpoint.sent}) == 5


def test_prompts_are_the_same_for_the_same_seed_only() -> None:
    with serving(Endpoint()) as endpoint:
        for seed in (1, 1, 2):
            load(STORY, Target(endpoint.url), seed=seed)
    prompts = [body["prompt"] for _, body in endpoint.sent]
    assert prompts[:5] == prompts[5:10] != prompts[10:]


def test_prompts_of_text_have_a_word_a_token() -> None:
    with serving(Endpoint()) as endpoint:
        load(STORY, Target(endpoint.url, prompts="text"), seed=0)
    assert [len(str(body["prompt"]).split()) for _, body in endpoint.sent] == [20] * 5
    assert not any("detokenize" in body for _, body in endpoint.sent)


def test_a_server_that_refuses_extras_is_driven_without_them_and_the_user_is_told() -> None:
    with serving(Endpoint(refused=("ignore_eos",))) as endpoint:
        summary = load(STORY, Target(endpoint.url), seed=0)
    assert summary.ok == 5
    assert summary.tenants[0].output_tokens == 25  # counted by text
    assert not any({"ignore_eos", "vllm_xargs", "return_token_ids"} & body.keys() for _, body in endpoint.sent)
    assert [note for note in summary.notes if "ignore_eos" in note]


def test_priorities_are_sent_where_they_are_taken() -> None:
    urgent = replace(CHAT, lengths=replace(CHAT.lengths, priority=2))
    with serving(Endpoint()) as endpoint:
        load(story(urgent), Target(endpoint.url), seed=0)
    assert [body["priority"] for _, body in endpoint.sent] == [2] * 5
    with serving(Endpoint(refused=("priority",))) as endpoint:
        summary = load(story(urgent), Target(endpoint.url), seed=0)
    assert summary.ok == 5
    assert [note for note in summary.notes if "priority" in note]


def test_tenants_can_have_keys_of_their_own(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text("chat: sk-chat\nbatch: sk-batch\n", encoding="utf-8")
    batch = replace(CHAT, name="batch")
    with serving(Endpoint(keys={"chat": "sk-chat", "batch": "sk-batch"})) as endpoint:
        summary = load(story(CHAT, batch), Target(endpoint.url, keys=read_keys(keys)), seed=0)
    assert statuses(summary) == {"batch": {"ok": 5}, "chat": {"ok": 5}}


# --- how answers end ----------------------------------------------------------------------------------------


def test_each_way_to_fail_has_a_status_and_harms_nobody_else(tmp_path: Path) -> None:
    ways = {"cut": "disconnected", "429": "rejected", "500": "http_500", "error": "error", "empty": "error"}
    tenants = [replace(CHAT, name=f"t{way}") for way in ways]
    with serving(Endpoint(behaviour={f"t{way}": way for way in ways} | {"bare": "bare"})) as endpoint:
        scenario = story(CHAT, replace(CHAT, name="bare"), *tenants)
        summary = load(scenario, Target(endpoint.url), seed=0, out=tmp_path)
    seen = statuses(summary)
    assert seen == {"chat": {"ok": 5}, "bare": {"ok": 5}} | {f"t{way}": {status: 5} for way, status in ways.items()}
    assert {span.output_tokens for span in spans(tmp_path / FILE_NAME) if span.tenant == "tcut"} == {2}
    told = " ".join(summary.notes)
    assert "too many" in told
    assert "it broke" in told
    assert "a stream without any token" in told


def test_arrivals_do_not_wait_for_answers() -> None:
    slow = Endpoint(token_s=0.4)
    with serving(slow) as endpoint:
        summary = load(STORY, Target(endpoint.url), seed=0)
    assert summary.ok == 5
    assert summary.duration_s < 5 * 5 * 0.4  # one after the other would take as long


def test_the_clients_view_is_written_as_it_was(tmp_path: Path) -> None:
    with serving(Endpoint(token_s=0.02)) as endpoint:
        summary = load(STORY, Target(endpoint.url), seed=0, out=tmp_path / "trace")
    assert summary.path == tmp_path / "trace" / FILE_NAME
    written = spans(summary.path)
    parents = {headers["x-request-id"]: headers["traceparent"].split("-")[1] for headers, _ in endpoint.sent}
    assert {span.request_id: span.trace_id for span in written} == parents
    for span in written:
        times = list(map(int, span.token_times.split(",")))
        assert (span.status, span.output_tokens, len(times)) == ("ok", 5, 5)
        assert sum(times) <= span.end - span.sent
        assert sum(times) >= 4 * 20_000_000  # of gaps, a busy machine may read some late


def test_what_an_engine_has_to_do_itself_is_left_out_and_said() -> None:
    faulty = replace(STORY, inject=(EnginePause(Literal(0.1), Literal(0.1)),))
    with serving(Endpoint()) as endpoint:
        assert "1 of the scenario's injections" in load(faulty, Target(endpoint.url), seed=0).notes[0]
        assert load(faulty, Target(endpoint.url), seed=0, inject=False).notes == ()


def test_injected_requests_are_left_out_of_the_control() -> None:
    big = AddedRequests("big", (Literal(0.2),), Literal(1), Lengths(Literal(900), Literal(2)))
    with serving(Endpoint()) as endpoint:
        both = load(replace(STORY, inject=(big,)), Target(endpoint.url), seed=0)
        control = load(replace(STORY, inject=(big,)), Target(endpoint.url), seed=0, inject=False)
    assert (statuses(both).keys(), statuses(control).keys()) == ({"big", "chat"}, {"chat"})


def test_progress_ends_at_no_more_than_one() -> None:
    shares: list[float] = []
    with serving(Endpoint()) as endpoint:
        load(STORY, Target(endpoint.url), seed=0, progress=shares.append)
    assert shares == sorted(shares)
    assert 0 <= shares[0] <= shares[-1] <= 1


def test_a_driver_that_was_held_up_itself_says_so() -> None:
    with serving(Endpoint()) as endpoint:
        summary = load(STORY, Target(endpoint.url), seed=0, progress=lambda _: time.sleep(0.4))
    assert summary.driver_was_late
    assert summary.lateness.most >= summary.lateness.p99 > 0.05


# --- closed loops -------------------------------------------------------------------------------------------

AGENT = Lengths(Literal(10), Literal(3))


def agents(**loop: float | int) -> Tenant:
    return Tenant("agents", replace(ClosedLoop(1, Literal(0.05)), **loop), AGENT)  # type: ignore[arg-type]


def test_a_client_of_a_closed_loop_waits_for_its_answer_and_thinks(tmp_path: Path) -> None:
    with serving(Endpoint(token_s=0.05)) as endpoint:
        summary = load(story(agents(), duration_s=1), Target(endpoint.url), seed=0, out=tmp_path)
    written = spans(tmp_path / FILE_NAME)
    assert [span.request_id for span in written] == [f"agents-0001-{turn:06d}" for turn in range(1, len(written) + 1)]
    assert summary.ok == len(written) >= 2
    assert all(later.sent - sooner.end >= 50_000_000 for sooner, later in pairwise(written))


def test_an_impatient_client_goes_away_and_sends_the_same_prompt_again(tmp_path: Path) -> None:
    impatient = agents(timeout_s=0.2, retries=2)
    with serving(Endpoint(behaviour={"agents": "hang"})) as endpoint:
        summary = load(story(impatient, duration_s=0.55), Target(endpoint.url), seed=0, out=tmp_path)
        deadline = time.monotonic() + 10
        while endpoint.left < len(endpoint.sent) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert endpoint.left == len(endpoint.sent)
    ids = [headers["x-request-id"] for headers, _ in endpoint.sent]
    assert ids[:2] == ["agents-0001-000001", "agents-0001-000001-r1"]
    assert endpoint.sent[0][1]["prompt"] == endpoint.sent[1][1]["prompt"]
    assert statuses(summary) == {"agents": {"timeout": len(ids)}}


def test_a_refused_client_comes_back_when_it_was_told_to() -> None:
    with serving(Endpoint(behaviour={"agents": "429"})) as endpoint:
        summary = load(story(agents(retries=2), duration_s=0.4), Target(endpoint.url), seed=0)
    ids = [headers["x-request-id"] for headers, _ in endpoint.sent]
    assert ids[:4] == ["agents-0001-000001", "agents-0001-000001-r1", "agents-0001-000001-r2", "agents-0001-000002"]
    assert summary.ok == 0


# --- wrong use ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("endpoint", "target", "said"),
    [
        (Endpoint(key="right"), {"key": "wrong"}, r"refuses without a key that it knows \(401\).*--api-key-file"),
        (Endpoint(), {"model": "tinny"}, "serves no model 'tinny'; did you mean tiny"),
        (Endpoint(models=("a", "b")), {}, "serves a, b: choose one by --model"),
        (Endpoint(models=()), {}, "names no model .*give --model"),
        (Endpoint(refused=("prompt",)), {}, "trial request: http_400 .unknown field prompt.; --prompts text"),
        (Endpoint(behaviour={"": "500"}), {}, "trial request: http_500 .it broke."),
    ],
)
def test_an_endpoint_that_cannot_be_driven_is_one_line(
    endpoint: Endpoint, target: dict[str, str], said: str, tmp_path: Path
) -> None:
    with serving(endpoint), pytest.raises(UsageError, match=said) as caught:
        load(STORY, Target(endpoint.url, **target), seed=0, out=tmp_path / "trace")  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("url", "said"), [("http://127.0.0.1:1", "nothing answers"), ("127.0.0.1", "no URL")])
def test_an_address_where_nothing_is_is_one_line(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(STORY, Target(url), seed=0)


def test_a_trace_is_not_overwritten_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.otlp.jsonl"
    path.write_text("mine", encoding="utf-8")
    with serving(Endpoint()) as endpoint:
        with pytest.raises(UsageError, match="--force"):
            load(STORY, Target(endpoint.url), seed=0, out=path)
        assert path.read_text(encoding="utf-8") == "mine"
        load(STORY, Target(endpoint.url), seed=0, out=path, force=True)
    assert len(spans(path)) == 5


def test_a_scenario_without_requests_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(UsageError, match="story has no requests"):
        load(story(replace(CHAT, arrivals=Poisson(Literal(0)))), Target("http://127.0.0.1:1"), seed=0)


@pytest.mark.parametrize("content", ["", "two words", "sk-\u00e4"])
def test_a_file_without_a_key_is_one_line(content: str, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match="no key"):
        read_key(path)


def test_a_key_is_never_part_of_the_trace_or_the_summary(tmp_path: Path) -> None:
    path = tmp_path / "clients.otlp.jsonl"
    with serving(Endpoint(key="sk-secret")) as endpoint:
        summary = load(STORY, Target(endpoint.url, key="sk-secret"), seed=0, out=path)
    assert summary.ok == 5
    assert "sk-secret" not in path.read_text(encoding="utf-8") + repr(summary)


# --- as a command -------------------------------------------------------------------------------------------

SHORT = """
name: short
duration_s: 0.5
tenants: {chat: {arrivals: {every_s: 0.1}, prompt_tokens: 5, output_tokens: 4}}
"""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Command:
    """Runs `stallscope load` on a short scenario, in this process: (exit code, stdout, stderr)."""
    (tmp_path / "short.yaml").write_text(SHORT, encoding="utf-8")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["stallscope", "load", str(tmp_path / "short.yaml"), *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        written = capsys.readouterr()
        return int(ended.value.code or 0), written.out, written.err

    return call


def test_the_summary_has_a_line_for_each_tenant_and_names_the_trace(command: Command, tmp_path: Path) -> None:
    with serving(Endpoint()) as endpoint:
        code, out, err = command("--url", endpoint.url, "-o", str(tmp_path / "trace"))
    assert (code, err) == (0, "")
    first, heading, chat, late, trace = out.splitlines()
    assert first.startswith("5 requests to tiny in ")
    assert heading.split()[:4] == ["tenant", "sent", "ok", "failed"]
    assert chat.split()[:5] == ["chat", "5", "5", "-", "20"]
    assert late.startswith("driver late by ")
    assert trace == f"{tmp_path / 'trace' / FILE_NAME}: the clients' view"


def test_failures_are_counted_by_status_and_are_no_error_of_the_command(command: Command) -> None:
    flaky = Endpoint(refuse_every=2)
    with serving(flaky) as endpoint:
        code, out, err = command("--url", endpoint.url)
    assert code == 0
    assert re.search(r"chat +5 +\d +rejected \d", out)
    assert "rejected: too many" in err


def test_a_run_without_any_answer_is_exit_code_2(command: Command) -> None:
    with serving(Endpoint(behaviour={"chat": "500"})) as endpoint:
        code, out, err = command("--url", endpoint.url)
    assert code == 2
    assert "http_500 5" in out
    assert "none of 5 requests was answered" in err


def test_a_late_driver_is_exit_code_4(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def slow(_: str) -> Iterator[Callable[[float], None]]:
        yield lambda share: time.sleep(0.4)

    monkeypatch.setattr(traffic, "progress", slow)
    with serving(Endpoint()) as endpoint:
        code, _, err = command("--url", endpoint.url)
    assert code == 4
    assert "the driver could not keep up" in err


def test_a_wrong_key_file_is_one_line_and_exit_code_2(command: Command, tmp_path: Path) -> None:
    code, out, err = command("--url", "http://127.0.0.1:1", "--api-key-file", str(tmp_path / "nowhere"))
    assert (code, out, len(err.splitlines())) == (2, "", 1)


LONG = """
name: long
duration_s: 600
tenants: {chat: {arrivals: {every_s: 0.05}, prompt_tokens: 5, output_tokens: 400}}
"""


def test_an_interrupted_run_keeps_what_was_recorded(tmp_path: Path) -> None:
    (tmp_path / "long.yaml").write_text(LONG, encoding="utf-8")
    with serving(Endpoint(token_s=0.002)) as endpoint:
        command = [sys.executable, "-m", "stallscope.cli", "load", "long.yaml", "--url", endpoint.url, "-o", "trace"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as run:
            deadline = time.monotonic() + 60
            while len(endpoint.sent) < 30 and time.monotonic() < deadline:
                time.sleep(0.05)
            run.send_signal(signal.SIGINT)
            out, err = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "Traceback" not in err
    assert "interrupted" in err
    assert "abandoned" in out
    written = spans(tmp_path / "trace" / FILE_NAME)
    assert len(written) >= 30
    assert {span.status for span in written} <= {"ok", "abandoned"}
