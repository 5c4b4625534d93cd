"""Who may look, and what a page may run: a token where others reach the port, a policy against injected code."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Sequence
from http import HTTPStatus
from ipaddress import ip_address
from urllib.parse import urlencode, urlsplit

import flask
from flask.typing import ResponseReturnValue

COOKIE = "stallscope_token"
_POLICY = {
    "default-src": "'none'",
    "style-src": "'self' 'unsafe-inline'",  # charts and tables set styles of their own elements
    "img-src": "'self' data: blob:",  # a chart that is saved as a picture
    "font-src": "'self' data:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def new_token() -> str:
    """What nobody guesses."""
    return secrets.token_urlsafe(24)


def protect(server: flask.Flask, script_hashes: Sequence[str], token: str | None, names: Sequence[str]) -> None:
    """Answers only those who know the token, where there is one, and who ask by one of the host's ``names``, where
    there are any.

    A link with ``?token=`` leaves a cookie and goes on without it. The names keep a foreign page from reading a server
    on loopback through a name of its own (DNS rebinding).
    """
    scripts = " ".join(["'self'", *script_hashes])
    policy = "; ".join(f"{name} {value}" for name, value in {**_POLICY, "script-src": scripts}.items())

    @server.before_request
    def admit() -> ResponseReturnValue | None:
        request = flask.request
        if names and urlsplit(f"//{request.host}").hostname not in names:
            return f"stallscope: not served as {request.host!r}\n", HTTPStatus.MISDIRECTED_REQUEST
        if token is None or _same(request.cookies.get(COOKIE, ""), token):
            return None
        if not _same(request.args.get("token", ""), token):
            told = "stallscope: open the link with the token that `stallscope dashboard` printed\n"
            return told, HTTPStatus.UNAUTHORIZED
        rest = urlencode([(name, value) for name, value in request.args.items(multi=True) if name != "token"])
        path = "/" + request.path.lstrip("/")  # two slashes would name another host
        answer = flask.redirect(f"{path}?{rest}" if rest else path)
        answer.set_cookie(COOKIE, token, httponly=True, samesite="Strict")
        return answer

    @server.after_request
    def harden(answer: flask.Response) -> flask.Response:
        answer.headers["Content-Security-Policy"] = policy
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())
