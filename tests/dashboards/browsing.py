"""A dashboard that is served here, and a real browser that looks at it; what its console says is an error."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import waitress
from playwright.sync_api import Browser, Page, sync_playwright

from stallscope.asking import Asked
from stallscope.diagnosis import Diagnosis, diagnose
from stallscope.trace import Trace
from stallscope_dash.app import make_app
from stallscope_dash.jobs import Jobs
from stallscope_dash.recording import Recording
from stallscope_dash.security import protect

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / ".screenshots"
CHROMIUM = shutil.which("chromium")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path (apt install chromium)")
_LEFT = "A nonexistent object was used in an `Output`"  # Dash, where a page is left before all of it has come
SEARCH = "form[data-ask=request] input"
WAIT_MS = 60_000  # the machine may be busy


@contextmanager
def serving(
    recording: Recording, *, token: str | None = None, names: tuple[str, ...] = ("127.0.0.1",)
) -> Iterator[str]:
    """The address at which a recording is shown."""
    app = make_app(recording)
    protect(app.server, app.csp_hashes(), token, names)
    server = waitress.create_server(app.server, host="127.0.0.1", port=0, threads=8)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.effective_port}"  # type: ignore[union-attr]
    finally:
        server.close()


def recording_of(trace: Trace, diagnosed: Callable[[Trace], Diagnosis] | None = None) -> Recording:
    """A recording that is read already, and diagnosed without replay unless said otherwise."""
    made = diagnosed or (lambda read: diagnose(read, replay=False, remedies=False))
    return Recording(Path(trace.source), Asked(), Jobs(), lambda _: trace, [lambda read, _: made(read)])


@dataclass
class Looking:
    """A page in a browser, and what went wrong in it."""

    page: Page
    complaints: list[str] = field(default_factory=list)

    def at(self, url: str) -> Looking:
        self.page.goto(url)
        return self

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text(timeout=WAIT_MS)

    def wait(self, selector: str) -> None:
        self.page.wait_for_selector(selector, timeout=WAIT_MS)

    def until(self, javascript: str) -> None:
        """Until a JavaScript expression holds."""
        self.page.wait_for_function(f"() => {javascript}", timeout=WAIT_MS)

    def scroll_to(self, selector: str) -> None:
        self.page.wait_for_selector(selector, state="attached", timeout=WAIT_MS)
        self.page.evaluate("(selector) => document.querySelector(selector).scrollIntoView({block: 'center'})", selector)

    def drawn(self, chart: str) -> int:
        """How many marks a chart has, once it has any: points of lines and bars."""
        self.scroll_to(chart)
        marks = f"{chart} .main-svg :is(.point path, .js-line, path.point, .points path)"
        self.page.wait_for_selector(marks, state="attached", timeout=WAIT_MS)
        return self.page.locator(marks).count()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Of a module, not of the session: Playwright's event loop is in the way of tests that run one of their own."""
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--force-prefers-reduced-motion"]
        )
        yield found
        found.close()


@pytest.fixture
def looking(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Looking]:
    """A fresh profile; at the end, nothing may have been complained of. What was seen last is kept as a picture."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, timezone_id="UTC")
    found = Looking(context.new_page())
    found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.page.on(
        "console",
        lambda said: (
            found.complaints.append(said.text) if said.type in ("error", "warning") and _LEFT not in said.text else None
        ),
    )
    found.page.on("dialog", lambda dialog: (found.complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    yield found
    PICTURES.mkdir(exist_ok=True)
    found.page.screenshot(path=PICTURES / f"{re.sub('[^a-z0-9-]+', '_', request.node.name)}.png", full_page=True)
    context.close()
    assert not found.complaints, found.complaints
