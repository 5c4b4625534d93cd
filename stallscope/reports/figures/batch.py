"""The batch, step by step: a lane a request."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stallscope.diagnosis.model import Incident
from stallscope.reports.figures.frame import USUAL, Figure, Looks, culprits_of, faint, titled
from stallscope.reports.markup import label
from stallscope.views import words
from stallscope.views.colours import GREY
from stallscope.views.swimlanes import Swimlanes

_WORST = "rgba(229,72,77,0.16)"
_SLIM = 0.32
_LANE_PX, _LANES_FRAME_PX = 19, 110
_IN_BATCH = {"decoding": 0.5, "prefill": 1.0, "recomputing": 1.0, "paused": 0.25}  # opacity of those in the batch


def swimlanes_figure(view: Swimlanes, incidents: Sequence[Incident], looks: Looks) -> Figure:
    """A lane a request, coloured by tenant: prefill full, decoding lighter, waiting slim and grey; culprits edged."""
    culprits = culprits_of(incidents)
    groups: dict[tuple[str, str], list[int]] = {}
    for position, one in enumerate(view.rectangles):
        groups.setdefault((view.lanes[one.lane].tenant, one.doing), []).append(position)
    named: set[str] = set()
    data = []
    for (tenant, doing), members in sorted(groups.items(), key=lambda group: -_IN_BATCH.get(group[0][1], 0.0)):
        runs = doing in _IN_BATCH
        colour = looks.get(tenant, GREY).colour
        shade = faint(colour, _IN_BATCH[doing]) if runs else faint(GREY.colour, 0.55)
        chosen = [view.rectangles[position] for position in members]
        data.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": titled(tenant, culprits),
                "legendgroup": label(tenant),
                "showlegend": runs and tenant not in named,
                "base": [(one.start_ns - view.start_ns) / 1e9 for one in chosen],
                "x": [(one.end_ns - one.start_ns) / 1e9 for one in chosen],
                "y": [one.lane for one in chosen],
                "width": 0.82 if runs else _SLIM,
                "marker": {
                    "color": shade,
                    "line": {"color": colour, "width": USUAL if tenant in culprits and runs else 0},
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
            "line": {"width": 0.5, "color": faint(GREY.colour, 0.5)},
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
