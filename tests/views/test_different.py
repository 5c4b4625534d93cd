"""What is different: plain counts give the same shares, chance is not shown, and what was planted is found."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stallscope.diagnosis import Diagnosis, diagnose
from stallscope.diagnosis.incidents import measure_waits
from stallscope.diagnosis.replica import Replica
from stallscope.trace import read_trace
from stallscope.views.different import (
    NONE,
    Difference,
    Different,
    Names,
    Numbers,
    at_least,
    blamed_requests,
    different,
    distance_of_names,
    distance_of_numbers,
    stalled_requests,
)
from stallscope.views.words import OTHERS
from tests.diagnosis.runs import only_replica
from tests.views.recordings import diagnosed, replica, waits

SAMPLES = Path(__file__).parents[2] / "sample_traces"
SECOND = 1_000_000_000


def whole(r: Replica) -> tuple[int, int]:
    return int(r.requests["arrival"].min()), int(r.timeline.end[-1])


def of(differences: Sequence[Difference], attribute: str) -> Difference:
    return next(one for one in differences if one.attribute == attribute)


def counted(mine: Sequence[float], others: Sequence[float]) -> np.ndarray:
    values = sorted({*mine, *others})
    return np.array([[list(side).count(value) for value in values] for side in (mine, others)])


def share_up_to(values: Sequence[float], most: float) -> float:
    return sum(value <= most for value in values) / len(values)


# --- distances ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 20), min_size=1, max_size=30), st.lists(st.integers(0, 20), min_size=1, max_size=30))
def test_distances_are_those_of_plain_sums(mine: list[int], others: list[int]) -> None:
    counts, values = counted(mine, others), {*mine, *others}
    apart = max(abs(share_up_to(mine, value) - share_up_to(others, value)) for value in values)
    variation = sum(abs(mine.count(one) / len(mine) - others.count(one) / len(others)) for one in values) / 2
    assert distance_of_numbers(counts)[0] == pytest.approx(apart)
    assert distance_of_names(counts)[0] == pytest.approx(variation)
    for distance_of in (distance_of_numbers, distance_of_names):
        assert distance_of(counts)[0] == pytest.approx(distance_of(counts[::-1])[0])


@pytest.mark.parametrize("distance_of", [distance_of_numbers, distance_of_names])
@settings(max_examples=40, deadline=None)
@given(values=st.lists(st.integers(0, 6), min_size=2, max_size=9), data=st.data())
def test_no_bound_is_below_the_probability_by_all_ways_to_draw(
    distance_of: object, values: list[int], data: st.DataObject
) -> None:
    assert callable(distance_of)
    size = data.draw(st.integers(1, len(values) - 1))
    every = range(len(values))
    bounds = sorted(
        distance_of(counted([values[i] for i in drawn], [values[i] for i in every if i not in drawn]))[1]
        for drawn in combinations(every, size)
    )
    for rank, bound in enumerate(bounds, start=1):
        assert rank / len(bounds) <= bound + 1e-9 or (rank < len(bounds) and bounds[rank] <= bound + 1e-12)


def test_where_the_sides_do_not_overlap_the_bound_is_the_probability_itself() -> None:
    counts = counted([7, 8, 9], list(range(7)))
    assert distance_of_numbers(counts) == (1.0, pytest.approx(2 / 120))


@given(st.integers(1, 40), st.data())
def test_the_bound_of_a_draw_is_no_less_than_the_sum_of_all_terms_and_no_more_than_needed(
    total: int, data: st.DataObject
) -> None:
    drawn, marked = data.draw(st.integers(0, total)), data.draw(st.integers(0, total))
    least, most = max(0, drawn + marked - total), min(drawn, marked)
    found = data.draw(st.integers(least, most))
    terms = [comb(marked, one) * comb(total - marked, drawn - one) for one in range(found, most + 1)]
    bound = at_least(np.array([found]), drawn, np.array([marked]), total)[0]
    assert sum(terms) / comb(total, drawn) <= bound * (1 + 1e-9)
    if len(terms) == 1:
        assert bound == pytest.approx(terms[0] / comb(total, drawn))


def test_names_that_are_all_unique_are_far_apart_by_chance_alone() -> None:
    distance, chance = distance_of_names(np.array([[1] * 5 + [0] * 50, [0] * 5 + [1] * 50]))
    assert (distance, chance >= 1) == (1.0, True)


# --- who is compared ----------------------------------------------------------------------------------------------


def test_others_were_there_at_the_time_and_usual_is_who_was_there_in_no_window() -> None:
    r = replica()
    start, end = whole(r)
    windows = [(start + 5 * SECOND, start + 6 * SECOND), (start + 20 * SECOND, start + 28 * SECOND)]
    chosen = np.flatnonzero(r.requests["tenant"] == r.tenants.index("archive"))[:2]
    for begin, finish in [*windows, (start, end)]:
        found = different(r, chosen, begin, finish, windows)
        others = usual = 0
        for code, arrival, until, tenant in zip(
            *(r.requests.reset_index()[name].tolist() for name in ("index", "arrival", "seen_until", "tenant")),
            strict=True,
        ):
            others += code not in chosen and arrival <= finish and until >= begin
            there = any(arrival <= last and until >= first for first, last in windows)
            usual += code not in chosen and r.tenants[tenant] == "archive" and not there
        assert (found.requests, found.others, found.usual) == (len(chosen), others, usual)


def test_nothing_is_different_about_nobody_nor_about_all_that_were_there() -> None:
    r = replica()
    for chosen in (np.zeros(0, dtype=np.int64), np.arange(len(r.requests))):
        found = different(r, chosen, *whole(r), [])
        assert (found.from_others, found.from_usual) == ((), ())


# --- what is shown ------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 12_000))
def test_shares_are_those_of_plain_counts(seed: int, most_prompt: int) -> None:
    r = replica()
    start, end = whole(r)
    rng = random.Random(seed)
    prompts = r.requests["prompt_tokens"].tolist()
    chosen = [code for code, prompt in enumerate(prompts) if prompt <= most_prompt and rng.random() < 0.7]
    others = sorted({*range(len(prompts))} - {*chosen})
    plain: dict[str, list[Hashable]] = {
        "tenant": [r.tenants[code] for code in r.requests["tenant"]],
        "prompt tokens": list(prompts),
        "output tokens": r.requests["output_tokens"].tolist(),
        "arrival": [(arrival - start) / 1e9 for arrival in r.requests["arrival"].tolist()],
    }
    found = different(r, np.array(chosen, dtype=np.int64), start, end, []).from_others
    distances = [one.distance for one in found]
    assert distances == sorted(distances, reverse=True)
    for one in found:
        for side, codes in ((one.chosen, chosen), (one.others, others)):
            assert side.sum() == pytest.approx(1)
            values = [plain[one.attribute][code] for code in codes]
            if isinstance(one, Names):
                shares = {name: count / len(values) for name, count in Counter(values).items()}
                assert dict(zip(one.names, side.tolist(), strict=True)) == pytest.approx(
                    {name: shares.get(name, 0.0) for name in one.names}
                )
            else:
                numbers = [float(str(value)) for value in values]
                upto = [share_up_to(numbers, most) for most in one.upto.tolist()]
                assert np.cumsum(side).tolist() == pytest.approx(upto)
        if isinstance(one, Numbers):
            apart = np.abs(np.cumsum(one.chosen) - np.cumsum(one.others))
            assert apart.max() == pytest.approx(one.distance)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 100))
def test_who_is_chosen_at_random_is_hardly_ever_different(seed: int, most: int) -> None:
    r = replica()
    rng = np.random.default_rng(seed)
    times = 20
    shown = 0
    for _ in range(times):
        chosen = rng.choice(len(r.requests), size=most, replace=False)
        shown += bool(different(r, chosen, *whole(r), []).from_others)
    assert shown <= 3  # of 20 at 1% each: more happens once in 20,000 tries


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_other_names_of_tenants_change_nothing_but_the_names(seed: int) -> None:
    r = replica()
    order = list(range(len(r.tenants)))
    random.Random(seed).shuffle(order)  # tenant i gets code order[i]
    names = tuple(f"<i>{code}\x1b[0m" for code in order)
    requests = r.requests.assign(tenant=np.array(order)[r.tenant_of_request])
    other = replace(r, tenants=names, requests=requests)
    chosen = np.flatnonzero(r.requests["prompt_tokens"] > 150)
    before, after = (different(one, chosen, *whole(r), []) for one in (r, other))
    called = {name: names[order[code]] for code, name in enumerate(r.tenants)}
    for first, second in zip(before.from_others, after.from_others, strict=True):
        assert (first.attribute, first.distance) == (second.attribute, pytest.approx(second.distance))
        if isinstance(first, Names) and isinstance(second, Names):
            assert {called[name]: share for name, share in zip(first.names, first.chosen, strict=True)} == dict(
                zip(second.names, second.chosen, strict=True)
            )


PLANTED: dict[str, tuple[str, list[object], list[object]]] = {
    "model": ("model", ["large"], ["small"]),
    "adapter": ("adapter", ["<script>"], [None]),
    "session": ("session", ["loop"], [None, "other"]),
    "prefix": ("prefix", [77], [None, 5]),
    "cached share": ("cached_tokens", [40], [0]),
    "priority": ("priority", [9], [0, 1]),
}


@pytest.mark.parametrize("attribute", PLANTED)
def test_what_was_planted_in_the_chosen_is_the_largest_difference(attribute: str) -> None:
    column, mine, others = PLANTED[attribute]
    r = replica()
    table = r.trace.requests
    chosen = np.arange(3, len(r.requests), 4)
    arrival = np.argsort(np.argsort(table["arrival"].to_numpy(), kind="stable"))
    values = [mine[0] if code in set(chosen.tolist()) else others[code % len(others)] for code in arrival.tolist()]
    at = table.schema.get_field_index(column)
    planted = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    trace = replace(r.trace, tables={**r.trace.tables, "requests": planted})
    found = different(replace(r, trace=trace), chosen, *whole(r), []).from_others
    assert [one.attribute for one in found] == [attribute]
    if isinstance(found[0], Names):
        shares = dict(zip(found[0].names, found[0].chosen.tolist(), strict=True))
        assert shares[str(mine[0])] == 1.0
        assert set(shares) == {str(mine[0]), *(NONE if one is None else str(one) for one in others)}


def test_names_beyond_the_most_shown_are_one() -> None:
    r = replica()
    tenants = tuple(f"t{code}" for code in range(20))
    requests = r.requests.assign(tenant=np.arange(len(r.requests)) % 20)
    chosen = np.flatnonzero(requests["tenant"] < 3)
    found = of(different(replace(r, tenants=tenants, requests=requests), chosen, *whole(r), []).from_others, "tenant")
    assert isinstance(found, Names)
    assert set(found.names[:3]) == {"t0", "t1", "t2"}
    assert (found.names[-1], len(found.names), found.chosen[-1]) == (OTHERS, 9, 0.0)
    assert found.others.sum() == pytest.approx(1)


# --- of incidents -------------------------------------------------------------------------------------------------


def about_blamed(r: Replica, diagnosis: Diagnosis) -> Different:
    incident = diagnosis.incidents[0]
    windows = [(one.start_ns, one.end_ns) for one in diagnosis.incidents]
    return different(r, blamed_requests(r, incident), incident.start_ns, incident.end_ns, windows)


@pytest.mark.parametrize(("name", "tenant"), [("stall", "reasoner"), ("flood", "batch"), ("pinned", "archive")])
def test_the_culprits_long_prompts_are_what_is_different_about_those_that_caused_most(name: str, tenant: str) -> None:
    trace = read_trace(SAMPLES / f"{name}.otlp.jsonl.zst")
    found = about_blamed(only_replica(trace), diagnose(trace, replay=False)).from_others
    prompts, tenants = of(found, "prompt tokens"), of(found, "tenant")
    assert isinstance(prompts, Numbers)
    assert isinstance(tenants, Names)
    assert prompts.distance == found[0].distance > 0.9
    assert (prompts.chosen[-1], tenants.names[0], tenants.chosen[0]) == (1.0, tenant, 1.0)


def test_a_bin_ends_where_three_prompts_part_from_all_others() -> None:
    trace = read_trace(SAMPLES / "stall.otlp.jsonl.zst")
    prompts = of(about_blamed(only_replica(trace), diagnose(trace, replay=False)).from_others, "prompt tokens")
    assert isinstance(prompts, Numbers)
    assert (prompts.upto[-1], prompts.chosen[-1], prompts.others[-1]) == (15_000, 1.0, 0.0)


def test_stalled_requests_are_those_with_a_stalled_wait_that_began_then() -> None:
    incident, table = diagnosed().incidents[0], waits().table
    expected = {
        row.request for row in table.itertuples() if row.stalled and incident.start_ns <= row.begin <= incident.end_ns
    }
    found = stalled_requests(waits(), incident.start_ns, incident.end_ns)
    assert set(found.tolist()) == expected
    assert len(found) == len(expected) > 0


def test_those_stalled_by_a_full_cache_came_when_it_was_full() -> None:
    trace = read_trace(SAMPLES / "pinned.otlp.jsonl.zst")
    r, (incident, *_) = only_replica(trace), diagnose(trace, replay=False).incidents
    chosen = stalled_requests(measure_waits(r), incident.start_ns, incident.end_ns)
    window = (incident.start_ns, incident.end_ns)
    assert different(r, chosen, *window, [window]).from_others[0].attribute == "arrival"
