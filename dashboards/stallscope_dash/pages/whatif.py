"""What if: a tenant as usual or not there, a request not there, another setting: replayed, and compared."""

from __future__ import annotations

import shlex
from dataclasses import replace

from dash import html
from dash.development.base_component import Component

from stallscope.diagnosis.whatif import Question, WhatIf
from stallscope.errors import UsageError
from stallscope.reports import pieces
from stallscope.reports.figures import Figure, what_if_figure
from stallscope.reports.markup import Html, element, joined
from stallscope.trace.rename import REDACTED_SOURCE
from stallscope.views import words
from stallscope.views.whatif import settings_of, side_by_side
from stallscope_dash import parts, window
from stallscope_dash.answers import what_if
from stallscope_dash.figures import framed, message
from stallscope_dash.jobs import Job, State
from stallscope_dash.markup import Markup
from stallscope_dash.pages import Page, Part
from stallscope_dash.scene import Scene

_KINDS = {"usual": "usual", "without": "without", "without-request": "without_requests", "set": "settings"}
_SETTINGS = (
    ("max_num_batched_tokens", "512"),
    ("max_num_batched_tokens", "2048"),
    ("chunked_prefill", "true"),
    ("long_prefill_token_threshold", "1024"),
    ("policy", "fair"),
)
_SHOWN = 24  # tenants to choose from


def layout() -> Component:
    return html.Div(
        [
            parts.place("whatif-window", at_once=True),
            parts.card(
                "What if …",
                parts.said(
                    "The recorded arrivals run again through the engine's own scheduler, one thing changed. A tenant "
                    "as usual: what it sends at other times, in place of what it sent in incidents."
                ),
                parts.place("whatif-choices", 120, at_once=True),
                Markup(joined(["or ", parts.question("set", "Another setting of the engine", "NAME=VALUE")])),
            ),
            parts.place("whatif-answer", 60, at_once=True),
            parts.chart(
                "whatif-chart",
                "Side by side",
                "What each tenant waited as recorded, replayed unchanged, and with the change; bars hold all draws.",
                420,
            ),
        ]
    )


def choices(scene: Scene) -> Html:
    """Links, each of which asks one question."""
    rows = [
        [
            pieces.name(tenant),
            parts.link("as usual", scene.to_question(f"usual:{tenant}")),
            parts.link("not there", scene.to_question(f"without:{tenant}")),
        ]
        for tenant in scene.replica.tenants[:_SHOWN]
    ]
    now = settings_of(scene.replica)
    settings = [
        joined([parts.link(f"{name}={value}", scene.to_question(f"set:{name}={value}")), f" (now {now[name]})"])
        for name, value in _SETTINGS
        if name in now and now[name] != value
    ]
    separated = [text for one in settings for text in (", ", one)][1:]
    changes = [element("p", "with ", *separated)] if separated else []
    return joined([pieces.table(["tenant", "", ""], rows, names=1), *changes])


def asked(scene: Scene) -> Question | None:
    """The address's question. Raises UsageError where it is none."""
    kind, _, what = scene.address.question.partition(":")
    if not scene.address.question:
        return None
    if kind not in _KINDS or not what:
        raise UsageError(f"{scene.address.question!r} asks nothing; choose one of the above")
    if kind == "set":
        name, equals, value = what.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"{what!r}: write NAME=VALUE, such as max_num_batched_tokens=512")
        return Question(settings=((name, value),))
    return Question(**{_KINDS[kind]: (what,)})  # type: ignore[arg-type]


def _job(scene: Scene) -> Job[WhatIf] | None:
    """None where nothing is asked, or nothing that stands still."""
    question = asked(scene)
    if question is None or scene.asked is None:
        return None
    part = replace(scene.asked, replica=scene.replica_name)
    return scene.recording.jobs.ask(what_if, scene.recording.path, part, question, version=scene.address.attempt)


def answer(scene: Scene) -> Html:
    """How much of the stalls would be gone, and how far that can be believed."""
    job = _job(scene)
    if job is None and scene.address.question:
        start, end = scene.window
        stretch = f"{words.clock(start)} to {words.clock(end, zone=True)}"
        ask = parts.link(f"ask it of {stretch}", scene.to_question(scene.address.question), class_="ask")
        return element("p", "The recording moves on, and a question is about a stretch that stands still: ", ask)
    if job is None:
        return parts.nothing("Choose a tenant or a setting.")
    if not job.state.is_final:
        return element("p", "Replaying; how far it is stands at the top of the page.", class_="dim", role="status")
    if job.state is State.CANCELLED:
        again = parts.link("Ask again", scene.to_question(scene.address.question, scene.address.attempt + 1))
        return element("p", "It was cancelled. ", again, class_="nothing")
    found = job.result()
    one = found.answer
    caveat = words.caveat(one)
    return element(
        "header",
        element("h1", one.what, f": {words.restored(one)} of the stalls gone"),
        element("p", words.replay_line(found.check), class_="dim" if found.check.trusted else "note"),
        element("p", caveat, class_="note") if caveat else "",
        element("p", f"Output tokens in the same time: {one.throughput:.0%}.", class_="dim"),
        _command(scene),
    )


def _command(scene: Scene) -> Html:
    source = scene.recording.trace.source
    if source == REDACTED_SOURCE:
        return Html("")
    kind, _, what = scene.address.question.partition(":")
    line = ["stallscope", "whatif", source, f"--{kind}", what, "--replica", scene.replica_name]
    part = scene.asked or scene.recording.asked
    times = (("--since", part.since), ("--until", part.until))
    line += [text for option, time in times if time is not None for text in (option, time)]
    return parts.command(shlex.join(line))


def chart(scene: Scene) -> Figure:
    try:
        job = _job(scene)
    except UsageError:
        return message("No question, hence no picture.")
    if job is not None and job.state is State.FAILED:
        return message("No answer, hence no picture.")
    if job is None:
        return message("Nothing was asked yet.")
    if not job.state.is_final:
        return message("Replaying …")
    if job.state is State.CANCELLED:
        return message("It was cancelled.")
    return framed(what_if_figure(side_by_side(job.result().answer), scene.looks))


PAGE = Page(
    "/whatif",
    "What if",
    layout,
    (
        Part("whatif-window", window.replica_and_stretch),
        Part("whatif-choices", choices),
        Part("whatif-answer", answer),
        Part("whatif-chart", chart, "figure"),
    ),
)
