"""Who may look: by a token, by the host's own name; and what a page may run."""

from __future__ import annotations

import pytest
from flask import Flask
from flask.testing import FlaskClient

from stallscope_dash.security import is_loopback, protect

TOKEN = "open-sesame"


def client(token: str | None = None, names: tuple[str, ...] = ()) -> FlaskClient:
    server = Flask("dashboard")
    server.add_url_rule("/", "shown", lambda: "shown")
    protect(server, ["'sha256-abc'"], token, names)
    return server.test_client()


def test_without_the_token_nothing_is_shown() -> None:
    answer = client(TOKEN).get("/")
    assert answer.status_code == 401
    assert "open the link with the token" in answer.text


def test_the_link_with_the_token_leaves_a_cookie_and_goes_on_without_it() -> None:
    browser = client(TOKEN)
    answer = browser.get(f"/?incident=2&token={TOKEN}")
    assert (answer.status_code, answer.location) == (302, "/?incident=2")
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Strict" in cookie
    assert browser.get("/").text == "shown"


@pytest.mark.parametrize("path", ["//example.org/", "//example.org/%2e%2e"])
def test_the_token_leads_to_no_other_host(path: str) -> None:
    answer = client(TOKEN).get(f"{path}?token={TOKEN}", base_url="http://localhost")
    assert not (answer.location or "").startswith(("//", "http://example", "https://example"))


@pytest.mark.parametrize("wrong", ["", "open", "öffne", TOKEN + " "])
def test_a_wrong_token_is_none(wrong: str) -> None:
    assert client(TOKEN).get("/", query_string={"token": wrong}).status_code == 401


def test_a_foreign_name_for_loopback_is_refused() -> None:
    browser = client(names=("127.0.0.1", "localhost"))
    assert browser.get("/", base_url="http://localhost:8050").text == "shown"
    assert browser.get("/", base_url="http://127.0.0.1").text == "shown"
    assert browser.get("/", base_url="http://evil.example:8050").status_code == 421


def test_a_page_runs_only_our_scripts() -> None:
    policy = client().get("/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self' 'sha256-abc'" in policy
    assert "unsafe-eval" not in policy


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_loopback_is_known(host: str, local: bool) -> None:
    assert is_loopback(host) is local
