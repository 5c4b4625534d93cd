"""The engine over time: who held how much of it, and what ordinary panels show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stallscope.diagnosis.model import Incident
from stallscope.reports.figures.frame import (
    USUAL,
    Figure,
    Looks,
    Span,
    bands,
    culprits_of,
    faint,
    numbers,
    titled,
    when_of,
)
from stallscope.reports.markup import label
from stallscope.views.colours import GREY
from stallscope.views.engine_load import EngineLoad
from stallscope.views.resources import Resource, Stack
from stallscope.views.shares import Shares, Spent

_RESOURCES = {  # title of the axis, and unit
    Resource.TOKENS: ("tokens a step", "tokens"),
    Resource.KV: ("KV blocks", "blocks"),
    Resource.SLOTS: ("requests in the batch", "requests"),
    Resource.QUEUE: ("requests waiting", "requests"),
}


def resource_figure(
    view: Stack,
    span: Span,
    incidents: Sequence[Incident],
    looks: Looks,
    queue: Stack | None = None,
    chosen: Incident | None = None,
) -> Figure:
    """What tenants held, stacked, beside the capacity; the total of a ``queue`` as a line with an axis of its own.

    The ``chosen`` incident is shaded more than the others.
    """
    title, unit = _RESOURCES[view.resource]
    when = [when_of(int(time)) for time in view.time_ns]
    layers = [(label(tenant), looks.get(tenant, GREY).colour, 0.75) for tenant in view.tenants]
    amounts = list(view.values)
    if np.nanmax(view.cached, initial=0) > 0:
        layers.append(("(cached)", GREY.colour, 0.3))
        amounts.append(view.cached)
    data: list[Figure] = [
        {
            "type": "scatter", "mode": "lines", "stackgroup": "held", "name": name, "x": when,
            "y": np.round(amount, 1), "line": {"width": 0, "shape": "hv", "color": shade},
            "fillcolor": faint(shade, opacity), "hovertemplate": f"%{{y:,.0f}} {unit}",
        }
        for (name, shade, opacity), amount in zip(layers, amounts, strict=True)
    ]  # fmt: skip
    shapes = bands(span, incidents, chosen=chosen)
    if view.capacity:
        shapes.append(
            {
                "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": view.capacity, "y1": view.capacity,
                "line": {"color": GREY.colour, "width": 1, "dash": "dash"},
            }
        )  # fmt: skip
    layout: Figure = {
        "height": 330,
        "xaxis": {"type": "date", "range": [when_of(time) for time in span]},
        "yaxis": {"title": {"text": title}, "rangemode": "tozero", "tickformat": "~s"},
        "shapes": shapes,
        "hovermode": "x unified",
    }
    if queue is not None:
        data.append(
            {
                "type": "scatter", "mode": "lines", "name": "requests waiting", "yaxis": "y2",
                "x": [when_of(int(time)) for time in queue.time_ns], "y": queue.total,
                "line": {"width": 1.5, "shape": "hv", "dash": "dot", "color": GREY.colour},
                "hovertemplate": "%{y:,.0f} waiting",
            }
        )  # fmt: skip
        layout["yaxis2"] = {
            "title": {"text": "waiting"}, "overlaying": "y", "side": "right", "rangemode": "tozero", "showgrid": False,
            "tickmode": "auto", "nticks": 5, "tickformat": ",d",
        }  # fmt: skip
    return {"data": data, "layout": layout}


def shares_figure(view: Shares, spent: Spent, span: Span, incidents: Sequence[Incident], looks: Looks) -> Figure:
    """What tenants took of one resource in each bin, as shares on top of one another."""
    when = [when_of(int(middle)) for middle in view.start_ns + view.bin_ns // 2]
    culprits = culprits_of(incidents)
    data: list[Figure] = [
        {
            "type": "bar", "name": titled(tenant, culprits), "x": when, "y": np.round(share, 4),
            "width": view.bin_ns / 1e6,
            "marker": {
                "color": looks.get(tenant, GREY).colour,
                "pattern": {
                    "shape": "/" if tenant in culprits else "", "size": 7, "fgcolor": "rgba(255,255,255,0.55)",
                    "bgcolor": looks.get(tenant, GREY).colour,
                },
            },
            "hovertemplate": "%{y:.0%}",
        }
        for tenant, share in zip(view.tenants, spent.share, strict=True)
    ]  # fmt: skip
    layout: Figure = {
        "height": 300,
        "barmode": "stack",
        "bargap": 0,
        "xaxis": {"type": "date", "range": [when_of(time) for time in span]},
        "yaxis": {"range": [0, 1.001], "tickformat": ".0%"},
        "shapes": bands(span, incidents, above=True),
        "annotations": numbers(span, incidents),
        "hovermode": "x unified",
    }
    return {"data": data, "layout": layout}


def fairness_figure(view: Shares, span: Span, incidents: Sequence[Incident]) -> Figure:
    """Jain's index over time."""
    line: Figure = {
        "type": "scatter", "mode": "lines", "name": "Jain's index", "y": np.round(view.fairness, 3),
        "x": [when_of(int(middle)) for middle in view.start_ns + view.bin_ns // 2],
        "line": {"color": GREY.colour, "width": USUAL}, "hovertemplate": "%{y:.2f}", "showlegend": False,
    }  # fmt: skip
    layout: Figure = {
        "height": 220,
        "xaxis": {"type": "date", "range": [when_of(time) for time in span]},
        "yaxis": {"range": [0, 1.05], "title": {"text": "Jain's index"}},
        "shapes": bands(span, incidents),
        "annotations": numbers(span, incidents),
        "hovermode": "x unified",
    }
    return {"data": [line], "layout": layout}


def engine_load_figure(view: EngineLoad, span: Span, incidents: Sequence[Incident]) -> Figure:
    """Utilisation, KV cache in use and tokens a second, below each other, with the incidents shaded and numbered."""
    when = [when_of(int(middle)) for middle in view.start_ns + view.bin_ns // 2]
    lines = (
        ("y", "time in steps", view.busy, "solid", ".0%"),
        ("y", "GPU utilization", view.gpu_utilization, "2px,2px", ".0%"),
        ("y2", "KV cache in use", view.kv_share, "solid", ".0%"),
        ("y3", "output tokens/s", view.output_tokens_per_s, "solid", ",.0f"),
        ("y3", "prefill tokens/s", view.prefill_tokens_per_s, "2px,2px", ",.0f"),
    )
    shown = [line for line in lines if not np.isnan(line[2]).all()]
    data: list[Figure] = [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": when, "y": values, "xaxis": "x", "yaxis": axis,
            "line": {"color": GREY.colour, "dash": dash, "width": USUAL}, "hovertemplate": f"%{{y:{form}}}",
            "showlegend": [one[0] for one in shown].count(axis) > 1,
        }
        for axis, name, values, dash, form in shown
    ]  # fmt: skip
    share: Figure = {"range": [0, 1.05], "tickformat": ".0%", "zeroline": False}
    layout: Figure = {
        "height": 430,
        "grid": {"rows": 3, "columns": 1, "pattern": "coupled", "roworder": "top to bottom", "ygap": 0.14},
        "xaxis": {"type": "date", "anchor": "y3", "range": [when_of(time) for time in span]},
        "yaxis": {**share, "title": {"text": "utilisation"}},
        "yaxis2": {**share, "title": {"text": "KV cache"}},
        "yaxis3": {"title": {"text": "tokens/s"}, "rangemode": "tozero", "tickformat": "~s"},
        "shapes": bands(span, incidents),
        "annotations": numbers(span, incidents),
        "hovermode": "x unified",
    }
    return {"data": data, "layout": layout}
