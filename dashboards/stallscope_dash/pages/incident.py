"""One incident: who did it, by which mechanism, how sure that is, what the batch looked like, and what would help."""

from __future__ import annotations

import shlex
from functools import partial

from dash import html
from dash.development.base_component import Component

from stallscope.diagnosis.model import Incident, Intervention, Quantile, Victim
from stallscope.diagnosis.timeline import Ints
from stallscope.errors import UsageError
from stallscope.reports import pieces
from stallscope.reports.figures import Figure, percentiles_figure, resource_figure, swimlanes_figure
from stallscope.reports.markup import Html, element, joined
from stallscope.trace.rename import REDACTED_SOURCE
from stallscope.views import words
from stallscope.views.blame import blame
from stallscope.views.different import blamed_requests, different, stalled_requests
from stallscope.views.hardest_hit import hardest_hit
from stallscope.views.percentiles import SHOWN_METRICS, percentiles
from stallscope.views.resources import Resource, resources
from stallscope.views.swimlanes import swimlanes
from stallscope_dash import parts, window
from stallscope_dash.differences import differences
from stallscope_dash.figures import framed, message
from stallscope_dash.pages import Page, Part
from stallscope_dash.recording import NotReadyError
from stallscope_dash.scene import Scene
from stallscope_dash.tables import Column, grid, linked

_BINS = 90
_MOMENTS = 300
LATENCY = parts.time_chart("incident-latency")
_RESOURCES = {
    Resource.TOKENS: "Tokens of each step",
    Resource.KV: "KV cache",
    Resource.SLOTS: "Slots of the batch",
    Resource.QUEUE: "Waiting requests",
}
_HIT = (
    Column("request", "request", link=True),
    Column("tenant", "of"),
    Column("metric", "waited for"),
    Column("waited", "waited, s", decimals=3),
    Column("delay", "beyond own work, s", decimals=3),
    Column("held", "held up by"),
    Column("mechanism", "by"),
    Column("held_s", "for, s", decimals=3),
    Column("at", "from"),
)
_CAUSED = (
    Column("request", "request", link=True),
    Column("tenant", "of"),
    Column("caused", "cost them, s", decimals=2),
    Column("share", "of its tenant's, %", decimals=1),
    Column("prompt", "prompt tokens", decimals=0),
    Column("output", "output tokens", decimals=0),
    Column("at", "arrived"),
)


def layout() -> Component:
    return html.Div(
        [
            parts.place("incident-head", 240, at_once=True),
            parts.place("incident-window", at_once=True),
            parts.chart(LATENCY, "Around it", "What each tenant waited; drag to zoom, double-click for all.", 430),
            parts.chart(
                "swimlanes",
                "Who was in the batch around the worst step",
                "A lane is a request, a band what it was doing: full colour prefill, lighter decoding, slim grey "
                "waiting. Thin lines are the ends of steps; the longest is shaded.",
                560,
            ),
            html.Div(
                [
                    parts.chart(_stack(resource), title, "By tenant, at the fullest moment of each stretch.", 290)
                    for resource, title in _RESOURCES.items()
                ],
                className="pairs",
            ),
            parts.card(
                "Who waited for whom",
                parts.said(pieces.ABOUT_BLAME),
                parts.place("blame", 120),
            ),
            parts.card("Then, usually, and without", parts.place("percentiles-then", 120)),
            parts.card("Hit hardest", grid("hit", _HIT)),
            parts.card("Caused most", grid("caused", _CAUSED)),
            html.Div(
                [
                    parts.card("What is different about those that were hit", parts.place("different-hit", 120)),
                    parts.card("What is different about those that caused most", parts.place("different-caused", 120)),
                ],
                className="pairs",
            ),
            parts.card("What would help", parts.place("remedies", 60)),
            parts.card("The same elsewhere", parts.place("commands", 60)),
        ]
    )


def _stack(resource: Resource) -> dict[str, str]:
    return parts.time_chart(f"incident-{resource}")


def _the_incident(scene: Scene) -> Incident | None:
    """None where nobody waited for long. Raises NotReadyError while nobody knows, UsageError where it is not there."""
    if scene.diagnosis is None:
        raise NotReadyError("no diagnosis yet")
    found = len(scene.diagnosis.incidents)
    if scene.incident is None and found and (scene.address.incident or scene.address.at is not None):
        at = scene.address.at
        which = f"{scene.address.incident}" if at is None else f"any more that went on at {words.clock(at, zone=True)}"
        raise UsageError(f"there is no incident {which}: {found} were found")
    return scene.incident


# --- what it was ----------------------------------------------------------------------------------------------------


def head(scene: Scene) -> Html:
    """The incident in words: verdict, culprits, mechanism, confidence, runner-up; and the way to its neighbours."""
    incident = _the_incident(scene)
    if incident is None:
        about = parts.link("what is usual", "/")
        where = f" on {scene.replica_name}" if len(scene.recording.names) > 1 else ""
        return element("p", f"No incident{where}: no tenant waited far longer than ", about, ".", class_="dim nothing")
    count = len(scene.diagnosis.incidents) if scene.diagnosis is not None else 0
    steps = {
        text: f"/incident{scene.to_incident(number)}"
        for text, number in (("← previous", scene.number - 1), ("next →", scene.number + 1))
        if 1 <= number <= count
    }
    others = parts.choice("Other incidents", steps, "") if steps else ""
    return element(
        "header",
        element("p", f"Incident {scene.number} of {count} ", others, class_="dim"),
        element(
            "h1",
            pieces.verdict(incident.verdict),
            " ",
            pieces.who(incident),
            f": {words.duration(incident.lost_s)} lost",
        ),
        element("p", words.incident_when(incident), class_="dim"),
        pieces.incident_facts(incident, lambda request: f"/request{scene.address.search(request=request)}"),
        class_="incident",
    )


# --- pictures -------------------------------------------------------------------------------------------------------


def latency(scene: Scene) -> Figure:
    chosen = _the_incident(scene)
    view = scene.recording.view(percentiles, scene.replica, *scene.near, _BINS)
    metrics = SHOWN_METRICS[:2]
    return framed(percentiles_figure(view, scene.near, scene.incidents, scene.looks, metrics, chosen=chosen))


def held(scene: Scene, resource: Resource) -> Figure:
    """Who had how much of a resource."""
    chosen = _the_incident(scene)
    view = scene.recording.view(resources, scene.replica, resource, *scene.near, _MOMENTS)
    return framed(resource_figure(view, scene.near, scene.incidents, scene.looks, chosen=chosen))


def batch(scene: Scene) -> Figure:
    incident = _the_incident(scene)
    if incident is None:
        return message("No incident, hence no worst step.")
    start, end = max(scene.near[0], incident.start_ns), min(scene.near[1], incident.end_ns)
    start, end = (start, end) if start < end else scene.near
    view = scene.recording.view(swimlanes, scene.replica, start, end)
    if view is None:
        return message("No step was recorded in this stretch of time.")
    return framed(swimlanes_figure(view, scene.incidents, scene.looks))


def who_for_whom(scene: Scene) -> Html:
    """The matrix of blame: rows are victims, columns are who is charged."""
    incident = _the_incident(scene)
    if incident is None:
        return parts.nothing("Nobody waited for long.")
    view = blame(scene.replica, scene.recording.waits(scene.replica_name), [(incident.start_ns, incident.end_ns)])
    return pieces.blame_matrix(view) if view.victims else parts.nothing("Nothing is charged to anybody here.")


# --- numbers --------------------------------------------------------------------------------------------------------


def then(scene: Scene) -> Html:
    """Each victim's percentiles in the incident, usually, and as replayed with the culprits as usual."""
    incident = _the_incident(scene)
    if incident is None:
        return parts.nothing("Nobody waited for long.")
    best = incident.interventions[0] if incident.interventions else None
    rows = [_percentile(victim, during, best) for victim in incident.victims for during in victim.during]
    without = words.printable(best.what) if best is not None else "without (no replay)"
    return pieces.table(["victim", "of", "then", "usually", without, "requests"], rows, names=2)


def _percentile(victim: Victim, during: Quantile, best: Intervention | None) -> list[str]:
    usual = next((one for one in victim.usual if one.metric == during.metric), None)
    told = (
        (one for one in best.predictions if (one.tenant, one.metric) == (victim.tenant, during.metric)) if best else ()
    )
    predicted = next(iter(told), None)
    said = "-"
    if predicted is not None and predicted.high_s <= 0 < predicted.recorded_s:
        said = "no request left"
    elif predicted is not None:
        spread = f" ({words.duration(predicted.low_s)} to {words.duration(predicted.high_s)})"
        said = words.duration(predicted.predicted_s) + (spread if predicted.low_s != predicted.high_s else "")
    return [
        pieces.name(victim.tenant),
        f"{words.METRIC_WORDS.get(during.metric, during.metric)} {words.quantile_name(during.quantile)}",
        words.duration(during.value_s),
        words.quantile(usual) if usual is not None else "-",
        said,
        f"{victim.stalled_requests:,} stalled of {victim.requests:,}",
    ]


def hit(scene: Scene) -> list[dict[str, object]]:
    incident = _the_incident(scene)
    if incident is None:
        return []
    found = scene.recording.view(hardest_hit, scene.replica, scene.recording.waits(scene.replica_name), incident)
    return [
        {
            "request": linked(one.request, f"/request{scene.address.search(request=one.request)}"),
            "tenant": one.tenant,
            "metric": words.METRIC_WORDS.get(one.metric, one.metric),
            "waited": round(one.waited_s, 4),
            "delay": round(one.delay_s, 4),
            "held": one.holder,
            "mechanism": one.mechanism,
            "held_s": round(one.held_s, 4),
            "at": words.clock(one.begin_ns),
        }
        for one in found
    ]


def caused(scene: Scene) -> list[dict[str, object]]:
    incident = _the_incident(scene)
    return [
        {
            "request": linked(one.request, f"/request{scene.address.search(request=one.request)}"),
            "tenant": culprit.tenant,
            "caused": round(one.caused_s, 4),
            "share": round(100 * one.share, 1),
            "prompt": one.prompt_tokens,
            "output": one.output_tokens,
            "at": words.clock(one.arrival_ns),
        }
        for culprit in (incident.culprits if incident is not None else ())
        for one in culprit.requests
    ]


def different_about_hit(scene: Scene) -> Html:
    incident = _the_incident(scene)
    if incident is None:
        return parts.nothing("Nobody was hit.")
    waits = scene.recording.waits(scene.replica_name)
    return _different(scene, incident, stalled_requests(waits, incident.start_ns, incident.end_ns))


def different_about_caused(scene: Scene) -> Html:
    incident = _the_incident(scene)
    if incident is None or not incident.culprits:
        return parts.nothing("Nobody is blamed.")
    return _different(scene, incident, blamed_requests(scene.replica, incident))


def _different(scene: Scene, incident: Incident, chosen: Ints) -> Html:
    unusual = [(one.start_ns, one.end_ns) for one in scene.incidents]
    return differences(different(scene.replica, chosen, incident.start_ns, incident.end_ns, unusual))


# --- what to do -----------------------------------------------------------------------------------------------------


def remedies(scene: Scene) -> Html:
    incident = _the_incident(scene)
    if incident is None:
        return parts.nothing("There is nothing to mend.")
    if not incident.remedies:
        ask = parts.link("ask what if", f"/whatif{scene.address.search()}")
        return element("p", "Without a replay nothing is predicted here; ", ask, ".", class_="dim nothing")
    return pieces.remedies(incident.remedies)


def commands(scene: Scene) -> Html:
    """What reproduces this page: its link, and what to type."""
    incident = _the_incident(scene)
    if incident is None or scene.diagnosis is None:
        return parts.nothing("There is nothing to reproduce.")
    link = f"/incident{scene.to_incident(scene.number, keeps_window=True)}"
    here = element("p", "This view: ", parts.link(words.shortened(link, 100), link))
    source = scene.diagnosis.source
    if source == REDACTED_SOURCE:
        return here
    lines = [["stallscope", "analyze", source, "--replica", incident.replica]]
    lines += [["stallscope", "explain", source, victim.worst_request] for victim in incident.victims[:1]]
    return joined([here, *(parts.command(shlex.join(line)) for line in lines)])


PAGE = Page(
    "/incident",
    "Incident",
    layout,
    (
        Part("incident-head", head),
        Part("incident-window", window.stretch),
        Part(LATENCY, latency, "figure"),
        Part("swimlanes", batch, "figure"),
        *(Part(_stack(resource), partial(held, resource=resource), "figure") for resource in _RESOURCES),
        Part("blame", who_for_whom),
        Part("percentiles-then", then),
        Part("hit", hit, "rowData"),
        Part("caused", caused, "rowData"),
        Part("different-hit", different_about_hit),
        Part("different-caused", different_about_caused),
        Part("remedies", remedies),
        Part("commands", commands),
    ),
)
