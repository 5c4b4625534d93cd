"""What a replay says would have been, as text: every tenant's percentiles as recorded, replayed, and changed."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from stallscope.diagnosis.whatif import WhatIf
from stallscope.reports.text import plain_table
from stallscope.views import words


def print_what_if(answer: WhatIf, console: Console) -> None:
    """The headline, how far it can be believed, and a row for each tenant and metric."""
    one = answer.answer
    console.print(Text.assemble((words.printable(one.what), "bold"), f": {words.restored(one)} of the stalls gone"))
    console.print(Text(words.replay_line(answer.check), style="dim"), soft_wrap=True)
    if caveat := words.caveat(one):
        console.print(Text(caveat, style="yellow"), soft_wrap=True)
    console.print()
    table = plain_table(
        ("tenant", "left"),
        ("", "left"),
        ("requests", "right"),
        ("recorded", "right"),
        ("replayed", "right"),
        ("predicted", "right"),
        ("draws", "left"),
    )
    for row in one.predictions:
        left = row.high_s > 0 or row.recorded_s <= 0  # answers of one token have no gaps
        table.add_row(
            Text(words.printable(row.tenant)),
            f"{words.METRIC_WORDS[row.metric]} p{row.quantile * 100:.0f}",
            f"{row.requests:,}",
            words.duration(row.recorded_s),
            words.duration(row.replayed_s),
            words.duration(row.predicted_s) if left else "none",
            f"{words.duration(row.low_s)} to {words.duration(row.high_s)}" if left else "no request left",
        )
    console.print(table)
    console.print(Text(f"\noutput tokens in the same time: {one.throughput:.0%}", style="dim"))
