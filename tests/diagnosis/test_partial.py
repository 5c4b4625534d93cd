"""Partial diagnoses: who is added to whom, and when, changes nothing; what is left out is counted; cuts are mended."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stallscope.diagnosis import partial
from stallscope.diagnosis.levels import Level
from stallscope.diagnosis.model import Charge, Confidence, Diagnosis, Incident, ReplayCheck, Verdict, Victim
from stallscope.diagnosis.partial import Partial, Seen, TenantTotals, finish, merge, merged
from stallscope.diagnosis.replica import OTHER
from stallscope.diagnosis.sketch import Sketch
from stallscope.diagnosis.stitch import ALONE, Found

S = 1_000_000_000


def incident(start_s: int, end_s: int, lost_s: float, verdict: Verdict = Verdict.ENGINE_STALL) -> Incident:
    victim = Victim("chat", 3, 10, lost_s, (), (), f"chat-{start_s}")
    charge = Charge("(engine)", "host_gap", lost_s, 1.0, False)
    return Incident(
        "r0", start_s * S, end_s * S, verdict, Confidence.MEDIUM, "host_gap", (), (victim,), lost_s, lost_s, (charge,),
        None, 0.0, (f"from {start_s}",),
    )  # fmt: skip


sizes = st.integers(0, 10**12)
waits = st.lists(sizes, max_size=4).map(lambda values: Sketch.of(np.array(values, dtype=np.int64)))
totals = st.builds(
    TenantTotals,
    st.dictionaries(st.sampled_from(["api_key", "claimed"]), st.integers(1, 100), min_size=1),
    sizes,
    sizes,
    sizes,
    st.tuples(waits, waits, waits),
)
found = st.builds(
    lambda start, lost, verdict, cut: Found(incident(start, start + 7, lost / 8, verdict), cut),
    st.integers(0, 10_000),
    st.integers(0, 1000),
    st.sampled_from([Verdict.ENGINE_STALL, Verdict.COLD_CACHE, Verdict.OVERLOAD]),
    st.booleans(),
)
checks = st.builds(
    lambda share, steps, trusted: ReplayCheck("r0", "fcfs", share, steps, 0.1, 0.1, 3, trusted, ""),
    st.floats(0, 1),
    st.integers(0, 100),
    st.booleans(),
)
seen = st.builds(
    Seen,
    st.none() | st.integers(1, 3),
    sizes,
    sizes,
    sizes,
    sizes,
    sizes,
    sizes,
    sizes,
    st.floats(0, 1),
    st.floats(0, 1),
)
partials = st.builds(
    lambda start, length, incidents, tenants, check, median, seen, failures: merged(
        [
            Partial(
                start,
                start + length,
                tuple(incidents),
                tenants=tenants,
                checks=check,
                levels={"r0": (Level(start, start + length, (median, -1)),)},
                seen=seen,
            ),
            *(Partial(failures=((f"r{where}", "no such file"),), failed=1) for where in failures),
        ]
    ),
    sizes,
    sizes,
    st.lists(found, max_size=4),
    st.dictionaries(st.sampled_from(["a", "b", "c", OTHER]), totals, max_size=4),
    st.dictionaries(st.just("r0"), checks, max_size=1),
    sizes,
    seen,
    st.lists(st.integers(0, 30), max_size=12),
)


def told(one: Partial) -> Diagnosis:
    return finish(one, "made up")


@given(st.lists(partials, max_size=4), st.randoms())
def test_the_sum_is_the_same_in_any_order_and_grouping(parts: list[Partial], random: object) -> None:
    known, partial.MOST_INCIDENTS = partial.MOST_INCIDENTS, 5
    try:
        in_order = told(merged(parts))
        shuffled = list(parts)
        random.shuffle(shuffled)  # type: ignore[attr-defined]
        from_the_right = reduce(lambda total, one: merge(one, total), shuffled, Partial())
        assert told(from_the_right) == in_order
        half = len(parts) // 2
        assert told(merge(merged(parts[:half]), merged(parts[half:]))) == in_order
    finally:
        partial.MOST_INCIDENTS = known


@given(partials)
def test_nothing_changes_nothing(one: Partial) -> None:
    assert told(merge(one, Partial())) == told(merge(Partial(), one)) == told(one)


def test_what_is_not_shown_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "MOST_INCIDENTS", 2)
    diagnosis = told(merged(Partial(incidents=(Found(incident(at, at + 1, at)),)) for at in (5, 20, 7, 1)))
    assert [one.lost_s for one in diagnosis.incidents] == [20, 7]
    assert diagnosis.notes == ("the worst 2 incidents are shown; 2 more lost 6 s",)


def test_the_smallest_of_too_many_tenants_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partial, "MOST_TENANTS", 3)
    none = Sketch.of(np.zeros(0, dtype=np.int64))
    tenants = {f"t{n}": TenantTotals({"claimed": 1}, n, n, n, (none,) * 3) for n in range(1, 6)}
    shown = told(Partial(tenants=tenants)).tenants
    assert [(one.tenant, one.requests) for one in shown] == [("t5", 1), ("t4", 1), (OTHER, 3)]
    assert sum(one.token_share for one in shown) == pytest.approx(1)


def test_an_incident_that_was_cut_is_one_again() -> None:
    parts = [Found(incident(0, 3590, 100.0), True), Found(incident(3592, 7200, 250.0), True)]
    apart = Found(incident(9000, 9001, 30.0))
    (whole, other) = told(merged(Partial(incidents=(one,)) for one in (*parts[::-1], apart))).incidents
    assert (whole.start_ns, whole.end_ns, whole.lost_s) == (0, 7200 * S, 350.0)
    assert [(victim.lost_s, victim.stalled_requests) for victim in whole.victims] == [(350.0, 6)]
    assert [(charge.seconds, charge.share) for charge in whole.charges] == [(350.0, 1.0)]
    assert whole.reasons == ("from 3592", "seen in 2 portions, of which the worst is described")
    assert other == apart.incident


@pytest.mark.parametrize(
    "later",
    [
        Found(incident(3700, 7200, 250.0), True),  # after a pause
        Found(incident(3592, 7200, 250.0, Verdict.OVERLOAD), True),
        Found(incident(3592, 7200, 250.0), False),  # seen as a whole
    ],
)
def test_others_that_follow_stay_apart(later: Found) -> None:
    first = Found(incident(0, 3590, 100.0), True)
    both = told(merged([Partial(incidents=(first,)), Partial(incidents=(later,))])).incidents
    assert len(both) == 2
    assert [one.reasons[-1] == ALONE for one in both] == [later.cut, True]


def test_portions_that_could_not_be_read_are_named_and_counted() -> None:
    failures = [Partial(failures=((f"r{where:02}", "damaged"),), failed=1) for where in range(12)]
    notes = told(merged(failures)).notes
    assert notes[0] == "r00 is left out: damaged"
    assert len(notes) == partial.NAMED_FAILURES + 1
    assert notes[-1] == "2 more portions are left out"


def test_a_portion_that_is_slow_throughout_is_named() -> None:
    portions = [Partial(levels={"r0": (Level(at * S, (at + 1) * S, (median, 20_000_000)),)}) for at, median in
                ((0, 100_000_000), (1, 110_000_000), (2, 5 * S), (3, 90_000_000))]  # fmt: skip
    (note,) = told(merged(portions)).notes
    assert note.startswith(
        "r0 was slow from 1970-01-01T00:00:02Z to 1970-01-01T00:00:03Z: TTFT p50 5 s, mostly 0.105 s;"
    )
    assert told(merged([portions[0], portions[1], portions[3]])).notes == ()
    assert told(merged(portions[1:3])).notes == ()  # of two, neither is usual
