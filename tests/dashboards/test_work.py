"""What takes longer than a look, in a real browser: what if with cancel, alerts, live, a recording that goes away."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from stallscope.asking import Asked
from stallscope.trace import read_trace, write_parquet
from stallscope.views.words import iso
from stallscope_dash.address import Address
from stallscope_dash.serving import live_at, recording_at
from tests.alerts.unit_tests import needs_promtool
from tests.dashboards.browsing import NEEDS_CHROMIUM, ROOT, SEARCH, Looking, browser, looking, serving

__all__ = ["browser", "looking"]
pytestmark = NEEDS_CHROMIUM
STALL, HEALTHY = (ROOT / "sample_traces" / f"{name}.otlp.jsonl.zst" for name in ("stall", "healthy"))
QUICK = Asked(replay=False)


def test_what_if_can_be_cancelled_and_asked_again(looking: Looking) -> None:
    with serving(recording_at(STALL, QUICK, False)) as url:
        looking.at(f"{url}/whatif")
        looking.wait("#whatif-choices a")
        looking.page.click("#whatif-choices tr:has-text('reasoner') a:text('as usual')")
        looking.page.click("#cancel:not([hidden])", timeout=60_000)
        looking.wait("#whatif-answer :text('It was cancelled')")

        looking.page.click("#whatif-choices tr:has-text('reasoner') a:text('not there')")
        looking.wait("#whatif-answer h1")
        assert "without reasoner" in looking.text("#whatif-answer h1")
        assert "stallscope whatif" in looking.text("#whatif-answer code")
        assert looking.drawn("#whatif-chart") >= 12


def test_a_setting_that_the_engine_does_not_have_is_said(looking: Looking) -> None:
    with serving(recording_at(STALL, QUICK, False)) as url:
        looking.at(f"{url}/whatif?question=set:colour=blue")
        looking.wait("#whatif-answer .trouble")
        assert "colour" in looking.text("#whatif-answer")
        looking.wait("#whatif-choices a:text('policy=fair')")
        assert "(now fcfs)" in looking.text("#whatif-choices")


@needs_promtool
def test_alerts_are_made_and_tried_when_they_are_asked_for(looking: Looking) -> None:
    with serving(recording_at(STALL, QUICK, False)) as url:
        looking.at(f"{url}/alerts")
        looking.page.click("#alerts-head a", timeout=60_000)
        looking.wait("#alerts-rules details")
        assert "alerts export --from" in looking.text("#alerts-head")
        with looking.page.expect_download() as kept:
            looking.page.click("#alerts-head a:text('the rules as a file')")
        assert kept.value.suggested_filename == "stallscope.rules.yml"
        assert "alert: StallscopeTenantStallsOthers" in kept.value.path().read_text(encoding="utf-8")
        looking.page.click("#alerts-rules summary >> nth=0")
        assert "stallscope:blame_seconds" in looking.text("#alerts-rules details >> nth=0")


def test_who_may_see_one_tenant_sees_no_other(looking: Looking) -> None:
    with serving(recording_at(STALL, Asked(replay=False, redact_for="chat"), False)) as url:
        for path in ("/", "/incident", "/tenants", "/whatif", "/alerts"):
            looking.at(f"{url}{path}")
            looking.wait("#page :is(.verdict, .nothing, .ag-cell, #whatif-choices a)")
            looking.page.wait_for_timeout(500)
            assert "reasoner" not in looking.page.content(), path


def test_who_may_see_a_tenant_that_is_not_there_is_told_of_no_other(looking: Looking) -> None:
    with serving(recording_at(STALL, Asked(replay=False, redact_for="nobody"), False)) as url:
        looking.at(url)
        looking.wait("#progress .trouble")
        assert "no tenant 'nobody' in the trace" in looking.text("#progress")
        assert not any(name in looking.page.content() for name in ("reasoner", "chat", "stall.otlp"))


def test_a_server_that_is_gone_is_said(looking: Looking) -> None:
    with serving(recording_at(STALL, QUICK, False)) as url:
        looking.at(url)
        looking.wait("#answer .verdict")
        assert not looking.page.is_visible(".gone-note")
        looking.page.route("**/_dash-update-component*", lambda route: route.abort())
        looking.wait(".gone-note:visible")
        looking.page.unroute("**/_dash-update-component*")
        looking.until("!document.body.classList.contains('gone')")
    looking.complaints.clear()  # of a request that failed


def test_live_waits_for_what_will_be_written(looking: Looking, tmp_path: Path) -> None:
    with serving(live_at(tmp_path, QUICK, 3600.0)) as url:
        looking.at(url)
        looking.wait("#progress .trouble")
        shutil.copyfile(STALL, tmp_path / STALL.name)
        (tmp_path / STALL.name).touch()
        looking.wait("#answer .verdict.noisy_neighbor")
        assert re.search(r": nothing has come for \d+ days", looking.text("#progress"))


def test_live_follows_a_folder(looking: Looking, tmp_path: Path) -> None:
    shutil.copyfile(HEALTHY, tmp_path / HEALTHY.name)
    (tmp_path / HEALTHY.name).touch()
    with serving(live_at(tmp_path, QUICK, 3600.0)) as url:
        looking.at(url)
        looking.wait("#answer .verdict.healthy")
        looking.wait("#progress :text('live, up to')")
        shutil.copyfile(STALL, tmp_path / STALL.name)
        (tmp_path / HEALTHY.name).unlink()
        looking.wait("#answer .verdict.noisy_neighbor")
        shutil.rmtree(tmp_path)
        looking.wait("#progress .trouble")
        assert "is `stallscope collect` running?" in looking.text("#progress")
        assert looking.page.locator("#answer .verdict.noisy_neighbor").count() == 1  # what was seen stays


def test_a_question_of_what_moves_on_is_about_a_stretch_that_stands_still(looking: Looking, tmp_path: Path) -> None:
    shutil.copyfile(STALL, tmp_path / STALL.name)
    (tmp_path / STALL.name).touch()
    with serving(live_at(tmp_path, QUICK, 3600.0)) as url:
        looking.at(f"{url}/whatif?question=without:reasoner")
        looking.page.click("#whatif-answer a.ask", timeout=60_000)
        looking.wait("#whatif-answer h1")
        assert "without reasoner" in looking.text("#whatif-answer h1")
        asked = Address.of(looking.page.url.partition("?")[2])
        assert looking.text("#whatif-answer code").endswith(f"--since {iso(asked.since)} --until {iso(asked.until)}")
        looking.page.click("#whatif-choices tr:has-text('reasoner') a:text('as usual')")
        looking.until("window.location.search.includes('usual')")
        assert Address.of(looking.page.url.partition("?")[2]).since == asked.since

        looking.page.click("#nav a:text('Alerts')")
        looking.wait("#alerts-head :text('What is shown now')")


def test_a_recording_that_goes_away_is_said_where_it_is_missed(looking: Looking, tmp_path: Path) -> None:
    folder = tmp_path / "stall"
    write_parquet(read_trace(STALL), folder)
    with serving(recording_at(folder, QUICK, False)) as url:
        looking.at(url)
        looking.wait("#answer .verdict")
        shutil.rmtree(folder)
        looking.page.fill(SEARCH, "chat-000150")
        looking.page.press(SEARCH, "Enter")
        looking.wait("#request-head .trouble")
        assert str(folder) in looking.text("#request-head")


def test_a_recording_that_is_none_is_said_on_the_page(looking: Looking, tmp_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("no spans\n", encoding="utf-8")
    with serving(recording_at(tmp_path / "none.jsonl", QUICK, False)) as url:
        looking.at(url)
        looking.wait("#progress .trouble")
        assert "no OTLP in it" in looking.text("#progress")
        looking.wait("#incidents .trouble")


def test_a_setting_of_ones_own_is_asked(looking: Looking) -> None:
    with serving(recording_at(STALL, QUICK, False)) as url:
        looking.at(f"{url}/whatif")
        looking.wait("#whatif-choices a")
        looking.page.fill("form[data-ask=set] input", "colour=blue")
        looking.page.press("form[data-ask=set] input", "Enter")
        looking.wait("#whatif-answer .trouble")
        assert "question=set%3Acolour%3Dblue" in looking.page.url
