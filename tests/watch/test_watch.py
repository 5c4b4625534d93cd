"""A watch from window to window: gauges that go on and end, counters of loss, objectives, cases that open and close."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from stallscope.diagnosis.model import Confidence, Culprit, Diagnosis, Incident, Verdict
from stallscope.diagnosis.slo import parse_slo
from stallscope.trace.decode import Collected, collect
from stallscope.trace.findings import Findings
from stallscope.trace.otlp import Reader, SpanGroup, find_sources
from stallscope.watch import families
from stallscope.watch.case import LASTING_NS, LONGEST_NS, Case, attribution_of
from stallscope.watch.changes import Changes
from stallscope.watch.rehearsal import bounds_with
from stallscope.watch.replica import WatchedReplica
from stallscope.watch.scores import Scores
from stallscope.watch.watch import FORGOTTEN_NS, Watch
from stallscope_telemetry import names
from tests.watch.spans import START_NS, WINDOW_NS, S, Watched, group, joining, step

SAMPLES = Path(__file__).parents[2] / "sample_traces"


def windows_of(path: Path) -> dict[int, list[SpanGroup]]:
    found: dict[int, list[SpanGroup]] = {}
    for one in Reader(Findings()).read(find_sources(path)):
        for span in one.spans:
            found.setdefault(span.end // WINDOW_NS + 1, []).append(replace(one, spans=[span]))
    return dict(sorted(found.items()))


def test_changes_that_are_applied_are_the_calls_made_directly() -> None:
    now_ns = 0
    slos = [parse_slo("chat:ttft=300ms@p99")]
    direct, applied = (Scores(bounds=bounds_with(slos), clock=lambda: now_ns) for _ in range(2))
    changes = Changes(bounds_with(slos))
    one, other = Watch(direct, slos), Watch(changes, slos)
    for number, groups in windows_of(SAMPLES / "flood.otlp.jsonl.zst").items():
        now_ns = number * WINDOW_NS
        for watch in (one, other):
            watch.take(groups)
            watch.close_window(now_ns)
        changes.taken().apply(applied)
        assert direct.exposed() == pytest.approx(applied.exposed())
    assert len(direct.exposed()) > 100
    direct_again = direct.exposed()
    changes.taken().apply(applied)
    assert direct_again == pytest.approx(applied.exposed()), "what was taken is not told twice"


def test_who_waits_grows_older_while_the_engine_hangs_and_is_gone_with_its_replica() -> None:
    it = Watched()
    waiting = joining(0, START_NS, [1], ["patient"])
    del waiting.attributes[names.CHUNKS]
    it.window(group("r", [waiting]))
    ages = []
    for _ in range(12):
        it.window()
        ages.append(it.total(families.OLDEST_WAIT, tenant="patient"))
    assert ages == sorted(ages)
    assert ages[-1] - ages[0] == pytest.approx(55, abs=0.1)
    it.window(seconds=FORGOTTEN_NS / S)
    it.window()
    assert it.total(families.OLDEST_WAIT, tenant="patient") == 0


def test_coverage_is_that_of_the_last_minute() -> None:
    it = Watched()
    for window in range(16):
        spans = [joining(window * 20, START_NS + window * WINDOW_NS, [window], ["t"])]
        spans += [
            step(window * 20 + number, START_NS + window * WINDOW_NS + number * S // 10) for number in range(1, 20)
        ]
        spans[0].attributes[names.KEYFRAME] = window > 2
        if window < 3:
            del spans[0].attributes[names.KEYFRAME]
        it.window(group("r", spans[:10] if window == 0 else spans))
        if window == 2:
            assert it.total(families.COVERAGE, replica="r") < 0.5, "a lost step, and nobody knows the batch after it"
            assert it.total(families.STEPS_LOST, replica="r") == 10
    assert it.total(families.COVERAGE, replica="r") == 1


def test_drops_that_telemetry_tells_are_counted_from_when_it_is_watched() -> None:
    it = Watched()
    for window, dropped in enumerate([500, 500, 530, 2, 7]):  # it begins again after the third
        number = window * 10 if window < 3 else (window - 3) * 10
        at_ns = START_NS + window * WINDOW_NS
        it.window(group("r", [step(number + k, at_ns + k * S // 10, DROPPED=dropped) for k in range(10)]))
    it.window()
    assert it.total(families.DROPPED, replica="r") == 30 + 7


def test_an_objective_of_a_tenant_that_has_not_been_here_lately_keeps_nobody_from_a_diagnosis(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slos = (parse_slo("gone:ttft=1ms@p99"), parse_slo("t:ttft=1ms@p99"), parse_slo("itl=1s@p99"))
    replica = WatchedReplica("r", slos)
    collected = Collected()
    replica.tenants.names.append("gone")
    spans = [joining(0, START_NS, [0], ["t"]), *(step(number, START_NS + number * S // 10) for number in range(1, 40))]
    collect([group("r", spans)], Findings(), collected)
    replica.advance(collected.replicas["r"].taken(), START_NS + WINDOW_NS)
    replica.case = Case(START_NS)
    looked: list[Diagnosis | None] = []
    monkeypatch.setattr(Case, "looked", lambda self, diagnosis, *rest: looked.append(diagnosis))
    replica.look()
    assert looked[0] is not None


# --- cases ------------------------------------------------------------------------------------------------------------


def incident(
    verdict: Verdict,
    lost_s: float,
    *culprits: tuple[str, float],
    end_ns: int = START_NS,
    confidence: Confidence = Confidence.HIGH,
    mechanism: str = "kv_pinning",
) -> Incident:
    blamed = tuple(Culprit(name, "", mechanism, caused, 0.5, 0.5, 0.1, "", (), None) for name, caused in culprits)
    return Incident(
        "r", START_NS - S, end_ns, verdict, confidence, mechanism, blamed, (), lost_s, lost_s, (), None, 0.0, ()
    )


def diagnosis(*incidents: Incident) -> Diagnosis:
    return Mock(spec=Diagnosis, incidents=incidents)


def looked_at(*incidents: Incident) -> Case:
    case = Case(START_NS)
    case.waiting |= {"victim": 10.0, "hog": 4.0}
    case.looked(diagnosis(*incidents), START_NS, 1.0)
    return case


def blame_of(case: Case, now_ns: int = START_NS, here: bool = True) -> dict[tuple[str, str], float]:
    return {(victim, culprit): seconds for victim, culprit, _, seconds in case.judged(now_ns, lambda _: here)}


def test_seconds_are_shared_by_what_each_culprit_caused_and_told_once() -> None:
    case = looked_at(incident(Verdict.NOISY_NEIGHBOR, 8.0, ("hog", 3.0), ("other", 1.0)))
    assert blame_of(case) == pytest.approx({("victim", "hog"): 7.5, ("victim", "other"): 2.5, ("hog", "other"): 1.0})
    assert blame_of(case) == {}


def test_what_an_engine_stall_cost_meanwhile_is_not_laid_at_a_neighbors_door() -> None:
    case = looked_at(incident(Verdict.NOISY_NEIGHBOR, 2.0, ("hog", 3.0)), incident(Verdict.ENGINE_STALL, 8.0))
    assert blame_of(case) == pytest.approx({("victim", "hog"): 2.0})


def test_an_incident_that_was_over_long_before_is_another_one() -> None:
    early = incident(Verdict.NOISY_NEIGHBOR, 2.0, ("hog", 3.0), end_ns=START_NS - 60 * S)
    assert attribution_of(diagnosis(early), START_NS) is None


def test_culprits_that_caused_nothing_measurable_share_alike() -> None:
    case = looked_at(incident(Verdict.NOISY_NEIGHBOR, 0.0, ("one", 0.0), ("other", 0.0)))
    assert blame_of(case)["victim", "one"] == pytest.approx(5.0)


def test_a_suspicion_without_a_mechanism_must_be_found_twice_and_a_weak_one_is_forgotten_when_not_found_again() -> None:
    weak = incident(Verdict.NOISY_NEIGHBOR, 8.0, ("hog", 0.0), confidence=Confidence.LOW, mechanism="unexplained")
    assert blame_of(looked_at(weak)) == {}
    assert not looked_at(weak).is_usual
    assert looked_at().is_usual
    again = looked_at(weak)
    again.looked(diagnosis(weak), START_NS, 1.0)
    assert blame_of(again)["victim", "hog"] == pytest.approx(10.0)
    weak = incident(Verdict.NOISY_NEIGHBOR, 8.0, ("hog", 3.0), confidence=Confidence.LOW)
    assert blame_of(looked_at(weak))["victim", "hog"] == pytest.approx(10.0)
    for found, stays in ((weak, False), (incident(Verdict.NOISY_NEIGHBOR, 8.0, ("hog", 3.0)), True)):
        case = looked_at(found)
        case.looked(diagnosis(), START_NS, 1.0)
        assert bool(blame_of(case)) == stays
        case.looked(None, START_NS, 1.0)
        assert (case.attribution is not None) == stays


def test_who_has_gone_is_not_blamed_for_what_goes_on_for_long() -> None:
    for now_ns, here, blames in ((0, False, True), (LONGEST_NS + 1, False, False), (LONGEST_NS + 1, True, True)):
        case = looked_at(incident(Verdict.NOISY_NEIGHBOR, 8.0, ("hog", 3.0)))
        assert bool(blame_of(case, START_NS + now_ns, here)) == blames


def test_a_case_is_looked_into_before_it_closes_and_does_not_stay_open_for_ever() -> None:
    replica = WatchedReplica("r")
    replica.case = Case(START_NS)
    assert replica.closed() is None, "nobody has looked yet"
    assert replica.wants_look
    replica.skip_look()
    assert replica.closed() is not None
    replica.case = case = looked_at(incident(Verdict.NOISY_NEIGHBOR, 8.0, ("hog", 3.0)))
    for _ in range(10):
        replica._losses.add(0.1)
        replica._losses.learn()
    replica._losses.add(50.0)
    assert replica.closed() is None
    replica._stream.last_ready = START_NS + LASTING_NS + 1
    assert replica.closed() is case
    assert not replica._losses.is_unusual


def test_a_stall_is_not_over_because_its_engine_is_silent_and_is_when_that_has_stopped() -> None:
    replica, collected = WatchedReplica("r"), Collected()
    spans = [joining(0, START_NS, [0], ["t"]), *(step(number, START_NS + number * S // 10) for number in range(1, 40))]
    collect([group("r", spans)], Findings(), collected)
    end_ns = START_NS + WINDOW_NS
    replica.advance(collected.replicas["r"].taken(), end_ns)
    for seconds in (*[0.1] * 10, 20.0, 20.0):
        replica._losses.add(seconds)
        if seconds < 1:
            replica._losses.learn()
    replica.case = Case(START_NS)
    replica.skip_look()
    open_for = 0
    for window in range(1, 20):
        replica.advance(collected.replicas["r"].taken(), end_ns + window * WINDOW_NS)
        if replica.closed() is not None:
            break
        open_for += 1
    assert 60 <= open_for * WINDOW_NS / S <= 80
