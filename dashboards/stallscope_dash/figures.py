"""Figures as the app shows them: those of the reports in a frame that fits a card, or words where there is none."""

from __future__ import annotations

from stallscope.reports.figures import Figure
from stallscope.reports.markup import label

_INK, _PAPER = "#3c4150", "#ffffff"  # of a saved picture; on a page its style sheet says otherwise
_FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif'


def framed(figure: Figure) -> Figure:
    """The figure with margins, alike so that times stand below each other, and a legend below."""
    layout = dict(figure["layout"])  # type: ignore[call-overload]
    right = any("side" in layout.get(name, {}) for name in ("yaxis2", "yaxis3", "yaxis4"))
    shared: Figure = {
        "autosize": True,
        "paper_bgcolor": _PAPER,
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": _INK, "size": 12, "family": _FONT},
        "margin": {"l": 76, "r": 56 if right else 16, "t": 22, "b": 34},
        "legend": {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
        "hoverlabel": {"align": "left", "namelength": -1},
        "modebar": {"orientation": "v"},
    }
    axes = {
        # Whether labels overflow would be measured one by one, each with a layout of the page.
        name: {"automargin": True, "zeroline": False, "ticklabeloverflow": "allow", **axis}
        for name, axis in layout.items()
        if name.startswith(("xaxis", "yaxis"))
    }
    return {"data": figure["data"], "layout": {**layout, **axes, **shared}}


def message(text: str) -> Figure:
    """A sentence where there is no picture."""
    hidden = {"visible": False, "fixedrange": True}
    said = {"text": label(text, 400), "showarrow": False, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
    return framed({"data": [], "layout": {"xaxis": hidden, "yaxis": hidden, "annotations": [said]}})
