"""The rules on a watch's metrics, evaluated by Prometheus: who pages when, and who does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from stallscope.alerts import settings as s
from stallscope.alerts.choices import Format, Pack
from stallscope.alerts.export import export
from stallscope.alerts.thresholds import NoTeacher
from stallscope.watch import families as f
from tests.alerts.unit_tests import OWNER, STEP_S, UnitTest, annotated, needs_promtool

RULES = export(NoTeacher(), [], OWNER, Pack.BLAME, Format.PROMETHEUS).text
ALONE = export(NoTeacher(), [], OWNER, Pack.BLAME, Format.GRAFANA).checkable  # without recording rules
PAGE = {"severity": "page", "team": "inference"}
TICKET = {"severity": "ticket", "team": "inference"}
STALLS, STALLED = "StallscopeTenantStallsOthers", "StallscopeTenantStalledOthers"
HOG = {"culprit": "hog", "tenant": "hog"}
SCRAPES = 120
ZERO_AT = 10  # the scrape that sees a new series at zero


def rising(rate: float, start: int, stop: int, scrapes: int = SCRAPES) -> list[float]:
    """A counter that rises by ``rate`` a second between two scrapes."""
    return [rate * STEP_S * min(max(number - start, 0), stop - start) for number in range(scrapes)]


def blame(
    test: UnitTest, values: list[float], culprit: str = "hog", victim: str = "chat", by: str = "kv_pinning"
) -> None:
    test.scraped(f.BLAME.name, {"victim": victim, "culprit": culprit, "mechanism": by}, values)


@pytest.mark.parametrize("rules", [RULES, ALONE], ids=["recorded", "alone"])
@needs_promtool
def test_a_lasting_stall_by_a_tenant_never_seen_pages_within_a_minute_and_no_sooner_than_it_lasts(
    tmp_path: Path,
    rules: str,
) -> None:
    """Worst case: the stall began 15 s before its series was scraped at zero (5 s of window, 10 s of scrape), and the
    evaluation comes 10 s after the first that could tell."""
    test = UnitTest()
    seen_s = ZERO_AT * STEP_S
    blame(test, [float("nan")] * ZERO_AT + rising(2.0, 0, 200)[: SCRAPES - ZERO_AT])
    test.firing(seen_s + (s.RISES - 1) * STEP_S, STALLS, [])
    test.firing(seen_s + s.RISES * STEP_S, STALLS, [HOG | PAGE])
    latest_s = f.WINDOW_S + f.SCRAPE_S + s.RISES * f.SCRAPE_S + f.EVALUATION_S
    assert latest_s <= 60
    test.passes(rules, tmp_path)


@needs_promtool
def test_a_stall_that_is_over_soon_is_a_ticket_and_no_page(tmp_path: Path) -> None:
    test = UnitTest()
    blame(test, rising(3.0, 10, 11))
    for at_s in range(100, 600, STEP_S):
        test.firing(at_s, STALLS, [])
    test.firing(120, STALLED, [HOG | TICKET])
    test.passes(RULES, tmp_path)


@pytest.mark.parametrize("rules", [RULES, ALONE], ids=["recorded", "alone"])
@needs_promtool
def test_a_stall_that_moves_from_victim_to_victim_lasts_but_one_that_hits_two_at_once_does_not(
    tmp_path: Path, rules: str
) -> None:
    test = UnitTest()
    for number, victim in enumerate(("chat", "search", "agents")):
        blame(test, rising(2.0, 10 + number, 11 + number), culprit="moving", victim=victim)
        blame(test, rising(2.0, 10, 11), culprit="at once", victim=victim)
    test.firing(130, STALLS, [{"culprit": "moving", "tenant": "moving"} | PAGE])
    test.passes(rules, tmp_path)


@needs_promtool
def test_a_page_outlasts_a_pause_and_resolves_five_minutes_after_the_stall(tmp_path: Path) -> None:
    test = UnitTest()
    blame(test, rising(1.0, 10, 30))
    ended_s = 30 * STEP_S
    test.firing(ended_s, STALLS, [HOG | PAGE])
    test.firing(ended_s + s.KEEP_FIRING_S, STALLS, [HOG | PAGE])
    test.firing(ended_s + s.KEEP_FIRING_S + s.RISES_WITHIN_S + STEP_S, STALLS, [])
    test.passes(RULES, tmp_path)


@needs_promtool
def test_calm_traffic_fires_nothing(tmp_path: Path) -> None:
    test = UnitTest()
    blame(test, [0.0] * SCRAPES)
    replica = {"replica": "r0"}
    test.scraped(f.JUDGED.name, {**replica, "verdict": "engine_stall"}, [0.0] * SCRAPES)
    test.scraped(f.STEPS.name, replica, rising(30, 0, SCRAPES))
    test.scraped(f.STEPS_LOST.name, replica, [0.0] * SCRAPES)
    test.scraped(f.DROPPED.name, replica, [3.0] * SCRAPES)
    test.scraped(f.COVERAGE.name, replica, [1.0] * SCRAPES)
    test.scraped(f.RUNNING.name, replica, [8.0] * SCRAPES)
    test.scraped(f.WAITING.name, replica, [0.0] * SCRAPES)
    test.scraped(f.PREEMPTIONS.name, {"tenant": "chat"}, rising(0.01, 0, SCRAPES))
    test.scraped(f.TOKENS.name, {"tenant": "chat", "phase": "decode"}, rising(500, 0, SCRAPES))
    test.scraped(f.RECOMPUTED.name, {"tenant": "chat"}, rising(1, 0, SCRAPES))
    test.scraped(f.SERIES.name, {"job": "stallscope", "instance": "a:1"}, [300.0] * SCRAPES)
    test.scraped("up", {"job": "stallscope", "instance": "a:1"}, [1.0] * SCRAPES)
    for at_s in range(0, SCRAPES * STEP_S, 60):
        test.exprs.append({"expr": "count(ALERTS)", "eval_time": f"{at_s}s", "exp_samples": []})
    test.passes(RULES, tmp_path)


def _engine(test: UnitTest) -> None:
    test.scraped(f.JUDGED.name, {"replica": "r0", "verdict": "engine_stall"}, rising(1.0, 10, 50))
    test.scraped(f.JUDGED.name, {"replica": "r0", "verdict": "noisy_neighbor"}, rising(9.0, 0, 50))


def _overload(test: UnitTest) -> None:
    test.scraped(f.JUDGED.name, {"replica": "r0", "verdict": "overload"}, rising(3.0, 0, 100))


def _kv(test: UnitTest) -> None:
    blame(test, rising(0.5, 10, 50), by="head_of_line")
    blame(test, rising(0.5, 10, 50), by="decode_drag")


def _preempted(test: UnitTest) -> None:
    test.scraped(f.PREEMPTIONS.name, {"tenant": "chat"}, rising(0.08, 0, SCRAPES))
    test.scraped(f.PREEMPTIONS.name, {"tenant": "search"}, rising(0.08, 0, SCRAPES))


def _recomputed(test: UnitTest) -> None:
    test.scraped(f.TOKENS.name, {"tenant": "chat", "phase": "decode"}, rising(300, 0, SCRAPES))
    test.scraped(f.TOKENS.name, {"tenant": "chat", "phase": "prefill"}, rising(200, 0, SCRAPES))
    test.scraped(f.RECOMPUTED.name, {"tenant": "chat"}, rising(100, 0, SCRAPES))


def _hot(test: UnitTest) -> None:
    for reason, share in (("thermal", 0.2), ("power", 0.3)):
        test.scraped(f.THROTTLED.name, {"replica": "r0", "device": "0", "reason": reason}, rising(share, 0, SCRAPES))


def _dropped(test: UnitTest) -> None:
    test.scraped(f.DROPPED.name, {"replica": "r0"}, rising(1.0, 10, 11))


def _gaps(test: UnitTest) -> None:
    test.scraped(f.STEPS.name, {"replica": "r0"}, rising(30, 0, SCRAPES))
    test.scraped(f.STEPS_LOST.name, {"replica": "r0"}, rising(3, 0, SCRAPES))


def _uncovered(test: UnitTest) -> None:
    test.scraped(f.COVERAGE.name, {"replica": "r0"}, [0.5] * SCRAPES)


def _silent(test: UnitTest) -> None:
    for replica, running in (("r0", 1.0), ("idle", 0.0)):
        test.scraped(f.STEPS.name, {"replica": replica}, rising(30, 0, 20))
        test.scraped(f.RUNNING.name, {"replica": replica}, [running] * SCRAPES)
        test.scraped(f.WAITING.name, {"replica": replica}, [0.0] * SCRAPES)


def _down(test: UnitTest) -> None:
    target = {"job": "stallscope", "instance": "a:1"}
    test.scraped(f.SERIES.name, target, [300.0] * 20)
    test.scraped("up", target, [1.0] * 20 + [0.0] * (SCRAPES - 20))
    test.scraped("up", {"job": "another", "instance": "b:1"}, [0.0] * SCRAPES)


REPLICA = {"replica": "r0"}
CASES = {
    "StallscopeEngineStall": (_engine, [REPLICA | PAGE, REPLICA | TICKET]),
    "StallscopeOverload": (_overload, [REPLICA | TICKET]),
    "StallscopeKvPinned": (_kv, [HOG | TICKET | {"mechanism": "head_of_line"}]),
    "StallscopePreemptionStorm": (_preempted, [TICKET]),
    "StallscopeRecomputeTax": (_recomputed, [TICKET]),
    "StallscopeGpuThrottled": (_hot, [REPLICA | TICKET | {"device": "0", "reason": "thermal"}]),
    "StallscopeTelemetryLost dropped": (_dropped, [REPLICA | TICKET | {"cause": "dropped_spans"}]),
    "StallscopeTelemetryLost gaps": (_gaps, [REPLICA | TICKET | {"cause": "steps_lost"}]),
    "StallscopeTelemetryLost coverage": (_uncovered, [REPLICA | TICKET | {"cause": "coverage"}]),
    "StallscopeTelemetryStopped silent": (_silent, [REPLICA | TICKET | {"cause": "silent_replica"}]),
    "StallscopeTelemetryStopped down": (
        _down,
        [TICKET | {"cause": "collector_down", "job": "stallscope", "instance": "a:1"}],
    ),
}


@needs_promtool
@pytest.mark.parametrize("case", CASES)
def test_each_alert_fires_on_what_it_is_for(tmp_path: Path, case: str) -> None:
    made, expected = CASES[case]
    test = UnitTest()
    made(test)
    test.firing(500, case.partition(" ")[0], expected)
    test.passes(RULES, tmp_path)


@needs_promtool
def test_the_command_begins_five_minutes_before_the_stall_and_names_the_culprit(tmp_path: Path) -> None:
    test = UnitTest()
    blame(test, rising(2.0, 60, 100))
    labels = HOG | PAGE
    command = "stallscope analyze spans --since 1970-01-01T00:05:10Z --tenant='hog'"
    test.saying(700, STALLS, [(labels, {"command": command})])
    test.passes(annotated(RULES, "command"), tmp_path)


@needs_promtool
@pytest.mark.parametrize(("alert", "severity"), [(STALLS, PAGE), (STALLED, TICKET)], ids=["page", "ticket"])
def test_the_command_of_a_collector_that_has_just_begun_begins_with_its_first_step(
    tmp_path: Path, alert: str, severity: dict[str, str]
) -> None:
    """Who asks for a time before the first span is told that it lies outside the trace."""
    test = UnitTest()
    test.scraped(f.STEPS.name, {"replica": "r0"}, [float("nan")] * 60 + rising(30, 0, 60))
    test.scraped(f.STEPS.name, {"replica": "r1"}, [float("nan")] * 70 + rising(30, 0, 50))
    blame(test, rising(2.0, 75, 100))
    command = "stallscope analyze spans --since 1970-01-01T00:10:00Z --tenant='hog'"
    test.saying(900, alert, [(HOG | severity, {"command": command})])
    test.passes(annotated(RULES, "command"), tmp_path)


@needs_promtool
def test_a_ticket_says_whom_by_what_and_how_much(tmp_path: Path) -> None:
    test = UnitTest()
    blame(test, rising(1.0, 12, 14), victim="chat")
    blame(test, rising(0.5, 12, 14), victim="search", by="slot_exhaustion")
    blame(test, [0.0] * SCRAPES, victim="bystander")
    what = "hog stalled chat, search for 30 s of waiting within 10m"
    said = f"{what}: its requests held the KV cache, and theirs did not fit."
    # 600 s into the test the window is full, so that nothing is extrapolated.
    test.saying(600, STALLED, [(HOG | TICKET, {"summary": said})])
    test.passes(annotated(RULES, "summary"), tmp_path)


@needs_promtool
def test_an_hour_of_waiting_is_told_in_plain_seconds_and_a_thousandth_of_one_is_left_out(tmp_path: Path) -> None:
    test = UnitTest()
    blame(test, rising(104.0, 12, 14))
    blame(test, rising(0.00004, 12, 14), by="decode_drag")
    evidence = f"By mechanism: kv_pinning 2080. Increase of {f.BLAME.name}, summed by culprit, over 10m."
    said = {
        "summary": "hog stalled chat for 2080 s of waiting within 10m: its requests held the KV cache, and theirs did "
        "not fit.",
        "evidence": evidence,
    }
    test.saying(600, STALLED, [(HOG | TICKET, said)])
    test.passes(annotated(RULES, "summary", "evidence"), tmp_path)


def test_every_alert_carries_what_whoever_is_woken_needs() -> None:
    document = yaml.safe_load(export(NoTeacher(), [], OWNER, Pack.BOTH, Format.PROMETHEUS).text)
    alerts = [rule for group in document["groups"] for rule in group["rules"] if "alert" in rule]
    for rule in alerts:
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["labels"]["team"] == "inference"
        said = rule["annotations"]
        assert set(said) == {
            "summary",
            "description",
            "evidence",
            "threshold_reason",
            "command",
            "runbook_url",
            "catches",
            "names",
        }
        assert all(said.values())
        assert said["runbook_url"] == f"https://example.org/runbooks/{rule['alert']}.md"
    on_blame = [rule for rule in alerts if rule["labels"].get("pack") != "plain" and "cause" not in rule["labels"]]
    assert not [rule for rule in on_blame if "for" in rule]
    assert {rule["keep_firing_for"] for rule in on_blame} == {"5m"}
