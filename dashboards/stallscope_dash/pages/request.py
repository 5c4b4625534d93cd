"""One request: where each millisecond of it went, whom that is charged to, and with whom it shared its steps."""

from __future__ import annotations

import shlex

from dash import html
from dash.development.base_component import Component

from stallscope.reports.figures import Figure, swimlanes_figure
from stallscope.trace.rename import REDACTED_SOURCE
from stallscope.views import words
from stallscope.views.swimlanes import swimlanes
from stallscope.views.waterfall import OWN, Row, Waterfall, code_of, waterfall_of
from stallscope_dash import parts
from stallscope_dash.figures import framed, message
from stallscope_dash.pages import Page, Part
from stallscope_dash.recording import NotReadyError
from stallscope_dash.scene import Scene

_ROWS = 60  # of a waterfall, the longest


def layout() -> Component:
    return html.Div(
        [
            parts.place("request-head", 150),
            parts.card("Where its time went", parts.place("waterfall", 200)),
            parts.chart(
                "request-batch",
                "With whom it shared the steps",
                "The batches around the step in which most time was lost while it was there; its lane is marked.",
                560,
            ),
        ]
    )


def _life(scene: Scene) -> Waterfall | None:
    """Of the address's request, or of the one that the incident hit hardest; None where there is neither."""
    request = wanted(scene)
    if not request:
        return None
    replica = scene.recording.replica(scene.recording.holder_of(request))
    return scene.recording.view(waterfall_of, replica, code_of(replica, request))


def wanted(scene: Scene) -> str:
    """The request that is looked at; "" for none."""
    if scene.address.request:
        return scene.address.request
    if scene.diagnosis is None:
        raise NotReadyError("nobody knows yet which request was hit hardest")
    victims = scene.incident.victims if scene.incident is not None else ()
    return victims[0].worst_request if victims else ""


def head(scene: Scene) -> Component:
    life = _life(scene)
    if life is None:
        return parts.card("Which request?", parts.nothing("Paste an id into the search above, or come from a table."))
    others = sum(part.seconds for part in life.parts if part.holder != OWN)
    first = "no token yet" if life.ttft_s is None else f"first token after {words.duration(life.ttft_s)}"
    estimated = [html.P("Nobody saw the batches: who was in them is an estimate.", className="note")]
    source = scene.recording.trace.source
    line = shlex.join(["stallscope", "explain", source, life.request])
    said = (
        f"{first}; {life.prompt_tokens:,} prompt and {life.output_tokens:,} output tokens; {life.state}; "
        f"arrived {words.clock(life.arrival_ns, zone=True)} on {life.replica}"
    )
    return html.Header(
        [
            html.H1([parts.code(life.request), " of ", parts.name(life.tenant)]),
            html.P(f"{words.duration(life.length_s)}, {words.duration(others)} of it not its own work; {said}."),
            *(estimated if life.estimated else []),
            html.Ul(
                [_charged(part.holder, part.mechanism, part.seconds) for part in life.parts[:8]], className="facts"
            ),
            *([] if source == REDACTED_SOURCE else [html.P(parts.code(line), className="dim")]),
        ]
    )


def _charged(holder: str, mechanism: str, seconds: float) -> Component:
    return html.Li([parts.name(holder), f" {mechanism} {words.duration(seconds)}"])


def falls(scene: Scene) -> Component:
    """The longest stretches of its life, in order: what it did, and whom that is charged to."""
    life = _life(scene)
    if life is None:
        return parts.nothing("No request is looked at.")
    shown = sorted(sorted(life.rows, key=lambda row: -row.length_s)[:_ROWS], key=lambda row: row.offset_s)
    heads = [html.Th(one, className="number", scope="col") for one in ("after", "for")]
    heads += [html.Th(one, scope="col") for one in ("where in its life", "doing", "charged to")]
    table = html.Table(
        [html.Thead(html.Tr(heads)), html.Tbody([_fall(row, life.length_s) for row in shown])], className="falls"
    )
    left = len(life.rows) - len(shown)
    more = [html.P(f"{words.counted(left, 'shorter row')} left out.", className="dim")] if left else []
    return html.Div([html.Div(table, className="scroll", tabIndex=0), *more])


def _fall(row: Row, length_s: float) -> Component:
    left, width = (f"{100 * value / max(length_s, 1e-9):.2f}%" for value in (row.offset_s, row.length_s))
    parties = [part for part in row.parts if part.seconds >= 0.1 * row.length_s][:3]
    who: list[parts.Child] = []
    for part in parties:
        who += [", " if who else "", parts.name(part.holder), f" {part.mechanism} {words.duration(part.seconds)}"]
    return html.Tr(
        [
            html.Td(words.duration(row.offset_s), className="number"),
            html.Td(words.duration(row.length_s), className="number"),
            html.Td(html.Div(html.Span(style={"left": left, "width": width}), className="track")),
            html.Td(f"{row.doing}, stalled" if row.stalled else row.doing),
            html.Td(who, className="text"),
        ],
        className="stalled" if row.stalled else None,
    )


def batch(scene: Scene) -> Figure:
    life = _life(scene)
    if life is None:
        return message("No request is looked at.")
    replica = scene.recording.replica(life.replica)
    end = life.arrival_ns + max(int(life.length_s * 1e9), 1)
    marked = code_of(replica, life.request)
    view = scene.recording.view(swimlanes, replica, life.arrival_ns, end, marked=marked)
    if view is None:
        return message("No step was recorded while it was there.")
    return framed(swimlanes_figure(view, scene.incidents, scene.looks))


PAGE = Page(
    "/request",
    "Request",
    layout,
    (
        Part("request-head", head),
        Part("waterfall", falls),
        Part("request-batch", batch, "figure"),
    ),
)
