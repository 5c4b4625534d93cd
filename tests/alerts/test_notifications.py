"""What people are told, by a real Alertmanager with the configuration and the templates that users copy."""

from __future__ import annotations

import html
import re
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from stallscope.alerts.choices import Format, Pack
from stallscope.alerts.export import export
from stallscope.alerts.thresholds import NoTeacher
from stallscope.diagnosis.slo import parse_slo
from tests.alerts.servers import (
    AMTOOL,
    NEEDS_ALERTMANAGER,
    Alertmanager,
    Inbox,
    Mailbox,
    alertmanager,
    mailbox,
    receiving,
    wait_for,
)
from tests.alerts.unit_tests import OWNER

FOLDER = Path(__file__).parents[2] / "dashboards" / "alertmanager"
BEGUN = datetime(2026, 3, 1, 14, 2, tzinfo=UTC)
COMMAND = "stallscope analyze traces/ --since 2026-03-01T14:01:00Z"
RUNBOOK = "https://example.com/runbooks/StallscopeTenantStallsOthers.md"
HOSTILE = [
    "\"double\" and 'single'",
    "back\\slash \\n \\u0041",
    "two\nlines",
    "{{ .Labels.alertname }} {{ template }} }}",
    "{braces}",
    "🔥 naïve 租户",
    "x" * 300,
    "<script>alert(1)</script>",
    "<!channel> & <https://example.com|here> &amp;",
    "*bold* _it_ `code` ~no~",
    "%s %d $1 ${x}",
]

SIDES = ("source_matchers", "target_matchers")

pytestmark = NEEDS_ALERTMANAGER


@dataclass(frozen=True)
class Told:
    """An Alertmanager, and what the people that it notifies have got."""

    manager: Alertmanager
    inbox: Inbox
    mailbox: Mailbox

    def slack(self, title: str = "") -> list[dict[str, Any]]:
        """Messages as Slack shows them, of which the title holds a text."""
        shown = [body["attachments"][0] for body in self.inbox.at("/slack")]
        plain = [one | {name: html.unescape(one[name]) for name in ("title", "text", "fallback")} for one in shown]
        return [one for one in plain if title in one["title"]]

    def state(self, alert: dict[str, Any]) -> str:
        """Active or suppressed; unprocessed for a moment before."""
        (found,) = [one for one in self.manager.alerts() if one["labels"] == alert["labels"]]
        return str(found["status"]["state"])

    def end(self, *alerts: dict[str, object]) -> None:
        """Ends these, which are all there are."""
        self.manager.fire(*(one | {"endsAt": datetime.now(UTC).isoformat()} for one in alerts))
        wait_for(lambda: not self.manager.alerts(), "end")


def config() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load((FOLDER / "alertmanager.yml").read_text(encoding="utf-8"))
    return read


def locally(inbox: Inbox, letters: Mailbox) -> dict[str, Any]:
    """The configuration as it is shipped, in a hurry, and all its receivers on this machine."""
    changed, at = config(), f"http://127.0.0.1:{inbox.port}"
    changed["templates"] = [str(FOLDER / name) for name in changed["templates"]]
    changed["global"] |= {"smtp_smarthost": f"127.0.0.1:{letters.port}", "smtp_require_tls": False}
    for route in (changed["route"], *changed["route"]["routes"]):
        route |= {"group_wait": "1s", "group_interval": "1s"}
    pages, tickets = changed["receivers"]
    pages["pagerduty_configs"][0]["url"] = f"{at}/pagerduty"
    pages["slack_configs"][0]["api_url"] = f"{at}/slack"
    tickets["webhook_configs"][0]["url"] = f"{at}/tickets"
    return changed


@pytest.fixture(name="told")
def _told(tmp_path: Path) -> Iterator[Told]:
    with _running(tmp_path) as told:
        yield told


@pytest.fixture(name="running", scope="module")
def _shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    with _running(tmp_path_factory.mktemp("shared")) as told:
        yield told


@contextmanager
def _running(folder: Path) -> Iterator[Told]:
    with receiving() as inbox, mailbox() as letters, alertmanager(folder, locally(inbox, letters)) as manager:
        yield Told(manager, inbox, letters)


def alert(name: str, severity: str, over: bool = False, **labels: str) -> dict[str, object]:
    """An alert as the exported rules make it, of a tenant or a replica."""
    who = labels.get("tenant") or labels.get("replica", "")
    return {
        "labels": {"alertname": name, "severity": severity, "team": "inference", **labels},
        "annotations": {
            "summary": sentence(who),
            "description": f"Requests of {who} took what others needed.",
            "evidence": f"chat waited 4.2 s a second for {who}",
            "threshold_reason": "3 x the highest of 2 h of calm: 0.4",
            "runbook_url": RUNBOOK,
            "command": COMMAND,
        },
        "startsAt": BEGUN.isoformat(),
        "endsAt": (BEGUN + timedelta(minutes=7) if over else datetime.now(UTC) + timedelta(hours=1)).isoformat(),
    }


def sentence(who: str) -> str:
    return f"{who} is stalling chat and search: its requests hold the KV cache (4.2 request-seconds a second)"


def page(tenant: str, over: bool = False) -> dict[str, object]:
    return alert("StallscopeTenantStallsOthers", "page", over, tenant=tenant)


class _Visible(HTMLParser):
    """The text of a page that a reader sees, and the elements in it."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.elements = "", set[str]()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.elements.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_configuration_that_is_shipped_is_sound() -> None:
    assert AMTOOL is not None
    run = subprocess.run(
        [AMTOOL, "check-config", FOLDER / "alertmanager.yml"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_what_is_kept_quiet_are_alerts_that_are_exported_with_the_labels_that_must_be_equal() -> None:
    slos = [parse_slo("ttft=500ms@p99")]
    rules = yaml.safe_load(export(NoTeacher(), slos, OWNER, Pack.BLAME, Format.PROMETHEUS).text)
    alerts = [rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    for one in config()["inhibit_rules"]:
        quieting, quiet = ([rule for rule in alerts if matched(rule, one[side])] for side in SIDES)
        named = {name for side in SIDES for matcher in one[side] for name in re.findall(r"Stallscope\w+", matcher)}
        assert {rule["alert"] for rule in (*quieting, *quiet)} == named
        for rule in (*quieting, *quiet):
            for label in one.get("equal", ()):
                assert label in rule["labels"] or f"by ({label}" in rule["expr"] or f"({label})" in rule["expr"]


def matched(rule: dict[str, Any], matchers: list[str]) -> bool:
    """Whether an alert is what all matchers (``name="value"`` or ``name=~"expression"``) say."""
    labels = rule["labels"] | {"alertname": rule["alert"]}
    found = [re.fullmatch(r'(\w+)=~?"(.*)"', matcher) for matcher in matchers]
    return all(one is not None and re.fullmatch(one[2], labels[one[1]]) is not None for one in found)


def test_a_page_says_who_stalls_whom_since_when_and_what_to_do(told: Told) -> None:
    told.manager.fire(page("reasoner"))
    (message,) = wait_for(told.slack, "message")
    assert message["title"] == message["fallback"] == f"[PAGE] {sentence('reasoner')}"
    assert message["color"] == "danger"
    assert message["text"].splitlines() == [
        "Since 14:02 UTC.",
        "Evidence: chat waited 4.2 s a second for reasoner",
        f"Open: {COMMAND}",
        f"Runbook: {RUNBOOK}",
    ]
    (incident,) = wait_for(lambda: told.inbox.at("/pagerduty"), "incident")
    assert incident["payload"]["summary"] == message["title"]
    assert incident["payload"]["severity"] == "critical"
    assert incident["payload"]["custom_details"]["text"].splitlines() == [
        f"{sentence('reasoner')}. Since 14:02 UTC.",
        "Requests of reasoner took what others needed.",
        "Evidence: chat waited 4.2 s a second for reasoner",
        "Threshold: 3 x the highest of 2 h of calm: 0.4",
        f"Open: {COMMAND}",
        f"Runbook: {RUNBOOK}",
    ]


def test_what_is_over_is_said_to_be_with_its_times(told: Told) -> None:
    told.manager.fire(page("reasoner"))
    wait_for(told.slack, "message")
    told.manager.fire(page("reasoner", over=True))
    (message,) = wait_for(lambda: told.slack("[OVER]"), "end of it")
    assert message["title"] == f"[OVER] {sentence('reasoner')}"
    assert message["color"] == "good"
    assert message["text"] == "From 14:02 UTC to 14:09 UTC."


def test_hostile_names_arrive_as_they_are_and_each_in_its_own_message(told: Told) -> None:
    told.manager.fire(*map(page, HOSTILE))
    messages = wait_for(lambda: (found := told.slack()) and len(found) == len(HOSTILE) and found, "message for each")
    assert sorted(one["title"] for one in messages) == sorted(f"[PAGE] {sentence(name)}" for name in HOSTILE)
    for name in HOSTILE:
        (message,) = [one for one in messages if sentence(name) in one["title"]]
        assert f"waited 4.2 s a second for {name}\nOpen: " in message["text"]
    for body in told.inbox.at("/slack"):  # and no markup: neither a call of everybody nor bold
        assert "<" not in body["attachments"][0]["text"] + body["attachments"][0]["title"]
        assert body["attachments"][0]["mrkdwn_in"] == ["pretext"]
    incidents = wait_for(lambda: (found := told.inbox.at("/pagerduty")) and len(found) == len(HOSTILE) and found, "all")
    assert {one["payload"]["summary"] for one in incidents} == {f"[PAGE] {sentence(name)}" for name in HOSTILE}


@settings(max_examples=3, phases=[Phase.generate])  # a failure takes a deadline: shrinking it would take an hour
@given(st.sets(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=150), min_size=20, max_size=40))
def test_any_names_reach_slack_and_pagerduty_as_they_are(running: Told, names: set[str]) -> None:
    running.inbox.bodies.clear()
    group = uuid.uuid4().hex  # or a name that the last example had, too, would not be told again
    alerts = [alert("StallscopeTenantStallsOthers", "page", tenant=name, replica=group) for name in names]
    running.manager.fire(*alerts)
    expected = {f"[PAGE] {sentence(name)}" for name in names}
    wait_for(lambda: {one["title"] for one in running.slack("[PAGE]")} >= expected, "message for each")
    texts = {one["title"]: one["text"] for one in running.slack("[PAGE]")}
    for name in names:
        assert f"waited 4.2 s a second for {name}\nOpen: " in texts[f"[PAGE] {sentence(name)}"]
    wait_for(lambda: {one["payload"]["summary"] for one in running.inbox.at("/pagerduty")} >= expected, "incidents")
    running.end(*alerts)


def test_hostile_names_in_e_mails_and_webhooks_arrive_as_they_are(told: Told) -> None:
    told.manager.fire(*(alert("StallscopeKvPinned", "ticket", tenant=name) for name in HOSTILE))
    letters = wait_for(lambda: len(found := told.mailbox.letters) == len(HOSTILE) and found, "letter for each")
    for name in HOSTILE:
        (letter,) = [one for one in letters if plain(one).startswith(f"{sentence(name)}. Since 14:02 UTC.\n")]
        assert " ".join(str(letter["Subject"]).split()) == " ".join(f"[TICKET] {sentence(name)}".split())
        page = _Visible()
        page.feed(part(letter, "html"))
        assert sentence(name) in page.text
        assert "script" not in page.elements
        assert COMMAND in page.text
    tickets = wait_for(lambda: (found := told.inbox.at("/tickets")) and len(found) == len(HOSTILE) and found, "all")
    assert {one["groupLabels"]["tenant"] for one in tickets} == set(HOSTILE)
    assert {one["alerts"][0]["annotations"]["summary"] for one in tickets} == set(map(sentence, HOSTILE))


def part(letter: Any, kind: str) -> str:
    body = letter.get_body((kind,))
    return str(body.get_content()).replace("\r\n", "\n")


def plain(letter: Any) -> str:
    return part(letter, "plain")


def test_what_is_said_of_one_tenant_comes_in_one_message(told: Told) -> None:
    told.manager.fire(
        alert("StallscopeSloFastBurn", "page", tenant="chat", slo="ttft"),
        alert("StallscopeSloFastBurn", "page", tenant="chat", slo="itl"),
        alert("StallscopeSloFastBurn", "page", tenant="search", slo="ttft"),
    )
    messages = wait_for(lambda: (found := told.slack()) and len(found) == 2 and found, "two messages")
    assert {one["title"] for one in messages} == {
        f"[PAGE] {sentence('chat')} (one of 2 alerts)",
        f"[PAGE] {sentence('search')}",
    }
    (both,) = [one["text"] for one in messages if "2 alerts" in one["title"]]
    assert both.count(f"{sentence('chat')}. Since 14:02 UTC.\n") == both.count("Open: ") == 2
    assert "\n\n" in both

    told.manager.fire(alert("StallscopeSloFastBurn", "page", over=True, tenant="chat", slo="itl"))
    (half,) = wait_for(lambda: [one["text"] for one in told.slack() if "\n\nOver:\n" in one["text"]], "half of it")
    assert half.count("Open: ") == 1
    assert half.endswith(f"Over:\n- {sentence('chat')}. From 14:02 UTC to 14:09 UTC.")


def test_pages_and_tickets_go_different_ways(told: Told) -> None:
    told.manager.fire(page("reasoner"), alert("StallscopeGpuThrottled", "ticket", replica="engine-0"))
    wait_for(lambda: told.slack() and told.inbox.at("/tickets") and told.mailbox.letters, "both")
    assert [one["title"] for one in told.slack()] == [f"[PAGE] {sentence('reasoner')}"]
    assert [one["groupLabels"] for one in told.inbox.at("/tickets")] == [{"replica": "engine-0"}]


@pytest.mark.parametrize(
    ("firing", "also", "state"),
    [
        (page("reasoner"), alert("StallscopeKvPinned", "ticket", tenant="reasoner"), "suppressed"),
        (page("reasoner"), alert("StallscopeTenantStalledOthers", "ticket", tenant="reasoner"), "suppressed"),
        (page("reasoner"), alert("StallscopeKvPinned", "ticket", tenant="batch"), "active"),
        (page("reasoner"), alert("StallscopeSloFastBurn", "page", tenant="chat", slo="ttft"), "active"),
        (
            alert("StallscopeEngineStall", "page", replica="engine-0"),
            alert("StallscopeSloFastBurn", "page", tenant="chat", slo="ttft"),
            "suppressed",
        ),
        (
            alert("StallscopeEngineStall", "page", replica="engine-0"),
            alert("StallscopeOverload", "ticket", replica="engine-0"),
            "suppressed",
        ),
        (
            alert("StallscopeEngineStall", "page", replica="engine-0"),
            alert("StallscopeEngineStall", "ticket", replica="engine-0"),
            "suppressed",
        ),
        (
            alert("StallscopeEngineStall", "ticket", replica="engine-0"),
            alert("StallscopeSloFastBurn", "page", tenant="chat", slo="ttft"),
            "active",
        ),
        (
            alert("StallscopeEngineStall", "page", replica="engine-0"),
            alert("StallscopeOverload", "ticket", replica="engine-1"),
            "active",
        ),
        (
            alert("StallscopeEngineStall", "page", replica="engine-0"),
            alert("StallscopeGpuThrottled", "ticket", replica="engine-0"),
            "active",
        ),
        (
            alert("StallscopeSloFastBurn", "page", tenant="chat", slo="ttft"),
            alert("StallscopeSloSlowBurn", "ticket", tenant="chat", slo="ttft"),
            "suppressed",
        ),
        (
            alert("StallscopeSloFastBurn", "page", tenant="chat", slo="ttft"),
            alert("StallscopeSloSlowBurn", "ticket", tenant="chat", slo="itl"),
            "active",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else value["labels"]["alertname"].removeprefix("Stallscope"),
)
def test_a_page_keeps_quiet_what_it_says_already_and_nothing_else(
    running: Told, firing: dict[str, Any], also: dict[str, Any], state: str
) -> None:
    running.manager.fire(firing)
    wait_for(lambda: running.state(firing) == "active", "page")
    running.manager.fire(also)
    wait_for(lambda: running.state(also) == state, state)
    running.end(firing, also)
