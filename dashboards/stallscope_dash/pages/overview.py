"""Overview: the answer in words, then what tenants waited, beside what ordinary panels show, and the incidents."""

from __future__ import annotations

from collections.abc import Iterator

from dash import dcc, html
from dash.development.base_component import Component

from stallscope.diagnosis.model import Diagnosis, Incident
from stallscope.reports.figures import Figure, engine_load_figure, percentiles_figure
from stallscope.views import words
from stallscope.views.engine_load import engine_load
from stallscope.views.percentiles import MEDIAN, P95, P99, SHOWN_METRICS, percentiles
from stallscope_dash import parts
from stallscope_dash.figures import framed
from stallscope_dash.pages import Page, Part
from stallscope_dash.recording import NotReadyError, Stage
from stallscope_dash.scene import Scene

_BINS = 90
_SHOWN, _AT_ONCE = 50, 5  # incidents: in all, and without being asked
_REPLICAS = 50  # to choose from
_QUANTILES = {"p50": MEDIAN, "p95": P95, "p99": P99}
LATENCY, ENGINE = parts.time_chart("latency"), parts.time_chart("engine")


def layout() -> Component:
    return html.Div(
        [
            parts.place("answer", 130),
            parts.card("Incidents", parts.place("incidents", 60)),
            html.Div(id="overview-window"),
            parts.chart(
                LATENCY,
                "What each tenant waited",
                "Requests by arrival; incidents are shaded and numbered. A bin with too few requests for a percentile "
                "shows the highest it can bear. Drag to zoom, double-click for all.",
                615,
                tools=html.Div(id="quantiles"),
            ),
            parts.chart(
                ENGINE,
                "What ordinary panels show",
                "The same time, not broken down by who shared the batch: in a stall, most of this looks fine.",
                430,
            ),
        ]
    )


def answer(scene: Scene) -> Component:
    """The verdict in words, how sure it is, and what can be done tonight."""
    diagnosis = scene.diagnosis
    if diagnosis is None:
        if scene.recording.progress.stage is Stage.FAILED:
            return html.Div()
        return html.Div(
            [
                html.H1("Looking for who did it …"),
                html.P("The charts below are of the whole recording already.", className="dim"),
            ]
        )
    length = words.duration((diagnosis.end_ns - diagnosis.start_ns) / 1e9)
    when = f"{words.day(diagnosis.start_ns)} {words.clock(diagnosis.start_ns, zone=True)}, {length}"
    return html.Header(
        [
            parts.verdict(diagnosis.verdict),
            html.Span(f"  {words.printable(diagnosis.source)} · {when}", className="dim"),
            html.H1(words.printable(words.headline(diagnosis))),
            html.Ul([html.Li(fact) for fact in words.evidence(diagnosis).split(" · ")], className="facts"),
            *tonight(diagnosis),
            *(html.P(f"note: {words.printable(note)}", className="note") for note in diagnosis.notes),
        ]
    )


def tonight(diagnosis: Diagnosis) -> Iterator[Component]:
    """The first remedy that needs no change of the engine, where a replay predicts one that helps."""
    best = words.tonight(diagnosis)
    if best is not None:
        how = [html.Br(), parts.code(best.how)] if best.how else []
        rest = f": by replay, {words.restored(best)} of what the victims lost would be gone"
        yield html.P([html.B("Tonight: "), words.printable(best.what), rest, *how], className="now")


def window(scene: Scene) -> Component | None:
    """Which replica and which stretch of time the charts show, and the way back to all of it."""
    start, end = scene.window
    names = scene.recording.names
    here = scene.replica_name
    shown: list[Component] = []
    if len(names) > 1:
        links = {one: scene.address.search(replica=one, since=None, until=None) or "?" for one in names[:_REPLICAS]}
        shown.append(parts.choice("Replica", links, here))
    if (start, end) != scene.span:
        said = f"{words.clock(start)} to {words.clock(end, zone=True)} ({words.duration((end - start) / 1e9)})"
        back = dcc.Link("show all", href=scene.address.search(since=None, until=None) or "?")
        shown.append(html.P([f"Zoomed to {said}: ", back], className="dim zoomed"))
    return html.Div(shown) if shown else None


def latency(scene: Scene) -> Figure:
    view = scene.recording.view(percentiles, scene.replica, *scene.window, _BINS)
    quantile = _QUANTILES.get(scene.address.quantile, P99)
    figure = percentiles_figure(view, scene.window, scene.incidents, scene.looks, SHOWN_METRICS, quantile)
    return framed(figure)


def engine(scene: Scene) -> Figure:
    view = scene.recording.view(engine_load, scene.replica, *scene.window, _BINS)
    return framed(engine_load_figure(view, scene.window, scene.incidents))


def quantiles(scene: Scene) -> Component:
    """Which percentile is drawn."""
    links = {name: scene.address.search(quantile=name) for name in _QUANTILES}
    chosen = scene.address.quantile if scene.address.quantile in _QUANTILES else "p99"
    return parts.choice("Percentile", links, chosen)


def incidents(scene: Scene) -> Component:
    if scene.diagnosis is None:
        raise NotReadyError("no diagnosis yet")
    found = scene.diagnosis.incidents
    if not found:
        return parts.nothing("None: no tenant waited far longer than it usually does. The charts show what is usual.")
    rows = [_row(scene, number, one) for number, one in enumerate(found[:_SHOWN], start=1)]
    worst, others = rows[:_AT_ONCE], rows[_AT_ONCE:]
    more = len(found) - len(rows)
    rest = [html.P(f"and {words.counted(more, 'smaller incident')}", className="dim")] if more else []
    lesser = [
        html.Details([html.Summary(f"{len(found) - len(worst)} more"), html.Ol(others, className="incidents"), *rest])
    ]
    return html.Div([html.Ol(worst, className="incidents"), *(lesser if others else [])])


def _row(scene: Scene, number: int, one: Incident) -> Component:
    """A link to the incident: when it was, what, who did it to whom, and what it cost."""
    culprits = [parts.name(culprit.tenant, "culprit") for culprit in one.culprits[:3]]
    victims = words.listed([words.shortened(words.printable(victim.tenant), 40) for victim in one.victims[:3]])
    did = [*_joined(culprits), " stalled ", victims] if culprits else [victims, " waited"]
    return html.Li(
        dcc.Link(
            [
                html.Span(str(number), className="number"),
                html.Span([parts.verdict(one.verdict), " ", *did], className="what"),
                html.Span(f"{words.duration(one.lost_s)} lost", className="lost"),
                html.Span(words.printable(words.incident_when(one)), className="dim when"),
            ],
            href=f"/incident{scene.address.search(incident=number, replica='', since=None, until=None)}",
        )
    )


def _joined(names: list[Component]) -> list[Component | str]:
    found: list[Component | str] = []
    for one in names:
        found += [", " if found else "", one]
    return found


PAGE = Page(
    "/",
    "Overview",
    layout,
    (
        Part("answer", answer),
        Part("overview-window", window),
        Part("quantiles", quantiles),
        Part(LATENCY, latency, "figure"),
        Part(ENGINE, engine, "figure"),
        Part("incidents", incidents),
    ),
)
