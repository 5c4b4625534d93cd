"""What would be exported from a trace, and what it does there: the same as the two commands say, step by step."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from stallscope import cli
from stallscope.alerts.backtest import Timeline
from stallscope.alerts.backtest import timeline as timelines
from stallscope.alerts.backtest.judge import GRACE_S, Answer, Outcome
from stallscope.alerts.choices import Pack
from stallscope.alerts.preview import Preview, PreviewedAlert, preview, trial
from stallscope.diagnosis.slo import parse_slo
from stallscope.errors import UsageError
from stallscope.watch.rehearsal import Rehearsal
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario
from tests.alerts.backtest.stories import START_S, Stall, timeline
from tests.alerts.backtest.test_recorded import FLOOD
from tests.alerts.test_hostile_names import HOSTILE, tenants
from tests.alerts.unit_tests import needs_promtool

SAMPLES = Path(__file__).parent.parent.parent / "sample_traces"
STALL, HEALTHY = SAMPLES / "stall.otlp.jsonl.zst", SAMPLES / "healthy.otlp.jsonl.zst"
STALLS, STALLED = "StallscopeTenantStallsOthers", "StallscopeTenantStalledOthers"
SLOS = ["ttft=500ms@p99", "chat:itl=70ms@p99"]
NASTY = '{{ x }}"\\'


def printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> tuple[str, str]:
    """What a command on alerts says on stdout and stderr."""
    monkeypatch.setattr("sys.argv", ["stallscope", "alerts", *map(str, arguments)])
    with pytest.raises(SystemExit):
        cli.main()
    return capsys.readouterr()


def of_story(story: Timeline, pack: Pack = Pack.BLAME) -> Preview:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(timelines, "rehearse", lambda *_, **__: Rehearsal(story.samples, story.incidents))
        return preview(story.name, pack=pack)


@pytest.fixture(scope="module")
def stall() -> Preview:
    """Of the recorded stall that comes with the repository, with all that can be asked for."""
    return preview(STALL, [parse_slo(slo) for slo in SLOS], Pack.BOTH)


def alert(made: Preview, name: str) -> PreviewedAlert:
    return next(one for one in made.alerts if one.name == name)


@needs_promtool
def test_the_rule_file_is_the_one_that_the_command_writes_and_its_notes_are_among_the_notes(
    stall: Preview, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [option for slo in SLOS for option in ("--slo", slo)]
    out, err = printed(monkeypatch, capsys, "export", "--from", STALL, "--pack", "both", *options)
    assert stall.text == out
    said = err.splitlines()
    assert [f"note: {note}" for note in stall.notes[: len(said)]] == said
    assert len(stall.alerts) == out.count("- alert: ")


@needs_promtool
def test_a_recording_of_half_a_minute_proves_no_rule_on_blame_and_each_says_why(stall: Preview) -> None:
    unproven = [one for one in stall.alerts if one.not_provable]
    assert alert(stall, STALLS).not_provable == "looks back 1 min, the trace has 30 s"
    assert {one.name for one in stall.alerts} == {one.name for one in unproven}
    assert (
        stall.notes[-1]
        == f"of {len(unproven)} of {len(stall.alerts)} alerts this trace can prove nothing: each says why"
    )
    tried = trial(stall)
    (fate,) = tried.fates
    assert [culprit.tenant for culprit in fate.incident.culprits] == ["reasoner"]
    assert (fate.answer, fate.alert, tried.firings) == (Answer.NOT_REQUIRED, None, ())


@needs_promtool
def test_nothing_pages_on_a_healthy_recording() -> None:
    tried = trial(preview(HEALTHY))
    assert (tried.firings, tried.fates, tried.calm.pages) == ((), (), 0)
    assert tried.headline.startswith("nothing to catch")


@needs_promtool
def test_a_lasting_stall_is_caught_first_by_the_page_that_names_its_culprit() -> None:
    made = of_story(timeline(1500, [Stall(900, 1100)]))
    tried = trial(made)
    (fate,) = tried.fates
    (page,) = [one for one in tried.firings if made.alerts[one.firing.alert].severity == "page"]
    assert (fate.answer, made.alerts[page.firing.alert].name) == (Answer.CAUGHT, STALLS)
    assert fate.alert == page.firing.alert
    assert dict(page.firing.labels)["culprit"] == "reasoner"
    assert fate.delay_s == (page.firing.start_ns - (START_S + 900) * 10**9) / 1e9
    assert tried.calm.pages == 0
    assert tried.headline.startswith("1 of 1 lasting incident caught, after ")


@needs_promtool
def test_a_page_that_nothing_justifies_is_counted_where_it_is_calm() -> None:
    """In nine minutes of calm, too few to learn from, a tenant is blamed that no incident is about."""
    tried = trial(of_story(timeline(540, also=[Stall(200, 300)])))
    assert (tried.calm.pages, [one.outcome for one in tried.firings]) == (1, [Outcome.FALSE])
    assert tried.calm.length_s == pytest.approx(540, abs=20)
    quiet = of_story(timeline(1800, also=[Stall(200, 300)]))
    assert alert(quiet, STALLS).not_provable == ""
    assert trial(quiet).calm.pages == 0  # it was learned that this is calm


@needs_promtool
def test_both_commands_say_the_same_of_a_tenant_named_like_a_template(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It is blamed a little at all times, and so has a threshold of its own in the rules."""
    daily = Stall(0, 3000, NASTY, per_s=0.05)
    story = timeline(3000, [Stall(700, 900), Stall(1500, 1700, NASTY)], also=[daily, Stall(2600, 2700)])
    made = of_story(story)
    tried = trial(made)
    monkeypatch.setattr(timelines, "rehearse", lambda *_, **__: Rehearsal(story.samples, story.incidents))
    exported = printed(monkeypatch, capsys, "export", "--from", "story")[0]
    assert made.text == exported
    assert NASTY in dict(alert(made, STALLS).reasons)
    (tmp_path / "rules.yml").write_text(exported, encoding="utf-8")
    said = json.loads(printed(monkeypatch, capsys, "backtest", tmp_path / "rules.yml", "story", "--format", "json")[0])
    assert (said["headline"], said["evidence"]) == (tried.headline, list(tried.evidence))
    assert [one["not_provable"] or "" for one in said["rules"]] == [one.not_provable for one in made.alerts]
    assert [
        (one["rule"], one["start_ns"], one["end_ns"], one["labels"], one["outcome"]) for one in said["firings"]
    ] == [
        (
            made.alerts[one.firing.alert].name,
            one.firing.start_ns,
            one.firing.end_ns,
            dict(one.firing.labels),
            one.outcome,
        )
        for one in tried.firings
    ]
    assert [(one["answer"], one["rule"], one["delay_s"]) for one in said["incidents"]] == [
        (one.answer, None if one.alert is None else made.alerts[one.alert].name, one.delay_s) for one in tried.fates
    ]
    assert said["calm"]["pages"] == tried.calm.pages
    assert len(tried.firings) >= 2
    assert len(tried.fates) == 2


@needs_promtool
@example(stalls=[(20, 0.3), (250, 1.0)])
@given(st.lists(st.tuples(st.integers(20, 300), st.floats(0.02, 3)), min_size=1, max_size=2))
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_who_caught_an_incident_first_can_be_told_from_what_fired(stalls: Sequence[tuple[int, float]]) -> None:
    """Stalls far apart: the first page of its culprit from its start to the grace after its end, else a ticket."""
    apart_s = 1200
    told = [
        Stall(apart_s * number, apart_s * number + length_s, f"t{number}", per_s=per_s)
        for number, (length_s, per_s) in enumerate(stalls, 1)
    ]
    made = of_story(timeline(apart_s * (len(told) + 1), told))
    tried = trial(made)
    for fate in tried.fates:
        culprits = {culprit.tenant for culprit in fate.incident.culprits}
        caught = sorted(
            (made.alerts[one.firing.alert].severity != "page", one.firing.start_ns, one.firing.alert)
            for one in tried.firings
            if dict(one.firing.labels)["culprit"] in culprits
            and fate.incident.start_ns <= one.firing.start_ns <= fate.incident.end_ns + GRACE_S * 1e9
        )
        if caught:
            assert fate.alert == caught[0][2]
            assert fate.delay_s == (caught[0][1] - fate.incident.start_ns) / 1e9
        else:
            assert (fate.alert, fate.delay_s) == (None, None)


@needs_promtool
def test_a_recorded_flood_by_a_tenant_named_like_a_template_is_paged_by_that_name(tmp_path: Path) -> None:
    (tmp_path / "flood.yaml").write_text(FLOOD.replace("duration_s: 420", "duration_s: 300"))
    recorded, trace = tmp_path / "recorded.otlp.jsonl", tmp_path / "flood.otlp.jsonl"
    record(load_scenario(str(tmp_path / "flood.yaml"), "cpu"), recorded, seed=7, executor="virtual")
    trace.write_text(recorded.read_text().replace('"ember"', json.dumps(NASTY)))
    shares: list[float] = []
    made = preview(trace, progress=shares.append)
    assert shares == sorted(shares)
    assert (shares[0] > 0, shares[-1]) == (True, 1.0)
    tried = trial(made)
    (page,) = [one for one in tried.firings if made.alerts[one.firing.alert].severity == "page"]
    assert {name: value for name, value in page.firing.labels if name in ("culprit", "tenant")} == {
        "culprit": NASTY,
        "tenant": NASTY,
    }
    assert [(fate.answer, fate.alert) for fate in tried.fates] == [(Answer.CAUGHT, page.firing.alert)]


@example(found=HOSTILE[:20])
@given(tenants)
@settings(max_examples=10, deadline=None)
def test_what_calm_taught_is_told_by_the_names_as_they_are_and_that_incidents_are_left_out(found: list[str]) -> None:
    every_day = [Stall(0, 3600, name, per_s=0.05 * (number + 1)) for number, name in enumerate(found)]
    made = of_story(timeline(3600, [Stall(1800, 1900, "once")], also=every_day))
    reasons = dict(alert(made, STALLS).reasons)
    assert set(found) - {"once", "reasoner"} <= set(reasons)
    assert "once" in found or "once" not in reasons
    assert all("3 x the highest in" in why for name, why in reasons.items() if name)
    assert any(
        note.startswith("thresholds were learned outside of the trace's 1 incident: 30 s") for note in made.notes
    )
    assert any("says nothing of another day" in note for note in made.notes)
    for one, read in zip(made.alerts, made.rules.alerts, strict=True):
        assert (one.name, one.expression.strip()) == (read.name, read.expression.strip())


def test_floors_have_no_calm_to_be_quiet_in() -> None:
    made = of_story(timeline(300, [Stall(100, 200)]))
    assert [note for note in made.notes if "thresholds were" in note] == [made.notes[0]]
    assert made.notes[0].startswith("0 of 11 thresholds were learned")


def test_without_promtool_the_rules_are_there_and_a_trial_says_in_one_line_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(os.environ, "PATH", str(tmp_path))
    made = of_story(timeline(900, [Stall(100, 250)]), Pack.BOTH)
    assert made.text.count("- alert: ") == len(made.alerts) == 22
    assert alert(made, "StallscopePlainQueue").not_provable == "needs vllm:num_requests_waiting"
    with pytest.raises(UsageError, match=r"^promtool is not installed.*apt install prometheus$"):
        trial(made)
    with pytest.raises(UsageError, match="apt install prometheus"):
        trial(of_story(timeline(30)))  # where nothing is provable either


def test_an_objective_that_makes_no_sense_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="contradict each other"):
        preview("nowhere", [parse_slo("ttft=1s@p99"), parse_slo("ttft=2s@p99")])


@needs_promtool
def test_a_preview_and_its_trial_can_be_handed_to_another_process() -> None:
    made = of_story(timeline(900, [Stall(100, 250, NASTY)]))
    passed: Preview = pickle.loads(pickle.dumps(made))
    assert (passed.text, passed.alerts, passed.notes) == (made.text, made.alerts, made.notes)
    tried = trial(passed)
    assert tried.firings
    assert pickle.loads(pickle.dumps(tried)) == tried == trial(made)


def test_an_alert_has_what_a_page_shows_of_it() -> None:
    page, *_ = of_story(timeline(900)).alerts
    assert (page.name, page.severity, page.for_s, page.keep_firing_s) == (STALLS, "page", 0, 300)
    assert page.runbook == f"docs/runbooks/{STALLS}.md"
    assert page.summary == (
        "<culprit> is stalling <victim> right now: <mechanism> (<value> requests held up at any time)."
    )
    assert page.expression.endswith("> 0.1")
    assert page.reasons[0][1].startswith("0.1 is the floor: ")
