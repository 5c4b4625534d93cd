"""Two recordings compared, as text for a terminal: did it get better, how sure is that, and what else has changed."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from stallscope.reports.text import plain_table
from stallscope.views import words
from stallscope.views.comparison import LEVEL, Change, Comparison, Outcome, Side

FEW_INCIDENTS = 3
LOSSY = 0.01  # share of steps lost from which on a comparison may be of what was seen, not of what was
_STYLE = {Outcome.BETTER: "green", Outcome.WORSE: "red", Outcome.CHANCE: "dim"}
_SAYS = {
    Outcome.BETTER: "better",
    Outcome.WORSE: "worse",
    Outcome.CHANCE: "within chance",
}


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Writes the whole comparison; names from the traces are text on one line."""
    console.print(_headline(comparison), soft_wrap=True)
    for line in _caveats(comparison):
        console.print(Text(line, style="yellow"), soft_wrap=True)
    console.print()
    sides = plain_table(
        ("", "left"),
        ("verdict", "left"),
        ("incidents", "right"),
        ("lost", "right"),
        ("length", "right"),
        ("requests", "right"),
        ("a second", "right"),
        ("tokens a second", "right"),
        ("from", "left"),
    )
    for name, side in (("before", comparison.before), ("after", comparison.after)):
        sides.add_row(name, *_side(side))
    console.print(sides)
    if not comparison.changes:
        return
    console.print()
    table = plain_table(
        ("tenant", "left"),
        ("", "left"),
        ("before", "right"),
        ("after", "right"),
        ("requests", "right"),
        ("after/before", "right"),
        (f"{LEVEL:.0%} interval", "right"),
        ("", "left"),
    )
    for change in comparison.changes:
        table.add_row(*_change(change))
    console.print(table)


def _headline(comparison: Comparison) -> Text:
    outcomes = [change.outcome for change in comparison.changes]
    better, worse = outcomes.count(Outcome.BETTER), outcomes.count(Outcome.WORSE)
    incidents = f"incidents {comparison.before.incidents:,} before, {comparison.after.incidents:,} after"
    if not outcomes:
        return Text.assemble(("INCONCLUSIVE", "bold"), (": too few requests of any tenant in both", "bold"))
    count = f": {better} of {len(outcomes)} percentiles better, {worse} worse; {incidents}"
    if better and worse:
        return Text.assemble(("MIXED", "bold yellow"), (count, "bold"))
    if better:
        return Text.assemble(("BETTER", "bold green"), (count, "bold"))
    if worse:
        return Text.assemble(("WORSE", "bold red"), (count, "bold"))
    return Text.assemble(("NO DIFFERENCE that chance doesn't explain", "bold"), f"; {incidents}")


def _caveats(comparison: Comparison) -> list[str]:
    """What keeps a difference from being the fix's doing, or from being seen."""
    lines = []
    for name, side in (("before", comparison.before), ("after", comparison.after)):
        if side.steps_lost_share >= LOSSY:
            lost = f"{side.steps_lost_share:.0%} of the steps {name} are lost from the telemetry"
            lines.append(f"{lost}: what can't be seen there may be all of the difference")
    for load in comparison.loads[:5]:
        name = words.printable(load.tenant)
        rates = f"{load.before:,.0f} tokens a second before, {load.after:,.0f} after"
        lines.append(f"load differs: {name} {rates}; part of any difference may be that")
    if 0 < comparison.before.incidents < FEW_INCIDENTS and comparison.after.incidents < comparison.before.incidents:
        count = words.counted(comparison.before.incidents, "incident")
        lines.append(f"{count} before: whether more would have come, no recording of this length can tell")
    if comparison.not_compared:
        names = [words.printable(name) for name in comparison.not_compared[:5]]
        more = len(comparison.not_compared) - len(names)
        lines.append(f"too few requests to compare: {words.listed([*names, *([f'{more} more'] if more else [])])}")
    return lines


def _side(side: Side) -> list[Text | str]:
    return [
        side.verdict,
        f"{side.incidents:,}",
        words.duration(side.lost_s),
        words.duration(side.length_s),
        f"{side.requests:,}",
        f"{side.requests_per_s:.1f}",
        f"{side.tokens_per_s:,.0f}",
        Text(words.printable(side.source)),
    ]


def _change(change: Change) -> list[Text | str]:
    metric = f"{words.METRIC_WORDS[change.metric]} {words.quantile_name(change.quantile)}"
    ratio = change.after_s / change.before_s if change.before_s else float("inf")
    return [
        Text(words.printable(change.tenant)),
        metric,
        words.duration(change.before_s),
        words.duration(change.after_s),
        f"{change.before_requests:,}, {change.after_requests:,}",
        f"{ratio:.3g}",
        f"{change.ratio_low:.3g} to {change.ratio_high:.3g}",
        Text(_SAYS[change.outcome], style=_STYLE[change.outcome]),
    ]
