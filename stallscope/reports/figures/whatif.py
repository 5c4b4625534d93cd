"""What if, side by side: a row for each tenant, metric and percentile."""

from __future__ import annotations

import numpy as np

from stallscope.diagnosis.timeline import Floats
from stallscope.reports.figures.frame import Figure, Looks
from stallscope.reports.figures.waits import seconds_axis
from stallscope.reports.markup import label
from stallscope.views import words
from stallscope.views.colours import GREY
from stallscope.views.whatif import SideBySide

_ROW_PX, _FRAME_PX = 30, 110


def what_if_figure(view: SideBySide, looks: Looks) -> Figure:
    """As recorded (an empty circle), replayed unchanged (a bar), and with the change (full, with all its draws)."""
    rows = list(range(len(view.tenants)))
    colours = [looks.get(tenant, GREY).colour for tenant in view.tenants]
    spread = {
        "type": "data", "symmetric": False, "array": view.high_s - view.predicted_s, "thickness": 1.5, "width": 5,
        "arrayminus": view.predicted_s - view.low_s, "color": GREY.colour,
    }  # fmt: skip
    shown: tuple[tuple[str, Floats, str, Figure], ...] = (
        ("recorded", view.recorded_s, "circle-open", {}),
        ("replayed unchanged", view.replayed_s, "line-ns-open", {}),
        ("with the change", view.predicted_s, "circle", {"error_x": spread}),
    )
    data: list[Figure] = [
        {
            "type": "scatter", "mode": "markers", "name": name, "x": np.maximum(values, 1e-4), "y": rows,
            "marker": _marker(symbol, colours),
            "hovertext": [f"{name} {words.duration(one)}" if not np.isnan(one) else "" for one in values.tolist()],
            "hoverinfo": "text", "showlegend": False, **extra,
        }
        for name, values, symbol, extra in shown
    ]  # fmt: skip
    # Their shapes alone, in nobody's colour.
    data += [
        {"type": "scatter", "mode": "markers", "name": name, "x": [None], "y": [None], "marker": _marker(symbol)}
        for name, _, symbol, _ in shown
    ]
    names = [
        f"{label(tenant)} {words.METRIC_WORDS[metric]} {words.quantile_name(quantile)}"
        for tenant, metric, quantile in zip(view.tenants, view.metrics, view.quantile.tolist(), strict=True)
    ]
    layout: Figure = {
        "height": _ROW_PX * len(rows) + _FRAME_PX,
        "xaxis": seconds_axis(""),
        "yaxis": {
            "tickmode": "array", "tickvals": rows, "ticktext": names, "autorange": "reversed", "zeroline": False,
        },
        "hovermode": "closest",
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _marker(symbol: str, colours: str | list[str] = GREY.colour) -> Figure:
    return {"symbol": symbol, "size": 11, "color": colours, "line": {"width": 2, "color": colours}}
