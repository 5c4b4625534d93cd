"""Alerts: the rules that would be exported from this trace, and when each of them fires on it."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING
from urllib.parse import quote

from dash import html
from dash.development.base_component import Component

from stallscope.reports.figures import Figure, firings_figure
from stallscope.reports.markup import Html, element, joined
from stallscope_dash import parts
from stallscope_dash.answers import TriedAlerts, tried_alerts
from stallscope_dash.figures import framed, message
from stallscope_dash.jobs import Job, State
from stallscope_dash.pages import Page, Part
from stallscope_dash.recording import NotReadyError
from stallscope_dash.scene import Scene

if TYPE_CHECKING:
    from stallscope.alerts.preview import PreviewedAlert, Trial

_TRY, _FILE = "try", "stallscope.rules.yml"
_FIRINGS = parts.time_chart("firings")


def layout() -> Component:
    return html.Div(
        [
            parts.place("alerts-head", 120, at_once=True),
            parts.chart(
                _FIRINGS,
                "When each fires",
                "On this trace, as Prometheus evaluates it; shaded and numbered are the incidents.",
                420,
            ),
            parts.card("The rules", parts.place("alerts-rules", 60)),
        ]
    )


def _job(scene: Scene) -> Job[TriedAlerts] | None:
    """None where nobody has asked: all that was asked for is watched from end to end for it, zoomed in or not."""
    recording = scene.recording
    part = scene.asked if recording.moves else recording.asked
    if scene.address.question != _TRY or part is None or part.redact_for is not None:
        return None
    return recording.jobs.ask(tried_alerts, recording.path, part, version=scene.address.attempt)


def _answer(scene: Scene) -> TriedAlerts | None:
    job = _job(scene)
    if job is None or job.state is State.CANCELLED:
        return None
    if not job.state.is_final:
        raise NotReadyError("still working on it")
    return job.result()


def head(scene: Scene) -> Html:
    job = _job(scene)
    if scene.recording.asked.redact_for is not None:
        return parts.nothing("Rules name tenants, and this view may not: open it unredacted.")
    if job is None or job.state is State.CANCELLED:
        ask = parts.link(
            "Make the rules and try them",
            scene.to_question(_TRY, scene.address.attempt + 1),
            class_="ask",
        )
        what = "What is shown now" if scene.recording.moves else "The whole trace"
        about = f"{what} is watched as a collector would watch it: seconds to minutes."
        return joined([element("h1", "Alert rules for this endpoint"), element("p", ask, Html("<br>"), about)])
    if not job.state.is_final:
        return element("p", "Working; how far it is stands at the top of the page.", class_="dim", role="status")
    found = job.result()
    lines = [found.trial.headline, *found.trial.evidence] if found.trial is not None else [found.missing]
    export = ["stallscope", "alerts", "export", "--from", str(scene.recording.path), "-o", _FILE]
    rules_file = f"data:text/yaml;charset=utf-8,{quote(found.text)}"
    return element(
        "header",
        element("h1", lines[0]),
        element("ul", *(element("li", line) for line in lines[1:]), class_="facts"),
        *(element("p", f"note: {note}", class_="note") for note in found.notes),
        element("p", "To load into Prometheus: ", parts.download("the rules as a file", rules_file, _FILE)),
        "" if scene.recording.moves or scene.recording.asked.is_part else parts.command(shlex.join(export)),
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


def rules(scene: Scene) -> Html:
    found = _answer(scene)
    if found is None:
        return parts.nothing("None yet.")
    shown = (_rule(number, alert, found.trial) for number, alert in enumerate(found.alerts))
    return element("div", *shown, class_="rules")


def _rule(number: int, alert: PreviewedAlert, trial: Trial | None) -> Html:
    """An alert in a line, which opens to all there is to say of it."""
    fired = [one for one in trial.firings if one.firing.alert == number] if trial is not None else []
    state = f"fired {len(fired)} times" if len(fired) > 1 else "fired once" if fired else alert.not_provable or "quiet"
    facts: list[tuple[str, str]] = [("says", alert.summary)]
    facts += [(f"threshold {label}".strip(), why) for label, why in alert.reasons]
    facts += [
        ("for", f"{alert.for_s} s; keeps firing for {alert.keep_firing_s} s"),
        ("expression", element("pre", *(element("code", f"{line} ") for line in alert.expression.splitlines()))),
        ("runbook", alert.runbook),
    ]
    return element(
        "details",
        element(
            "summary",
            element("span", str(alert.severity).upper(), class_=f"severity {alert.severity}"),
            element("b", alert.name),
            element("span", state, class_="dim"),
        ),
        element("dl", *(joined([element("dt", title), element("dd", text)]) for title, text in facts)),
        class_="incident",
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
