"""NVIDIA Dynamo's files: passes and requests become one trace, whose batches are those that there were."""

import gzip
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from stallscope.cli import app
from stallscope.errors import UsageError
from stallscope.trace import Trace, read_trace
from tests.trace.formats.files import forward_pass, request_end, write_recording, write_records
from tests.trace.recording import as_batches, share_of_batches
from tests.trace.test_reconstruct import busy

START = 1_782_777_601_000
REPLICA = "4192/0"

# Four chats decode; the fifth request's prompt of 600 tokens takes three passes of 100 ms and more.
PASSES = [
    forward_pass(40, START + 20, 0.020, prefill=(4, 80)),
    *(forward_pass(41 + n, START + 40 + 20 * n, 0.020, decodes=4) for n in range(3)),
    forward_pass(44, START + 200, 0.120, prefill=(1, 200), decodes=4),
    forward_pass(45, START + 320, 0.120, prefill=(1, 200), decodes=4),
    forward_pass(46, START + 450, 0.130, prefill=(1, 200), decodes=4, queued=1),
    *(forward_pass(47 + n, START + 470 + 20 * n, 0.020, decodes=5) for n in range(5)),
]
REQUESTS = [
    *(request_end(f"chat-{n}", START, (0.0, 20.0), 550.0, (20, 12), "chat") for n in range(4)),
    request_end("long", START + 75, (5.0, 370.0), 475.0, (600, 6), "batch"),
]


def trace_of(folder: Path, passes: list[dict[str, object]], requests: list[dict[str, object]]) -> Trace:
    write_records(folder / "fpm.jsonl.gz", passes)
    write_records(folder / "requests.jsonl.gz", requests)
    return read_trace(folder)


def kinds(trace: Trace) -> dict[str, int]:
    return {one.kind: one.count for one in trace.findings}


def test_passes_and_requests_of_one_folder_are_one_trace_of_the_batches_there_were(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, PASSES, REQUESTS)
    assert trace.coverage.select(["replica", "fidelity", "steps_seen", "steps_lost"]).to_pylist() == [
        {"replica": REPLICA, "fidelity": 2, "steps_seen": 12, "steps_lost": 0}
    ]
    assert trace.validate() == []
    found = as_batches(trace, REPLICA)
    chats = [f"chat-{n}" for n in range(4)]
    doing = {step: {name: (phase, tokens) for name, (phase, tokens, *_) in one.items()} for step, one in found.items()}
    assert doing[40] == dict.fromkeys(chats, ("prefill", 20))
    assert doing[42] == dict.fromkeys(chats, ("decode", 1))
    for step in (44, 45, 46):
        assert doing[step] == {**dict.fromkeys(chats, ("decode", 1)), "long": ("prefill", 200)}
    assert doing[51] == dict.fromkeys([*chats, "long"], ("decode", 1))


def test_the_sums_and_times_are_those_of_the_passes(tmp_path: Path) -> None:
    steps = trace_of(tmp_path, PASSES, REQUESTS).steps.to_pandas().set_index("step")
    assert steps["prefill_tokens"].tolist() == [80, 0, 0, 0, 200, 200, 200, 0, 0, 0, 0, 0]
    assert steps["decode_tokens"].tolist() == [0, 4, 4, 4, 4, 4, 4, 5, 5, 5, 5, 5]
    assert steps["waiting"].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert steps.loc[46, "ready"] == (START + 450) * 1_000_000
    assert steps.loc[46, "ready"] - steps.loc[46, "scheduled"] == 130_000_000
    assert steps.loc[44, "kv_used"] == 240  # tokens: of four contexts of ten, and the prompt's


def test_the_tenant_is_what_the_agent_context_claims(tmp_path: Path) -> None:
    requests = trace_of(tmp_path, PASSES, REQUESTS).requests.to_pandas().set_index("request")
    assert requests.loc["long", ["tenant", "tenant_source", "session"]].tolist() == [
        "batch",
        "claim:session_type_id",
        "batch-1",
    ]
    assert set(requests.loc[[f"chat-{n}" for n in range(4)], "tenant"]) == {"chat"}
    long = requests.loc["long"]
    assert [long["scheduled"], long["first_token"], long["end"]] == [
        (START + offset) * 1_000_000 for offset in (80, 450, 550)
    ]


def test_doctor_says_fidelity_2_and_that_no_live_engine_was_seen(tmp_path: Path) -> None:
    trace_of(tmp_path, PASSES, REQUESTS)
    said = CliRunner().invoke(app, ["doctor", str(tmp_path)])
    (header, row) = (line.split() for line in said.output.strip().splitlines()[-2:])
    assert row[0] == REPLICA
    assert row[header.index("fidelity") + 1] == "2"  # its length takes two words
    assert "experimental, read by the producer's documents (NVIDIA Dynamo, 17 times)" in said.output


def test_of_a_real_run_nearly_every_batch_is_the_real_one(tmp_path: Path) -> None:
    recording = busy()
    write_recording(tmp_path, recording)
    trace = read_trace(tmp_path)
    assert trace.validate() == []
    assert share_of_batches(trace, recording, REPLICA) > 0.95


def test_a_gap_in_the_counter_is_lost_steps(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, PASSES[:3] + PASSES[5:], REQUESTS)
    assert trace.coverage["steps_lost"].to_pylist() == [2]


def test_each_rank_of_a_worker_is_a_replica(tmp_path: Path) -> None:
    other = orjson.loads(orjson.dumps(PASSES))
    for one in other:
        one["event"]["fpm"]["dp_rank"] = 1
    trace = trace_of(tmp_path, PASSES + other, REQUESTS)
    assert sorted(set(trace.steps["replica"].to_pylist())) == ["4192/0", "4192/1"]
    assert set(trace.requests["replica"].to_pylist()) == {"4192/0"}


def test_a_heartbeat_of_an_idle_engine_is_an_empty_step(tmp_path: Path) -> None:
    trace = trace_of(tmp_path, [*PASSES, forward_pass(52, START + 551, 0.0)], REQUESTS)
    assert trace.validate() == []
    assert trace.coverage["steps_lost"].to_pylist() == [0]
    assert trace.steps["batch_size"].to_pylist()[-1] == 0


def test_sampled_passes_are_said_to_be(tmp_path: Path) -> None:
    passes = orjson.loads(orjson.dumps(PASSES))
    for one in passes:
        one["event"]["capture_mode"] = "sampled"
    assert kinds(trace_of(tmp_path, passes, REQUESTS))["sampled_steps"] == 12


def test_records_come_without_their_envelope_too_and_beside_others(tmp_path: Path) -> None:
    tool = {"schema": "dynamo.request.trace.v1", "event_type": "tool_end", "event_time_unix_ms": START, "tool": {}}
    bare = [one["event"] for one in [*PASSES, *REQUESTS]]
    records = write_records(tmp_path / "all.jsonl.gz", [tool, *bare])
    trace = read_trace(records)
    assert (trace.steps.num_rows, trace.requests.num_rows) == (12, 5)
    assert kinds(trace) == {"experimental_format": 18}


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("wall_time",), -0.1),
        (("wall_time",), None),
        (("wall_time",), "long"),
        (("wall_time",), True),
        (("counter_id",), -1),
        (("counter_id",), 1 << 60),
        (("worker_id",), None),
        (("dp_rank",), 0.5),
        (("scheduled_requests",), [1]),
        (("scheduled_requests", "sum_prefill_tokens"), -5),
        (("queued_requests", "num_prefill_requests"), "many"),
    ],
)
def test_a_damaged_pass_costs_itself(tmp_path: Path, place: tuple[str, ...], value: object) -> None:
    bad = orjson.loads(orjson.dumps(PASSES[5]))
    where = bad["event"]["fpm"]
    for name in place[:-1]:
        where = where[name]
    where[place[-1]] = value
    trace = trace_of(tmp_path, [*PASSES[:5], bad, *PASSES[6:]], REQUESTS)
    assert trace.steps.num_rows == 11
    assert kinds(trace)["malformed_span"] == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("request_id", 5), ("request_received_ms", None), ("total_time_ms", -1), ("worker", {}), ("input_tokens", 1.5)],
)
def test_a_damaged_request_costs_itself(tmp_path: Path, name: str, value: object) -> None:
    bad = orjson.loads(orjson.dumps(REQUESTS[0]))
    bad["event"]["request"][name] = value
    trace = trace_of(tmp_path, PASSES, [bad, *REQUESTS[1:]])
    assert trace.requests.num_rows == 4
    assert kinds(trace)["malformed_span"] == 1


def test_not_a_number_and_a_cut_off_file_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    lines = [orjson.dumps(one) for one in [*PASSES, *REQUESTS]]
    lines[1] = lines[1].replace(b'"wall_time":0.02', b'"wall_time":NaN')
    whole = gzip.compress(b"\n".join(lines) + b"\n")
    (tmp_path / "nan.jsonl.gz").write_bytes(whole)
    assert kinds(read_trace(tmp_path))["unreadable_line"] == 1
    (tmp_path / "nan.jsonl.gz").write_bytes(whole[:-20])
    assert kinds(read_trace(tmp_path))["damaged_file"] == 1


def test_records_that_are_nobodys_are_no_trace(tmp_path: Path) -> None:
    write_records(tmp_path / "x.jsonl.gz", [{"schema": "other.v1"}, {"event": 5}, [], 7])
    with pytest.raises(UsageError, match="no OTLP"):
        read_trace(tmp_path)
