"""What axe-core finds on each page, light and dark: nothing serious."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from tests.dashboards.browsing import NEEDS_CHROMIUM, WAIT_MS, browser, recording_of, serving
from tests.dashboards.test_pages import sample

__all__ = ["browser"]
pytestmark = NEEDS_CHROMIUM
PAGES = {
    "/": "#incidents a",
    "/incident": "#caused .ag-cell a",
    "/request": "#waterfall table",
    "/tenants": "#tenants .ag-cell",
    "/whatif": "#whatif-choices a",
    "/alerts": "#alerts-head a",
}


@pytest.fixture(scope="module")
def stall() -> Iterator[str]:
    with serving(recording_of(sample("stall"))) as url:
        yield url


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", PAGES)
def test_axe_finds_nothing_serious(stall: str, browser: Browser, path: str, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)  # axe is a script that is put into the page
    page = context.new_page()
    page.goto(f"{stall}{path}")
    page.wait_for_selector("#page .card", timeout=WAIT_MS)
    while page.evaluate("window.scrollY + window.innerHeight < document.documentElement.scrollHeight - 1"):
        page.evaluate("window.scrollBy(0, 500)")  # what is not seen is not drawn
        page.wait_for_timeout(200)
    page.wait_for_selector(PAGES[path], timeout=WAIT_MS)
    page.wait_for_timeout(800)
    found = Axe().run(page)
    serious = [
        f"{one['id']} ({one['impact']}): {one['help']}: {[node['html'][:160] for node in one['nodes'][:4]]}"
        for one in found.response["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    context.close()
    assert not serious, "\n".join(serious)
