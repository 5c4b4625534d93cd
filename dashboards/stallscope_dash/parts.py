"""Pieces that pages are made of: cards, charts, places for parts, links, and what is said where there is nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dash import dcc, html
from dash.dependencies import Wildcard
from dash.development.base_component import Component

from stallscope.reports.markup import Html, element
from stallscope_dash.markup import Markup

Identity = str | dict[str, str]
_CHART: dcc.Graph.Config = {
    "displaylogo": False,
    "responsive": True,
    "doubleClick": "autosize",  # ``zoomed`` takes it for all there is
    "modeBarButtonsToRemove": ["lasso2d", "select2d", "resetScale2d", "toImage", "sendChartToCloud"],
}
_LOADING = element("p", "Loading …", class_="dim loading", role="status")


# --- what stands in a layout ----------------------------------------------------------------------------------------


def attributes(**given: str) -> dict[str, Any]:
    """Attributes with a dash in their names (``aria_label``), which Dash's components take as they are."""
    return {name.replace("_", "-"): value for name, value in given.items()}


def time_chart(name: str) -> dict[str, str]:
    """The identity of a chart whose x axis is the time: those zoom together."""
    return {"type": "time", "name": name}


def seen(name: str | Wildcard) -> dict[str, Any]:
    """The identity of what a part is to show: nothing until its place comes into sight, then the address and the
    version of the data, whenever one of them changes (``assets/behaviour.js``)."""
    return {"type": "seen", "name": name}


def name_of(identity: Identity) -> str:
    return identity["name"] if isinstance(identity, dict) else identity


def chart(identity: Identity, title: str, about: str, height: int, *, tools: str = "") -> Component:
    """A card with a place for a figure, of so many pixels so that nothing moves when it comes, and with one for
    ``tools``, if they have an identity."""
    name = name_of(identity)
    graph = dcc.Graph(id=identity, config=_CHART, className="picture", style={"minHeight": height})
    buttons = [
        element(
            "button", kind.upper(), class_="save", data_save=kind, data_name=name, aria_label=f"Save {title} as {kind}"
        )
        for kind in ("png", "svg")
    ]
    shown = [
        Markup(element("p", about, class_="dim")),
        place(tools, at_once=True) if tools else None,
        html.Figure(made_later(name, graph, "figure", height), **attributes(aria_label=title)),
        Markup(element("div", *buttons, class_="saves")),
    ]
    return card(title, *shown)


def card(title: str, *content: Component | None) -> Component:
    """A section of a page."""
    return html.Section([html.H2(title), *(one for one in content if one is not None)], className="card")


def said(text: str) -> Component:
    """A sentence under a heading."""
    return Markup(element("p", text, class_="dim"))


def place(identity: str, height: int = 0, *, at_once: bool = False) -> Component:
    """Where a part will put its HTML, when it comes into sight or ``at_once``; says that it is loading until then."""
    shown = Markup(_LOADING, id=identity, style={"minHeight": height})
    about = {"data_part": identity} | ({"data_at": "once"} if at_once else {})
    return html.Div([dcc.Store(id=seen(identity)), shown], **attributes(**about))


def made_later(name: str, made: Component, prop: str, height: int = 0) -> Component:
    """Where a component that takes long to make comes to be when it comes into sight and its ``prop`` is drawn."""
    there = [
        dcc.Store(id=seen(name)),
        dcc.Store(id=drawn(name)),
        dcc.Store(id=later(name), data={"made": made.to_plotly_json(), "prop": prop}),  # type: ignore[no-untyped-call]
        html.Div(id=home(name), className="home", style={"minHeight": height}),
    ]
    return html.Div(there, **attributes(data_part=name))


def drawn(name: str | Wildcard) -> dict[str, Any]:
    """The identity of what was drawn for a component."""
    return {"type": "drawn", "name": name}


def later(name: str | Wildcard) -> dict[str, Any]:
    """The identity of what keeps the component until then."""
    return {"type": "later", "name": name}


def home(name: str | Wildcard) -> dict[str, Any]:
    """The identity of where it will be."""
    return {"type": "home", "name": name}


# --- what parts put there ---------------------------------------------------------------------------------------------


def trouble(text: str, kind: str = "") -> Html:
    """What went wrong, in a line that says what to do; in the head of a page, in place of the page, unless the
    ``kind`` is "ours" (``assets/app.css``)."""
    return element("p", text, class_=f"trouble {kind}".strip(), role="alert")


def nothing(text: str) -> Html:
    """What there is not, and what to do about that."""
    return element("p", text, class_="dim nothing")


def link(text: str, href: str, **attributes: str) -> Html:
    """To another address of ours."""
    return element("a", text, href=href or "?", **attributes)


def download(text: str, href: str, name: str = "file") -> Html:
    """To a file of ours, which is kept and not looked at; ``name``: where it has none."""
    return element("a", text, href=href, download=name)


def choice(label: str, links: Mapping[str, str], chosen: str) -> Html:
    """Links of which one is chosen: a choice that is kept in the address."""
    shown = [link(text, href, aria_current="true" if text == chosen else "") for text, href in links.items()]
    return element("nav", *shown, class_="choice", aria_label=label)


def question(kind: str, label: str, example: str) -> Html:
    """A line to type in: what is typed becomes the address's request, or its question of this kind."""
    field = element(
        "input", type="search", class_="search", placeholder=example, aria_label=label, autocomplete="off", name=kind
    )
    return element("form", field, class_="ask-form", data_ask=kind)


def command(line: str) -> Html:
    """What can be typed, with a button that copies it."""
    copy = element("button", "copy", class_="save", data_copy=line, aria_label="Copy the command")
    return element("p", element("code", line), " ", copy)
