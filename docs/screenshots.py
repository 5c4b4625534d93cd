"""Makes the pictures of the dashboard in docs/images, of a recording that comes with the repository.

python docs/screenshots.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).parent.parent
TRACE = ROOT / "sample_traces" / "stall.otlp.jsonl.zst"
SIZE = {"width": 1180, "height": 1000}


def main() -> None:
    command = [sys.executable, "-m", "stallscope.cli", "dashboard", str(TRACE.relative_to(ROOT)), "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    url = server.stderr.readline().split(": ", 1)[1].split()[0].rstrip("/")
    images = ROOT / "docs" / "images"
    images.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport=SIZE, timezone_id="UTC", device_scale_factor=0.75)
        page.set_default_timeout(120_000)
        page.goto(url)
        page.wait_for_selector("#answer .facts :text('replayed')")
        page.wait_for_selector("#answer .now")
        shoot(page, images / "dashboard-overview.png", ".js-plotly-plot .scatterlayer .trace")
        page.click("#incidents a")
        page.wait_for_selector("#incident-head dl")
        page.evaluate("() => document.querySelector('#swimlanes').scrollIntoView({block: 'center'})")
        shoot(page, images / "dashboard-batch.png", "#swimlanes .barlayer .trace")
        browser.close()
    server.terminate()


def shoot(page: Page, path: Path, drawn: str) -> None:
    page.wait_for_selector(drawn, state="attached")
    page.wait_for_timeout(1500)
    page.screenshot(path=path)
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
