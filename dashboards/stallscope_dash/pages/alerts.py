"""Alerts: the rules that would be exported from this trace, and when each of them fires on it."""

from __future__ import annotations

import shlex

from dash import dcc, html
from dash.development.base_component import Component

from stallscope.alerts.preview import PreviewedAlert, Trial
from stallscope.reports.figures import Figure, firings_figure
from stallscope.views import words
from stallscope_dash import parts
from stallscope_dash.answers import TriedAlerts, tried_alerts
from stallscope_dash.figures import framed, message
from stallscope_dash.jobs import Job, State
from stallscope_dash.pages import Page, Part
from stallscope_dash.recording import NotReadyError
from stallscope_dash.scene import Scene

_TRY = "try"
_FIRINGS = parts.time_chart("firings")


def layout() -> Component:
    return html.Div(
        [
            parts.place("alerts-head", 120),
            parts.chart(_FIRINGS, "When each fires", "On this trace, as Prometheus evaluates it.", 420),
            parts.card("The rules", parts.place("alerts-rules", 60)),
        ]
    )


def _job(scene: Scene) -> Job[TriedAlerts] | None:
    """None where nobody has asked: a trace is watched from end to end for it."""
    recording = scene.recording
    if scene.address.question != _TRY or recording.asked.redact_for is not None:
        return None
    return recording.jobs.ask(tried_alerts, recording.path, recording.asked.slos)


def _answer(scene: Scene) -> TriedAlerts | None:
    job = _job(scene)
    if job is None or job.state is State.CANCELLED:
        return None
    if not job.state.is_final:
        raise NotReadyError("still working on it")
    return job.result()


def head(scene: Scene) -> Component:
    job = _job(scene)
    if scene.recording.asked.redact_for is not None:
        return parts.card("Alerts", parts.nothing("Rules name tenants, and this view may not: open it unredacted."))
    if job is None or job.state is State.CANCELLED:
        ask = dcc.Link("Make the rules and try them", href=scene.address.search(question=_TRY), className="ask")
        said = "The whole trace is watched as a collector would watch it: seconds to minutes."
        return parts.card("Alert rules for this endpoint", html.P([ask, html.Br(), said], className="dim"))
    if not job.state.is_final:
        return html.P("Working; how far it is stands at the top of the page.", className="dim", role="status")
    found = job.result()
    lines = [found.trial.headline, *found.trial.evidence] if found.trial is not None else [found.missing]
    export = shlex.join(
        ["stallscope", "alerts", "export", "--from", str(scene.recording.path), "-o", "stallscope.rules.yml"]
    )
    return html.Header(
        [
            html.H1(words.printable(lines[0])),
            html.Ul([html.Li(words.printable(line)) for line in lines[1:]], className="facts"),
            *(html.P(f"note: {words.printable(note)}", className="note") for note in found.notes),
            html.P([parts.code(export), dcc.Clipboard(content=export, title="copy", className="copy")]),
        ]
    )


def firings(scene: Scene) -> Figure:
    found = _answer(scene)
    if found is None:
        return message("No rules were made yet.")
    if found.trial is None:
        return message(found.missing)
    if not found.trial.firings:
        return message("None of them fires.")
    names = [alert.name for alert in found.alerts]
    fired = [
        (one.firing.alert, dict(one.firing.labels), one.firing.start_ns, one.firing.end_ns)
        for one in found.trial.firings
    ]
    severities = [str(alert.severity) for alert in found.alerts]
    return framed(firings_figure(names, severities, fired, scene.window, scene.incidents))


def rules(scene: Scene) -> Component:
    found = _answer(scene)
    if found is None:
        return parts.nothing("None yet.")
    return html.Div([_rule(number, alert, found.trial) for number, alert in enumerate(found.alerts)], className="rules")


def _rule(number: int, alert: PreviewedAlert, trial: Trial | None) -> Component:
    """An alert in a line, which opens to all there is to say of it."""
    fired = [one for one in trial.firings if one.firing.alert == number] if trial is not None else []
    state = f"fired {len(fired)} times" if len(fired) > 1 else "fired once" if fired else alert.not_provable or "quiet"
    facts: list[tuple[str, parts.Children]] = [("says", words.printable(alert.summary))]
    facts += [(f"threshold {label}".strip(), words.printable(why)) for label, why in alert.reasons]
    facts += [
        ("for", f"{alert.for_s} s; keeps firing for {alert.keep_firing_s} s"),
        ("expression", html.Pre(parts.code_lines(alert.expression))),
        ("runbook", alert.runbook),
    ]
    return html.Details(
        [
            html.Summary(
                [
                    html.Span(str(alert.severity).upper(), className=f"severity {alert.severity}"),
                    html.B(alert.name),
                    html.Span(words.printable(state), className="dim"),
                ]
            ),
            html.Dl([piece for name, said in facts for piece in (html.Dt(name), html.Dd(said))]),
        ],
        className="incident",
    )


PAGE = Page(
    "/alerts",
    "Alerts",
    layout,
    (
        Part("alerts-head", head),
        Part(_FIRINGS, firings, "figure"),
        Part("alerts-rules", rules),
    ),
)
