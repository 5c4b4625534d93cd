"""Views as Plotly figures (plain dicts, ready for JSON): drawn here once, for the HTML file and for whoever draws too.

Categories are numbers with tick texts, never names: Plotly would merge equal labels, and take some for dates. Colours
that depend on a light or dark page are left to the page.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime

import numpy as np

from stallscope.diagnosis.model import Incident
from stallscope.diagnosis.slo import Slo
from stallscope.reports.markup import label
from stallscope.views import words
from stallscope.views.colours import GREY, Look
from stallscope.views.engine_load import EngineLoad
from stallscope.views.percentiles import MEDIAN, P99, Line, Percentiles
from stallscope.views.resources import Resource, Stack
from stallscope.views.shares import Shares, Spent
from stallscope.views.swimlanes import Swimlanes

Figure = dict[str, object]
Looks = Mapping[str, Look]
Span = tuple[int, int]  # ns

_SHADE, _EDGE, _WORST = "rgba(229,72,77,0.14)", "rgba(229,72,77,0.35)", "rgba(229,72,77,0.16)"
_APART = 0.02  # of a picture's width, between numbers of incidents
_SLIM = 0.32
_THIN, _USUAL, _THICK = 0.9, 1.8, 3.6  # widths of lines: medians, tails, and those of culprits
_ROW_PX, _ROWS_FRAME_PX = 185, 60
_LANE_PX, _LANES_FRAME_PX = 19, 110
_RESOURCES = {  # title of the axis, and unit
    Resource.TOKENS: ("tokens a step", "tokens"),
    Resource.KV: ("KV blocks", "blocks"),
    Resource.SLOTS: ("requests in the batch", "requests"),
    Resource.QUEUE: ("requests waiting", "requests"),
}
_IN_BATCH = {"decoding": 0.5, "prefill": 1.0, "recomputing": 1.0, "paused": 0.25}  # opacity of those in the batch


def percentiles_figure(
    view: Percentiles,
    span: Span,
    incidents: Sequence[Incident],
    looks: Looks,
    metrics: Sequence[str],
    quantile: float = P99,
    medians: bool = False,
    slos: Sequence[Slo] = (),
) -> Figure:
    """A row for each of ``metrics``, on logarithmic axes of time, with the incidents shaded and numbered.

    Each tenant's line is the one nearest to ``quantile``; with ``medians`` a thin one of its medians is beside it. The
    limits of ``slos`` on these metrics are dashed.
    """
    culprits = _culprits_of(incidents)
    data: list[Figure] = []
    named: set[str] = set()
    axes = {metric: f"y{row}" if row > 1 else "y" for row, metric in enumerate(metrics, start=1)}
    for metric, axis in axes.items():
        if medians:
            data += [_median(line, view.bin_ns, axis, looks) for line in view.nearest(metric, MEDIAN)]
        for line in view.nearest(metric, quantile):
            data.append(_line(line, view.bin_ns, axis, looks, culprits) | {"showlegend": line.tenant not in named})
            named.add(line.tenant)
    layout: Figure = {
        "height": _ROW_PX * len(metrics) + _ROWS_FRAME_PX,
        "grid": {"rows": len(metrics), "columns": 1, "pattern": "coupled", "roworder": "top to bottom", "ygap": 0.12},
        "xaxis": {"type": "date", "anchor": axes[metrics[-1]], "range": [_when(time) for time in span]},
        **{axis.replace("y", "yaxis"): _time_axis(words.METRIC_WORDS[metric]) for metric, axis in axes.items()},
        "shapes": [*_bands(span, incidents), *_limits(slos, axes, looks)],
        "annotations": _numbers(span, incidents),
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def _culprits_of(incidents: Sequence[Incident]) -> set[str]:
    """Tenants that any of the incidents is blamed on."""
    return {culprit.tenant for incident in incidents for culprit in incident.culprits}


def _line(line: Line, bin_ns: int, axis: str, looks: Looks, culprits: Collection[str]) -> Figure:
    name, tail, look = label(line.tenant), words.quantile_name(line.quantile), looks.get(line.tenant, GREY)
    metric = words.METRIC_WORDS[line.metric]
    hover = [
        f"{name}<br>{metric} {tail} {words.duration(value)}<br>{words.counted(int(requests), 'request')} arrived"
        + (f", {still} still waiting" if still else "")
        for value, requests, still in zip(line.value_s, line.requests, line.open_requests, strict=True)
    ]
    width = _THICK if line.tenant in culprits else _USUAL
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"{_titled(line.tenant, culprits)} {tail}",
        "legendgroup": name,
        **_points(line, bin_ns, axis),
        "line": {"color": look.colour, "dash": look.dash, "width": width},
        "marker": {"size": 4 + width, "symbol": look.marker},
        "hovertext": hover,
        "hoverinfo": "text+x",
    }


def _median(line: Line, bin_ns: int, axis: str, looks: Looks) -> Figure:
    look = looks.get(line.tenant, GREY)
    return {
        "type": "scatter",
        "mode": "lines",
        "legendgroup": label(line.tenant),
        "showlegend": False,
        **_points(line, bin_ns, axis),
        "line": {"color": look.colour, "dash": look.dash, "width": _THIN},
        "hoverinfo": "skip",
    }


def _points(line: Line, bin_ns: int, axis: str) -> Figure:
    """Where a line runs: in the middle of its bins, and above 0 for the sake of the axis."""
    when = [_when(int(middle)) for middle in line.start_ns + bin_ns // 2]
    return {"x": when, "y": np.maximum(line.value_s, 1e-4), "xaxis": "x", "yaxis": axis}


def _titled(tenant: str, culprits: Collection[str]) -> str:
    """A tenant in a legend, which says who is a culprit."""
    return f"{label(tenant)} (culprit)" if tenant in culprits else label(tenant)


def _limits(slos: Sequence[Slo], axes: Mapping[str, str], looks: Looks) -> list[Figure]:
    """A dashed line on the metric's row for each objective: in the tenant's colour where it is for one."""
    found: list[Figure] = []
    for slo in slos:
        if slo.metric not in axes:
            continue
        limit_s = slo.limit_ns / 1e9
        colour = looks.get(slo.tenant or "", GREY).colour
        whose = "" if slo.tenant is None else f" {label(slo.tenant)}"
        text = f"SLO{whose} {words.quantile_name(slo.quantile)} {words.duration(limit_s)}"
        found.append(
            {
                "type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": limit_s, "y1": limit_s,
                "yref": axes[slo.metric],
                "line": {"color": colour, "width": 1, "dash": "dash"},
                "label": {"text": text, "textposition": "end", "yanchor": "bottom", "font": {"size": 11}},
            }
        )  # fmt: skip
    return found


def resource_figure(
    view: Stack, span: Span, incidents: Sequence[Incident], looks: Looks, queue: Stack | None = None
) -> Figure:
    """What tenants held, stacked, beside the capacity; the total of a ``queue`` as a line with an axis of its own."""
    title, unit = _RESOURCES[view.resource]
    when = [_when(int(time)) for time in view.time_ns]
    layers = [(label(tenant), looks.get(tenant, GREY).colour, 0.75) for tenant in view.tenants]
    amounts = list(view.values)
    if np.nanmax(view.cached, initial=0) > 0:
        layers.append(("(cached)", GREY.colour, 0.3))
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
                "line": {"color": GREY.colour, "width": 1, "dash": "dash"},
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
    when = [_when(int(middle)) for middle in view.start_ns + view.bin_ns // 2]
    culprits = _culprits_of(incidents)
    data: list[Figure] = [
        {
            "type": "bar", "name": _titled(tenant, culprits), "x": when, "y": np.round(share, 4),
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
        "xaxis": {"type": "date", "range": [_when(time) for time in span]},
        "yaxis": {"range": [0, 1.001], "tickformat": ".0%"},
        "shapes": _bands(span, incidents),
        "annotations": _numbers(span, incidents),
        "hovermode": "x unified",
    }
    return {"data": data, "layout": layout}


def fairness_figure(view: Shares, span: Span, incidents: Sequence[Incident]) -> Figure:
    """Jain's index over time."""
    line: Figure = {
        "type": "scatter", "mode": "lines", "name": "Jain's index", "y": np.round(view.fairness, 3),
        "x": [_when(int(middle)) for middle in view.start_ns + view.bin_ns // 2],
        "line": {"color": GREY.colour, "width": _USUAL}, "hovertemplate": "%{y:.2f}", "showlegend": False,
    }  # fmt: skip
    layout: Figure = {
        "height": 220,
        "xaxis": {"type": "date", "range": [_when(time) for time in span]},
        "yaxis": {"range": [0, 1.05], "title": {"text": "Jain's index"}},
        "shapes": _bands(span, incidents),
        "annotations": _numbers(span, incidents),
        "hovermode": "x unified",
    }
    return {"data": [line], "layout": layout}


def engine_load_figure(view: EngineLoad, span: Span, incidents: Sequence[Incident]) -> Figure:
    """Utilisation, KV cache in use and tokens a second, below each other, with the incidents shaded and numbered."""
    when = [_when(int(middle)) for middle in view.start_ns + view.bin_ns // 2]
    lines = (
        ("y", "time in steps", view.busy, "solid", ".0%"),
        ("y", "GPU utilization", view.gpu_utilization, "2px,2px", ".0%"),
        ("y2", "KV cache in use", view.kv_share, "solid", ".0%"),
        ("y3", "output tokens/s", view.output_tokens_per_s, "solid", ",.0f"),
        ("y3", "prefill tokens/s", view.prefill_tokens_per_s, "2px,2px", ",.0f"),
    )
    data: list[Figure] = [
        {
            "type": "scatter", "mode": "lines", "name": name, "x": when, "y": values, "xaxis": "x", "yaxis": axis,
            "line": {"color": GREY.colour, "dash": dash, "width": _USUAL}, "hovertemplate": f"%{{y:{form}}}",
        }
        for axis, name, values, dash, form in lines
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


def swimlanes_figure(view: Swimlanes, incidents: Sequence[Incident], looks: Looks) -> Figure:
    """A lane a request, coloured by tenant: prefill full, decoding lighter, waiting slim and grey; culprits edged."""
    culprits = _culprits_of(incidents)
    groups: dict[tuple[str, str], list[int]] = {}
    for position, one in enumerate(view.rectangles):
        groups.setdefault((view.lanes[one.lane].tenant, one.doing), []).append(position)
    named: set[str] = set()
    data = []
    for (tenant, doing), members in sorted(groups.items(), key=lambda group: -_IN_BATCH.get(group[0][1], 0.0)):
        runs = doing in _IN_BATCH
        colour = looks.get(tenant, GREY).colour
        shade = _faint(colour, _IN_BATCH[doing]) if runs else _faint(GREY.colour, 0.55)
        chosen = [view.rectangles[position] for position in members]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": _titled(tenant, culprits),
                "legendgroup": label(tenant),
                "showlegend": runs and tenant not in named,
                "base": [(one.start_ns - view.start_ns) / 1e9 for one in chosen],
                "x": [(one.end_ns - one.start_ns) / 1e9 for one in chosen],
                "y": [one.lane for one in chosen],
                "width": 0.82 if runs else _SLIM,
                "marker": {
                    "color": shade,
                    "line": {"color": colour, "width": _USUAL if tenant in culprits and runs else 0},
                },
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
            "line": {"width": 0.5, "color": _faint(GREY.colour, 0.5)},
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
            "ticktext": [
                f"<b>▶ {label(lane.request)}</b>" if at == view.marked_lane else label(lane.request)
                for at, lane in enumerate(view.lanes)
            ],
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
