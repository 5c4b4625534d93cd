"""What if: a tenant as usual or not there, a request not there, another setting: replayed, and compared."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import replace

from dash import dcc, html
from dash.development.base_component import Component

from stallscope.diagnosis.whatif import Question, WhatIf
from stallscope.errors import UsageError
from stallscope.reports.figures import Figure, what_if_figure
from stallscope.trace.rename import REDACTED_SOURCE
from stallscope.views import words
from stallscope.views.whatif import side_by_side
from stallscope_dash import parts
from stallscope_dash.answers import what_if
from stallscope_dash.figures import framed, message
from stallscope_dash.jobs import Job, State
from stallscope_dash.pages import Page, Part
from stallscope_dash.recording import NotReadyError
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
    own = dcc.Input(
        id={"type": "ask", "name": "set"}, type="text", debounce=True, n_submit=0, className="search",
        placeholder="NAME=VALUE",
        autoComplete="off",
    )  # fmt: skip
    return html.Div(
        [
            parts.card(
                "What if …",
                html.P(
                    "The recorded arrivals run again through the engine's own scheduler, with one thing changed.",
                    className="dim",
                ),
                parts.place("whatif-choices", 120),
                html.Label(["or another setting of the engine: ", own], className="dim"),
            ),
            parts.place("whatif-answer", 60),
            parts.chart(
                "whatif-chart",
                "Side by side",
                "What each tenant waited as recorded, replayed unchanged, and with the change; bars hold all draws.",
                420,
            ),
        ]
    )


def choices(scene: Scene) -> Component:
    """Links, each of which asks one question."""
    rows: list[list[parts.Children]] = [
        [
            parts.name(tenant),
            dcc.Link("as usual", href=scene.address.search(question=f"usual:{tenant}")),
            dcc.Link("not there", href=scene.address.search(question=f"without:{tenant}")),
        ]
        for tenant in scene.replica.tenants[:_SHOWN]
    ]
    settings = [
        dcc.Link(f"{name}={value}", href=scene.address.search(question=f"set:{name}={value}"))
        for name, value in _SETTINGS
    ]
    return html.Div(
        [parts.table(["tenant", "", ""], rows), html.P(["with ", *_separated(settings)])], className="choices"
    )


def _separated(links: Sequence[Component]) -> list[parts.Child]:
    found: list[parts.Child] = []
    for link in links:
        found += [", ", link] if found else [link]
    return found


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
    question = asked(scene)
    if question is None:
        return None
    since, until = (words.iso(time) for time in scene.window)
    part = scene.recording.asked
    if scene.window != scene.span:
        part = replace(part, since=since, until=until)
    return scene.recording.jobs.ask(what_if, scene.recording.path, replace(part, replica=scene.replica_name), question)


def answer(scene: Scene) -> Component:
    """How much of the stalls would be gone, and how far that can be believed."""
    job = _job(scene)
    if job is None:
        return parts.nothing("Choose a tenant or a setting.")
    if not job.state.is_final:
        return html.P("Replaying; how far it is stands at the top of the page.", className="dim", role="status")
    if job.state is State.CANCELLED:
        again = scene.address.search(question="")
        return html.P(["It was cancelled. ", dcc.Link("Ask something else", href=again or "?")], className="nothing")
    found = job.result()
    one = found.answer
    caveat = words.caveat(one)
    return html.Header(
        [
            html.H1([words.printable(one.what), f": {words.restored(one)} of the stalls gone"]),
            html.P(words.replay_line(found.check), className="dim" if found.check.trusted else "note"),
            html.P(caveat or None, className="note"),
            html.P(f"Output tokens in the same time: {one.throughput:.0%}.", className="dim"),
            *_commands(scene),
        ]
    )


def _commands(scene: Scene) -> list[Component]:
    source = scene.recording.trace.source
    if source == REDACTED_SOURCE:
        return []
    kind, _, what = scene.address.question.partition(":")
    line = ["stallscope", "whatif", source, f"--{kind}", what, "--replica", scene.replica_name]
    if scene.window != scene.span:
        line += ["--since", words.iso(scene.window[0]), "--until", words.iso(scene.window[1])]
    return [html.P(parts.code(shlex.join(line)))]


def chart(scene: Scene) -> Figure:
    job = _job(scene)
    if job is None:
        return message("Nothing was asked yet.")
    if not job.state.is_final:
        raise NotReadyError("still replaying")
    if job.state is State.CANCELLED:
        return message("It was cancelled.")
    return framed(what_if_figure(side_by_side(job.result().answer), scene.looks))


PAGE = Page(
    "/whatif",
    "What if",
    layout,
    (
        Part("whatif-choices", choices),
        Part("whatif-answer", answer),
        Part("whatif-chart", chart, "figure"),
    ),
)
