"""The Markdown post-mortem: a parser finds the tables and headings that are meant, and nothing that a name brought."""

from __future__ import annotations

from collections import Counter

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from stallscope.diagnosis import Diagnosis
from stallscope.reports.markdown import to_markdown
from tests.reports.examples import HOSTILE, hostile_diagnosis, with_replay
from tests.views.recordings import diagnosed


def tokens(diagnosis: Diagnosis) -> list[Token]:
    top = MarkdownIt("commonmark").enable("table").parse(to_markdown(diagnosis))
    return [token for one in top for token in (one, *(one.children or []))]


def kinds(diagnosis: Diagnosis) -> Counter[str]:
    return Counter(token.type for token in tokens(diagnosis))


def test_it_begins_with_the_verdict_and_says_how_sure() -> None:
    lines = to_markdown(diagnosed("reasoning_prompt")).splitlines()
    assert lines[0] == "# Post-mortem: noisy neighbor"
    assert lines[2].startswith("**reasoner stalled chat")
    assert "- confidence medium (charges only, no replay)" in lines


def test_incidents_and_replays_have_their_tables() -> None:
    diagnosis = diagnosed("reasoning_prompt")
    plain, replayed = kinds(diagnosis), kinds(with_replay(diagnosis))
    assert plain["heading_open"] == 2 + len(diagnosis.incidents)
    assert plain["table_open"] == 2 * len(diagnosis.incidents) + 1
    assert replayed["table_open"] == plain["table_open"] + 2


def test_what_replay_predicts_is_there() -> None:
    text = to_markdown(with_replay(diagnosed("reasoning_prompt")))
    assert "| reasoner as usual | 93% (87% to 96%) | 97% | chat TTFT p90 3.86 s, then 21 ms (14 ms to 40 ms)" in text
    assert "chunks of at most 512 tokens (tonight)<br>`vllm serve --max-num-batched-tokens 512`" in text
    assert "replay of engine-0: fcfs, 99.1% of 4,076 steps with the recorded batch" in text


def test_hostile_names_are_code_and_nothing_else() -> None:
    diagnosis = with_replay(hostile_diagnosis())
    found = tokens(diagnosis)
    types = Counter(token.type for token in found)
    assert types["link_open"] == types["image"] == types["html_block"] == types["em_open"] == 0
    assert {token.content for token in found if token.type == "html_inline"} <= {"<br>"}
    assert types["heading_open"] == 2 + len(diagnosis.incidents)
    assert types["strong_open"] == 1
    assert any(HOSTILE[0] in token.content for token in found if token.type == "code_inline")
    text = [token.content for token in found if token.type == "text"]
    assert [one for one in text if "@" in one or "#" in one or "http" in one] == []


def test_every_row_of_a_table_has_the_cells_of_its_head() -> None:
    columns, widths = 0, set()
    for token in tokens(with_replay(hostile_diagnosis())):
        if token.type == "tr_open":
            columns = 0
        elif token.type in ("td_open", "th_open"):
            columns += 1
        elif token.type == "tr_close":
            widths.add(columns)
    assert widths == {4, 7}


@pytest.mark.parametrize("scenario", ["kv_pinning", "healthy"])
def test_other_recordings_have_a_post_mortem_too(scenario: str) -> None:
    assert kinds(diagnosed(scenario))["table_open"] >= 1
