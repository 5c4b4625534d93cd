"""Pairs of runs: requests are matched by who sent them and when, and harm is what changed for the same ones."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from stallscope.bench.paired import METRICS, few_harmed, outcomes, outcomes_of_trace, pair, same_harm, worst_harm
from stallscope.trace import read_trace
from stallscope.workloads.recording import VIRTUAL_START_NS, record, simulate
from stallscope.workloads.scenario import load_scenario
from tests.bench.stories import FLOOD, RISER, write_story


def runs(path: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    scenario = load_scenario(path)
    with_it, without = (outcomes(scenario, 3, inject, simulate(scenario, 3, inject)) for inject in (True, False))
    return with_it, without


def frame(ttft: list[float], without: list[float]) -> pd.DataFrame:
    """Requests of chat, one a second."""
    table = pd.DataFrame({"tenant": "chat", "arrival_s": [float(second) for second in range(len(ttft))]})
    for metric in METRICS:
        table[metric] = table[f"{metric}_without"] = 0.0
    return table.assign(ttft=ttft, ttft_without=without)


def test_a_tenants_usual_requests_are_matched_though_injected_ones_renumber_them(tmp_path: Path) -> None:
    with_it, without = runs(write_story(tmp_path, RISER))
    pairs = pair(with_it, without)
    assert with_it["injected"].sum() > 0
    assert len(pairs) == len(without)
    assert (with_it.loc[pairs.index, "request"] != without.loc[pairs.index, "request"]).any()
    assert (with_it.loc[pairs.index, "arrival_s"] == without.loc[pairs.index, "arrival_s"]).all()


def test_clients_who_wait_for_answers_are_matched_turn_by_turn(tmp_path: Path) -> None:
    loop = "{closed_loop: {clients: 3, think_s: 1}, prompt_tokens: 200, output_tokens: 20}"
    path = write_story(tmp_path, FLOOD)
    path.write_text(path.read_text().replace("inject:", f"  cedar: {loop}\ninject:"), encoding="utf-8")
    with_it, without = runs(path)
    pairs = pair(with_it, without)
    chosen = pairs[pairs["tenant"] == "cedar"]
    assert len(chosen) > 30
    assert (chosen.index == chosen["request"]).all()


def test_the_same_run_twice_harms_nobody(tmp_path: Path) -> None:
    with_it, _ = runs(write_story(tmp_path, FLOOD))
    harm = worst_harm(pair(with_it, with_it), ["amber", "birch"])
    assert harm is not None
    assert harm.excess_s == 0
    assert not harm.counts
    assert not few_harmed(pair(with_it, with_it))


def test_who_still_waits_at_the_end_has_waited_so_far(tmp_path: Path) -> None:
    endless = "{tenant: ember, at_s: 5, count: 2, prompt_tokens: 20, output_tokens: 60000}"
    with_it, without = runs(write_story(tmp_path, endless, slots=2, blocks=8192))
    harm = worst_harm(pair(with_it, without), ["amber", "birch"])
    assert harm is not None
    assert harm.with_s > 20


def test_a_trace_tells_the_same_as_the_run_that_was_recorded(tmp_path: Path) -> None:
    scenario = load_scenario(write_story(tmp_path, FLOOD))
    run = outcomes(scenario, 3, True, simulate(scenario, 3))
    path = tmp_path / "trace.otlp.jsonl"
    record(scenario, path, seed=3, executor="virtual")
    table, start_ns = outcomes_of_trace(scenario, 3, True, read_trace(path))
    assert start_ns == VIRTUAL_START_NS
    assert sorted(table.index) == sorted(run.index)
    both = table.join(run.add_suffix("_run"))
    for name in ("arrival_s", "ttft", "delivery"):
        assert both[name].to_numpy() == pytest.approx(both[f"{name}_run"].to_numpy())
    assert (both["injected"] == both["injected_run"]).all()
    long = both["itl_run"] > 0.1  # shorter gaps are recorded in sum
    assert both["itl"][long].to_numpy() == pytest.approx(both["itl_run"][long].to_numpy())


@pytest.mark.parametrize(
    ("ttft", "counts", "doubles"),
    [(0.149, False, False), (0.151, True, False), (0.2, True, True)],
)
def test_harm_counts_from_fifty_milliseconds_and_a_fifth(ttft: float, counts: bool, doubles: bool) -> None:
    harm = worst_harm(frame([ttft] * 30, [0.1] * 30), ["chat"])
    assert harm is not None
    assert (harm.counts, harm.doubles) == (counts, doubles)
    slow = worst_harm(frame([1 + ttft] * 30, [1.1] * 30), ["chat"])
    assert slow is not None
    assert not slow.counts


def test_the_worst_window_is_found_and_measured_alike_in_other_runs() -> None:
    stalled = [0.1] * 100 + [2.0] * 20 + [0.1] * 100
    harm = worst_harm(frame(stalled, [0.1] * 220), ["chat"])
    assert harm is not None
    assert harm.from_s < 120 <= harm.to_s
    assert harm.excess_s == pytest.approx(1.9)
    assert same_harm(frame([0.1] * 220, [0.1] * 220), harm).excess_s == 0


def test_a_few_hurt_requests_show_where_no_percentile_does() -> None:
    stalled = [0.1] * 97 + [2.0] * 3
    assert few_harmed(frame(stalled, [0.1] * 100))
    assert not few_harmed(frame([0.1] * 98 + [2.0] * 2, [0.1] * 100))
