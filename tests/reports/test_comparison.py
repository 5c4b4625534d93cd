"""The comparison as it is printed: the answer first, then what keeps it from being the fix's doing."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

from rich.console import Console

from stallscope.reports.comparison import print_comparison
from stallscope.views.comparison import Change, Comparison, LoadChange, Outcome, Side

SIDE = Side("t.otlp.jsonl", "noisy_neighbor", 60.0, 400, 6.7, 1500.0, 2, 31.0, 0.0)
BETTER = Change("chat", "ttft", 0.9, 3.2, 0.016, 300, 310, 0.004, 0.02, Outcome.BETTER)
SAME = replace(BETTER, metric="itl", after_s=3.1, ratio_low=0.7, ratio_high=1.2, outcome=Outcome.CHANCE)
WORSE = replace(BETTER, tenant="a\nb", before_s=0.016, after_s=3.2, ratio_low=50, ratio_high=250, outcome=Outcome.WORSE)


def printed(*changes: Change, before: Side = SIDE, after: Side = SIDE, loads: tuple[LoadChange, ...] = ()) -> list[str]:
    out = StringIO()
    print_comparison(Comparison(before, after, changes, loads, ()), Console(file=out, width=150, highlight=False))
    return out.getvalue().splitlines()


def test_the_answer_is_the_first_line() -> None:
    assert printed(BETTER, SAME)[0].startswith(
        "BETTER: 1 of 2 percentiles better, 0 worse; incidents 2 before, 2 after"
    )
    assert printed(BETTER, WORSE)[0].startswith("MIXED: ")
    assert printed(SAME, WORSE)[0].startswith("WORSE: ")
    assert printed(SAME)[0].startswith("NO DIFFERENCE that chance doesn't explain")
    assert printed()[0].startswith("INCONCLUSIVE: ")


def test_a_change_is_shown_with_its_interval_and_the_requests_behind_it() -> None:
    (line,) = (line for line in printed(BETTER) if line.startswith("chat"))
    assert line.split("  ")[0] == "chat"
    for part in ("TTFT p90", "3.20 s", "16 ms", "300, 310", "0.004 to 0.02", "better"):
        assert part in line


def test_what_else_may_have_made_the_difference_is_said() -> None:
    lossy, spared = replace(SIDE, steps_lost_share=0.3), replace(SIDE, incidents=0)
    lines = printed(BETTER, before=lossy, after=spared, loads=(LoadChange("batch", 1000.0, 0.0),))
    assert lines[1].startswith("30% of the steps before are lost from the telemetry")
    assert lines[2].startswith("load differs: batch 1,000 tokens a second before, 0 after")
    assert lines[3].startswith("2 incidents before: whether more would have come")


def test_names_stay_on_their_line() -> None:
    assert any(line.startswith("a\\nb") for line in printed(WORSE))
