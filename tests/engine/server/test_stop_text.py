"""No stop string slips through, in however many pieces it comes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stallscope_engine.server.stop_text import StopText


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_where_a_stop_string_first_begins(parts: list[str], stops: list[str]) -> None:
    stop_text = StopText(stops)
    sent = ""
    for part in parts:
        sent += stop_text.push(part)
        if stop_text.stopped:
            break
    else:
        sent += stop_text.finish()
    said = "".join(parts)
    first_to_end = min((said.find(stop) + len(stop) for stop in stops if stop in said), default=None)
    assert stop_text.stopped == (first_to_end is not None)
    if first_to_end is None:
        assert sent == said
    else:
        assert said.startswith(sent)
        assert not any(stop in sent for stop in stops)
