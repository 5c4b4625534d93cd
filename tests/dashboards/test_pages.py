"""Each page in a real browser, on a trace with a stall and on a healthy one; and the three clicks to the batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from stallscope.trace import Trace, read_trace
from stallscope.trace.rename import renamed
from stallscope_dash.address import Address
from tests.dashboards.browsing import (
    NEEDS_CHROMIUM,
    ROOT,
    SEARCH,
    WAIT_MS,
    Looking,
    browser,
    looking,
    recording_of,
    serving,
)
from tests.reports.examples import hostile_trace

__all__ = ["browser", "looking"]
pytestmark = NEEDS_CHROMIUM
LATENCY = "#page .js-plotly-plot"


def sample(name: str) -> Trace:
    return read_trace(ROOT / "sample_traces" / f"{name}.otlp.jsonl.zst")


@pytest.fixture(scope="module")
def stall() -> Iterator[str]:
    with serving(recording_of(sample("stall"))) as url:
        yield url


@pytest.fixture(scope="module")
def healthy() -> Iterator[str]:
    with serving(recording_of(sample("healthy"))) as url:
        yield url


@pytest.fixture(scope="module")
def hostile() -> Iterator[str]:
    with serving(recording_of(hostile_trace())) as url:
        yield url


def test_three_clicks_lead_from_the_answer_to_the_batch_and_the_request_that_did_it(
    stall: str, looking: Looking
) -> None:
    looking.at(stall)
    looking.wait("#answer .verdict")
    assert "reasoner stalled chat and search" in looking.text("#answer h1")
    assert looking.drawn(LATENCY) > 50

    looking.page.click("#incidents a")  # one: the incident, with the batch around its worst step
    looking.wait("#incident-head dl")
    assert "reasoner" in looking.text("#incident-head h1")
    assert looking.drawn("#swimlanes") > 30

    looking.scroll_to("[data-part=caused]")
    looking.page.locator("#caused .ag-cell a").first.scroll_into_view_if_needed()
    top = "document.querySelector('[data-part=caused]').getBoundingClientRect().top"
    stood = looking.page.evaluate(top)
    looking.page.click("#caused .ag-cell a")  # two: the request that cost the others most
    looking.wait("#waterfall table")
    looking.page.go_back()
    looking.until(f"Math.abs({top} - {stood}) < 5")  # where one was
    looking.page.wait_for_timeout(1500)
    assert abs(looking.page.evaluate(top) - stood) < 5
    looking.page.evaluate("window.scrollTo(0, 0)")
    looking.page.click("#incident-head dd a:has-text('reasoner-000003')")  # the same from the words
    looking.wait("#waterfall table")
    assert "reasoner-000003" in looking.text("#request-head h1")
    assert looking.drawn("#request-batch") > 30
    assert "▶ reasoner-000003" in looking.text("#request-batch")


def test_a_zoom_in_one_chart_is_in_the_address_and_back_undoes_it(stall: str, looking: Looking) -> None:
    looking.at(stall)
    looking.wait("#answer .verdict")
    looking.drawn(LATENCY)
    box = looking.page.locator(f"{LATENCY} .nsewdrag").first.bounding_box()
    assert box is not None
    looking.page.mouse.move(box["x"] + 0.3 * box["width"], box["y"] + 20)
    looking.page.mouse.down()
    looking.page.mouse.move(box["x"] + 0.7 * box["width"], box["y"] + 20, steps=8)
    looking.page.mouse.up()
    looking.until("window.location.search.includes('since=')")
    looking.wait("#overview-window .zoomed")
    address = Address.of(looking.page.url.partition("?")[2])
    assert 10e9 < (address.until or 0) - (address.since or 0) < 20e9  # of 40 s

    looking.page.go_back()
    looking.until("!window.location.search.includes('since=')")
    looking.until("!document.querySelector('#overview-window .zoomed')")
    looking.page.go_forward()
    looking.wait("#overview-window .zoomed")
    looking.page.wait_for_timeout(500)
    looking.page.mouse.dblclick(box["x"] + 0.5 * box["width"], box["y"] + 20)
    looking.until("!document.querySelector('#overview-window .zoomed')")


def test_keys_zoom_and_move_as_in_trace_viewers(stall: str, looking: Looking) -> None:
    looking.at(stall)
    looking.wait("#answer .verdict")
    looking.drawn(LATENCY)
    looking.page.keyboard.press("w")
    looking.until("window.location.search.includes('since=')")
    zoomed = Address.of(looking.page.url.partition("?")[2])
    assert 15e9 < (zoomed.until or 0) - (zoomed.since or 0) < 25e9  # half of 40 s
    looking.wait("#overview-window .zoomed")
    looking.page.wait_for_timeout(500)
    before = looking.page.url
    looking.page.keyboard.press("d")
    looking.until(f"window.location.href !== {before!r}")
    moved = Address.of(looking.page.url.partition("?")[2])
    assert (moved.since or 0) > (zoomed.since or 0)
    looking.page.click("#nav a:text('Tenants')")
    looking.wait("#tenants-window .zoomed a")  # said on each page that is zoomed
    looking.page.click("#nav a:text('Overview')")
    looking.drawn(LATENCY)
    while "since=" in looking.page.url:  # out, until all there is is shown, and no further
        before = looking.page.url
        looking.page.keyboard.press("s")
        looking.until(f"window.location.href !== {before!r}")
        looking.page.wait_for_timeout(700)
    looking.page.keyboard.press("/")
    looking.page.keyboard.type("chat-000150")
    looking.page.keyboard.press("Enter")
    looking.wait("#waterfall table")


def test_a_link_reproduces_what_was_seen(stall: str, looking: Looking) -> None:
    looking.at(f"{stall}/request?request=chat-000150")
    looking.wait("#waterfall table")
    assert "chat-000150" in looking.text("#request-head h1")
    assert "reasoner prefill_interference" in looking.text("#request-head .facts")


def test_a_request_is_found_by_its_id_and_one_that_is_not_there_is_said_with_those_nearest(
    stall: str, looking: Looking
) -> None:
    looking.at(stall)
    looking.wait("#answer .verdict")
    looking.page.fill(SEARCH, " search-000025 ")
    looking.page.press(SEARCH, "Enter")
    looking.wait("#waterfall table")
    assert "search-000025" in looking.text("#request-head h1")

    looking.page.fill(SEARCH, "chat-00015x")
    looking.page.press(SEARCH, "Enter")
    looking.wait("#request-head .trouble")
    assert "no request 'chat-00015x'" in looking.text("#request-head")
    assert "did you mean chat-000" in looking.text("#request-head")


def test_a_healthy_trace_says_so_on_each_page(healthy: str, looking: Looking) -> None:
    looking.at(healthy)
    looking.wait("#answer .verdict.healthy")
    assert "None: no tenant waited" in looking.text("#incidents")
    assert looking.drawn(LATENCY) > 20
    looking.page.click("#nav a:text('Incident')")
    looking.wait("#incident-head .nothing")
    assert looking.page.locator("#page .card:visible").count() == 0
    looking.page.click("#nav a:text('Request')")
    looking.wait("#request-head .nothing")


@pytest.mark.parametrize("path", ["/", "/incident", "/request"])
def test_names_are_text_whatever_they_say(hostile: str, looking: Looking, path: str) -> None:
    looking.at(f"{hostile}{path}")
    looking.drawn(LATENCY)
    looking.page.wait_for_timeout(500)
    assert looking.page.locator("img, b:text('bold'), #page script").count() == 0
    assert "onerror=alert(2)" in looking.text("#page")


def test_a_name_of_300_characters_is_shortened_and_there_in_full_for_who_points_at_it(looking: Looking) -> None:
    long = "reasoner-" + "x" * 291
    trace = renamed(sample("stall"), {"tenant": lambda name: long if name == "reasoner" else name})
    with serving(recording_of(trace)) as url:
        looking.at(url)
        looking.wait("#incidents .culprit")
        assert looking.page.locator("#incidents .culprit").first.get_attribute("title") == long
        width = looking.page.evaluate("() => document.documentElement.scrollWidth")
        assert width <= 1280


def test_on_a_phone_nothing_is_wider_than_the_page(stall: str, looking: Looking) -> None:
    looking.page.set_viewport_size({"width": 390, "height": 800})
    for path in ("/", "/incident", "/request"):
        looking.at(f"{stall}{path}")
        looking.drawn(LATENCY)
        looking.page.wait_for_timeout(300)
        assert looking.page.evaluate("() => document.documentElement.scrollWidth") <= 390, path


def test_the_report_is_a_file_to_keep(stall: str, looking: Looking, tmp_path: Path) -> None:
    looking.at(stall)
    looking.wait("#answer .verdict")
    with looking.page.expect_download(timeout=WAIT_MS) as download:
        looking.page.click("#answer a[download]")
    download.value.save_as(tmp_path / "report.html")
    assert "reasoner stalled chat and search" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_no_button_sends_a_chart_to_anybody(stall: str, looking: Looking, tmp_path: Path) -> None:
    looking.at(stall)
    looking.wait("#answer .verdict")
    looking.drawn(LATENCY)
    buttons = "[...document.querySelectorAll('.modebar-btn')].map((button) => button.dataset.title)"
    assert "Pan" in looking.page.evaluate(f"() => {buttons}")
    assert "Share chart..." not in looking.page.evaluate(f"() => {buttons}")
    report = tmp_path / "report.html"
    report.write_bytes(looking.page.request.get(f"{stall}/report.html").body())
    looking.at(report.as_uri())
    looking.wait(".js-plotly-plot .main-svg")
    assert "Pan" in looking.page.evaluate(f"() => {buttons}")
    assert "Share chart..." not in looking.page.evaluate(f"() => {buttons}")


def test_a_chart_is_kept_as_svg_and_a_table_as_csv(stall: str, looking: Looking, tmp_path: Path) -> None:
    looking.at(f"{stall}/incident")
    looking.drawn("#swimlanes")
    with looking.page.expect_download(timeout=WAIT_MS) as picture:
        looking.page.click("button[data-save=svg][data-name=swimlanes]")
    picture.value.save_as(tmp_path / "batch.svg")
    assert "reasoner-000003" in (tmp_path / "batch.svg").read_text(encoding="utf-8")
    assert "Who was in the batch around the worst step · " in (tmp_path / "batch.svg").read_text(encoding="utf-8")
    assert picture.value.suggested_filename.endswith("-incident_1-swimlanes.svg")
    looking.scroll_to("[data-part=caused]")
    looking.wait("#caused .ag-cell a")
    with looking.page.expect_download(timeout=WAIT_MS) as table:
        looking.page.click("button[data-csv=caused]")
    table.value.save_as(tmp_path / "caused.csv")
    assert "reasoner-000003" in (tmp_path / "caused.csv").read_text(encoding="utf-8")


def test_what_reading_left_out_is_said_below_the_answer(looking: Looking, tmp_path: Path) -> None:
    whole = (ROOT / "sample_traces" / "stall.otlp.jsonl.zst").read_bytes()
    (tmp_path / "cut.otlp.jsonl.zst").write_bytes(whole[: len(whole) // 2])
    trace = read_trace(tmp_path / "cut.otlp.jsonl.zst")
    assert trace.findings
    with serving(recording_of(trace)) as url:
        looking.at(url)
        looking.wait("#answer .note")
        assert trace.findings[0].text in looking.text("#answer")


def test_a_page_that_is_not_there_leads_back(stall: str, looking: Looking) -> None:
    looking.at(f"{stall}/nowhere")
    looking.page.click("#page a:text('Overview')")
    looking.wait("#answer .verdict")


def test_an_incident_that_is_not_there_is_said(stall: str, looking: Looking) -> None:
    looking.at(f"{stall}/incident?incident=9")
    looking.wait("#incident-head .trouble")
    assert "there is no incident 9: 1 were found" in looking.text("#incident-head")


def test_an_incident_is_found_again_by_its_time_when_its_number_has_changed(stall: str, looking: Looking) -> None:
    looking.at(stall)
    looking.wait("#incidents a")
    link = str(looking.page.get_attribute("#incidents a", "href"))
    assert "at=" in link
    looking.at(stall + link.replace("incident=1", "incident=7"))
    looking.wait("#incident-head dl")
    assert "Incident 1 of 1" in looking.text("#incident-head")
    looking.at(f"{stall}/incident?incident=1&at=2020-01-01T00:00:00Z")
    looking.wait("#incident-head .trouble")
    assert "there is no incident any more that went on at" in looking.text("#incident-head")
    looking.page.click("nav a:text('Overview')")
    looking.wait("#answer .verdict")
    assert looking.drawn(LATENCY) > 0


def test_what_nobody_expected_is_said_in_its_place(monkeypatch: pytest.MonkeyPatch, looking: Looking) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("stallscope.reports.pieces.incident_facts", broken)
    with serving(recording_of(sample("stall"))) as url:
        looking.at(f"{url}/incident")
        looking.wait("#incident-head .trouble")
        assert "the terminal that the dashboard was started from says more" in looking.text("#incident-head")
        assert looking.drawn("#swimlanes") > 30


def test_a_trace_without_steps_says_what_to_do(looking: Looking) -> None:
    trace = sample("healthy")
    tables = {**trace.tables, "steps": trace.steps.slice(0, 0)}
    with serving(recording_of(replace(trace, tables=tables))) as url:
        looking.at(url)
        looking.wait("#overview-window .trouble, #answer .trouble, #progress .trouble")
        assert "no engine steps in it; see `stallscope doctor`" in looking.text("#page")
