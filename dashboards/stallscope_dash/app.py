"""The app: binds the parts of pages to the browser, so that what is shown follows from address and recording."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from importlib.resources import files
from typing import Any

import dash
import flask
from dash import ALL, MATCH, ClientsideFunction, Input, Output, State, dcc, html, no_update
from dash.development.base_component import Component

from stallscope.errors import StallscopeError
from stallscope.reports.html import page_file, to_html
from stallscope.reports.markup import Html, element, joined
from stallscope.views import words
from stallscope_dash import figures, parts
from stallscope_dash.address import Address
from stallscope_dash.jobs import Job
from stallscope_dash.markup import Markup
from stallscope_dash.pages import Page, Part, alerts, incident, overview, request, tenants, whatif
from stallscope_dash.recording import OURS, NotReadyError, Recording, Stage
from stallscope_dash.scene import Scene

log = logging.getLogger(__name__)
PAGES: tuple[Page, ...] = (
    overview.PAGE,
    incident.PAGE,
    request.PAGE,
    tenants.PAGE,
    whatif.PAGE,
    alerts.PAGE,
)
_BUSY_MS, _IDLE_MS = 400, 2000  # between two looks whether there is news
_LATE_S = 60.0
_ZOOMS = ("xaxis.range[0]", "xaxis.range[1]")


def make_app(recording: Recording) -> dash.Dash:
    """The app on a recording, which may still be read."""
    app = dash.Dash(
        __name__,
        title=f"{recording.title} · stallscope",
        update_title="",
        serve_locally=True,
        suppress_callback_exceptions=True,  # pages come and go
        add_log_handler=False,
    )
    app.index_string = (files(__package__) / "index.html").read_text(encoding="utf-8")
    for name, kind in (("page.css", "text/css"), ("plotly.js", "text/javascript")):
        _serve(app.server, name, kind)
    app.server.add_url_rule(overview.REPORT, "report", lambda: _report(app.server, recording))
    app.layout = _shell(recording)
    _bind_shell(app, recording)
    for page in PAGES:
        for part in page.parts:
            _bind(app, recording, part)
    return app


def _serve(server: flask.Flask, name: str, kind: str) -> None:
    """A file of the reports' pages."""
    text = page_file(name)
    server.add_url_rule(f"/{name}", name, lambda: server.response_class(text, mimetype=kind))


def _report(server: flask.Flask, recording: Recording) -> flask.Response:
    """The report on what is looked at, to be kept."""
    if recording.diagnosis is None:
        return server.response_class("not diagnosed yet\n", HTTPStatus.SERVICE_UNAVAILABLE, mimetype="text/plain")
    try:
        page = to_html(recording.diagnosis, recording.trace)
    except StallscopeError as error:
        return server.response_class(f"{error}\n", HTTPStatus.GONE, mimetype="text/plain")
    name = re.sub(r"[^\w.-]+", "_", recording.title)
    return server.response_class(
        page, mimetype="text/html", headers={"Content-Disposition": f"attachment; filename={name}.html"}
    )


# --- what stands around every page ----------------------------------------------------------------------------------


def _shell(recording: Recording) -> Component:
    """Has the layouts of all pages, so that one is there as soon as it is asked for."""
    links = (parts.link(page.title, page.path) for page in PAGES)
    back = Markup(element("p", "Nothing of ours has this address. ", parts.link("Overview", "/")))
    nowhere = parts.card("No such page", back).to_plotly_json()  # type: ignore[no-untyped-call]
    return html.Div(
        [
            dcc.Location(id="url", refresh="callback-nav"),
            dcc.Store(id="pages", data={page.path: _laid_out(page) for page in PAGES} | {"": nowhere}),
            dcc.Store(id="version", data=""),
            dcc.Store(id="shown"),
            dcc.Store(id="moved"),  # what keys have zoomed to, as a chart would tell it
            dcc.Interval(id="pulse", interval=_BUSY_MS),
            html.A("To the content", href="#page", className="skip"),
            html.Header(
                [
                    html.Strong("stallscope"),
                    html.Span(words.shortened(recording.title, 40), className="dim", title=recording.title),
                    html.Nav(Markup(joined(links), id="nav", className="nav"), **parts.attributes(aria_label="Pages")),
                    Markup(parts.question("request", "Find a request", "request id")),
                    html.Button("◐", id="theme", title="Light or dark", **parts.attributes(aria_label="Light or dark")),
                ],
                className="bar",
            ),
            Markup(parts.trouble("The dashboard's server does not answer: was it ended?"), className="gone-note"),
            html.Div([Markup(Html(""), id="progress"), html.Button("Cancel", id="cancel", hidden=True)], role="status"),
            html.Main(id="page", tabIndex=-1),
        ]
    )


def _laid_out(page: Page) -> object:
    laid_out = html.Div(page.layout(), **parts.attributes(data_page=page.path))
    return laid_out.to_plotly_json()  # type: ignore[no-untyped-call]


def _bind_shell(app: dash.Dash, recording: Recording) -> None:
    app.clientside_callback(  # type: ignore[no-untyped-call]  # of Dash
        ClientsideFunction("stallscope", "open"),
        Output("page", "children"),
        Input("url", "pathname"),
        State("pages", "data"),
    )

    @app.callback(
        Output("version", "data"),
        Output("progress", "html"),
        Output("cancel", "hidden"),
        Output("pulse", "interval"),
        Input("pulse", "n_intervals"),
        State("version", "data"),
        State("pulse", "interval"),
    )
    def follow(_: int, known: str, interval: int) -> tuple[object, Html, bool, object]:
        version = recording.version
        busy = not recording.progress.stage.is_final or recording.jobs.unfinished()
        wanted = _BUSY_MS if busy else _IDLE_MS
        return (
            no_update if version == known else version,
            joined(_progress(recording)),
            not _asked_for(recording),
            no_update if wanted == interval else wanted,
        )

    @app.callback(
        Output("cancel", "hidden", allow_duplicate=True), Input("cancel", "n_clicks"), prevent_initial_call=True
    )
    def cancel(_: int | None) -> bool:
        for job in _asked_for(recording):
            job.cancel()
        return True

    @app.callback(Output("pulse", "interval", allow_duplicate=True), Input("url", "search"), prevent_initial_call=True)
    def hurry(_: str | None) -> int:
        return _BUSY_MS  # something may have been asked

    app.clientside_callback(  # type: ignore[no-untyped-call]  # of Dash
        ClientsideFunction("stallscope", "show"),
        Output("shown", "data"),
        Input("url", "search"),
        Input("version", "data"),
    )
    app.clientside_callback(  # type: ignore[no-untyped-call]
        ClientsideFunction("stallscope", "make"),
        Output(parts.home(MATCH), "children"),
        Input(parts.drawn(MATCH), "data"),
        State(parts.later(MATCH), "data"),
        State(parts.home(MATCH), "children"),
        prevent_initial_call=True,
    )

    # Charts tell much more than zooms, such as their sizes; of calls of one callback the server's last answer counts.
    app.clientside_callback(  # type: ignore[no-untyped-call]  # of Dash
        ClientsideFunction("stallscope", "zoomed"),
        Output("moved", "data"),
        Input({"type": "time", "name": ALL}, "relayoutData"),
        prevent_initial_call=True,
    )

    @app.callback(Output("url", "search"), Input("moved", "data"), State("url", "search"), prevent_initial_call=True)
    def zoomed(told: Mapping[str, object], search: str | None) -> object:
        window = _zoomed_to(told)
        return no_update if window is None else Scene(recording, Address.of(search or "")).to_stretch(*window)


def _asked_for(recording: Recording) -> list[Job[Any]]:
    """Unfinished jobs that somebody asked for: the first may be the recording's own."""
    own = recording.progress.stage in (Stage.CHARTS, Stage.VERDICT)
    return recording.jobs.unfinished()[1 if own else 0 :]


def _progress(recording: Recording) -> Iterator[Html]:
    """What is being worked at, and how far it is; what went wrong with the recording."""
    progress = recording.progress
    if progress.stage is Stage.FAILED:
        yield parts.trouble(progress.error)
    elif not progress.stage.is_final:
        what = "by replay: " if progress.stage is Stage.VERDICT else ""
        yield _bar(f"{what}{progress.doing or 'reading'}", progress.share)
    elif recording.moves:
        age_s = time.time() - recording.end_ns / 1e9
        late = f": nothing has come for {_rounded(age_s)}" if age_s > _LATE_S else ""
        at = f"{words.clock(recording.end_ns, zone=True)}{late}"
        yield element("p", f"live, up to {at}", class_="note" if late else "dim")
    for job in _asked_for(recording):
        yield _bar(job.progress.stage or "starting", job.progress.share)


def _rounded(seconds: float) -> str:
    """A long time, in the largest unit of which it has two."""
    units = (("days", 86_400), ("hours", 3600), ("minutes", 60))
    return next((f"{seconds // of:.0f} {unit}" for unit, of in units if seconds >= 2 * of), words.duration(seconds))


def _bar(doing: str, share: float) -> Html:
    bar = element("progress", value=f"{share:.3f}", max="1", aria_label=doing)
    return element("p", f"{doing}: {share:.0%} ", bar, class_="dim")


def _zoomed_to(told: Mapping[str, object]) -> tuple[int | None, int | None] | None:
    """From when to when (ns) a chart was zoomed by hand; (None, None): to all there is; None: it was not."""
    if told.get("xaxis.autorange"):
        return None, None
    ends = [told.get(name) for name in _ZOOMS]
    if not all(isinstance(end, str) for end in ends):
        return None
    start, end = (_ns(str(one)) for one in ends)
    return (start, end) if start < end else None


def _ns(local: str) -> int:
    """A time of a chart's axis, which is in the local zone, as ns since the epoch."""
    time = datetime.fromisoformat(local.replace(" ", "T")[:26])
    since = time.astimezone() - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000


# --- parts ----------------------------------------------------------------------------------------------------------


def _bind(app: dash.Dash, recording: Recording, part: Part) -> None:
    name = parts.name_of(part.identity)
    where = Output(name, "html") if part.prop == "html" else Output(parts.drawn(name), "data")
    app.callback(where, Input(parts.seen(name), "data"), prevent_initial_call=True)(_drawn(recording, part))


def _said(text: str, part: Part, kind: str = "") -> object:
    """What went wrong, in the part's place."""
    shown = words.printable(text)
    return {"figure": figures.message(shown), "html": parts.trouble(shown, kind)}.get(part.prop, [])


def _drawn(recording: Recording, part: Part) -> Callable[[Mapping[str, str] | None], object]:
    """Draws the part for the address; where that can't be, says why in its place."""

    def draw(seen: Mapping[str, str] | None) -> object:
        if seen is None:
            return no_update
        try:
            return part.draw(Scene(recording, Address.of(seen["search"])))
        except NotReadyError:
            has_failed = recording.progress.stage is Stage.FAILED
            return _said("Not there: what went wrong is said above.", part) if has_failed else no_update
        except StallscopeError as error:
            return _said(str(error), part)
        except Exception:
            log.exception("%s can't be drawn for %s", part.identity, seen["search"])
            return _said(OURS, part, "ours")

    return draw
