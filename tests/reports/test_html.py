"""The HTML file: complete in itself, readable without a network, and nothing in a name becomes part of it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stallscope.diagnosis import diagnose
from stallscope.reports.html import to_html
from stallscope.reports.markup import Html, data_block, element, label
from stallscope_engine.config import EngineConfig
from tests.reports.examples import HOSTILE, hostile_diagnosis, hostile_trace, with_replay
from tests.trace.recording import Arrival, Workload, read, run
from tests.views.recordings import diagnosed, recorded

Made = Callable[[], "tuple[str, Page]"]
MOST_BYTES = 6_000_000
CHROMIUM = shutil.which("chromium")


class Page(HTMLParser):
    """What a browser would make of the page: elements with their attributes, the text that is read, the scripts."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.elements)


@cache
def stall() -> tuple[str, Page]:
    page = to_html(with_replay(diagnosed("reasoning_prompt")), recorded("reasoning_prompt"))
    return page, Page(page)


@cache
def hostile() -> tuple[str, Page]:
    page = to_html(with_replay(hostile_diagnosis()), hostile_trace())
    return page, Page(page)


def test_the_answer_comes_first_then_how_sure_it_is() -> None:
    text = stall()[1].text
    positions = [text.index(part) for part in ("NOISY NEIGHBOR", "reasoner stalled chat", "confidence high", "Tonight")]
    assert positions == sorted(positions)
    assert text.index("Tonight") < text.index("What happened")


def test_every_picture_has_its_place_and_its_data() -> None:
    _, page = stall()
    places = {attributes["id"] for tag, attributes in page.elements if attributes.get("class") == "picture"}
    figures = json.loads(page.scripts[0])
    assert places == set(figures) >= {"percentiles", "swimlanes", "kv"}
    assert {trace["type"] for figure in figures.values() for trace in figure["data"]} <= {
        "bar",
        "scatter",
    }  # the bundle's
    for title in ("Who waited for whom", "The worst request's time", "What would have been", "What would help"):
        assert title in page.text


def figures_of_an_incident_of(length_s: float) -> tuple[int, dict[str, dict[str, dict[str, dict[str, list[str]]]]]]:
    """The start (ns) of the worst incident, and the figures if it had been so long."""
    diagnosis = diagnosed("reasoning_prompt")
    worst = diagnosis.incidents[0]
    changed = replace(worst, end_ns=worst.start_ns + round(length_s * 1e9))
    page = Page(to_html(replace(diagnosis, incidents=(changed,)), recorded("reasoning_prompt")))
    return worst.start_ns, json.loads(page.scripts[0])


def test_a_short_incident_is_shown_from_near_and_a_long_one_as_it_is() -> None:
    start_ns, figures = figures_of_an_incident_of(0.3)
    near = figures["percentiles-near"]["layout"]["xaxis"]["range"]
    first, last = (datetime.fromisoformat(time).timestamp() for time in near)
    assert first < start_ns / 1e9 < last
    assert figures["kv"]["layout"]["xaxis"]["range"] == near
    assert "percentiles-near" not in figures_of_an_incident_of(8.0)[1]


def test_what_replay_predicts_is_shown_and_its_absence_is_said() -> None:
    text = stall()[1].text
    assert "chat TTFT p90 3.86 s, then 21 ms (14 ms to 40 ms)" in text
    assert "vllm serve --max-num-batched-tokens 512" in text
    assert "20% of its steps are larger than any recorded" in text
    assert "99.1% of 4,076 steps with the recorded batch" in text
    without = Page(to_html(diagnosed("reasoning_prompt"), recorded("reasoning_prompt"))).text
    assert "charges only, no replay" in without
    assert "No replay was made" in without
    assert "Tonight" not in without


@pytest.mark.parametrize("made", [stall, hostile])
def test_the_file_is_below_6_mb_and_asks_nothing_of_a_network(made: Made) -> None:
    text, page = made()
    assert len(text.encode()) < MOST_BYTES
    loading = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}
    assert [name for _, attributes in page.elements for name in attributes if name in loading] == []
    assert page.count("link") == page.count("iframe") == page.count("img") == 0


@pytest.mark.parametrize("made", [stall, hostile])
def test_its_own_policy_lets_only_its_own_scripts_run(made: Made) -> None:
    _, page = made()
    policy = next(a["content"] or "" for tag, a in page.elements if tag == "meta" and "http-equiv" in a)
    digests = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in page.scripts[1:]]
    assert len(digests) == 2
    assert re.findall(r"'sha256-([^']+)'", policy) == digests
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_hostile_names_are_text_and_never_elements() -> None:
    (_, page), (_, harmless) = hostile(), stall()
    assert page.count("script") == harmless.count("script") == 3
    assert page.count("b") == 1  # of "Tonight:"
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []
    assert HOSTILE[0] in page.text
    assert HOSTILE[1] in page.text
    assert "\x1b" not in page.text
    assert "\u202e" not in page.text


def test_hostile_names_render_as_text_within_pictures_too() -> None:
    figures = json.loads(hostile()[1].scripts[0])
    texts = [text for figure in figures.values() for text in strings(figure)]
    assert any("&lt;" in text for text in texts)
    assert [text for text in texts if "<" in text.replace("<br>", "")] == []
    assert [text for text in texts if "$" in text] == []


def strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for child in children for text in strings(child)]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("made", [stall, hostile])
def test_a_browser_draws_all_pictures_and_runs_nothing_else(made: Made, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(made()[0], encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", path.as_uri()]
    drawn = Page(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    backgrounds = [a for tag, a in drawn.elements if tag == "svg" and a.get("class") == "main-svg"]
    assert len(backgrounds) >= 3
    assert drawn.count("img") == 0
    assert [name for tag, attributes in drawn.elements for name in attributes if name.startswith("on")] == []


def test_a_healthy_trace_has_a_page_too() -> None:
    arrivals = [Arrival(50_000_000, 20, 10, f"t{number % 2}") for number in range(40)]
    trace = read(run(Workload(EngineConfig(), arrivals, 50, 10_000)).lines())
    text = Page(to_html(diagnose(trace), trace)).text
    assert "HEALTHY" in text
    assert "What each tenant waited" in text
    assert "What would have been" not in text


@pytest.mark.parametrize("arrivals", [[Arrival(0, 8, 10, "only")], [Arrival(0, 8, 10, ""), Arrival(0, 5, 1, "b")]])
def test_a_trace_with_next_to_nothing_in_it_has_a_page_too(arrivals: list[Arrival]) -> None:
    trace = read(run(Workload(EngineConfig(), arrivals, 50, 10_000)).lines())
    assert "INSUFFICIENT DATA" in Page(to_html(diagnose(trace), trace)).text


def test_a_worst_request_that_the_trace_does_not_have_is_left_out() -> None:
    diagnosis = diagnosed("reasoning_prompt")
    worst = diagnosis.incidents[0]
    victim = replace(worst.victims[0], worst_request="elsewhere")
    changed = replace(diagnosis, incidents=(replace(worst, victims=(victim,)),))
    assert "The worst request's time" not in Page(to_html(changed, recorded("reasoning_prompt"))).text


# --- markup -------------------------------------------------------------------------------------------------------


def test_text_is_escaped_and_markup_is_not() -> None:
    assert element("p", "a<b", Html("<br>"), title='"x"') == '<p title="&quot;x&quot;">a&lt;b<br></p>'


@pytest.mark.parametrize("value", ["</script>", "<!--", "\u2028\u2029", {"</script>": ["<script>"]}])
def test_data_can_not_end_the_script_it_lies_in(value: object) -> None:
    block = data_block("data", value)
    assert block.count("<") == 2  # the element itself
    assert json.loads(Page(block).scripts[0]) == value


@pytest.mark.parametrize("name", [*HOSTILE, "", "x" * 500, "&lt;b&gt;"])
def test_a_label_is_short_one_line_and_has_nothing_to_render(name: str) -> None:
    shown = label(name)
    assert not set(shown) & set("<>$\n")
    assert 0 < len(shown.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&").replace("&#36;", "$")) <= 22
