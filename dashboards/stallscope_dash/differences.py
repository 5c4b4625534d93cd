"""What is different about some requests, as bars: of each attribute the shares among these and among the others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from stallscope.reports.markup import Html, element, joined
from stallscope.reports.pieces import name
from stallscope.views import words
from stallscope.views.different import Difference, Different, Numbers
from stallscope_dash import parts

_MOST = 4  # attributes
_FEW_OTHERS = 0.5  # of those chosen: where fewer others were there, they say little


def differences(view: Different) -> Html:
    """The attributes that differ most: from the others of the same time, where there were any to speak of, else from
    their tenants' usual requests."""
    at_the_time = view.others >= _FEW_OTHERS * view.requests and bool(view.from_others)
    found = view.from_others if at_the_time else view.from_usual
    against = (
        f"{words.counted(view.others, 'other')} of the same time"
        if at_the_time
        else f"{view.usual:,} usual ones of their tenants"
    )
    about = f"{words.counted(view.requests, 'request')} (dark) against {against} (light)"
    if not found:
        return parts.nothing(f"{about}: nothing that chance would not explain.")
    return joined([element("p", f"{about}.", class_="dim"), *(_attribute(one) for one in found[:_MOST])])


def _attribute(one: Difference) -> Html:
    rows = [
        element(
            "tr",
            element("th", value, scope="row"),
            element("td", _bar(chosen, "these"), _bar(others, "those")),
            element("td", f"{chosen:.0%}"),
        )
        for value, chosen, others in _rows(one)
    ]
    return element("table", element("caption", one.attribute), element("tbody", *rows), class_="different")


def _bar(share: float, kind: str) -> Html:
    filled = element("span", style=f"width: {100 * share:.1f}%")
    return element("div", filled, class_=f"share {kind}", title=f"{share:.1%}")


def _rows(one: Difference) -> Iterator[tuple[str, float, float]]:
    shares = zip(one.chosen.tolist(), one.others.tolist(), strict=True)
    values: Iterable[str]
    if isinstance(one, Numbers):
        values = [f"up to {_number(value)}" for value in one.upto.tolist()]
    else:
        values = [name(value) for value in one.names]
    for value, (chosen, others) in zip(values, shares, strict=True):
        if chosen > 0.005 or others > 0.005:
            yield value, chosen, others


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
