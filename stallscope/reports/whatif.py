"""What a replay says would have been, as text: every tenant's percentiles as recorded, replayed, and changed."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.text import Text

from stallscope.diagnosis.whatif import WhatIf
from stallscope.reports.text import plain_table
from stallscope.views import words
from stallscope.views.whatif import side_by_side


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
    view = side_by_side(one)
    for row, tenant in enumerate(view.tenants):
        left = not np.isnan(view.predicted_s[row])
        table.add_row(
            Text(words.printable(tenant)),
            f"{words.METRIC_WORDS[view.metrics[row]]} {words.quantile_name(view.quantile[row])}",
            f"{view.requests[row]:,}",
            words.duration(view.recorded_s[row]),
            words.duration(view.replayed_s[row]),
            words.duration(view.predicted_s[row]) if left else "none",
            f"{words.duration(view.low_s[row])} to {words.duration(view.high_s[row])}" if left else "no request left",
        )
    console.print(table)
    console.print(Text(f"\noutput tokens in the same time: {one.throughput:.0%}", style="dim"))
