"""A diagnosis as Markdown: a post-mortem to paste into an issue, in which names are code and link to nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from stallscope import __version__
from stallscope.diagnosis.model import Diagnosis, Incident, Intervention, InterventionKind
from stallscope.views import words

MOST_INCIDENTS = 10
MOST_CHARGES = 8
_HARMLESS = re.compile(r"[\w .,;:%()/+=-]*", re.ASCII)  # in which no Markdown, mention or reference can hide
_ACTIVE = re.compile(r"(?<!\w)_|_(?!\w)|://|www\.|^\s*([-+=]|\d+[.)]\s)")


def to_markdown(diagnosis: Diagnosis) -> str:
    """The whole report, with a line break at its end."""
    return "\n".join(_lines(words.legible(diagnosis))) + "\n"


def _lines(diagnosis: Diagnosis) -> Iterator[str]:
    name = str(diagnosis.verdict).replace("_", " ")
    yield f"# Post-mortem: {name}"
    yield ""
    yield f"**{_sentence(words.headline(diagnosis))}**"
    yield ""
    length = words.duration((diagnosis.end_ns - diagnosis.start_ns) / 1e9)
    when = f"{words.day(diagnosis.start_ns)} {words.clock(diagnosis.start_ns, zone=True)}, {length}"
    yield f"{when}, from {_code(diagnosis.source)}"
    yield ""
    yield from (f"- {fact}" for fact in map(_sentence, words.evidence(diagnosis).split(" · ")))
    yield from (f"- replay of {_sentence(words.replay_line(check))}" for check in diagnosis.replays)
    yield from (f"- note: {_sentence(note)}" for note in diagnosis.notes)
    for number, incident in enumerate(diagnosis.incidents[:MOST_INCIDENTS], start=1):
        yield from ("", f"## {number}. {_sentence(words.incident_line(incident))}", "")
        yield from _incident(incident)
    more = len(diagnosis.incidents) - MOST_INCIDENTS
    if more > 0:
        yield from ("", f"And {words.counted(more, 'smaller incident')}; `--format json` lists them all.")
    yield from _tenants(diagnosis)
    yield from ("", f"Written by stallscope {__version__}.")


def _incident(incident: Incident) -> Iterator[str]:
    for culprit in incident.culprits:
        yield f"- culprit: {_code(culprit.tenant)}{_sentence(words.culprit_line(culprit, incident))}"
        for request in culprit.requests[:3]:
            yield (
                f"  - {_code(request.request)}: {request.prompt_tokens:,} prompt and {request.output_tokens:,} output "
                f"tokens, arrived {words.clock(request.arrival_ns)}, cost them {words.duration(request.caused_s)} "
                f"({request.share:.0%} of what its tenant did)"
            )
    if incident.group:
        yield f"- alike: {_sentence(incident.group)}"
    yield from (f"- because: {_sentence(reason)}" for reason in incident.reasons)
    yield f"- confidence: {incident.confidence}"
    if incident.mechanism and not incident.culprits:
        yield f"- mechanism: {_code(incident.mechanism)}: {words.mechanism(incident.mechanism)}"
    if incident.runner_up:
        yield f"- runner-up: {_code(incident.runner_up)}, {incident.runner_up_share:.0%}"
    yield from ("", *_victims(incident))
    yield from ("", *_charges(incident))
    if incident.interventions:
        yield from ("", "What would have been, by replay:", "", *_what_if("replayed with", incident.interventions))
    if incident.remedies:
        yield from ("", "What would help, by replay:", "", *_what_if("remedy", incident.remedies))


def _victims(incident: Incident) -> Iterator[str]:
    rows = (
        [
            _code(victim.tenant),
            f"{victim.stalled_requests:,} of {victim.requests:,}",
            words.duration(victim.lost_s),
            *(
                next((words.quantile(one) for one in quantiles if one.metric == metric), "")
                for metric in ("ttft", "itl")
                for quantiles in (victim.during, victim.usual)
            ),
        ]
        for victim in incident.victims
    )
    return _table(["victim", "stalled", "lost", "TTFT", "usually", "longest gap", "usually"], list(rows), "lrrrrrr")


def _charges(incident: Incident) -> Iterator[str]:
    rows = [
        [
            _code(charge.holder) + (" (itself)" if charge.own else ""),
            _code(charge.mechanism),
            words.duration(charge.seconds),
            f"{charge.share:.0%}",
        ]
        for charge in incident.charges[:MOST_CHARGES]
        if charge.share >= 0.01
    ]
    return _table(["charged to", "by", "seconds", "share"], rows, "llrr")


def _what_if(title: str, interventions: Sequence[Intervention]) -> Iterator[str]:
    rows = []
    for one in interventions:
        when = ""
        if one.kind is InterventionKind.REMEDY:
            when = " (tonight)" if one.tonight else " (needs a change of the engine)"
        extra = [_code(one.how)] if one.how else []
        extra += [text for text in (words.caveat(one),) if text]
        rows.append(
            [
                "<br>".join([_sentence(one.what) + when, *extra]),
                words.restored(one),
                f"{one.throughput:.0%}",
                "<br>".join(map(_sentence, words.predictions(one))),
            ]
        )
    return _table([title, "excess gone", "throughput", "predicted"], rows, "lrrl")


def _tenants(diagnosis: Diagnosis) -> Iterator[str]:
    yield from ("", "## All tenants, over the whole trace", "")
    rows = []
    for tenant in diagnosis.tenants:
        values = {one.metric: words.quantile(one) for one in tenant.quantiles}
        shares = (f"{share:.0%}" for share in (tenant.token_share, tenant.step_time_share, tenant.kv_share))
        times = (values.get("ttft", ""), values.get("itl", ""))
        rows.append([_code(tenant.tenant), f"{tenant.requests:,}", *times, *shares])
    headings = ["tenant", "requests", "TTFT", "longest gap", "tokens", "step time", "KV cache"]
    yield from _table(headings, rows, "lrrrrrr")


# --- pieces -------------------------------------------------------------------------------------------------------


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], sides: str) -> Iterator[str]:
    """A table; ``sides``: l or r for each column. A pipe would end a cell even within code."""
    yield _row(headings)
    yield _row(["---:" if side == "r" else "---" for side in sides])
    yield from (_row([cell.replace("|", "\\|") for cell in row]) for row in rows)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _code(text: str) -> str:
    """Text as code, in which nothing is markup, a mention or a reference; fenced by more backticks than it has."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"


def _sentence(text: str) -> str:
    """A sentence as it is where nothing in it could act as Markdown, else as code."""
    harmless = _HARMLESS.fullmatch(text) is not None and _ACTIVE.search(text) is None
    return text if harmless else _code(text)
