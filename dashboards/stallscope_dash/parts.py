"""Pieces that pages are made of: cards, charts with their tools, names, tables, and what is said where nothing is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dash import dcc, html
from dash.development.base_component import Component

from stallscope.diagnosis.model import Verdict
from stallscope.views import words

Child = str | Component | None
Children = Child | Sequence[Child]
Identity = str | dict[str, str]
_LONGEST_NAME = 64
_CHART: dcc.Graph.Config = {
    "displaylogo": False,
    "responsive": True,
    "doubleClick": False,  # the whole trace is an address like any other: ``zoomed`` leads there
    "modeBarButtonsToRemove": ["lasso2d", "select2d", "autoScale2d", "toImage"],
}


def attributes(**given: str) -> dict[str, Any]:
    """Attributes with a dash in their names (``aria_label``), which Dash's components take as they are."""
    return {name.replace("_", "-"): value for name, value in given.items()}


def time_chart(name: str) -> dict[str, str]:
    """The identity of a chart whose x axis is the time: those zoom together."""
    return {"type": "time", "name": name}


def chart(identity: Identity, title: str, about: Children, height: int, *, tools: Children = None) -> Component:
    """A card with a place for a figure, of so many pixels so that nothing moves when it comes."""
    name = identity["name"] if isinstance(identity, dict) else identity
    graph = dcc.Graph(
        id=identity, figure=_empty(height), config=_CHART, className="picture", style={"minHeight": height}
    )
    return card(
        title,
        html.Figcaption(about, className="dim"),
        html.Div(tools, className="tools") if tools is not None else None,  # a component without children is falsy
        html.Figure(graph, **attributes(aria_label=title)),
        html.Div(
            [
                html.Button(
                    kind.upper(), className="save", **attributes(data_save=kind, data_name=name, aria_label=said)
                )
                for kind, said in (("png", f"Save {title} as PNG"), ("svg", f"Save {title} as SVG"))
            ],
            className="saves",
        ),
    )


def _empty(height: int) -> dict[str, object]:
    hidden = {"visible": False}
    clear = "rgba(0,0,0,0)"
    return {
        "data": [],
        "layout": {"xaxis": hidden, "yaxis": hidden, "height": height, "paper_bgcolor": clear, "plot_bgcolor": clear},
    }


def card(title: Children, *content: Child, classes: str = "") -> Component:
    """A section of a page."""
    return html.Section([html.H2(title), *(one for one in content if one is not None)], className=f"card {classes}")


def place(identity: str, height: int = 0) -> Component:
    """Where a part will draw components; says that it is loading until then."""
    waiting = html.P("Loading …", className="dim loading", role="status")
    return html.Div(waiting, id=identity, style={"minHeight": height} if height else {})


def trouble(text: str) -> Component:
    """What went wrong, in a line that says what to do."""
    return html.P(text, className="trouble", role="alert")


def nothing(text: str) -> Component:
    """What there is not, and what to do about that."""
    return html.P(text, className="dim nothing")


def name(text: str, kind: str = "") -> Component:
    """A name from the trace; in full where one points at it."""
    shown = words.shortened(words.printable(text), _LONGEST_NAME)
    return html.Span(shown, className=kind or None, title=text if len(text) > _LONGEST_NAME else None)


def code(text: str) -> Component:
    return html.Code(words.printable(text))


def code_lines(text: str) -> Component:
    """The same of several lines."""
    return html.Code("\n".join(words.printable(line) if line else "" for line in text.splitlines()))


def verdict(found: Verdict) -> Component:
    return html.Span(str(found).replace("_", " ").upper(), className=f"verdict {found}")


def choice(label: str, links: Mapping[str, str], chosen: str) -> Component:
    """Links of which one is chosen: a choice that is kept in the address."""
    shown = [dcc.Link(text, href=href, className="chosen" if text == chosen else "") for text, href in links.items()]
    return html.Nav(shown, className="choice", **attributes(aria_label=label))


def table(
    headings: Sequence[str], rows: Sequence[Sequence[Children]], *, names: int = 1, text: Sequence[int] = ()
) -> Component:
    """A small table whose first ``names`` columns are names, those at ``text`` sentences, and the others numbers; on a
    narrow page a row is a card, and each cell says what it is."""

    def kind(at: int) -> str:
        return "name" if at < names else "text" if at in text else "number"

    head = html.Tr([html.Th(one, className=kind(at), scope="col") for at, one in enumerate(headings)])
    body = [
        html.Tr(
            [
                html.Td(html.Div(cell), className=kind(at), **attributes(data_label=headings[at]))
                for at, cell in enumerate(row)
            ]
        )
        for row in rows
    ]
    return html.Div(html.Table([html.Thead(head), html.Tbody(body)], className="cards"), className="scroll", tabIndex=0)
