"""Clients of closed loops: what follows what, and that their draws depend on nothing but seed, number and turn."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from stallscope.workloads.closed_loop import RETRY_PAUSE_NS, Client, Outcome, clients_of
from stallscope.workloads.draws import Literal, Uniform
from stallscope.workloads.prompts import token_ids
from stallscope.workloads.scenario import ClosedLoop, Lengths, Scenario, Tenant
from stallscope.workloads.traffic import PlannedRequest, plan
from stallscope_engine.config import EngineConfig

S = 1_000_000_000
LOOP = ClosedLoop(2, Uniform(0.5, 2), timeout_s=3, retries=2)
LENGTHS = Lengths(Uniform(100, 200), Uniform(5, 50), priority=1)


def scenario(loop: ClosedLoop = LOOP, lengths: Lengths = LENGTHS) -> Scenario:
    return Scenario("story", "", 60.0, 0, EngineConfig(), (Tenant("agents", loop, lengths),), (), None)


def client(loop: ClosedLoop = LOOP, lengths: Lengths = LENGTHS, seed: int = 0) -> Client:
    return clients_of(scenario(loop, lengths), seed)[0]


def sent(request: PlannedRequest | None) -> PlannedRequest:
    assert request is not None
    return request


def test_a_closed_loop_has_its_clients_and_no_planned_arrivals() -> None:
    assert [one.session for one in clients_of(scenario(), 0)] == ["agents-0001", "agents-0002"]
    assert plan(scenario(), 0) == []


def test_a_request_says_which_session_it_is_of_and_what_came_before() -> None:
    one = client()
    first = sent(one.begin())
    second = sent(one.after(Outcome.ANSWERED, first.offset_ns + S))
    assert (first.session, first.predecessor, first.retry_of) == ("agents-0001", "", "")
    assert (second.session, second.predecessor, second.retry_of) == ("agents-0001", first.request_id, "")
    assert (first.tenant, first.priority, first.timeout_ns) == ("agents", 1, 3 * S)
    assert 0 <= first.offset_ns <= 2 * S
    assert 0.5 * S <= second.offset_ns - first.offset_ns - S <= 2 * S


def test_a_timeout_is_followed_at_once_by_the_same_prompt_and_at_last_by_thinking() -> None:
    one = client()
    first = sent(one.begin())
    retries = [sent(one.after(Outcome.TIMED_OUT, (10 + 3 * attempt) * S)) for attempt in (0, 1)]
    assert [(retry.request_id, retry.retry_of) for retry in retries] == [
        (f"{first.request_id}-r1", first.request_id),
        (f"{first.request_id}-r2", first.request_id),
    ]
    assert [retry.offset_ns for retry in retries] == [10 * S, 13 * S]
    assert {tuple(token_ids(request, 0)) for request in (first, *retries)} == {tuple(token_ids(first, 0))}
    next_turn = sent(one.after(Outcome.TIMED_OUT, 16 * S))
    assert (next_turn.retry_of, next_turn.predecessor) == ("", retries[-1].request_id)
    assert next_turn.offset_ns >= 16.5 * S
    assert token_ids(next_turn, 0) != token_ids(first, 0)


def test_a_failure_is_tried_again_after_a_pause_or_when_the_server_says() -> None:
    one = client()
    one.begin()
    assert sent(one.after(Outcome.FAILED, 5 * S)).offset_ns == 5 * S + RETRY_PAUSE_NS
    assert sent(one.after(Outcome.FAILED, 9 * S, pause_ns=4 * S)).offset_ns == 13 * S


def test_nothing_is_sent_after_the_end() -> None:
    one = client()
    one.begin()
    assert one.after(Outcome.TIMED_OUT, 60 * S) is None
    other = client()
    other.begin()
    assert other.after(Outcome.ANSWERED, round(59.6 * S)) is None


outcomes = st.lists(st.tuples(st.sampled_from(Outcome), st.integers(0, 5 * S)), max_size=12)


def turns(outcome_of: list[tuple[Outcome, int]], seed: int) -> dict[str, tuple[int, int]]:
    """Lengths of the first attempt of each turn, when requests end as they are told to."""
    one = client(seed=seed)
    request = one.begin()
    lengths = {}
    for outcome, took_ns in outcome_of:
        if request is None:
            break
        if not request.retry_of:
            lengths[request.request_id] = (request.prompt_tokens, request.output_tokens)
        request = one.after(outcome, request.offset_ns + took_ns)
    return lengths


@given(outcomes, outcomes, st.integers(0, 1000))
def test_what_a_turn_asks_for_does_not_depend_on_how_others_ended(
    one: list[tuple[Outcome, int]], other: list[tuple[Outcome, int]], seed: int
) -> None:
    first, second = turns(one, seed), turns(other, seed)
    assert {turn: first[turn] for turn in first.keys() & second} == {
        turn: second[turn] for turn in first.keys() & second
    }


@given(outcomes)
def test_ids_are_never_used_twice(outcome_of: list[tuple[Outcome, int]]) -> None:
    one = client()
    request, ids = one.begin(), []
    for outcome, took_ns in outcome_of:
        if request is not None:
            ids.append(request.request_id)
            request = one.after(outcome, request.offset_ns + took_ns)
    assert len(ids) == len(set(ids))


def test_clients_and_seeds_draw_differently() -> None:
    drawn = {(one.seed, one.number): one.begin() for seed in (0, 1) for one in clients_of(scenario(), seed)}
    assert len({(request.prompt_tokens, request.offset_ns) for request in drawn.values() if request}) == 4


def test_a_conversation_grows_by_answer_and_question_until_it_is_full() -> None:
    one = client(replace(LOOP, context_tokens=450), Lengths(Literal(100), Literal(50)))
    request, prompts = sent(one.begin()), []
    for _ in range(5):
        prompts.append(token_ids(request, 7))
        request = sent(one.after(Outcome.ANSWERED, request.offset_ns + S))
    assert [len(prompt) for prompt in prompts] == [100, 250, 400, 100, 250]
    assert prompts[1][:100] == prompts[0]
    assert prompts[2][:250] == prompts[1]
    assert prompts[3] != prompts[0]


def test_a_conversation_does_not_grow_by_what_was_not_answered() -> None:
    one = client(replace(LOOP, context_tokens=450, retries=0), Lengths(Literal(100), Literal(50)))
    first = sent(one.begin())
    second = sent(one.after(Outcome.FAILED, first.offset_ns + S))
    assert second.prompt_tokens == 100


def test_a_limit_is_never_below_the_answer() -> None:
    one = client(lengths=Lengths(Literal(10), Uniform(5, 50), max_tokens=Uniform(20, 60)))
    request = sent(one.begin())
    for _ in range(20):
        assert request.output_tokens <= request.max_tokens <= 60
        request = sent(one.after(Outcome.ANSWERED, 0))
