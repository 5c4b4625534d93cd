"""A key says who its holder is; without keys, what a client claims is bounded, and called a claim."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torch", reason="torch is not installed (extra: engine)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: engine)")

from stallscope_engine.server.errors import ApiError
from stallscope_engine.server.serve import listen
from stallscope_engine.server.tenants import ApiKeys, Tenant, claimed_tenant
from tests.engine.server.running import Running, eventually, running

HASHED = "sha256:" + hashlib.sha256(b"key-b").hexdigest()
KEYS = {"key-a": {"tenant": "chat"}, HASHED: {"tenant": "reports", "priority": 3}}


@pytest.fixture(scope="module")
def keyed() -> Iterator[Running]:
    with running(keys=ApiKeys.from_entries(KEYS)) as server:
        yield server


def served_as(live: Running, headers: dict[str, str], **body: object) -> tuple[str, str, int]:
    """Tenant, source and priority of a request, as telemetry has them."""
    before = len(live.recorded.requests)
    answer = live.client.post("/v1/completions", json={"prompt": [5], "max_tokens": 1, **body}, headers=headers)
    assert answer.status_code == 200, answer.text
    eventually(lambda: len(live.recorded.requests) > before)
    info = live.recorded.requests[-1].info
    return info.tenant, info.tenant_source, info.priority


def test_a_key_is_its_tenant_whatever_else_is_claimed(keyed: Running) -> None:
    headers = {"Authorization": "Bearer key-a", "X-Tenant": "reports"}
    assert served_as(keyed, headers, user="reports", priority=1) == ("chat", "api_key", 1)


def test_a_key_may_be_hashed_and_have_a_priority(keyed: Running) -> None:
    assert served_as(keyed, {"Authorization": "bearer key-b"}, priority=1) == ("reports", "api_key", 3)


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer key-c", "Basic key-a", HASHED])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics"])
def test_a_missing_or_wrong_key_is_401(keyed: Running, path: str, authorization: str | None) -> None:
    headers = {} if authorization is None else {"Authorization": authorization}
    method = "POST" if "completions" in path else "GET"
    answer = keyed.client.request(method, path, headers=headers, content=b"{}")
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "authentication_error"


def test_health_needs_no_key(keyed: Running) -> None:
    assert keyed.client.get("/health").status_code == 200


def test_new_keys_hold_from_the_next_request_on() -> None:
    with running(keys=ApiKeys.from_entries(KEYS)) as live:
        live.server.keys = ApiKeys.from_entries({"key-c": {"tenant": "new"}})
        assert served_as(live, {"Authorization": "Bearer key-c"})[0] == "new"
        assert live.client.get("/v1/models", headers={"Authorization": "Bearer key-a"}).status_code == 401


def test_claims_are_taken_in_order_and_called_claims() -> None:
    with running() as live:
        everything = {"vllm_xargs": {"tenant": "x"}, "user": "u"}
        assert served_as(live, {"X-Tenant": "h"}, **everything)[:2] == ("h", "claim:header")
        assert served_as(live, {}, **everything)[:2] == ("x", "claim:xargs")
        assert served_as(live, {}, user="u")[:2] == ("u", "claim:user")
        assert served_as(live, {})[:2] == ("", "")


@given(st.text(), st.text(), st.text())
def test_a_claimed_name_is_short_and_plain(header: str, xargs: str, user: str) -> None:
    tenant = claimed_tenant(header, xargs, user)
    assert len(tenant.name) <= 64
    assert tenant.name.isascii()
    assert tenant.name.isprintable()
    assert bool(tenant.name) == bool(tenant.source) == bool(header.strip() or xargs.strip() or user.strip())


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        (None, "at least one key"),
        ([], "at least one key"),
        ({}, "at least one key"),
        ({"": {"tenant": "a"}}, "entry 1"),
        ({5: {"tenant": "a"}}, "quotes"),
        ({"secret": "a"}, "tenant"),
        ({"secret": {"name": "a"}}, "tenant"),
        ({"secret": {"tenant": "a", "prio": 1}}, "'prio' is unknown"),
        ({"secret": {"tenant": "a b"}}, "'a b'"),
        ({"secret": {"tenant": "a" * 65}}, "64"),
        ({"secret": {"tenant": "a", "priority": True}}, "priority"),
        ({"sha256:secret": {"tenant": "a"}}, "64 hexadecimal"),
    ],
)
def test_a_wrong_file_of_keys_is_one_line_without_a_key(entries: object, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        ApiKeys.from_entries(entries)
    assert "secret" not in str(error.value)
    assert "\n" not in str(error.value)


@given(st.text())
def test_no_header_is_taken_for_a_key(authorization: str) -> None:
    keys = ApiKeys.from_entries({HASHED: {"tenant": "a"}})
    with pytest.raises(ApiError) as refused:
        keys.tenant_of(authorization)
    assert refused.value.status == 401
    json.loads(refused.value.body())
    assert keys.tenant_of("Bearer key-b") == Tenant("a", "api_key")


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_keys_only_this_machine_is_served(host: str) -> None:
    with pytest.raises(ValueError, match="--api-keys"):
        listen(host, 0, has_keys=False)
    listen("localhost", 0, has_keys=False).close()


def test_a_host_or_port_that_can_not_be_had_is_one_line() -> None:
    with pytest.raises(ValueError, match=r"^host 'nowhere\.invalid'"):
        listen("nowhere.invalid", 0, has_keys=True)
    with listen("127.0.0.1", 0, has_keys=False) as taken, pytest.raises(ValueError, match="can't listen"):
        listen("127.0.0.1", taken.getsockname()[1], has_keys=False)
