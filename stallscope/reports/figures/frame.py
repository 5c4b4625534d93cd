"""What all figures share: how times and tenants are written, and how incidents are marked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime

from stallscope.diagnosis.model import Incident
from stallscope.reports.markup import label
from stallscope.views.colours import Look

Figure = dict[str, object]
Looks = Mapping[str, Look]
Span = tuple[int, int]  # ns

THIN, USUAL, THICK = 0.9, 1.8, 3.6  # widths of lines: medians, others, and those of culprits
_SHADE, _EDGE = "rgba(229,72,77,0.14)", "rgba(229,72,77,0.35)"
_FAINT, _FRAME = "rgba(229,72,77,0.06)", "#e5484d"
_APART = 0.02  # of a picture's width, between numbers of incidents


def culprits_of(incidents: Sequence[Incident]) -> set[str]:
    """Tenants that any of the incidents is blamed on."""
    return {culprit.tenant for incident in incidents for culprit in incident.culprits}


def titled(tenant: str, culprits: Collection[str]) -> str:
    """A tenant in a legend, which says who is a culprit."""
    return f"{label(tenant)} (culprit)" if tenant in culprits else label(tenant)


def bands(
    span: Span, incidents: Sequence[Incident], *, chosen: Incident | None = None, above: bool = False
) -> list[Figure]:
    """A shade for each incident within the span; with an edge, so that a short one in a long span is seen.

    Where one is ``chosen``, the others are fainter. ``above`` what is drawn, where that covers all, only an edge is.
    """
    edge: Figure = {"layer": "above", "line": {"width": 2, "color": _FRAME}}
    shade: Figure = {"layer": "below", "fillcolor": _SHADE, "line": {"width": 1, "color": _EDGE}}
    faint_shade: Figure = {"layer": "below", "fillcolor": _FAINT, "line": {"width": 0}}
    return [
        {
            "type": "rect", "yref": "paper", "y0": 0, "y1": 1, "x0": when_of(start), "x1": when_of(end),
            **(edge if above else shade if chosen in (None, one) else faint_shade),
        }
        for one, start, end in (
            (one, max(one.start_ns, span[0]), min(one.end_ns, span[1])) for one in incidents
        )
        if start <= end
    ]  # fmt: skip


def numbers(span: Span, incidents: Sequence[Incident]) -> list[Figure]:
    """The numbers of incidents above their shades; of those that would cover each other, the first."""
    taken: list[int] = []
    found: list[Figure] = []
    for number, one in enumerate(incidents, start=1):
        at = max(one.start_ns, span[0])
        near = any(abs(at - other) < _APART * (span[1] - span[0]) for other in taken)
        if near or one.start_ns > span[1] or one.end_ns < span[0]:
            continue
        taken.append(at)
        place: Figure = {"x": when_of(at), "xanchor": "left", "y": 1, "yref": "paper", "yanchor": "bottom"}
        found.append({**place, "text": str(number), "showarrow": False})
    return found


def when_of(time_ns: int) -> str:
    """A time for a date axis: of the local zone, as in the texts."""
    return datetime.fromtimestamp(time_ns / 1e9, tz=UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S.%f")


def faint(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"
