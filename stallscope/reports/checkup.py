"""A trace's check-up as text for a terminal: usable or not first, then what it can't answer, then what it holds."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from stallscope.reports.text import plain_table
from stallscope.views import words
from stallscope.views.checkup import Answer, Checkup

_STYLE = {Answer.YES: "green", Answer.PARTLY: "yellow", Answer.NO: "red"}


def print_checkup(checkup: Checkup, console: Console) -> None:
    """Writes the whole check-up; names from the trace are text on one line."""
    console.print(_headline(checkup), soft_wrap=True)
    console.print(Text(_evidence(checkup), style="dim"), soft_wrap=True)
    for note in checkup.notes:
        console.print(Text(f"note: {words.printable(note)}", style="yellow"), soft_wrap=True)
    console.print()
    table = plain_table(("can it say", "left"), ("", "left"), ("why not, and what to do", "left"))
    for one in sorted(checkup.questions, key=lambda one: not one.main):
        doubt = "" if one.answer is Answer.YES else f"{words.printable(one.why)}; {one.remedy}"
        table.add_row(Text(one.question), Text(one.answer, style=_STYLE[one.answer]), Text(doubt))
    console.print(table)
    console.print()
    replicas = plain_table(
        ("replica", "left"),
        ("engine", "left"),
        ("model", "left"),
        ("length", "right"),
        ("steps", "right"),
        ("lost", "right"),
        ("dropped", "right"),
        ("fidelity", "right"),
        ("batches known", "right"),
        ("step cost off by", "right"),
    )
    for replica in checkup.replicas:
        replicas.add_row(
            *(
                Text(words.printable(text) if text else "-")
                for text in (replica.replica, replica.engine, replica.model)
            ),
            words.duration(replica.length_s),
            f"{replica.steps:,}",
            f"{replica.steps_lost:,}",
            f"{replica.records_dropped:,}",
            str(replica.fidelity),
            f"{replica.batches_known:.0%}",
            f"{replica.cost_model_error:.0%}",
        )
    console.print(replicas)


def _headline(checkup: Checkup) -> Text:
    answers = [one.answer for one in checkup.questions]
    count = f"{answers.count(Answer.YES)} of {len(answers)} questions answered, {answers.count(Answer.PARTLY)} in part"
    if not checkup.usable:
        return Text.assemble(("NOT USABLE", "bold red"), (": the trace can't say what it is for; ", "bold"), count)
    if any(one.answer is not Answer.YES for one in checkup.questions if one.main):
        return Text.assemble(("USABLE IN PART", "bold yellow"), (": ", "bold"), (count, "bold"))
    return Text.assemble(("USABLE", "bold green"), (": ", "bold"), (count, "bold"))


def _evidence(checkup: Checkup) -> str:
    sources = [
        f"{words.printable(one.source)} {one.requests:,} of {words.counted(one.tenants, 'tenant')}"
        for one in checkup.tenant_sources
    ]
    parts = [
        words.counted(len(checkup.replicas), "replica"),
        words.counted(checkup.requests, "request"),
        f"{checkup.requests_open:,} still open",
        f"{checkup.requests_lost:,} lost from sight",
        words.counted(checkup.tenants, "known tenant"),
        f"{checkup.known_tenant_share:.0%} of known tenant (named by {words.listed(sources)})",
    ]
    return " · ".join(parts)
