"""Text of tokens that come one at a time is the text of them all, and no stop string slips through."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope_engine.server.tokens import ByteTokenizer, StopText

TOKENIZER = ByteTokenizer(2048)


@given(st.text())
def test_text_comes_back_from_its_tokens(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.lists(st.integers(0, 2047)))
def test_parts_make_the_whole(token_ids: list[int]) -> None:
    decoder = TOKENIZER.decoder()
    assert "".join(map(decoder.push, token_ids)) + decoder.finish() == TOKENIZER.decode(token_ids)


def test_a_character_comes_when_it_is_whole() -> None:
    decoder = TOKENIZER.decoder()
    assert [*map(decoder.push, TOKENIZER.encode("é€"))] == ["", "é", "", "", "€"]


def test_a_small_vocabulary_has_no_text() -> None:
    with pytest.raises(ValueError, match="send ids"):
        ByteTokenizer(128).encode("é")


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
