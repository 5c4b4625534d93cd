"""Traffic by seed: draws stay within their bounds, and taking the injection away changes nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallscope.errors import UsageError
from stallscope.workloads.draws import Choice, Draw, Literal, Lognormal, Uniform, stream
from stallscope.workloads.scenario import (
    AddedRequests,
    AddedTraffic,
    Arrivals,
    Change,
    EnginePause,
    Every,
    Growth,
    Injection,
    Lengths,
    Poisson,
    Recorded,
    Scenario,
    Tenant,
)
from stallscope.workloads.traffic import PlannedRequest, plan
from stallscope_engine.config import EngineConfig

DURATION_S = 60.0
SHORT = Lengths(Uniform(40, 200), Uniform(20, 60))

sizes = st.floats(1, 500, allow_nan=False)
draws: st.SearchStrategy[Draw] = st.one_of(
    sizes.map(Literal),
    st.tuples(sizes, sizes).map(lambda ends: Uniform(min(ends), max(ends))),
    st.lists(sizes, min_size=1, max_size=4).map(lambda values: Choice(tuple(values))),
    st.builds(Lognormal, sizes, st.floats(0.1, 1)),
)
lengths = st.builds(Lengths, draws, draws, st.integers(0, 3))
arrivals: st.SearchStrategy[Arrivals] = st.one_of(
    st.sampled_from([0, 0.01, 0.5, 5]).map(lambda rate: Poisson(Literal(rate))),
    st.floats(0.3, 20).map(lambda interval: Every(Literal(interval))),
    st.just(Poisson(Uniform(1, 4))),
)
names = st.sampled_from(["chat", "search", "agents", "big"])
starts, ends = st.floats(0, 25).map(Literal), st.floats(26, 60).map(Literal)
added: st.SearchStrategy[Injection] = st.one_of(
    st.builds(
        AddedRequests, names, st.lists(st.just(Uniform(0, 60)), min_size=1).map(tuple), st.just(Uniform(1, 3)), lengths
    ),
    st.builds(AddedTraffic, names, starts, ends, arrivals, lengths, st.just(()) | st.just(("one", "two"))),
    st.just(EnginePause(Uniform(1, 9), Literal(1))),
)
changes = st.builds(Change, names, starts, ends, st.none() | arrivals, draws, st.none() | draws)


@st.composite
def scenarios(draw: st.DrawFn, injections: st.SearchStrategy[Injection]) -> Scenario:
    tenants = draw(st.lists(st.builds(Tenant, names, arrivals, lengths), min_size=1, unique_by=lambda one: one.name))
    known = {tenant.name for tenant in tenants}
    inject = [
        injection
        for injection in draw(st.lists(injections, max_size=4))
        if not isinstance(injection, Change) or injection.tenant in known
    ]
    return Scenario("story", "", DURATION_S, 0, EngineConfig(), tuple(tenants), tuple(inject), None)


def story(*tenants: Tenant, inject: tuple[Injection, ...] = ()) -> Scenario:
    return Scenario("story", "", DURATION_S, 0, EngineConfig(), tenants, inject, None)


def without_id(requests: list[PlannedRequest]) -> list[PlannedRequest]:
    return [replace(request, request_id="") for request in requests]


@given(scenarios(added), st.integers(0, 2**40))
@settings(max_examples=50)
def test_removing_the_injection_leaves_the_usual_traffic_as_it_was(scenario: Scenario, seed: int) -> None:
    with_injection = [request for request in plan(scenario, seed) if not request.injected]
    assert without_id(with_injection) == without_id(plan(scenario, seed, inject=False))


@given(scenarios(changes), st.integers(0, 2**40))
@settings(max_examples=50)
def test_a_change_touches_its_tenant_within_its_stretch_and_nothing_else(scenario: Scenario, seed: int) -> None:
    changed = [change for change in scenario.inject if isinstance(change, Change)]

    def untouched(requests: list[PlannedRequest]) -> list[PlannedRequest]:
        return [
            request
            for request in without_id(requests)
            if not any(
                change.tenant == request.tenant
                and change.from_s.bounds[0] - 1e-8 <= request.offset_ns / 1e9 <= change.to_s.bounds[1] + 1e-8
                for change in changed
            )
        ]

    assert untouched(plan(scenario, seed)) == untouched(plan(scenario, seed, inject=False))


@given(scenarios(added | changes), st.integers(0, 2**40))
@settings(max_examples=50)
def test_plans_are_ordered_reproducible_and_within_the_run(scenario: Scenario, seed: int) -> None:
    requests = plan(scenario, seed)
    assert requests == plan(scenario, seed)
    assert [request.offset_ns for request in requests] == sorted(request.offset_ns for request in requests)
    assert all(0 <= request.offset_ns <= DURATION_S * 1e9 for request in requests)
    assert all(request.prompt_tokens >= 1 and request.output_tokens >= 1 for request in requests)


@given(scenarios(added), st.integers(0, 2**40))
@settings(max_examples=50)
def test_request_ids_count_a_tenants_requests_and_do_not_tell_the_injected_ones(scenario: Scenario, seed: int) -> None:
    seen: Counter[str] = Counter()
    for request in plan(scenario, seed):
        seen[request.tenant] += 1
        assert request.request_id == f"{request.tenant}-{seen[request.tenant]:06d}"


@given(draws, st.integers(0, 2**40), st.floats(0.1, 3))
def test_draws_stay_within_their_bounds_and_scale_with_them(draw: Draw, seed: int, factor: float) -> None:
    low, high = draw.bounds
    values = draw.sample(stream(seed, "x"), 200)
    assert values.shape == (200,)
    assert np.all((values >= low) & (values <= high))
    assert draw.scaled(factor).sample(stream(seed, "x"), 200) == pytest.approx(values * factor)


def test_draws_have_the_shape_they_say() -> None:
    generator = stream(0, "shape")
    assert np.mean(Uniform(40, 200).sample(generator, 20_000)) == pytest.approx(120, rel=0.02)
    lognormal = Lognormal(100, 0.5).sample(generator, 20_000)
    assert np.median(lognormal) == pytest.approx(100, rel=0.02)
    assert np.std(np.log(lognormal)) == pytest.approx(0.5, rel=0.05)
    assert Counter(Choice((1, 2)).sample(generator, 1000).tolist())[1] == pytest.approx(500, rel=0.15)


def test_streams_differ_by_seed_and_by_every_part_of_their_key() -> None:
    keys = [(0, "a", "b"), (1, "a", "b"), (0, "ab"), (0, "a", "c"), (0, "b", "a")]
    assert len({float(stream(seed, *key).random()) for seed, *key in keys}) == len(keys)


def test_poisson_arrivals_come_at_their_rate() -> None:
    chat = Tenant("chat", Poisson(Literal(4)), SHORT)
    counts = [len(plan(story(chat), seed)) for seed in range(40)]
    assert np.mean(counts) == pytest.approx(240, rel=0.05)
    assert np.var(counts) == pytest.approx(240, rel=0.6)


def test_a_tenant_does_not_change_when_another_joins() -> None:
    chat, search = (Tenant(name, Poisson(Literal(4)), SHORT) for name in ("chat", "search"))
    together = [request for request in plan(story(search, chat), 7) if request.tenant == "chat"]
    assert together == plan(story(chat), 7)


def test_arrivals_at_an_interval_and_from_a_file_come_when_they_say() -> None:
    every = Tenant("every", Every(Literal(25)), SHORT)
    recorded = Tenant("recorded", Recorded((0, 1.5, 61)), SHORT)
    assert [request.offset_ns / 1e9 for request in plan(story(every), 0)] == [0, 25, 50]
    assert [request.offset_ns / 1e9 for request in plan(story(recorded), 0)] == [0, 1.5]


def test_injected_requests_come_at_their_times_in_their_number() -> None:
    chat = Tenant("chat", Poisson(Literal(1)), SHORT)
    big = AddedRequests("big", (Literal(8), Literal(14)), Literal(3), Lengths(Literal(900), Literal(20)))
    injected = [request for request in plan(story(chat, inject=(big,)), 0) if request.injected]
    assert [(request.offset_ns / 1e9, request.prompt_tokens) for request in injected] == [(8, 900)] * 3 + [
        (14, 900)
    ] * 3


def test_one_culprits_injection_does_not_change_when_anothers_goes() -> None:
    chat = Tenant("chat", Poisson(Literal(1)), SHORT)
    first, second = (AddedTraffic(name, Literal(5), Literal(50), Poisson(Literal(2)), SHORT) for name in ("a", "b"))
    both = [request for request in plan(story(chat, inject=(first, second)), 3) if request.tenant == "b"]
    assert both == [request for request in plan(story(chat, inject=(second,)), 3) if request.tenant == "b"]


def test_a_change_of_arrivals_keeps_the_lengths_that_it_does_not_name() -> None:
    chat = Tenant("chat", Poisson(Literal(1)), SHORT)
    change = Change("chat", Literal(20), Literal(40), Every(Literal(0.5)), Literal(777), None)
    inside = [request for request in plan(story(chat, inject=(change,)), 0) if request.injected]
    assert len(inside) == 40
    assert all(request.prompt_tokens == 777 and 20 <= request.output_tokens <= 60 for request in inside)


def test_a_rate_that_must_be_a_slip_is_refused() -> None:
    flood = Tenant("flood", Poisson(Literal(1_000_000)), SHORT)
    with pytest.raises(UsageError, match="about 60000000 requests of one tenant are too many"):
        plan(story(flood), 0)


def test_a_limit_on_tokens_is_drawn_apart_and_never_below_the_answer() -> None:
    plain = Tenant("chat", Poisson(Literal(2)), Lengths(Literal(50), Uniform(20, 60)))
    limited = replace(plain, lengths=replace(plain.lengths, max_tokens=Uniform(40, 80)))
    with_limit = plan(story(limited), 0)
    assert [replace(one, max_tokens=0) for one in with_limit] == plan(story(plain), 0)
    assert all(one.output_tokens <= one.max_tokens <= 80 for one in with_limit)
    assert len({one.max_tokens for one in with_limit}) > 10


def test_a_tenant_that_grows_sends_more_of_the_same_beside_its_usual_requests() -> None:
    chat = Tenant("chat", Poisson(Uniform(2, 4)), Lengths(Lognormal(Uniform(50, 5000), 0.1), Literal(20)))
    growth = Growth("chat", Literal(20), Literal(50), Literal(3))
    for seed in range(5):
        requests = plan(story(chat, inject=(growth,)), seed)
        usual, more = ([one for one in requests if one.injected is injected] for injected in (False, True))
        inside = [one for one in usual if 20e9 <= one.offset_ns < 50e9]
        assert len(usual) == len(plan(story(chat), seed))
        assert len(more) / len(inside) == pytest.approx(2, rel=0.35)
        assert {20e9 <= one.offset_ns < 50e9 for one in more} == {True}
        median = np.median([one.prompt_tokens for one in usual])
        assert np.median([one.prompt_tokens for one in more]) == pytest.approx(median, rel=0.1)


def test_all_who_grow_together_grow_alike() -> None:
    chat, search = (Tenant(name, Poisson(Literal(5)), SHORT) for name in ("chat", "search"))
    growth = Growth("chat", Uniform(10, 20), Uniform(40, 50), Uniform(2, 4), ("search",))
    for seed in range(3):
        planned = plan(story(chat, search, inject=(growth,)), seed)
        counts = Counter(one.tenant for one in planned if one.injected)
        assert counts["chat"] / counts["search"] == pytest.approx(1, rel=0.4)
        ends = [max(one.offset_ns for one in planned if one.injected and one.tenant == name) / 1e9 for name in counts]
        assert ends[0] == pytest.approx(ends[1], abs=1.5)


def test_slivers_share_stretch_rate_and_kind_but_no_request() -> None:
    chat = Tenant("chat", Poisson(Literal(1)), SHORT)
    kind = Lengths(Lognormal(Uniform(50, 5000), 0.01), Literal(20))
    slivers = AddedTraffic("a", Uniform(5, 20), Uniform(40, 55), Poisson(Uniform(1, 5)), kind, ("b", "c"))
    counts: Counter[str] = Counter()
    for seed in range(6):
        injected = [one for one in plan(story(chat, inject=(slivers,)), seed) if one.injected]
        assert len({one.offset_ns for one in injected}) == len(injected)
        lengths = [one.prompt_tokens for one in injected]
        assert max(lengths) < 1.1 * min(lengths)
        counts.update(one.tenant for one in injected)
    assert set(counts) == {"a", "b", "c"}
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_a_drawn_median_is_drawn_once_a_run() -> None:
    chat = Tenant("chat", Poisson(Literal(4)), Lengths(Lognormal(Uniform(100, 1000), 0.01), Literal(20)))
    prompts = [[one.prompt_tokens for one in plan(story(chat), seed)] for seed in range(6)]
    assert all(max(lengths) < 1.1 * min(lengths) for lengths in prompts)
    assert len({round(np.median(lengths), -1) for lengths in prompts}) > 4


def test_prompts_of_a_tenant_begin_alike_as_far_as_they_are_long_enough() -> None:
    lengths = Lengths(Uniform(20, 200), Literal(20), shared_prefix_tokens=100, shared_prefixes=3)
    chat, search = (Tenant(name, Poisson(Literal(2)), lengths) for name in ("chat", "search"))
    planned = plan(story(chat, search), 0)
    assert all(one.prefix_tokens == min(100, one.prompt_tokens) for one in planned)
    assert all(sum(tokens for _, tokens in one.prompt_parts) == one.prompt_tokens for one in planned)
    keys = Counter(one.prefix_key for one in planned)
    assert len(keys) == 6
    assert min(keys.values()) > 20
    assert {key.partition("/")[0] for key in keys} == {"chat", "search"}
