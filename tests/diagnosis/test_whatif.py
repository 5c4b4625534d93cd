"""What if: each kind of question is answered by replay, or refused in one line where it can't be."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from stallscope.diagnosis.model import InterventionKind, Prediction
from stallscope.diagnosis.replay.interventions import DRAWS, MEDIAN
from stallscope.diagnosis.whatif import Question, WhatIf, what_if
from stallscope.errors import InconclusiveError, UsageError
from stallscope.trace import Trace
from stallscope.trace.select import select
from tests.diagnosis.replay.recorded import CHAT, FLOOD, PINNED, SMALL_CACHE, recorded, saying

# The residents come again and again, from the first second to the last.
CHRONIC = PINNED.replace("at_s: 14,", "at_s: [1, 8, 15, 22],").replace("output_tokens: 700", "output_tokens: 1000")


@cache
def answer(question: Question, text: str = CHAT + FLOOD) -> WhatIf:
    return what_if(recorded(text), question)


def ttft_of(answered: WhatIf, tenant: str) -> Prediction:
    return next(
        one
        for one in answered.answer.predictions
        if (one.tenant, one.metric) == (tenant, "ttft") and one.quantile != MEDIAN
    )


@pytest.mark.parametrize(
    ("question", "kind", "what"),
    [
        (Question(usual=("batch",)), InterventionKind.USUAL, "batch as usual"),
        (Question(without=("batch",)), InterventionKind.WITHOUT_TENANT, "without batch"),
        (Question(without=("batch", "search")), InterventionKind.WITHOUT_TENANT, "without batch, search"),
        (Question(settings=(("tenant_token_share", "0.25"),)), InterventionKind.REMEDY, "tenant_token_share=0.25"),
        (
            Question(settings=(("tenant_token_share", "0.25"), ("policy", "fair"))),
            InterventionKind.REMEDY,
            "tenant_token_share=0.25, policy=fair",
        ),
    ],
)
def test_each_kind_of_question_has_an_answer(question: Question, kind: InterventionKind, what: str) -> None:
    answered = answer(question)
    assert (answered.answer.kind, answered.answer.what) == (kind, what)
    assert answered.check.trusted
    assert answered.answer.restored > 0.3
    chat = ttft_of(answered, "chat")
    assert chat.predicted_s < 0.7 * chat.recorded_s


def test_a_bystander_that_is_not_there_restores_little() -> None:
    assert abs(answer(Question(without=("search",))).answer.restored) < 0.3


def test_one_request_is_taken_away() -> None:
    """Each of the flood's requests is a part of it, and a small one of others' is none."""
    requests = recorded(CHAT + FLOOD).requests.to_pandas()
    flood = requests[requests["tenant"].astype(str) == "batch"].sort_values("prompt_tokens")
    largest = tuple(flood["request"].astype(str).tail(5))
    several, one = (answer(Question(without_requests=those)).answer for those in (largest, largest[:1]))
    assert several.kind is InterventionKind.WITHOUT_REQUEST
    assert several.tenants == ("batch",)
    assert 0 < one.restored < several.restored


def test_a_prediction_is_what_a_run_without_the_tenant_has() -> None:
    predicted = ttft_of(answer(Question(without=("batch",))), "chat")
    control = what_if(recorded(CHAT + FLOOD, inject=False), Question(without=("search",)))
    assert predicted.predicted_s == pytest.approx(ttft_of(control, "chat").recorded_s, rel=0.2)


def test_the_recorded_settings_change_nothing() -> None:
    answered = answer(Question(settings=(("max_num_seqs", "32"),))).answer
    assert (answered.restored_low, answered.restored_high, answered.throughput) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize(
    ("question", "says"),
    [
        (Question(usual=("bach",)), "no tenant 'bach' in the trace, but batch, chat, search"),
        (Question(settings=(("kv_blocs", "9"),)), "no setting 'kv_blocs'; there are max_num_seqs"),
        (Question(settings=(("model", "llama"),)), "no setting 'model'; there are max_num_seqs"),
        (Question(settings=(("max_num_seqs", "many"),)), "must be a number; it was 32 in the recording"),
        (Question(settings=(("chunked_prefill", "yes"),)), "must be true or false; it was True in the recording"),
        (Question(settings=(("max_num_seqs", "0"),)), "max_num_seqs must be at least 1, not 0"),
        (Question(settings=(("policy", "lifo"),)), "policy must be one of fcfs"),
        # Who is turned away does not wait: that is no cure.
        (Question(settings=(("kv_blocks", "200"),)), "12 of 309 recorded requests would be rejected"),
    ],
)
def test_a_wrong_question_is_one_line(question: Question, says: str) -> None:
    with pytest.raises(UsageError) as error:
        answer(question)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("asked", [{}, {"usual": ("batch",), "without": ("chat",)}, {"usual": ()}])
def test_a_question_is_one(asked: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(UsageError, match="ask one thing"):
        Question(**asked)


def test_progress_is_told_from_the_first_replay_to_the_last() -> None:
    told: list[float] = []
    answered = what_if(recorded(CHAT + FLOOD), Question(without=("batch",)), told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert len(told) == 2 * len(DRAWS)
    assert answered == answer(Question(without=("batch",)))


def refusal(trace: Trace, question: Question) -> str:
    with pytest.raises(InconclusiveError) as error:
        what_if(trace, question)
    return str(error.value)


def test_another_scheduler_than_the_trace_names_is_not_trusted() -> None:
    busy = recorded(CHAT + FLOOD, "max_num_seqs: 8, kv_blocks: 4096")
    assert "its scheduler chose otherwise in" in refusal(saying(busy, policy="static"), Question(without=("batch",)))


def test_a_scheduler_that_replay_does_not_have_is_named() -> None:
    said = refusal(saying(recorded(CHAT + FLOOD), policy="lottery"), Question(without=("batch",)))
    assert "its scheduler is none that can be replayed" in said
    assert "'lottery'" in said


def test_too_few_steps_teach_no_cost() -> None:
    part = select(recorded(CHAT + FLOOD), since=None, until="+0.3s", replica=None, model=None)
    assert "too few to learn what a step costs" in refusal(part, Question(without=("chat",)))


def test_with_most_batches_lost_nothing_is_replayed() -> None:
    trace = recorded(CHAT + FLOOD)
    at = trace.coverage.schema.get_field_index("steps_lost")
    lost = trace.coverage.set_column(at, trace.coverage.schema.field(at), [[10_000_000] * len(trace.coverage)])
    unseen = replace(trace, tables={**trace.tables, "coverage": lost})
    assert "the batches of only 0% of its steps are known" in refusal(unseen, Question(without=("batch",)))


def test_what_is_usual_is_not_made_up_where_no_time_is_calm() -> None:
    trace = recorded(CHRONIC, SMALL_CACHE)
    said = refusal(trace, Question(usual=("archive",)))
    assert "what is usual for archive can't be told" in said
    assert "--without archive" in said
    assert what_if(trace, Question(without=("archive",))).answer.restored > 0.8
