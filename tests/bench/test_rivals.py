"""Rules of thumb: each names who has the most of what it looks at, in the victims' window."""

from __future__ import annotations

from pathlib import Path

from stallscope.bench.paired import Harm
from stallscope.bench.rivals import accuse
from stallscope.diagnosis import diagnose
from stallscope.trace import read_trace
from stallscope.workloads.recording import VIRTUAL_START_NS, record
from stallscope.workloads.scenario import load_scenario
from tests.bench.stories import FLOOD, write_story


def test_a_flood_is_what_all_rules_but_the_rate_see(tmp_path: Path) -> None:
    path = tmp_path / "trace.otlp.jsonl"
    record(load_scenario(write_story(tmp_path, FLOOD)), path, seed=0, executor="virtual")
    trace = read_trace(path)
    named = accuse(trace, diagnose(trace), Harm("amber", "ttft", 0.9, 15, 30, 1, 0.1), VIRTUAL_START_NS)
    assert named["most tokens"] == named["longest prompt"] == named["most KV held"] == "ember"
    assert named["tokens above usual"] == named["charge above usual"] == named["load follows latency"] == "ember"
    before = accuse(trace, diagnose(trace), Harm("amber", "ttft", 0.9, 0, 15, 1, 0.1), VIRTUAL_START_NS)
    assert before["highest rate"] == before["most tokens"] == "amber"
    assert before["most KV held"] in ("amber", "birch")
