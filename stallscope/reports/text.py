"""A diagnosis or a request's waterfall as text for a terminal: the answer first, then how sure, then the evidence."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stallscope.diagnosis.model import Diagnosis, Incident, Intervention, InterventionKind, Verdict
from stallscope.views import words
from stallscope.views.waterfall import OWN, Part, Waterfall

MOST_INCIDENTS = 5
MOST_CHARGES = 6
MOST_PREDICTIONS = 3  # of one intervention
_STYLE = {
    Verdict.HEALTHY: "bold green",
    Verdict.NOISY_NEIGHBOR: "bold red",
    Verdict.SELF_INFLICTED: "bold yellow",
    Verdict.OVERLOAD: "bold yellow",
    Verdict.ENGINE_STALL: "bold magenta",
    Verdict.COLD_CACHE: "bold yellow",
    Verdict.OUTSIDE_ENGINE: "bold magenta",
    Verdict.INSUFFICIENT_DATA: "bold",
}


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Writes the whole report; names from the trace are text, never markup or commands to the terminal."""
    diagnosis = words.legible(diagnosis)
    console.print(_headline(diagnosis), soft_wrap=True)
    console.print(Text(words.evidence(diagnosis), style="dim"), soft_wrap=True)
    for check in diagnosis.replays:
        line = f"replay of {words.replay_line(check)}"
        console.print(Text(line, style="dim" if check.trusted else "yellow"), soft_wrap=True)
    for note in diagnosis.notes:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)
    for number, incident in enumerate(diagnosis.incidents[:MOST_INCIDENTS], start=1):
        console.print()
        console.print(_incident(number, incident))
    more = len(diagnosis.incidents) - MOST_INCIDENTS
    if more > 0:
        console.print(Text(f"\nand {words.counted(more, 'smaller incident')}; --format json lists them all"))
    console.print()
    console.print(_tenants(diagnosis))
    if command := words.explain_command(diagnosis):
        console.print(Text(f"\nnext: {command}", style="dim"), soft_wrap=True)


def _headline(diagnosis: Diagnosis) -> Text:
    name = str(diagnosis.verdict).replace("_", " ").upper()
    return Text.assemble((name, _STYLE[diagnosis.verdict]), (": ", "bold"), (words.headline(diagnosis), "bold"))


def _incident(number: int, incident: Incident) -> RenderableType:
    parts: list[RenderableType] = []
    for culprit in incident.culprits:
        line = words.culprit_line(culprit, incident)
        parts.append(Text.assemble(("culprit    ", "dim"), (culprit.tenant, "bold red"), line))
        shown = [r for r in culprit.requests if r.share >= 0.05][:3] or list(culprit.requests[:1])
        for request in shown:
            text = (
                f"{request.prompt_tokens:,} prompt and {request.output_tokens:,} output tokens, "
                f"arrived {words.clock(request.arrival_ns)}, cost them {words.duration(request.caused_s)} "
                f"({request.share:.0%} of what {culprit.tenant} did)"
            )
            label = "request    " if request.request == culprit.dominating_request else "one of     "
            parts.append(Text.assemble((label, "dim"), (request.request, "bold"), f": {text}"))
    if incident.group:
        parts.append(Text.assemble(("alike      ", "dim"), incident.group))
    for reason in incident.reasons:
        parts.append(Text.assemble(("because    ", "dim"), reason))
    parts.append(Text.assemble(("confidence ", "dim"), str(incident.confidence)))
    if incident.mechanism and not incident.culprits:
        meaning = words.mechanism(incident.mechanism)
        parts.append(Text.assemble(("mechanism  ", "dim"), (incident.mechanism, "bold"), f": {meaning}"))
    if incident.runner_up:
        parts.append(Text.assemble(("runner-up  ", "dim"), f"{incident.runner_up}, {incident.runner_up_share:.0%}"))
    parts += [_victims(incident), _charges(incident)]
    if incident.interventions:
        parts.append(_what_if("replayed with", incident.interventions))
    if incident.remedies:
        parts.append(_what_if("remedy", incident.remedies))
    title = Text.assemble((f"{number}. ", "bold"), (words.incident_line(incident), "bold"))
    return Group(title, Padding(Group(*parts), (0, 0, 0, 3), expand=False))


def plain_table(*columns: tuple[str, str]) -> Table:
    """A plain table: columns are (heading, "left" or "right"). Where it is too wide, the widest wrap."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for heading, side in columns:
        table.add_column(heading, justify="right" if side == "right" else "left", overflow="fold")
    return table


def _victims(incident: Incident) -> RenderableType:
    table = plain_table(
        ("victim", "left"),
        ("stalled", "right"),
        ("lost", "right"),
        ("TTFT", "right"),
        ("usually", "right"),
        ("longest gap", "right"),
        ("usually", "right"),
    )
    for victim in incident.victims:
        table.add_row(
            Text(victim.tenant),
            f"{victim.stalled_requests} of {victim.requests}",
            words.duration(victim.lost_s),
            *(
                next((words.quantile(q) for q in quantiles if q.metric == metric), "-")
                for metric in ("ttft", "itl")
                for quantiles in (victim.during, victim.usual)
            ),
        )
    return table


def _charges(incident: Incident) -> Table:
    table = plain_table(("charged to", "left"), ("by", "left"), ("seconds", "right"), ("share", "right"))
    for charge in incident.charges[:MOST_CHARGES]:
        if charge.share < 0.01:
            break
        holder = f"{charge.holder} (itself)" if charge.own else charge.holder
        table.add_row(Text(holder), charge.mechanism, words.duration(charge.seconds), f"{charge.share:.0%}")
    return table


def _what_if(title: str, interventions: tuple[Intervention, ...]) -> Table:
    table = plain_table((title, "left"), ("excess gone", "right"), ("throughput", "right"), ("predicted", "left"))
    for one in interventions:
        what = Text(one.what)
        if one.kind is InterventionKind.REMEDY:
            what.append(" (tonight)" if one.tonight else " (needs a change of the engine)", style="dim")
        for line in (one.how, words.caveat(one)):
            if line:
                what.append(f"\n  {line}", style="dim")
        predicted = Text("\n".join(words.predictions(one)[:MOST_PREDICTIONS]))
        table.add_row(what, words.restored(one), f"{one.throughput:.0%}", predicted)
    return table


def _tenants(diagnosis: Diagnosis) -> Table:
    title = f"the whole trace, {words.day(diagnosis.start_ns)} {words.clock(diagnosis.start_ns)}"
    table = plain_table(
        ("tenant", "left"),
        ("requests", "right"),
        ("TTFT", "left"),
        ("longest gap", "left"),
        ("tokens", "right"),
        ("step time", "right"),
        ("KV cache", "right"),
    )
    table.title = Text(f"{title} to {words.clock(diagnosis.end_ns, zone=True)}", style="dim")
    table.title_justify = "left"
    for tenant in diagnosis.tenants:
        values = {q.metric: words.quantile(q) for q in tenant.quantiles}
        table.add_row(
            Text(tenant.tenant),
            f"{tenant.requests:,}",
            values.get("ttft", "-"),
            values.get("itl", "-"),
            f"{tenant.token_share:.0%}",
            f"{tenant.step_time_share:.0%}",
            f"{tenant.kv_share:.0%}",
        )
    return table


# --- one request --------------------------------------------------------------------------------------------------


def print_waterfall(waterfall: Waterfall, console: Console) -> None:
    """Where each millisecond of one request went, and to whom."""
    others = sum(part.seconds for part in waterfall.parts if part.holder != OWN)
    console.print(
        Text.assemble(
            (waterfall.request, "bold"),
            " of ",
            (waterfall.tenant, "bold"),
            f" took {words.duration(waterfall.length_s)}, ",
            (f"{words.duration(others)} of it not its own work", "bold red" if others > waterfall.length_s / 2 else ""),
        ),
        soft_wrap=True,
    )
    ttft = "no token yet" if waterfall.ttft_s is None else f"first token after {words.duration(waterfall.ttft_s)}"
    console.print(
        Text(
            f"{waterfall.state} · arrived {words.clock(waterfall.arrival_ns, zone=True)} on {waterfall.replica} · "
            f"{ttft} · "
            f"{waterfall.prompt_tokens:,} prompt and {waterfall.output_tokens:,} output tokens"
            f"{' · who was in the batches is an estimate' if waterfall.estimated else ''}",
            style="dim",
        ),
        soft_wrap=True,
    )
    console.print()
    rows = plain_table(("after", "right"), ("for", "right"), ("", "left"), ("doing", "left"), ("charged to", "left"))
    longest = max((row.length_s for row in waterfall.rows), default=1.0)
    for row in waterfall.rows:
        bar = "█" * max(1, round(16 * row.length_s / longest))
        rows.add_row(
            words.duration(row.offset_s),
            words.duration(row.length_s),
            Text(bar, style="red" if row.stalled else "blue"),
            f"{row.doing}, stalled" if row.stalled else row.doing,
            _who(row.parts, row.length_s),
        )
    console.print(rows)
    console.print()
    sums = plain_table(("in sum", "right"), ("share", "right"), ("charged to", "left"), ("by", "left"))
    for part in waterfall.parts:
        share = part.seconds / waterfall.length_s if waterfall.length_s else 0.0
        if share < 0.005:
            continue
        holder = f"{part.holder} (its other requests)" if part.holder == waterfall.tenant else part.holder
        meaning = words.MECHANISM_WORDS.get(part.mechanism, "")
        sums.add_row(words.duration(part.seconds), f"{share:.0%}", Text(holder), f"{part.mechanism}: {meaning}")
    console.print(sums)


def _who(parts: tuple[Part, ...], length_s: float) -> Text:
    """The holders of a row that matter, the largest first."""
    shown = [part for part in parts if part.seconds >= 0.1 * length_s][:3]
    return Text(", ".join(f"{part.holder} {part.mechanism} {words.duration(part.seconds)}" for part in shown))
