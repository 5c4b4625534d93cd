"""A rule is provable on data that has its metrics and is as long as it looks back; else it is said why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from stallscope.alerts.backtest.provable import reads, spoken
from stallscope.alerts.backtest.timeline import grid_of
from stallscope.errors import UsageError
from tests.alerts.backtest.stories import BLAME, rules, timeline

RULE = "groups:\n- name: g\n  rules:\n%s\n  - alert: A\n    expr: '%s'\n    for: %s\n"


def reason(folder: Path, expression: str, *, wait: str = "0s", recordings: str = "", length_s: float = 240) -> str:
    read = rules(folder, RULE % (recordings, expression, wait))
    made = timeline(length_s)
    return reads(read).reason(read.alerts[0], made, grid_of(made, 10))


@pytest.mark.parametrize(
    ("expression", "says"),
    [
        ("vllm:num_requests_waiting > 3", "needs vllm:num_requests_waiting"),
        ("up == 0 or a + b + c + d + e", "needs a, b, c, d and 2 more"),
        ('{__name__=~"vllm:.*"} > 0', "needs vllm:.*"),
        (f"rate({BLAME}[6h]) > 0", "looks back 6 h, the trace has 4 min"),
        (f"rate({BLAME}[2m] offset 3m) > 0", "looks back 5 min, the trace has 4 min"),
        (f"{BLAME} > 0 and hour() > 8", "asks for the date (hour()), and a backtest's clock starts in 1970"),
        (f"rate({BLAME}[4m]) > 0", ""),
        ("rate(stallscope_judged_seconds_total[1m]) > 0", ""),
        ("increase(stallscope_gpu_throttled_seconds_total[1m]) > 1", "needs stallscope_gpu_throttled_seconds_total"),
        (f"absent({BLAME})", ""),
        ("vector(1)", ""),
    ],
)
def test_why_a_rule_is_not_provable(tmp_path: Path, expression: str, says: str) -> None:
    assert reason(tmp_path, expression) == says


def test_for_counts_as_looking_back(tmp_path: Path) -> None:
    assert reason(tmp_path, f"rate({BLAME}[2m]) > 0", wait="3m") == "looks back 5 min, the trace has 4 min"


def test_what_a_recording_rule_reads_its_alert_needs(tmp_path: Path) -> None:
    recorded = "  - record: r:a\n    expr: sum(rate(vllm:x[1h]))"
    assert reason(tmp_path, "r:a > 0", recordings=recorded) == "needs vllm:x"
    recorded = f"  - record: r:a\n    expr: sum(rate({BLAME}[1h]))"
    assert reason(tmp_path, "r:a > 0", recordings=recorded) == "looks back 60 min, the trace has 4 min".replace(
        "60 min", "1 h"
    )


def test_only_series_that_a_rule_reads_are_given_to_promtool(tmp_path: Path) -> None:
    read = rules(tmp_path, RULE % ("", "vector(1)", "0s"))
    assert reads(read).series(timeline(60)) == []
    read = rules(tmp_path, RULE % ("", '{victim="chat"} > 0', "0s"))
    assert [name for name, _ in reads(read).series(timeline(60))] == [BLAME]


def test_what_a_label_queries_is_given_too(tmp_path: Path) -> None:
    label = "    labels: {top: '{{ with query \"topk(1, NAME)\" }}x{{ end }}'}\n".replace("NAME", BLAME)
    text = RULE % ("", "vector(1)", "0s") + label
    read = rules(tmp_path, text)
    assert [name for name, _ in reads(read).series(timeline(60))] == [BLAME]


def test_what_is_not_understood_is_an_error_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rules\.yaml: .* is no PromQL"):
        reads(rules(tmp_path, RULE % ("", "a > $x", "0s")))


@pytest.mark.parametrize(
    ("length_s", "text"),
    [
        (5, "5 s"),
        (90, "90 s"),
        (410, "6.8 min"),
        (3588, "60 min"),
        (2.5, "2.5 s"),
        (120, "2 min"),
        (3600, "1 h"),
        (21600, "6 h"),
        (259200, "3 d"),
    ],
)
def test_lengths_in_words(length_s: float, text: str) -> None:
    assert spoken(length_s) == text
