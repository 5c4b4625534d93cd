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
from stallscope.diagnosis.model import Diagnosis, Incident, Intervention, Verdict
from stallscope.diagnosis.replica import Replica, replicas
from stallscope.reports.figures import (
    Figure,
    Looks,
    Span,
    percentiles_figure,
    resource_figure,
    swimlanes_figure,
)
from stallscope.reports.markup import Html, data_block, element, joined
from stallscope.trace import Trace
from stallscope.views import words
from stallscope.views.blame import Blame, blame
from stallscope.views.colours import colours
from stallscope.views.focus import around
from stallscope.views.percentiles import percentiles
from stallscope.views.resources import Resource, resources
from stallscope.views.swimlanes import Swimlanes, swimlanes
from stallscope.views.waterfall import OWN, Waterfall, waterfall_of

SHOWN_INCIDENTS = 20
_METRICS = (METRICS[TTFT], METRICS[ITL])
_POINTS, _MOMENTS = 90, 400  # widths of the pictures: bins of percentiles, moments of the KV cache
_ROWS = 30  # of a waterfall, the longest
_LONGEST_NAME = 64


def to_html(diagnosis: Diagnosis, trace: Trace) -> str:
    """The page. ``trace`` is what was diagnosed; its pictures are of the replica with the worst incident."""
    replica = _replica_to_show(diagnosis, trace)
    incidents = diagnosis.incidents[:SHOWN_INCIDENTS]
    pictures: dict[str, Figure] = {}
    body = [*_head(diagnosis), *_incidents(diagnosis)]
    if replica is not None:
        body += _pictures(diagnosis, replica, pictures)
    body += [*_what_if(incidents), *_tenants(diagnosis), _footer(diagnosis)]
    return _page(f"{_verdict(diagnosis.verdict)}: {diagnosis.source}", body, pictures)


def _replica_to_show(diagnosis: Diagnosis, trace: Trace) -> Replica | None:
    """The replica of the worst incident, or the first one."""
    found = None
    for replica in replicas(trace):
        if found is None or any(one.replica == replica.name for one in diagnosis.incidents[:1]):
            found = replica
    return found


def _page(title: str, body: Sequence[Html], pictures: dict[str, Figure]) -> str:
    """The document: style, data and scripts inline; a policy that lets nothing else run or load."""
    own = files("stallscope.reports") / "page"
    style = Html((own / "page.css").read_text(encoding="utf-8"))
    scripts: list[Html] = []
    if pictures:
        from plotly.offline import get_plotlyjs

        scripts = [Html(get_plotlyjs()), Html((own / "page.js").read_text(encoding="utf-8"))]
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


def _hashes(scripts: Sequence[str]) -> str:
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests) or "'none'"


# --- the answer ---------------------------------------------------------------------------------------------------


def _head(diagnosis: Diagnosis) -> Iterable[Html]:
    length = words.duration((diagnosis.end_ns - diagnosis.start_ns) / 1e9)
    when = f"{words.day(diagnosis.start_ns)} {words.clock(diagnosis.start_ns, zone=True)}, {length}"
    yield element(
        "header",
        element("span", _verdict(diagnosis.verdict), class_=f"verdict {diagnosis.verdict}"),
        element("span", f"  {diagnosis.source} · {when}", class_="dim"),
        element("h1", words.headline(diagnosis)),
        element("ul", *_facts(diagnosis), class_="facts"),
    )
    for check in diagnosis.replays:
        yield element("p", f"replay of {words.replay_line(check)}", class_="dim" if check.trusted else "note")
    for note in diagnosis.notes:
        yield element("p", f"note: {note}", class_="note")
    yield from _do_now(diagnosis)


def _facts(diagnosis: Diagnosis) -> Iterable[Html]:
    first, *rest = words.evidence(diagnosis).split(" · ")
    yield element("li", first, class_="sure")
    c = diagnosis.coverage
    doubts = c.steps_lost or c.records_dropped or c.requests_lost or c.known_tenant_share < 0.9 or c.fidelity < 3
    for fact in rest:
        yield element("li", fact, class_="doubt" if doubts and _is_doubtful(fact, diagnosis) else "")


def _is_doubtful(fact: str, diagnosis: Diagnosis) -> bool:
    """Whether a fact is one that makes the answer less sure."""
    c = diagnosis.coverage
    if fact.startswith("fidelity"):
        return c.fidelity < 3
    if "of known tenant" in fact:
        return c.known_tenant_share < 0.9
    return ("lost" in fact and "none lost" not in fact) or "dropped" in fact


def _do_now(diagnosis: Diagnosis) -> Iterable[Html]:
    """The first remedy that needs no change of the engine, where a replay predicts one that helps."""
    best = words.tonight(diagnosis)
    if best is None:
        return
    rest = f": by replay, {words.restored(best)} of what the victims lost would be gone"
    yield element(
        "p",
        element("b", "Tonight: "),
        best.what,
        rest,
        *([Html("<br>"), element("code", best.how)] if best.how else []),
        class_="now",
    )


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
    rows: list[tuple[str, Html]] = []
    for culprit in incident.culprits:
        rows.append(("culprit", joined([_name(culprit.tenant, "culprit"), words.culprit_line(culprit, incident)])))
        shown = [one for one in culprit.requests if one.share >= 0.05][:3] or list(culprit.requests[:1])
        for request in shown:
            what = (
                f": {request.prompt_tokens:,} prompt and {request.output_tokens:,} output tokens, "
                f"arrived {words.clock(request.arrival_ns)}, cost them {words.duration(request.caused_s)} "
                f"({request.share:.0%} of what its tenant did)"
            )
            kind = "request" if request.request == culprit.dominating_request else "one of"
            rows.append((kind, joined([_code(request.request), what])))
    if incident.group:
        rows.append(("alike", joined([incident.group])))
    rows += [("because", joined([reason])) for reason in incident.reasons]
    rows.append(("confidence", joined([str(incident.confidence)])))
    if incident.mechanism and not incident.culprits:
        rows.append(("mechanism", joined([f"{incident.mechanism}: {words.mechanism(incident.mechanism)}"])))
    if incident.runner_up:
        rows.append(("runner-up", joined([_name(incident.runner_up), f", {incident.runner_up_share:.0%}"])))
    yield element("dl", *(joined([element("dt", name), element("dd", text)]) for name, text in rows))
    yield _victims(incident)
    yield _charges(incident)


def _victims(incident: Incident) -> Html:
    headings = ["victim", "stalled", "lost", "TTFT", "usually", "longest gap", "usually"]
    rows = [
        [
            _name(victim.tenant),
            f"{victim.stalled_requests:,} of {victim.requests:,}",
            words.duration(victim.lost_s),
            *(
                next((words.quantile(one) for one in quantiles if one.metric == metric), "-")
                for metric in ("ttft", "itl")
                for quantiles in (victim.during, victim.usual)
            ),
        ]
        for victim in incident.victims
    ]
    return _table(headings, rows, names=1)


def _charges(incident: Incident) -> Html:
    shown = [charge for charge in incident.charges if charge.share >= 0.01][:12]
    rows = [
        [
            joined([_name(charge.holder), " (itself)" if charge.own else ""]),
            charge.mechanism,
            words.duration(charge.seconds),
            f"{charge.share:.0%}",
        ]
        for charge in shown
    ]
    table = _table(["charged to", "by", "seconds", "share"], rows, names=2)
    title = f"Where the {words.duration(incident.lost_s)} went"
    return element("details", element("summary", title), table)


# --- pictures -----------------------------------------------------------------------------------------------------


def _pictures(diagnosis: Diagnosis, replica: Replica, pictures: dict[str, Figure]) -> Iterable[Html]:
    """Sections with a place for each figure; the figures themselves go into ``pictures``, by the id of their place."""
    incidents = [one for one in diagnosis.incidents if one.replica == replica.name]
    looks = colours(replica.tenants)
    span = (diagnosis.start_ns, diagnosis.end_ns)
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
    most = float(view.seconds.max())
    head = element("tr", element("th", "victim"), *(element("th", _name(holder)) for holder in view.holders))
    rows = []
    for victim, stalled, seconds, mechanisms in zip(
        view.victims, view.stalled, view.seconds, view.mechanisms, strict=True
    ):
        hit = element("small", words.counted(stalled, "stalled request"), class_="dim")
        cells = (
            _heat(float(amount), float(amount) / most, name) for amount, name in zip(seconds, mechanisms, strict=True)
        )
        rows.append(element("tr", element("th", _name(victim), Html("<br>"), hit), *cells))
    table = element("table", element("thead", head), element("tbody", *rows), class_="heat")
    about = (
        "Seconds that stalled waits of each victim (rows) are charged to each holder (columns), by what mostly; "
        "own work is left out, and a tenant's own other requests count as its own."
    )
    yield _section("Who waited for whom", about, element("div", table, class_="scroll"))


def _heat(seconds: float, share: float, mechanism: str) -> Html:
    if seconds <= 0:
        return element("td", "", class_="cell")
    style = f"background: rgba(var(--heat), {0.06 + 0.74 * share:.2f})"
    kind = "cell hot" if share > 0.4 else "cell"
    return element("td", words.duration(seconds), element("small", mechanism), class_=kind, style=style)


def _waterfall(view: Waterfall) -> Html:
    shown = sorted(sorted(view.rows, key=lambda row: -row.length_s)[:_ROWS], key=lambda row: row.offset_s)
    rows = []
    for row in shown:
        left = f"{100 * row.offset_s / view.length_s:.2f}%"
        width = f"{100 * row.length_s / view.length_s:.2f}%"
        bar = element("div", element("span", style=f"left: {left}; width: {width}"), class_="track")
        parts = [part for part in row.parts if part.seconds >= 0.1 * row.length_s][:3]
        who: list[str] = []
        for part in parts:
            who += [", " if who else "", _name(part.holder), f" {part.mechanism} {words.duration(part.seconds)}"]
        cells = [
            element("td", words.duration(row.offset_s), class_="number"),
            element("td", words.duration(row.length_s), class_="number"),
            element("td", bar),
            element("td", f"{row.doing}, stalled" if row.stalled else row.doing),
            element("td", *who, class_="text"),
        ]
        rows.append(element("tr", *cells, class_="stalled" if row.stalled else ""))
    headings = [element("th", name, class_="number") for name in ("after", "for")]
    headings += [element("th", name) for name in ("", "doing", "charged to")]
    table = element("table", element("thead", element("tr", *headings)), element("tbody", *rows), class_="falls")
    others = sum(part.seconds for part in view.parts if part.holder != OWN)
    first = "no token yet" if view.ttft_s is None else f"first token after {words.duration(view.ttft_s)}"
    about = joined(
        [
            _code(view.request),
            " of ",
            _name(view.tenant),
            f" took {words.duration(view.length_s)}, {words.duration(others)} of it not its own work; {first}; "
            f"{view.prompt_tokens:,} prompt and {view.output_tokens:,} output tokens.",
            f" {words.counted(len(view.rows) - len(shown), 'shorter row')} left out." if len(view.rows) > _ROWS else "",
        ]
    )
    return _section("The worst request's time", about, element("div", table, class_="scroll"))


# --- what if ------------------------------------------------------------------------------------------------------


def _what_if(incidents: Sequence[Incident]) -> Iterable[Html]:
    for number, incident in enumerate(incidents, start=1):
        if not incident.interventions and not incident.remedies:
            continue
        which = "" if len(incidents) == 1 else f" in incident {number}"
        if incident.interventions:
            rows = [_intervention(one) for one in incident.interventions]
            headings = ["replayed with", "excess gone", "victims and culprits", "throughput"]
            about = "The recorded arrivals run again, with one thing changed; blame rests on these."
            yield _section(f"What would have been{which}", about, _table(headings, rows, names=1, text=(2,)))
        if incident.remedies:
            rows = [
                ["tonight" if one.tonight else "engine change", *_intervention(one)[:1], _code(one.how) if one.how else
                 "", *_intervention(one)[1:]]
                for one in incident.remedies
            ]  # fmt: skip
            headings = ["when", "remedy", "how", "excess gone", "victims and culprits", "throughput"]
            about = "What can be done tonight first, then what needs a change of the engine."
            yield _section(f"What would help{which}", about, _table(headings, rows, names=2, text=(2, 4)))
    if incidents and not any(one.interventions or one.remedies for one in incidents):
        about = "No replay was made: nothing is predicted here, and no confidence is higher than medium."
        yield _section("What would have been", about)


def _intervention(one: Intervention) -> list[str]:
    """Cells: what was changed, what it restores, whom it changes how, and throughput."""
    caveat = words.caveat(one)
    lines: list[str] = []
    for prediction in words.predictions(one):
        lines += [*([Html("<br>")] if lines else []), prediction]
    what = joined([one.what, *([Html("<br>"), element("span", caveat, class_="note")] if caveat else [])])
    return [what, words.restored(one), joined(lines), f"{one.throughput:.0%}"]


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
                _name(tenant.tenant),
                f"{tenant.requests:,}",
                values.get("ttft", "-"),
                values.get("itl", "-"),
                *(f"{share:.0%}" for share in shares),
            ]
        )
    headings = ["tenant", "requests", "TTFT", "longest gap", "tokens", "step time", "KV cache"]
    about = "Percentiles, and shares of what the engine spent, over the whole trace."
    yield _section("All tenants", about, _table(headings, rows, names=1))


def _footer(diagnosis: Diagnosis) -> Html:
    command = words.explain_command(diagnosis)
    return element(
        "footer",
        element("p", f"stallscope {__version__}, schema of the diagnosis {diagnosis.schema_version}."),
        *([element("p", "One request in full: ", _code(command))] if command else []),
    )


# --- pieces -------------------------------------------------------------------------------------------------------


def _verdict(verdict: Verdict) -> str:
    return str(verdict).replace("_", " ").upper()


def _name(name: str, kind: str = "") -> Html:
    """A name from the trace; in full where one points at it."""
    shown = words.shortened(words.printable(name), _LONGEST_NAME)
    return element("span", shown, class_=kind, title=name if len(name) > _LONGEST_NAME else "")


def _code(text: str) -> Html:
    return element("code", words.printable(text))


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], *, names: int, text: Sequence[int] = ()) -> Html:
    """A table whose first ``names`` columns are names, those at ``text`` sentences, and the others numbers."""

    def kind(column: int) -> str:
        return "name" if column < names else "text" if column in text else "number"

    def cells(row: Sequence[str]) -> Iterable[Html]:
        # On a narrow page a row becomes a card, and each cell says what it is.
        return (
            element("td", element("div", cell), class_=kind(at), data_label=headings[at]) for at, cell in enumerate(row)
        )

    head = element("tr", *(element("th", name, class_=kind(at)) for at, name in enumerate(headings)))
    body = (element("tr", *cells(row)) for row in rows)
    table = element("table", element("thead", head), element("tbody", *body), class_="cards")
    return element("div", table, class_="scroll")
