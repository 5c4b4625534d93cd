"""When alerts fire: a row an alert, a bar a firing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stallscope.diagnosis.model import Incident
from stallscope.reports.figures.frame import Figure, Span, bands, numbers, when_of
from stallscope.reports.markup import label
from stallscope.views import words

_ROW_PX, _FRAME_PX = 28, 90
_SEVERITIES = {"page": "#8250c4", "ticket": "#858b99"}  # neither is the red of incidents
Firing = tuple[int, Mapping[str, str], int, int]  # the alert's number, labels, start and end, ns


def firings_figure(
    names: Sequence[str], severities: Sequence[str], fired: Sequence[Firing], span: Span, incidents: Sequence[Incident]
) -> Figure:
    """Pages and tickets over time, with the incidents shaded and numbered; those that never fire have no row."""
    rows = {alert: row for row, alert in enumerate(sorted({alert for alert, *_ in fired}))}
    data: list[Figure] = []
    for severity, colour in _SEVERITIES.items():
        mine = [one for one in fired if severities[one[0]] == severity]
        data.append(
            {
                "type": "bar", "orientation": "h", "name": severity, "showlegend": bool(mine), "width": 0.6,
                "base": [when_of(start) for _, _, start, _ in mine],
                "x": [(end - start) / 1e6 for _, _, start, end in mine],
                "y": [rows[alert] for alert, *_ in mine],
                "marker": {"color": colour, "line": {"width": 1, "color": colour}},
                "hovertext": [
                    f"{names[alert]}{_of(labels)}<br>{words.clock(start)} to {words.clock(end)}"
                    for alert, labels, start, end in mine
                ],
                "hoverinfo": "text",
            }
        )  # fmt: skip
    layout: Figure = {
        "height": _ROW_PX * len(rows) + _FRAME_PX,
        "barmode": "overlay",
        "xaxis": {"type": "date", "range": [when_of(span[0]), when_of(max([span[1], *(end for *_, end in fired)]))]},
        "yaxis": {
            "tickmode": "array", "tickvals": list(rows.values()), "ticktext": [names[alert] for alert in rows],
            "autorange": "reversed", "zeroline": False,
        },
        "shapes": bands(span, incidents),
        "annotations": numbers(span, incidents),
        "hovermode": "closest",
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _of(labels: Mapping[str, str]) -> str:
    who = labels.get("tenant") or labels.get("culprit") or ""
    return f": {label(who)}" if who else ""
