"""What tenants waited over time: a row for each metric, a line for each tenant."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from stallscope.diagnosis.model import Incident
from stallscope.diagnosis.slo import Slo
from stallscope.reports.figures.frame import (
    THICK,
    THIN,
    USUAL,
    Figure,
    Looks,
    Span,
    bands,
    culprits_of,
    numbers,
    titled,
    when_of,
)
from stallscope.reports.markup import label
from stallscope.views import words
from stallscope.views.colours import GREY
from stallscope.views.percentiles import MEDIAN, P99, Line, Percentiles

_ROW_PX, _ROWS_FRAME_PX = 185, 60
_NOTHING: Figure = {
    "text": "no request arrived in this stretch", "showarrow": False, "xref": "paper", "yref": "paper",
    "x": 0.5, "y": 0.5,
}  # fmt: skip
_MOST_MARKERS = 15  # of a line: enough to tell tenants apart without colour; each is an element of its own to draw


def percentiles_figure(
    view: Percentiles,
    span: Span,
    incidents: Sequence[Incident],
    looks: Looks,
    metrics: Sequence[str],
    quantile: float = P99,
    medians: bool = False,
    slos: Sequence[Slo] = (),
    chosen: Incident | None = None,
) -> Figure:
    """A row for each of ``metrics``, on logarithmic axes of time, with the incidents shaded and numbered; the
    ``chosen`` one more than the others.

    Each tenant's line is the one nearest to ``quantile``; with ``medians`` a thin one of its medians is beside it. The
    limits of ``slos`` on these metrics are dashed.
    """
    culprits = culprits_of(incidents)
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
        "xaxis": {"type": "date", "anchor": axes[metrics[-1]], "range": [when_of(time) for time in span]},
        **{axis.replace("y", "yaxis"): seconds_axis(words.METRIC_WORDS[metric]) for metric, axis in axes.items()},
        "shapes": [*bands(span, incidents, chosen=chosen), *_limits(slos, axes, looks)],
        "annotations": numbers(span, incidents) if data else [_NOTHING],
        "hovermode": "closest",
    }
    return {"data": data, "layout": layout}


def _line(line: Line, bin_ns: int, axis: str, looks: Looks, culprits: Collection[str]) -> Figure:
    name, tail, look = label(line.tenant), words.quantile_name(line.quantile), looks.get(line.tenant, GREY)
    metric = words.METRIC_WORDS[line.metric]
    hover = [
        f"{name}<br>{metric} {tail} {words.duration(value)}<br>{words.counted(int(requests), 'request')} arrived"
        + (f", {still} still waiting" if still else "")
        for value, requests, still in zip(line.value_s, line.requests, line.open_requests, strict=True)
    ]
    width = THICK if line.tenant in culprits else USUAL
    is_whole = bool(np.isfinite(line.value_s).all())  # else a marker may be all there is of a bin between two gaps
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"{titled(line.tenant, culprits)} {tail}",
        "legendgroup": name,
        **_points(line, bin_ns, axis),
        "line": {"color": look.colour, "dash": look.dash, "width": width},
        "marker": {"size": 4 + width, "symbol": look.marker, "maxdisplayed": _MOST_MARKERS if is_whole else 0},
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
        "line": {"color": look.colour, "dash": look.dash, "width": THIN},
        "hoverinfo": "skip",
    }


def _points(line: Line, bin_ns: int, axis: str) -> Figure:
    """Where a line runs: in the middle of its bins, and above 0 for the sake of the axis."""
    when = [when_of(int(middle)) for middle in line.start_ns + bin_ns // 2]
    return {"x": when, "y": np.maximum(line.value_s, 1e-4), "xaxis": "x", "yaxis": axis}


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


def seconds_axis(title: str) -> Figure:
    ticks = (0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
    names = ["1 ms", "10 ms", "100 ms", "1 s", "10 s", "100 s", "1000 s"]
    return {"type": "log", "title": {"text": title}, "tickvals": ticks, "ticktext": names, "zeroline": False}
