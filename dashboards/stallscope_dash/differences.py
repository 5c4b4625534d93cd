"""What is different about some requests, as bars: of each attribute the shares among these and among the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dash import html
from dash.development.base_component import Component

from stallscope.views import words
from stallscope.views.different import Difference, Different, Numbers
from stallscope_dash import parts

_MOST = 4  # attributes
_FEW_OTHERS = 0.5  # of those chosen: where fewer others were there, they say little


def differences(view: Different) -> Component:
    """The attributes that differ most: from the others of the same time, where there were any to speak of, else from
    their tenants' usual requests."""
    at_the_time = view.others >= _FEW_OTHERS * view.requests and bool(view.from_others)
    found = view.from_others if at_the_time else view.from_usual
    against = (
        f"{words.counted(view.others, 'other')} of the same time"
        if at_the_time
        else f"{view.usual:,} usual ones of their tenants"
    )
    said = f"{words.counted(view.requests, 'request')} (dark) against {against} (light)"
    if not found:
        return parts.nothing(f"{said}: nothing that chance would not explain.")
    return html.Div([html.P(f"{said}.", className="dim"), *(_attribute(one) for one in found[:_MOST])])


def _attribute(one: Difference) -> Component:
    rows = [
        html.Tr(
            [
                html.Th(said, scope="row"),
                html.Td([_bar(chosen, "these"), _bar(others, "those")]),
                html.Td(f"{chosen:.0%}"),
            ]
        )
        for said, chosen, others in _rows(one)
    ]
    return html.Table([html.Caption(one.attribute), html.Tbody(rows)], className="different")


def _bar(share: float, kind: str) -> Component:
    return html.Div(html.Span(style={"width": f"{100 * share:.1f}%"}), className=f"share {kind}", title=f"{share:.1%}")


def _rows(one: Difference) -> Iterator[tuple[Component | str, float, float]]:
    shares = zip(one.chosen.tolist(), one.others.tolist(), strict=True)
    labels: Iterable[Component | str]
    if isinstance(one, Numbers):
        labels = [f"up to {_number(value)}" for value in one.upto.tolist()]
    else:
        labels = [parts.name(name) for name in one.names]
    for said, (chosen, others) in zip(labels, shares, strict=True):
        if chosen > 0.005 or others > 0.005:
            yield said, chosen, others


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
