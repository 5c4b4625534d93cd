"""What is being looked at, as the query of a URL: all of a page's state, so that a link reproduces it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs, urlencode

_TIMES = ("since", "until", "at")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Address:
    """State of a page; what is empty or None is left to the page.

    ``incident``: its number from 1, by harm, and ``at`` a time within it (of a recording that grows, numbers change).
    ``since`` and ``until``: the window that charts show. All times are ns since the epoch, to a microsecond.
    ``quantile``: p50, p95, p99. ``question``: what is asked beyond that, as its page has it, and ``attempt`` how often
    that was asked again.
    """

    replica: str = ""
    incident: int = 0
    request: str = ""
    quantile: str = ""
    question: str = ""
    attempt: int = 0
    since: int | None = None
    until: int | None = None
    at: int | None = None

    @staticmethod
    def of(search: str) -> Address:
        """What a query says; names and values that mean nothing here are passed over, as links come from anywhere."""
        given = {name: values[-1] for name, values in parse_qs(search.lstrip("?")).items()}
        since, until = (_time(given.get(name, "")) for name in ("since", "until"))
        if since is not None and until is not None and since >= until:
            since = until = None
        return Address(
            replica=given.get("replica", ""),
            incident=_number(given.get("incident", "")),
            request=given.get("request", ""),
            quantile=given.get("quantile", ""),
            question=given.get("question", ""),
            attempt=_number(given.get("attempt", "")),
            since=since,
            until=until,
            at=_time(given.get("at", "")),
        )

    def search(self, **changed: object) -> str:
        """The query, with some of the state changed; "" where there is none."""
        state = replace(self, **changed)  # type: ignore[arg-type]
        said = {field.name: getattr(state, field.name) for field in fields(state)}
        times = {name: _written(said[name]) for name in _TIMES if said[name] is not None}
        texts = {name: str(value) for name, value in said.items() if value and name not in times} | times
        return f"?{urlencode(texts)}" if texts else ""


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 9 else 0


def _written(time_ns: int) -> str:
    return (_EPOCH + timedelta(microseconds=time_ns // 1000)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _time(text: str) -> int | None:
    """ISO 8601 as ns; UTC where it names no zone."""
    try:
        time = datetime.fromisoformat(text)
    except ValueError:
        return None
    time = time if time.tzinfo is not None else time.replace(tzinfo=UTC)
    return (time - _EPOCH) // timedelta(microseconds=1) * 1000
