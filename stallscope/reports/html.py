"""A diagnosis with its pictures as one HTML file that opens offline: the last face of a trace, for whoever is woken.

The answer comes first, then how sure it is and what to do, then the evidence. Names from the trace are hostile input:
``markup`` escapes them, and the page's own policy runs no script but ours and loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from importlib.resources import files

from stallscope import __version__
from stallscope.diagnosis.incidents import measure_waits
from stallscope.diagnosis.metrics import ITL, METRICS, TTFT
from stallscope.diagnosis.model import Diagnosis, Incident
from stallscope.diagnosis.replica import Replica, replicas
from stallscope.reports.figures import (
    Figure,
    Looks,
    Span,
    percentiles_figure,
    resource_figure,
    swimlanes_figure,
)
from stallscope.reports.markup import Html, data_block, element
from stallscope.reports.pieces import (
    ABOUT_BLAME,
    about_request,
    answer,
    blame_matrix,
    charges,
    code,
    falls,
    incident_facts,
    interventions,
    name,
    remedies,
    table,
    verdict_words,
    victims,
)
from stallscope.trace import Trace
from stallscope.views import words
from stallscope.views.blame import Blame, blame
from stallscope.views.colours import colours
from stallscope.views.focus import around
from stallscope.views.percentiles import percentiles
from stallscope.views.resources import Resource, resources
from stallscope.views.swimlanes import Swimlanes, swimlanes
from stallscope.views.waterfall import Waterfall, waterfall_of

SHOWN_INCIDENTS = 20
_METRICS = (METRICS[TTFT], METRICS[ITL])
_POINTS, _MOMENTS = 90, 400  # widths of the pictures: bins of percentiles, moments of the KV cache


def to_html(diagnosis: Diagnosis, trace: Trace) -> str:
    """The page. ``trace`` is what was diagnosed; its pictures are of the replica with the worst incident."""
    replica = _replica_to_show(diagnosis, trace)
    incidents = diagnosis.incidents[:SHOWN_INCIDENTS]
    pictures: dict[str, Figure] = {}
    body = [*answer(diagnosis), *_incidents(diagnosis)]
    if replica is not None:
        body += _pictures(diagnosis, replica, pictures)
    body += [*_what_if(incidents), *_tenants(diagnosis), _footer(diagnosis)]
    return _page(f"{verdict_words(diagnosis.verdict)}: {diagnosis.source}", body, pictures)


def _replica_to_show(diagnosis: Diagnosis, trace: Trace) -> Replica | None:
    """The replica of the worst incident, or the first one."""
    found = None
    for replica in replicas(trace):
        if found is None or any(one.replica == replica.name for one in diagnosis.incidents[:1]):
            found = replica
    return found


def _page(title: str, body: Sequence[Html], pictures: dict[str, Figure]) -> str:
    """The document: style, data and scripts inline; a policy that lets nothing else run or load."""
    style = Html(page_file("page.css"))
    scripts = [Html(page_file(name)) for name in ("plotly.js", "page.js")] if pictures else []
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {_hashes(scripts)}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", style),
    )
    tail = [data_block("figures", pictures), *(element("script", script) for script in scripts)] if pictures else []
    return f"<!doctype html>\n{element('html', head, element('body', *body, *tail), lang='en')}\n"


def page_file(name: str) -> str:
    """A file of the page's own, in ``page/``."""
    return (files("stallscope.reports") / "page" / name).read_text(encoding="utf-8")


def _hashes(scripts: Sequence[str]) -> str:
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"


# --- the answer ---------------------------------------------------------------------------------------------------


# --- incidents ----------------------------------------------------------------------------------------------------


def _incidents(diagnosis: Diagnosis) -> Iterable[Html]:
    incidents = diagnosis.incidents[:SHOWN_INCIDENTS]
    if not incidents:
        return
    yield element("h2", "What happened" if len(incidents) == 1 else f"What happened: {len(incidents)} incidents")
    for number, incident in enumerate(incidents, start=1):
        title = f"{number}. {words.incident_line(incident)}"
        if number == 1:
            yield element("section", element("h3", title), *_incident(incident), class_="incident")
        else:
            yield element("details", element("summary", title), *_incident(incident), class_="incident")
    more = len(diagnosis.incidents) - len(incidents)
    if more:
        yield element("p", f"and {words.counted(more, 'smaller incident')}; --format json lists them all")


def _incident(incident: Incident) -> Iterable[Html]:
    yield incident_facts(incident)
    yield victims(incident)
    yield charges(incident)


# --- pictures -----------------------------------------------------------------------------------------------------


def _pictures(diagnosis: Diagnosis, replica: Replica, pictures: dict[str, Figure]) -> Iterable[Html]:
    """Sections with a place for each figure; the figures themselves go into ``pictures``, by the id of their place."""
    incidents = [one for one in diagnosis.incidents if one.replica == replica.name]
    looks = colours(replica.tenants)
    span = (int(replica.timeline.before[0]), int(replica.timeline.end[-1]))  # from the first arrival on
    shown = incidents[:SHOWN_INCIDENTS]
    on = "" if len({one.replica for one in diagnosis.incidents}) < 2 else f" on {replica.name}"

    near = around(incidents[0], span) if incidents else span
    title = f"What each tenant waited{on}"
    yield from _percentiles(replica, span, shown, looks, pictures, "percentiles", title)
    if near != span:
        title = "The same, around the worst incident"
        yield from _percentiles(replica, near, shown, looks, pictures, "percentiles-near", title)
    if incidents:
        windows = [(one.start_ns, one.end_ns) for one in incidents]
        yield from _blame_section(blame(replica, measure_waits(replica), windows))
        worst = incidents[0]
        batch = swimlanes(replica, worst.start_ns, worst.end_ns)
        if batch is not None:
            pictures["swimlanes"] = swimlanes_figure(batch, shown, looks)
            yield _section("Who was in the batch around the worst step", _swimlanes_caption(batch), _place("swimlanes"))
    memory = resources(replica, Resource.KV, *near, _MOMENTS)
    if memory.tenants:
        queue = resources(replica, Resource.QUEUE, *near, _MOMENTS)
        pictures["kv"] = resource_figure(memory, near, shown, looks, queue)
        capacity = f"; the dashed line is the capacity of {memory.capacity:,} blocks." if memory.capacity else "."
        about = f"KV blocks in use by tenant, at the fullest moment of each stretch{capacity}"
        yield _section(f"Who held the KV cache{on}", about, _place("kv"))
    if incidents and incidents[0].victims:
        request = incidents[0].victims[0].worst_request
        known = (replica.requests["request"] == request).to_numpy()
        if known.any():
            yield _waterfall(waterfall_of(replica, int(known.argmax())))


def _percentiles(
    replica: Replica,
    span: Span,
    incidents: Sequence[Incident],
    looks: Looks,
    pictures: dict[str, Figure],
    place: str,
    title: str,
) -> Iterable[Html]:
    view = percentiles(replica, *span, _POINTS, metrics=_METRICS)
    if not view.lines:
        return
    pictures[place] = percentiles_figure(view, span, incidents, looks, _METRICS)
    about = f"Requests by arrival, in bins of {words.duration(view.bin_ns / 1e9)}; incidents are shaded."
    if view.tenants_left_out:
        about += f" {words.counted(view.tenants_left_out, 'tenant')} with fewer requests left out."
    yield _section(title, about, _place(place))


def _section(title: str, about: str, *content: Html) -> Html:
    return element("section", element("h2", title), element("figure", element("figcaption", about), *content))


def _place(name: str) -> Html:
    return element("div", element("noscript", "The picture needs JavaScript."), id=name, class_="picture")


def _swimlanes_caption(view: Swimlanes) -> str:
    about = (
        "A lane is a request, a band what it was doing: full colour prefill, lighter decoding, slim grey waiting. "
        "Thin lines are the ends of steps; the longest is shaded."
    )
    if view.lanes_left_out:
        about += f" {words.counted(view.lanes_left_out, 'request')} that cost or waited less left out."
    return about


def _blame_section(view: Blame) -> Iterable[Html]:
    if not view.victims:
        return
    yield _section("Who waited for whom", ABOUT_BLAME, blame_matrix(view))


def _waterfall(view: Waterfall) -> Html:
    return _section("The worst request's time", about_request(view), falls(view))


# --- what if ------------------------------------------------------------------------------------------------------


def _what_if(incidents: Sequence[Incident]) -> Iterable[Html]:
    for number, incident in enumerate(incidents, start=1):
        if not incident.interventions and not incident.remedies:
            continue
        which = "" if len(incidents) == 1 else f" in incident {number}"
        if incident.interventions:
            about = "The recorded arrivals run again, with one thing changed; blame rests on these."
            yield _section(f"What would have been{which}", about, interventions(incident.interventions))
        if incident.remedies:
            about = "What can be done tonight first, then what needs a change of the engine."
            yield _section(f"What would help{which}", about, remedies(incident.remedies))
    if incidents and not any(one.interventions or one.remedies for one in incidents):
        about = "No replay was made: nothing is predicted here, and no confidence is higher than medium."
        yield _section("What would have been", about)


# --- the whole trace ----------------------------------------------------------------------------------------------


def _tenants(diagnosis: Diagnosis) -> Iterable[Html]:
    if not diagnosis.tenants:
        return
    rows = []
    for tenant in diagnosis.tenants:
        values = {one.metric: words.quantile(one) for one in tenant.quantiles}
        shares = (tenant.token_share, tenant.step_time_share, tenant.kv_share)
        rows.append(
            [
                name(tenant.tenant),
                f"{tenant.requests:,}",
                values.get("ttft", "-"),
                values.get("itl", "-"),
                *(f"{share:.0%}" for share in shares),
            ]
        )
    headings = ["tenant", "requests", "TTFT", "longest gap", "tokens", "step time", "KV cache"]
    about = "Percentiles, and shares of what the engine spent, over the whole trace."
    yield _section("All tenants", about, table(headings, rows, names=1))


def _footer(diagnosis: Diagnosis) -> Html:
    command = words.explain_command(diagnosis)
    return element(
        "footer",
        element("p", f"stallscope {__version__}, schema of the diagnosis {diagnosis.schema_version}."),
        *([element("p", "One request in full: ", code(command))] if command else []),
    )
