"""Small scenarios for the benchmark's own tests: half a minute of two tenants, and something that happens to them."""

from __future__ import annotations

from pathlib import Path

from stallscope.bench.cases import Case
from stallscope.workloads.scenario import load_scenario

USUAL = """
duration_s: 40
engine: {{model: 8b, max_num_seqs: {slots}, max_num_batched_tokens: {budget}, kv_blocks: {blocks}}}
tenants:
  amber: {{arrivals: {{poisson_per_s: 2}}, prompt_tokens: {{uniform: [100, 300]}}, output_tokens: 20}}
  birch: {{arrivals: {{poisson_per_s: 1}}, prompt_tokens: {{uniform: [100, 300]}}, output_tokens: 20}}
"""
FLOOD = "{tenant: ember, from_s: 18, to_s: 24, poisson_per_s: 4, prompt_tokens: 5000, output_tokens: 5}"
RESIDENTS = "{tenant: ember, at_s: 18, count: 4, prompt_tokens: 3000, output_tokens: 700}"
ANSWERS = "{tenant: ember, at_s: 18, count: 8, prompt_tokens: 50, output_tokens: 700}"
RISER = "{tenant: birch, from_s: 16, to_s: 26, grow: 2}"


def write_story(
    folder: Path, *inject: str, expect: str = "", slots: int = 32, budget: int = 512, blocks: int = 4096
) -> Path:
    """A scenario file called story.yaml."""
    text = "name: story\n" + USUAL.format(slots=slots, budget=budget, blocks=blocks).lstrip()
    if inject:
        text += "inject:\n" + "".join(f"  - {entry}\n" for entry in inject)
    if expect:
        text += f"expect: {expect}\n"
    path = folder / "story.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def story_case(path: Path, seed: int = 0) -> Case:
    """The scenario as it stands, neither disguised nor made hostile."""
    return Case("story", "cpu", seed, load_scenario(path))
