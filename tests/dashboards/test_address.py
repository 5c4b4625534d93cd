"""The state of a page in its URL: what is written is read again, and what means nothing is passed over."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stallscope_dash.address import Address

times = st.integers(0, 4_000_000_000_000_000).map(lambda microseconds: microseconds * 1000)
texts = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=300)


@given(texts, st.integers(0, 10**8 - 1), texts, texts, texts, st.tuples(times, times))
def test_what_is_written_is_read_again(
    replica: str, incident: int, request: str, quantile: str, question: str, window: tuple[int, int]
) -> None:
    since, until = (None, None) if window[0] == window[1] else sorted(window)
    address = Address(replica, incident, request, quantile, question, incident % 7, since, until, since)
    assert Address.of(address.search()) == address


@given(st.text(max_size=200))
def test_any_text_is_an_address(search: str) -> None:
    found = Address.of(search)
    assert found.since is None or found.until is None or found.since < found.until


def test_a_window_that_ends_before_it_begins_is_none() -> None:
    assert Address.of("?since=2026-01-01T00:00:01Z&until=2026-01-01T00:00:00Z") == Address()


def test_the_plain_address_is_empty() -> None:
    assert not Address().search()
    assert Address().search(incident=2) == "?incident=2"
