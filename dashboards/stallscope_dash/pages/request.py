"""One request: where each millisecond of it went, whom that is charged to, and with whom it shared its steps."""

from __future__ import annotations

import shlex

from dash import html
from dash.development.base_component import Component

from stallscope.reports import pieces
from stallscope.reports.figures import Figure, swimlanes_figure
from stallscope.reports.markup import Html, element
from stallscope.trace.rename import REDACTED_SOURCE
from stallscope.views import words
from stallscope.views.swimlanes import swimlanes
from stallscope.views.waterfall import Part as ChargedPart
from stallscope.views.waterfall import Waterfall, code_of, waterfall_of
from stallscope_dash import parts
from stallscope_dash.figures import framed, message
from stallscope_dash.pages import Page, Part
from stallscope_dash.recording import NotReadyError
from stallscope_dash.scene import Scene

_ROWS = 60  # of a waterfall, the longest


def layout() -> Component:
    return html.Div(
        [
            parts.place("request-head", 150, at_once=True),
            parts.card("Where its time went", parts.place("waterfall", 200, at_once=True)),
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
    replica = scene.recording.replica(scene.recording.holder_of(request, scene.replica_name))
    return scene.recording.view(waterfall_of, replica, code_of(replica, request))


def wanted(scene: Scene) -> str:
    """The request that is looked at; "" for none."""
    if scene.address.request:
        return scene.address.request
    if scene.diagnosis is None:
        raise NotReadyError("nobody knows yet which request was hit hardest")
    victims = scene.incident.victims if scene.incident is not None else ()
    return victims[0].worst_request if victims else ""


def head(scene: Scene) -> Html:
    life = _life(scene)
    if life is None:
        return parts.nothing("Which request? Paste an id into the search above, or come from a table.")
    arrived = f"{life.state}; arrived {words.clock(life.arrival_ns, zone=True)} on {life.replica}"
    estimated = element("p", "Nobody saw the batches: who was in them is an estimate.", class_="note")
    source = scene.recording.trace.source
    command = parts.command(shlex.join(["stallscope", "explain", source, life.request]))
    return element(
        "header",
        element("h1", pieces.about_request(life)),
        element("p", arrived, class_="dim"),
        estimated if life.estimated else "",
        element("ul", *(_charged(part) for part in life.parts[:8]), class_="facts"),
        command if source != REDACTED_SOURCE else "",
    )


def _charged(part: ChargedPart) -> Html:
    return element("li", pieces.name(part.holder), f" {part.mechanism} {words.duration(part.seconds)}")


def falls(scene: Scene) -> Html:
    """The longest stretches of its life, in order: what it did, and whom that is charged to."""
    life = _life(scene)
    return parts.nothing("No request is looked at.") if life is None else pieces.falls(life, _ROWS)


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
