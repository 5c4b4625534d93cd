"""From a recorded flood to the proof: engine, rehearsal, diagnosis and Prometheus as they are."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from stallscope import cli
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario
from tests.alerts.backtest.stories import PAGE, needs_promtool

FLOOD = """
name: long_flood
about: A flood of long prompts that lasts for two minutes.
duration_s: 420
engine: {model: 8b, max_num_seqs: 64, max_num_batched_tokens: 512, kv_blocks: 16384}
tenants:
  amber:
    arrivals: {poisson_per_s: 1.2}
    prompt_tokens: {lognormal: {median: 260, sigma: 0.75}}
    output_tokens: {lognormal: {median: 30, sigma: 0.6}}
  birch:
    arrivals: {poisson_per_s: 0.8}
    prompt_tokens: {lognormal: {median: 350, sigma: 0.9}}
    output_tokens: {lognormal: {median: 6, sigma: 0.5}}
inject:
  - tenant: ember
    from_s: 80
    to_s: 230
    poisson_per_s: 1.2
    prompt_tokens: {lognormal: {median: 3500, sigma: 0.3}}
    output_tokens: {uniform: [5, 25]}
expect: {verdict: noisy_neighbor, culprits: [ember], mechanism: [prefill_queue]}
"""


@needs_promtool
def test_a_flood_that_lasts_is_paged_by_its_tenants_name_and_the_proof_can_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario, trace, rules, tests = (tmp_path / name for name in ("flood.yaml", "t.otlp.jsonl", "r.yaml", "tests.yaml"))
    scenario.write_text(FLOOD)
    rules.write_text(PAGE.replace("> 0.2", "> 0.05"))
    record(load_scenario(str(scenario), "cpu"), trace, seed=7, executor="virtual")
    arguments = ["stallscope", "alerts", "backtest", str(rules), str(trace), "--tests", str(tests), "--format", "json"]
    monkeypatch.setattr("sys.argv", arguments)
    cli.app(standalone_mode=False)
    made = json.loads(capsys.readouterr().out)
    lasting = [one for one in made["incidents"] if one["required"]]
    assert [one["culprits"] for one in lasting] == [["ember"]]
    assert [one["answer"] for one in lasting] == ["caught"]
    assert 0 < lasting[0]["delay_s"] <= 60
    assert {one["labels"]["tenant"] for one in made["firings"]} == {"ember"}
    assert subprocess.run(["promtool", "test", "rules", tests], capture_output=True, check=False).returncode == 0
