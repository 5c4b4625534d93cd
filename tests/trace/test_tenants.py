"""Tenants from a gateway's log: who is known becomes the log's tenant everywhere, and every doubt is counted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from stallscope.errors import UsageError
from stallscope.trace import Trace, read_trace, write_parquet
from stallscope.trace.model import Trace as Model
from stallscope.trace.tables import encode, plain_table
from stallscope.trace.tenants import read_tenant_logs, with_tenants
from stallscope_engine.config import EngineConfig
from tests.trace.recording import Arrival, Workload, read, run

HOSTILE = "a\nb|\x1b[2J`<script>alert(1)</script>\"'&$x$\u202e,;"


def crowded(requests: int = 12) -> Trace:
    """Two tenants, short of KV blocks, so that there are residency, preemptions and evictions of both."""
    arrivals = [Arrival(500_000, 40, 30, ["chat", "batch"][number % 2]) for number in range(requests)]
    config = EngineConfig(block_size=4, kv_blocks=30, max_num_seqs=6, prefix_caching=True)
    return read(run(Workload(config, arrivals, 20, 10_000)).lines())


def named(names: Iterable[str], trace_ids: Iterable[str | None] | None = None) -> Trace:
    """A trace with these request ids and nothing else; all claim to be chat's."""
    ids = list(names)
    columns = {
        "replica": ["r0"] * len(ids),
        "request": ids,
        "tenant": ["chat"] * len(ids),
        "tenant_source": ["claim:user"] * len(ids),
        "trace_id": list(trace_ids) if trace_ids is not None else [None] * len(ids),
    }
    tables = {name: table.slice(0, 0) for name, table in crowded(1).tables.items()}
    tables["requests"] = encode("requests", [plain_table("requests", columns, len(ids))])
    return Model(tables, "t")


def log(folder: Path, rows: Iterable[Mapping[str, object]], name: str = "gw.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return str(path)


def tenants_of(trace: Trace) -> dict[str, tuple[str, str | None]]:
    """Tenant and source by request."""
    rows = trace.requests.select(["request", "tenant", "tenant_source"]).to_pylist()
    return {row["request"]: (row["tenant"], row["tenant_source"]) for row in rows}


def found(trace: Trace) -> dict[str, tuple[str, int]]:
    """Place and count of each kind of finding."""
    return {finding.kind: (finding.where, finding.count) for finding in trace.findings}


# --- which tables -------------------------------------------------------------------------------------------------


def test_every_table_has_the_tenant_that_the_log_knows(tmp_path: Path) -> None:
    trace = crowded()
    assert trace.evictions.num_rows
    rows = [{"request_id": f"req-{number}", "tenant": f"t{number % 3}"} for number in range(12)]
    told = with_tenants(trace, read_tenant_logs([log(tmp_path, rows)]))
    expected = {f"req-{number}": f"t{number % 3}" for number in range(12)}
    assert tenants_of(told) == {request: (tenant, "gateway:gw.jsonl") for request, tenant in expected.items()}
    for table, request, tenant in (("residency", "request", "tenant"), ("evictions", "owner_request", "owner_tenant")):
        for row in told.tables[table].to_pylist():
            assert row[tenant] == expected.get(row[request])
    assert told.validate() == []
    assert found(told).keys() == {"claimed_unknown"}  # the engine called them chat and batch


def test_what_the_log_does_not_know_stays_as_it_was_and_is_counted(tmp_path: Path) -> None:
    trace = crowded()
    before = tenants_of(trace)
    told = with_tenants(trace, read_tenant_logs([log(tmp_path, [{"request_id": "req-3", "tenant": "archive"}])]))
    after = tenants_of(told)
    assert after.pop("req-3") == ("archive", "gateway:gw.jsonl")
    before.pop("req-3")
    assert after == before
    assert found(told)["tenant_unmapped"] == (f"{tmp_path / 'gw.jsonl'} request req-0", 11)
    assert "8% are, by request_id to tenant" in next(f.text for f in told.findings if f.kind == "tenant_unmapped")
    amounts = [name for name in trace.residency.schema.names if name != "tenant"]
    assert told.residency.select(amounts).equals(trace.residency.select(amounts))


def test_clients_follow_and_those_that_reached_no_engine_too(tmp_path: Path) -> None:
    trace = crowded()
    columns = {
        "replica": ["r0", None, None],
        "request": ["req-1", "refused-1", "refused-2"],
        "tenant": ["batch", "batch", None],
        "sent": [1, 2, 3],
        "end": [2, 3, 4],
        "status": ["ok", "rejected", "rejected"],
    }
    clients = encode("clients", [plain_table("clients", columns, 3)])
    trace = Model({**trace.tables, "clients": clients}, "t")
    rows = [{"id": "req-1", "tenant": "a"}, {"id": "refused-2", "tenant": "b"}]
    told = with_tenants(trace, read_tenant_logs([log(tmp_path, rows)]))
    assert told.clients["tenant"].to_pylist() == ["a", "batch", "b"]


def test_a_stored_trace_is_told_as_one_just_read(tmp_path: Path) -> None:
    trace = crowded()
    write_parquet(trace, tmp_path / "stored")
    logs = read_tenant_logs([log(tmp_path, [{"id": f"req-{n}", "tenant": str(n % 2)} for n in range(10)])])
    told, stored = with_tenants(trace, logs), with_tenants(read_trace(tmp_path / "stored"), logs)
    for name, table in told.tables.items():
        assert stored.tables[name].to_pylist() == table.to_pylist()


# --- which request ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_id", "logged"),
    [
        ("abc", "abc"),
        ("chatcmpl-abc", "abc"),  # vLLM's span of a chat
        ("cmpl-abc-0", "abc"),  # of a completion with one prompt
        ("cmpl-abc-12-1a2b3c4d", "abc"),  # within vLLM, as the hook sees it
        ("chatcmpl-abc-1a2b3c4d", "chatcmpl-abc"),  # the log has the id of the answer
        ("1_chatcmpl-abc-1a2b3c4d", "abc"),  # the second answer of a request with n=2
        ("abc", "cmpl-abc"),
        ("chatcmpl-abc #2", "abc"),  # an id that came twice
        ("cmpl-ab-3-0", "ab-3"),
        ("chatcmpl-ab-1a2b3c4d-5e6f7a8b", "ab-1a2b3c4d"),
    ],
)
def test_ids_are_known_as_engines_write_them(tmp_path: Path, request_id: str, logged: str) -> None:
    logs = read_tenant_logs([log(tmp_path, [{"x-request-id": logged, "tenant": "archive"}])])
    assert tenants_of(with_tenants(named([request_id]), logs))[request_id] == ("archive", "gateway:gw.jsonl")


def test_the_exact_id_goes_before_what_it_may_have_been_made_of(tmp_path: Path) -> None:
    rows = [{"x-request-id": "cmpl-a-1", "tenant": "exact"}, {"x-request-id": "a", "tenant": "made"}]
    told = with_tenants(named(["cmpl-a-1", "cmpl-a-2"]), read_tenant_logs([log(tmp_path, rows)]))
    assert {request: one[0] for request, one in tenants_of(told).items()} == {"cmpl-a-1": "exact", "cmpl-a-2": "made"}


def test_an_id_that_may_be_of_two_tenants_is_of_none(tmp_path: Path) -> None:
    rows = [
        {"x-request-id": "a", "tenant": "one"},
        {"x-request-id": "a-0", "tenant": "two"},
        {"id": "b", "tenant": "x"},
    ]
    told = with_tenants(named(["cmpl-a-0-0", "cmpl-a-0", "b"]), read_tenant_logs([log(tmp_path, rows)]))
    assert tenants_of(told)["cmpl-a-0"] == ("chat", "claim:user")
    assert found(told)["tenant_conflict"][1] == 1


def test_a_traceparent_names_a_request_where_its_id_does_not(tmp_path: Path) -> None:
    ids = ["4bf92f3577b34da6a3ce929d0e0e4736", "0af7651916cd43dd8448eb211c80319c", None]
    rows = [
        {"traceparent": f"00-{ids[0]}-00f067aa0ba902b7-01", "tenant": "a"},
        {"trace_id": (ids[1] or "").upper(), "tenant": "b"},
        {"trace_id": "0" * 32, "tenant": "nobody"},
        {"trace_id": "teatime", "tenant": "nobody"},
    ]
    told = with_tenants(named(["x", "y", "z"], ids), read_tenant_logs([log(tmp_path, rows)]))
    assert [tenant for tenant, _ in tenants_of(told).values()] == ["a", "b", "chat"]


def test_a_request_with_two_tenants_in_the_log_keeps_its_own_unless_its_trace_decides(tmp_path: Path) -> None:
    trace_id = "4bf92f3577b34da6a3ce929d0e0e4736"
    rows = [
        {"id": "r1", "tenant": "a"},
        {"id": "r1", "tenant": "b"},
        {"id": "r2", "tenant": "a"},
        {"id": "r2", "tenant": "b", "trace_id": trace_id},
        {"id": "r3", "tenant": "a"},
        {"id": "r3", "tenant": "a"},
    ]
    told = with_tenants(named(["r1", "r2", "r3"], [None, trace_id, None]), read_tenant_logs([log(tmp_path, rows)]))
    assert [tenant for tenant, _ in tenants_of(told).values()] == ["chat", "b", "a"]
    assert found(told)["tenant_conflict"] == (f"{tmp_path / 'gw.jsonl'} request r1", 1)


# --- which columns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"request_id": "abc", "team_id": "no", "metadata": {"user_api_key_team_alias": "archive"}, "end_user": "no"},
        {"id": "abc", "metadata": json.dumps({"user_api_key_alias": "archive"}), "user": "no"},
        {"call_id": "abc", "team_alias": "archive", "user": "no"},
        {"request": {"id": "kongs-own", "headers": {"x-request-id": "abc"}}, "consumer": {"username": "archive"}},
        {"x-request-id": "abc", ":authority": "no", "x-tenant": " archive "},
        {"X_Request_ID": "abc", "Tenant": "archive"},
        {"request_id": "abc", "remote_user": "archive", "tenant": "-"},
    ],
)
def test_columns_have_the_names_that_gateways_give_them(tmp_path: Path, row: dict[str, object]) -> None:
    told = with_tenants(named(["chatcmpl-abc"]), read_tenant_logs([log(tmp_path, [row])]))
    assert tenants_of(told) == {"chatcmpl-abc": ("archive", "gateway:gw.jsonl")}


def test_columns_of_other_names_are_said(tmp_path: Path) -> None:
    rows = [{"request_id": "other", "tenant": "no", "a,b": "abc", ":authority": "archive"}]
    logs = read_tenant_logs([f"{log(tmp_path, rows, 'gw:1.jsonl')}:request=a,b,tenant=:authority"])
    assert tenants_of(with_tenants(named(["abc"]), logs)) == {"abc": ("archive", "gateway:gw:1.jsonl")}


@pytest.mark.parametrize(
    ("row", "options", "says"),
    [
        ({"path": "/v1", "tenant": "a"}, "", "no column that names requests; it has 'path', 'tenant'"),
        ({"id": "a", "path": "/v1"}, "", "no column that names tenants; it has 'id', 'path'"),
        ({"id": "a", "tenant": ""}, "", "no row that names a request and its tenant"),
        ({"id": "a", "tenant": "b"}, ":tenant=team", "no column 'team' with anything in it; it has 'id', 'tenant'"),
        ({"id": "a", "tenant": "b"}, ":tenant=", "tenant= names no column"),
    ],
)
def test_missing_columns_are_named(tmp_path: Path, row: dict[str, object], options: str, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_tenant_logs([log(tmp_path, [row]) + options])
    assert says in str(raised.value)


def test_a_log_that_knows_nobody_is_the_wrong_one_and_both_sides_are_shown(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none of the 12 requests .* it has 'x-1', the trace 'req-0'"):
        with_tenants(crowded(), read_tenant_logs([log(tmp_path, [{"id": "x-1", "tenant": "a"}])]))


def test_several_logs_are_one_and_each_is_a_source_of_its_own(tmp_path: Path) -> None:
    logs = [
        log(tmp_path, [{"id": "r1", "tenant": "a"}], "one.jsonl"),
        log(tmp_path, [{"id": "r2", "tenant": "a"}, {"id": "r1", "tenant": "a"}], "two.jsonl"),
    ]
    told = with_tenants(named(["r1", "r2"]), read_tenant_logs(logs))
    assert tenants_of(told) == {"r1": ("a", "gateway:one.jsonl"), "r2": ("a", "gateway:two.jsonl")}


# --- doubts -------------------------------------------------------------------------------------------------------


def test_who_claims_anothers_name_is_counted_and_loses_it(tmp_path: Path) -> None:
    trace = named(["r1", "r2", "r3"])  # all claim to be chat
    rows = [{"id": "r1", "tenant": "chat"}, {"id": "r2", "tenant": "batch"}, {"id": "r3", "tenant": "batch"}]
    told = with_tenants(trace, read_tenant_logs([log(tmp_path, rows)]))
    assert [tenant for tenant, _ in tenants_of(told).values()] == ["chat", "batch", "batch"]
    assert found(told) == {"claimed_another": (f"{tmp_path / 'gw.jsonl'} request r2", 2)}


def test_a_claim_that_no_gateway_knows_is_counted_apart(tmp_path: Path) -> None:
    told = with_tenants(named(["r1"]), read_tenant_logs([log(tmp_path, [{"id": "r1", "tenant": "batch"}])]))
    assert found(told) == {"claimed_unknown": (f"{tmp_path / 'gw.jsonl'} request r1", 1)}


def test_what_the_engine_authenticated_is_no_claim(tmp_path: Path) -> None:
    trace = named(["r1", "r2"])
    requests = trace.requests.to_pylist()
    columns = {name: [row[name] for row in requests] for name in trace.requests.schema.names}
    columns["tenant_source"] = ["api_key", "api_key"]
    trace = Model({**trace.tables, "requests": encode("requests", [plain_table("requests", columns, 2)])}, "t")
    rows = [{"id": "r1", "tenant": "chat"}, {"id": "r2", "tenant": "batch"}]
    told = with_tenants(trace, read_tenant_logs([log(tmp_path, rows)]))
    assert [tenant for tenant, _ in tenants_of(told).values()] == ["chat", "batch"]
    assert found(told) == {}


def test_names_may_be_anything_but_endless_or_nothing(tmp_path: Path) -> None:
    rows = [
        {"id": "r1", "tenant": HOSTILE},
        {"id": "r2", "tenant": "x" * 100_000},
        {"id": "r3", "tenant": " "},
        {"id": "r4", "tenant": "(unknown)"},
        {"id": "r5", "tenant": {"name": "object"}},
        {"id": "", "tenant": "a"},
    ]
    told = with_tenants(named([f"r{n}" for n in range(1, 6)]), read_tenant_logs([log(tmp_path, rows)]))
    assert [tenant for tenant, _ in tenants_of(told).values()] == [HOSTILE, "x" * 256, "chat", "chat", "chat"]
    assert found(told)["gateway_row"] == (str(tmp_path / "gw.jsonl"), 4)
    assert found(told)["tenant_unmapped"][1] == 3


def test_lines_that_can_not_be_read_are_counted_with_the_first_place(tmp_path: Path) -> None:
    path = tmp_path / "gw.jsonl"
    path.write_text('{"id": "r1", "tenant": "a"}\n{"id": "r2", "ten\nnonsense\n', encoding="utf-8")
    told = with_tenants(named(["r1"]), read_tenant_logs([str(path)]))
    assert found(told)["unreadable_row"] == (f"{path}:2", 2)


def test_texts_of_findings_name_nobody(tmp_path: Path) -> None:
    rows = [{"id": "r1", "tenant": "quokka"}, {"id": "r2", "tenant": "okapi"}, {"id": "r2", "tenant": "quokka"}]
    told = with_tenants(named(["r1", "r2", "r3"]), read_tenant_logs([log(tmp_path, rows)]))
    assert {finding.kind for finding in told.findings} >= {"tenant_unmapped", "tenant_conflict", "claimed_unknown"}
    for finding in told.findings:
        assert not any(word in finding.text for word in ("quokka", "okapi", "r1", "r2", "r3", "gw.jsonl"))


def test_many_tenants_are_no_loop(tmp_path: Path) -> None:
    count = 20_000
    ids = pa.array([f"r-{n}" for n in range(count)])
    rows = ({"id": f"r-{n}", "tenant": f"t-{n}"} for n in range(count))
    told = with_tenants(named(ids.to_pylist()), read_tenant_logs([log(tmp_path, rows)]))
    assert pc.count_distinct(told.requests["tenant"].cast(pa.string())).as_py() == count
