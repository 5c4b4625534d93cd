"""Views as Plotly figures (plain dicts, ready for JSON): drawn here once, for the HTML file and for whoever draws too.

Categories are numbers with tick texts, never names: Plotly would merge equal labels, and take some for dates. Colours
that depend on a light or dark page are left to the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime

import numpy as np

from stallscope.diagnosis.model import Incident
from stallscope.reports.markup import label
from stallscope.views import words
from stallscope.views.engine_load import EngineLoad
from stallscope.views.percentiles import MEDIAN, Line, Percentiles
from stallscope.views.resources import Resource, Stack
from stallscope.views.swimlanes import Swimlanes

Figure = dict[str, object]
Colours = Mapping[str, str]
Span = tuple[int, int]  # ns

_CULPRITS = ("#e5484d", "#f76b15", "#c2298a")
_TENANTS = ("#3b82f6", "#14a38b", "#a071e8", "#c99a0a", "#5ba532", "#2fa4c7", "#b07d5b", "#7c87a6")
_OTHERS = "#8b8f98"
_SHADE, _EDGE, _WORST = "rgba(229,72,77,0.14)", "rgba(229,72,77,0.35)", "rgba(229,72,77,0.16)"
_APART = 0.02  # of a picture's width, between numbers of incidents
_SLIM = 0.32
_LANE_PX, _LANES_FRAME_PX = 19, 110
_RESOURCES = {  # title of the axis, and unit
    Resource.TOKENS: ("tokens a step", "tokens"),
    Resource.KV: ("KV blocks", "blocks"),
    Resource.SLOTS: ("requests in the batch", "requests"),
    Resource.QUEUE: ("requests waiting", "requests"),
}
_IN_BATCH = {"decoding": 0.5, "prefill": 1.0, "recomputing": 1.0, "paused": 0.25}  # opacity of those in the batch


def colours(tenants: Sequence[str], culprits: Sequence[str]) -> dict[str, str]:
    """A colour for each tenant, the same in all pictures: culprits red or next to it, the others none of these."""
    others = [tenant for tenant in tenants if tenant not in culprits]
    found = {tenant: _TENANTS[position % len(_TENANTS)] for position, tenant in enumerate(others)}
    return found | {tenant: _CULPRITS[position % len(_CULPRITS)] for position, tenant in enumerate(culprits)}


def percentiles_figure(view: Percentiles, span: Span, incidents: Sequence[Incident], colour: Colours) -> Figure:
    """TTFT above, longest gaps below, both on logarithmic axes of time, with the incidents shaded and numbered."""
    metrics = ("ttft", "itl")
    lines = [line for line in view.lines if line.quantile != MEDIAN]
    data = [_line(line, view.bin_ns, metrics.index(line.metric), colour) for line in lines]
    layout: Figure = {
        "height": 430,
        "grid": {"rows": 2, "columns": 1, "pattern": "coupled", "roworder": "top to bottom", "ygap": 0.12},
        "xaxis": {"type": "date", "anchor": "y2", "range": [_when(time) for time in span]},
        "yaxis": _time_axis("TTFT"),
        "yaxis2": _time_axis("longest gap"),
        "shapes": _bands(span, incidents),
        "annotations": _numbers(span, incidents),
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def _line(line: Line, bin_ns: int, row: int, colour: Colours) -> Figure:
    name, tail = label(line.tenant), words.quantile_name(line.quantile)
    metric = words.METRIC_WORDS[line.metric]
    hover = [
        f"{name}<br>{metric} {tail} {words.duration(value)}<br>{words.counted(int(requests), 'request')} arrived"
        + (f", {still} still waiting" if still else "")
        for value, requests, still in zip(line.value_s, line.requests, line.open_requests, strict=True)
    ]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"{name} {tail}",
        "legendgroup": name,
        "showlegend": row == 0,
        "x": [_when(int(middle)) for middle in line.start_ns + bin_ns // 2],
        "y": np.maximum(line.value_s, 1e-4),
        "xaxis": "x",
        "yaxis": "y2" if row else "y",
        "line": {"color": colour.get(line.tenant, _OTHERS), "width": 1.8},
        "marker": {"size": 5},
        "hovertext": hover,
        "hoverinfo": "text+x",
    }


def resource_figure(
    view: Stack, span: Span, incidents: Sequence[Incident], colour: Colours, queue: Stack | None = None
) -> Figure:
    """What tenants held, stacked, beside the capacity; the total of a ``queue`` as a line with an axis of its own."""
    title, unit = _RESOURCES[view.resource]
    when = [_when(int(time)) for time in view.time_ns]
    layers = [(label(tenant), colour.get(tenant, _OTHERS), 0.75) for tenant in view.tenants]
    amounts = list(view.values)
    if np.nanmax(view.cached, initial=0) > 0:
        layers.append(("(cached)", _OTHERS, 0.3))
        amounts.append(view.cached)
    data: list[Figure] = [
        {
            "type": "scatter", "mode": "lines", "stackgroup": "held", "name": name, "x": when,
            "y": np.round(amount, 1), "line": {"width": 0, "shape": "hv", "color": shade},
            "fillcolor": _faint(shade, opacity), "hovertemplate": f"%{{y:,.0f}} {unit}",
        }
        for (name, shade, opacity), amount in zip(layers, amounts, strict=True)
    ]  # fmt: skip
    shapes = _bands(span, incidents)
    if view.capacity:
        shapes.append(
            {
                "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": view.capacity, "y1": view.capacity,
                "line": {"color": _OTHERS, "width": 1, "dash": "dash"},
            }
        )  # fmt: skip
    layout: Figure = {
        "height": 330,
        "xaxis": {"type": "date", "range": [_when(time) for time in span]},
        "yaxis": {"title": {"text": title}, "rangemode": "tozero", "tickformat": "~s"},
        "shapes": shapes,
        "hovermode": "x unified",
    }
    if queue is not None:
        data.append(
            {
                "type": "scatter", "mode": "lines", "name": "requests waiting", "yaxis": "y2",
                "x": [_when(int(time)) for time in queue.time_ns], "y": queue.total,
                "line": {"width": 1.5, "shape": "hv", "dash": "dot", "color": _OTHERS},
                "hovertemplate": "%{y:,.0f} waiting",
            }
        )  # fmt: skip
        layout["yaxis2"] = {
            "title": {"text": "waiting"}, "overlaying": "y", "side": "right", "rangemode": "tozero", "showgrid": False,
            "tickmode": "auto", "nticks": 5, "tickformat": ",d",
        }  # fmt: skip
    return {"data": data, "layout": layout}


def engine_load_figure(view: EngineLoad, span: Span, incidents: Sequence[Incident]) -> Figure:
    """Utilisation, KV cache in use and tokens a second, below each other, with the incidents shaded and numbered."""
    when = [_when(int(middle)) for middle in view.start_ns + view.bin_ns // 2]
    lines = (
        ("y", "time in steps", view.busy, 0, ".0%"),
        ("y", "GPU utilization", view.gpu_utilization, 1, ".0%"),
        ("y2", "KV cache in use", view.kv_share, 2, ".0%"),
        ("y3", "output tokens/s", view.output_tokens_per_s, 3, ",.0f"),
        ("y3", "prefill tokens/s", view.prefill_tokens_per_s, 4, ",.0f"),
    )
    data: list[Figure] = [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": when, "y": values, "xaxis": "x", "yaxis": axis,
            "line": {"color": _TENANTS[colour], "width": 1.8}, "hovertemplate": f"%{{y:{form}}}",
        }
        for axis, name, values, colour, form in lines
        if not np.isnan(values).all()
    ]  # fmt: skip
    share: Figure = {"range": [0, 1.05], "tickformat": ".0%", "zeroline": False}
    layout: Figure = {
        "height": 430,
        "grid": {"rows": 3, "columns": 1, "pattern": "coupled", "roworder": "top to bottom", "ygap": 0.14},
        "xaxis": {"type": "date", "anchor": "y3", "range": [_when(time) for time in span]},
        "yaxis": {**share, "title": {"text": "utilisation"}},
        "yaxis2": {**share, "title": {"text": "KV cache"}},
        "yaxis3": {"title": {"text": "tokens/s"}, "rangemode": "tozero", "tickformat": "~s"},
        "shapes": _bands(span, incidents),
        "annotations": _numbers(span, incidents),
        "hovermode": "x unified",
    }
    return {"data": data, "layout": layout}


def swimlanes_figure(view: Swimlanes, colour: Colours) -> Figure:
    """A lane a request, coloured by tenant: prefill full, decoding lighter, waiting slim and grey."""
    groups: dict[tuple[str, str], list[int]] = {}
    for position, one in enumerate(view.rectangles):
        groups.setdefault((view.lanes[one.lane].tenant, one.doing), []).append(position)
    named: set[str] = set()
    data = []
    for (tenant, doing), members in sorted(groups.items(), key=lambda group: -_IN_BATCH.get(group[0][1], 0.0)):
        runs = doing in _IN_BATCH
        shade = _faint(colour.get(tenant, _OTHERS), _IN_BATCH[doing]) if runs else _faint(_OTHERS, 0.55)
        chosen = [view.rectangles[position] for position in members]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": label(tenant),
                "legendgroup": label(tenant),
                "showlegend": runs and tenant not in named,
                "base": [(one.start_ns - view.start_ns) / 1e9 for one in chosen],
                "x": [(one.end_ns - one.start_ns) / 1e9 for one in chosen],
                "y": [one.lane for one in chosen],
                "width": 0.82 if runs else _SLIM,
                "marker": {"color": shade, "line": {"width": 0}},
                "hovertext": [
                    f"{label(view.lanes[one.lane].request)} of {label(tenant)}<br>{doing} "
                    f"{words.duration((one.end_ns - one.start_ns) / 1e9)}, {words.counted(one.steps, 'step')}"
                    + (f", {one.tokens:,} tokens" if one.tokens else "")
                    for one in chosen
                ],
                "hoverinfo": "text",
            }
        )
        if runs:
            named.add(tenant)
    starts, ends = (np.round((times - view.start_ns) / 1e9, 6) for times in (view.step_start_ns, view.step_end_ns))
    worst = int(np.argmax(ends - starts))
    edges: list[Figure] = [
        {
            "type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": end, "x1": end, "layer": "below",
            "line": {"width": 0.5, "color": _faint(_OTHERS, 0.5)},
        }
        for end in ends.tolist()
    ]  # fmt: skip
    longest: Figure = {
        "type": "rect", "yref": "paper", "y0": 0, "y1": 1, "x0": float(starts[worst]), "x1": float(ends[worst]),
        "layer": "below", "fillcolor": _WORST, "line": {"width": 0},
    }  # fmt: skip
    layout: Figure = {
        "height": _LANE_PX * len(view.lanes) + _LANES_FRAME_PX,
        "barmode": "overlay",
        "xaxis": {"title": {"text": f"seconds after {words.clock(view.start_ns)}"}, "zeroline": False},
        "yaxis": {
            "tickmode": "array",
            "tickvals": list(range(len(view.lanes))),
            "ticktext": [label(lane.request) for lane in view.lanes],
            "autorange": "reversed",
            "showgrid": False,
            "zeroline": False,
            "tickfont": {"size": 10},
        },
        "shapes": [*edges, longest],
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def _bands(span: Span, incidents: Sequence[Incident]) -> list[Figure]:
    """A shade for each incident within the span; with an edge, so that a short one in a long span is seen."""
    return [
        {
            "type": "rect", "yref": "paper", "y0": 0, "y1": 1, "x0": _when(start), "x1": _when(end),
            "layer": "below", "fillcolor": _SHADE, "line": {"width": 1, "color": _EDGE},
        }
        for start, end in (
            (max(one.start_ns, span[0]), min(one.end_ns, span[1])) for one in incidents
        )
        if start <= end
    ]  # fmt: skip


def _numbers(span: Span, incidents: Sequence[Incident]) -> list[Figure]:
    """The numbers of incidents above their shades; of those that would cover each other, the first."""
    taken: list[int] = []
    found: list[Figure] = []
    for number, one in enumerate(incidents, start=1):
        at = max(one.start_ns, span[0])
        near = any(abs(at - other) < _APART * (span[1] - span[0]) for other in taken)
        if near or one.start_ns > span[1] or one.end_ns < span[0]:
            continue
        taken.append(at)
        place: Figure = {"x": _when(at), "xanchor": "left", "y": 1, "yref": "paper", "yanchor": "bottom"}
        found.append({**place, "text": str(number), "showarrow": False})
    return found


def _time_axis(title: str) -> Figure:
    ticks = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
    names = ["1 ms", "10 ms", "100 ms", "1 s", "10 s", "100 s", "1000 s"]
    return {"type": "log", "title": {"text": title}, "tickvals": ticks, "ticktext": names, "zeroline": False}


def _when(time_ns: int) -> str:
    """A time for a date axis: of the local zone, as in the texts."""
    return datetime.fromtimestamp(time_ns / 1e9, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")


def _faint(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
