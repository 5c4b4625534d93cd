"""Overview: the answer in words and the incidents, then what tenants waited, beside what ordinary panels show."""

from __future__ import annotations

from dash import html
from dash.development.base_component import Component

from stallscope.diagnosis.model import Incident
from stallscope.reports import pieces
from stallscope.reports.figures import Figure, engine_load_figure, percentiles_figure
from stallscope.reports.markup import Html, element, joined
from stallscope.views import words
from stallscope.views.engine_load import engine_load
from stallscope.views.percentiles import MEDIAN, P95, P99, SHOWN_METRICS, percentiles
from stallscope_dash import parts, window
from stallscope_dash.figures import framed
from stallscope_dash.pages import Page, Part
from stallscope_dash.recording import NotReadyError, Stage
from stallscope_dash.scene import Scene

_BINS = 90
_SHOWN, _AT_ONCE = 50, 5  # incidents: in all, and without being asked
_QUANTILES = {"p50": MEDIAN, "p95": P95, "p99": P99}
REPORT = "/report.html"
LATENCY, ENGINE = parts.time_chart("latency"), parts.time_chart("engine")


def layout() -> Component:
    return html.Div(
        [
            parts.place("answer", 130, at_once=True),
            parts.card(
                "Incidents",
                parts.said(
                    "Seconds lost are those beyond the usual, summed over requests: many wait at the same time."
                ),
                parts.place("incidents", 60, at_once=True),
            ),
            parts.place("overview-window", at_once=True),
            parts.chart(
                LATENCY,
                "What each tenant waited",
                "Requests by arrival; incidents are shaded and numbered. A bin with too few requests for a percentile "
                "shows the highest it can bear. Drag to zoom, double-click for all.",
                615,
                tools="quantiles",
            ),
            parts.chart(
                ENGINE,
                "What ordinary panels show",
                "The same time, not broken down by who shared the batch: a busy engine, no word of who waits for whom.",
                430,
            ),
        ]
    )


def answer(scene: Scene) -> Html:
    """The verdict in words, how sure it is, and what can be done tonight."""
    if scene.diagnosis is not None:
        report = parts.download("the report as one HTML file", REPORT)
        left_out = (
            element("p", f"left out in reading: {one.line}", class_="note")
            for one in scene.recording.trace.findings
            if one.line not in scene.diagnosis.notes
        )
        return joined(
            [*pieces.answer(scene.diagnosis), *left_out, element("p", "To keep or to pass on: ", report, class_="dim")]
        )
    if scene.recording.progress.stage is Stage.FAILED:
        return Html("")
    about = "The charts below are of the whole recording already."
    return joined([element("h1", "Looking for who did it …"), element("p", about, class_="dim")])


def incidents(scene: Scene) -> Html:
    if scene.diagnosis is None:
        raise NotReadyError("no diagnosis yet")
    found = scene.diagnosis.incidents
    if not found:
        return parts.nothing("None: no tenant waited far longer than it usually does. The charts show what is usual.")
    rows = [_row(scene, number, one) for number, one in enumerate(found[:_SHOWN], start=1)]
    worst = element("ol", *rows[:_AT_ONCE], class_="incidents")
    if len(rows) <= _AT_ONCE:
        return worst
    more = len(found) - len(rows)
    rest = [element("p", f"and {words.counted(more, 'smaller incident')}", class_="dim")] if more else []
    lesser = element("ol", *rows[_AT_ONCE:], class_="incidents")
    return joined([worst, element("details", element("summary", f"{len(found) - _AT_ONCE} more"), lesser, *rest)])


def _row(scene: Scene, number: int, one: Incident) -> Html:
    """A link to the incident: when it was, what, who did it to whom, and what it cost."""
    return element(
        "li",
        element(
            "a",
            element("span", str(number), class_="number"),
            element("span", pieces.verdict(one.verdict), " ", pieces.who(one, 3), class_="what"),
            element("span", f"{words.duration(one.lost_s)} lost", class_="lost"),
            element("span", words.incident_when(one), class_="dim when"),
            href=f"/incident{scene.to_incident(number)}",
        ),
    )


def quantiles(scene: Scene) -> Html:
    """Which percentile is drawn."""
    links = {one: scene.address.search(quantile=one) for one in _QUANTILES}
    return parts.choice("Percentile", links, scene.address.quantile if scene.address.quantile in links else "p99")


def latency(scene: Scene) -> Figure:
    view = scene.recording.view(percentiles, scene.replica, *scene.window, _BINS)
    quantile = _QUANTILES.get(scene.address.quantile, P99)
    slos = scene.recording.asked.slos
    figure = percentiles_figure(view, scene.window, scene.incidents, scene.looks, SHOWN_METRICS, quantile, slos=slos)
    return framed(figure)


def engine(scene: Scene) -> Figure:
    view = scene.recording.view(engine_load, scene.replica, *scene.window, _BINS)
    return framed(engine_load_figure(view, scene.window, scene.incidents))


PAGE = Page(
    "/",
    "Overview",
    layout,
    (
        Part("answer", answer),
        Part("incidents", incidents),
        Part("overview-window", window.replica_and_stretch),
        Part("quantiles", quantiles),
        Part(LATENCY, latency, "figure"),
        Part(ENGINE, engine, "figure"),
    ),
)
