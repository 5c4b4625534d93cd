"""Names and amounts as they are said."""

from __future__ import annotations

from dataclasses import replace

import pytest

from stallscope.diagnosis.model import Prediction, ReplayCheck
from stallscope.trace.rename import REDACTED_SOURCE
from stallscope.views import words
from tests.reports.examples import hostile_diagnosis, with_replay
from tests.views.recordings import diagnosed


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("chat", "chat"),
        ("", "(no name)"),
        ("two\nlines\ttab", "two\\nlines\\ttab"),
        ("\x1b[2J", "\\x1b[2J"),
        ("a\u202eb\u200b", "a\\u202eb\\u200b"),
        ("Größe 東京", "Größe 東京"),
    ],
)
def test_a_name_is_shown_on_one_line_with_nothing_invisible(name: str, shown: str) -> None:
    assert words.printable(name) == shown


@pytest.mark.parametrize(
    ("names", "most", "shown"),
    [("a", 1, "a"), ("ab", None, "a and b"), ("abcd", 4, "a, b, c and d"), ("abcdef", 4, "a, b, c and 3 more")],
)
def test_of_many_names_the_first_are_said(names: str, most: int | None, shown: str) -> None:
    assert words.listed(list(names), most) == shown


def test_a_headline_of_many_victims_names_those_of_the_worst_incident_first() -> None:
    found = diagnosed()
    incident, *rest = found.incidents
    many = tuple(replace(incident.victims[0], tenant=f"victim-{number}") for number in range(20))
    told = words.headline(replace(found, incidents=(replace(incident, victims=many), *rest)))
    assert told.startswith("archive stalled victim-0, victim-1, victim-2, victim-3, victim-4 and 15 more: ")


def test_a_headline_says_when_much_was_lost_by_the_culprit_itself() -> None:
    found = diagnosed()
    incident, *rest = found.incidents
    victim = incident.victims[0]
    own = replace(victim, tenant="archive", lost_s=incident.lost_s / 2)
    told = words.headline(replace(found, incidents=(replace(incident, victims=(victim, own)), *rest)))
    assert told.startswith(f"archive stalled {victim.tenant}: ")
    assert told.endswith(" of it their own")
    assert "their own" not in words.headline(found)


def test_a_legible_diagnosis_is_the_same_but_for_its_texts() -> None:
    assert words.legible(diagnosed()) == diagnosed()
    shown = words.legible(hostile_diagnosis())
    assert shown != hostile_diagnosis()
    assert shown.verdict is hostile_diagnosis().verdict
    assert [one.lost_s for one in shown.incidents] == [one.lost_s for one in hostile_diagnosis().incidents]
    assert all(text.isprintable() for incident in shown.incidents for text in incident.reasons)


@pytest.mark.parametrize(("text", "most", "shown"), [("abcdef", 6, "abcdef"), ("abcdefg", 6, "ab…efg"), ("ab", 1, "…")])
def test_long_names_lose_their_middle(text: str, most: int, shown: str) -> None:
    assert words.shortened(text, most) == shown
    assert len(shown) <= most


def test_predictions_name_victims_before_who_was_changed_and_say_when_nothing_is_left() -> None:
    intervention = with_replay(diagnosed("reasoning_prompt")).incidents[0].interventions[0]
    gone = Prediction("reasoner", "itl", 1.0, 3, 4.0, 4.0, 0.0, 0.0, 0.0)
    lines = words.predictions(replace(intervention, predictions=(gone, *intervention.predictions)))
    assert lines[0].startswith("chat TTFT p90 3.86 s, then 21 ms (14 ms to 40 ms)")
    assert lines[1] == "reasoner longest gap worst 4.00 s, then none: no request left"


def test_percentiles_are_named_as_people_do() -> None:
    assert [words.quantile_name(q) for q in (0.5, 0.9, 0.99, 0.999, 0.29, 1.0)] == [
        "p50", "p90", "p99", "p99.9", "p29", "worst",
    ]  # fmt: skip


def test_what_to_type_next_can_be_pasted_and_is_not_said_of_a_trace_that_is_not_named() -> None:
    diagnosis = replace(diagnosed(), source="my trace.otlp.jsonl")
    worst = diagnosis.incidents[0].victims[0].worst_request
    assert words.explain_command(diagnosis) == f"stallscope explain 'my trace.otlp.jsonl' {worst}"
    assert words.explain_command(replace(diagnosis, source=REDACTED_SOURCE)) == ""
    assert words.explain_command(replace(diagnosis, incidents=())) == ""


def test_of_what_could_not_be_replayed_no_accuracy_is_told() -> None:
    check = ReplayCheck("engine-0", "lottery", 0.0, 0, -1.0, -1.0, 0, False, "its scheduler is none that is known")
    assert words.replay_line(check) == "engine-0: not trusted: its scheduler is none that is known, lottery"
