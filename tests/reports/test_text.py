"""The report for terminals: replays where there are any, and no command to the terminal from a name."""

from __future__ import annotations

from io import StringIO

from rich.console import Console

from stallscope.diagnosis import Diagnosis
from stallscope.reports.text import print_diagnosis
from tests.reports.examples import HOSTILE, hostile_diagnosis, with_replay
from tests.views.recordings import diagnosed


def printed(diagnosis: Diagnosis, width: int = 300) -> str:
    out = StringIO()
    print_diagnosis(diagnosis, Console(file=out, width=width, highlight=False))
    return out.getvalue()


def test_without_a_replay_that_is_said() -> None:
    text = printed(diagnosed("reasoning_prompt"))
    assert "confidence medium (charges only, no replay)" in text
    assert "excess gone" not in text


def test_a_replay_says_how_well_it_fits_and_what_it_predicts() -> None:
    text = printed(with_replay(diagnosed("reasoning_prompt")))
    assert "confidence high (replayed)" in text
    assert "replay of engine-0: fcfs, 99.1% of 4,076 steps with the recorded batch" in text
    assert "as usual, 93% of the excess would be gone" in text
    assert "chat TTFT p90 3.86 s, then 21 ms (14 ms to 40 ms)" in text
    assert "chunks of at most 512 tokens (tonight)" in text
    assert "vllm serve --max-num-batched-tokens 512" in text
    assert "20% of its steps are larger than any recorded" in text
    assert "alike      tenants that came in the same minute" in text


def test_names_are_text_on_one_line_and_never_commands() -> None:
    text = printed(hostile_diagnosis())
    assert text.splitlines()[0].startswith(f"NOISY NEIGHBOR: {HOSTILE[0]} stalled")
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\n# not a heading" in text
