"""A dataset of two replicas over two hours in virtual time, with stalls whose causes and times are known."""

from __future__ import annotations

from pathlib import Path

from stallscope.trace import Trace, read_trace, write_parquet
from stallscope.trace.append import append_parquet
from stallscope.trace.rename import renamed
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario

HOUR_S = 3600
FLOOD_S = 1500  # amid an hour
ACROSS_S = 3597  # from one hour into the next, for seconds
THROTTLED_S = (3300, 4200)  # for longer than the next hour's margin
STORY = f"""
name: hours
duration_s: {2 * HOUR_S}
engine: {{model: tiny-llama, max_num_seqs: 32, kv_blocks: 4096, max_num_batched_tokens: 2048}}
tenants:
  chat:
    arrivals: {{poisson_per_s: 0.2}}
    prompt_tokens: {{uniform: [40, 400]}}
    output_tokens: {{uniform: [4, 12]}}
  search:
    arrivals: {{poisson_per_s: 0.1}}
    prompt_tokens: {{uniform: [400, 900]}}
    output_tokens: {{uniform: [2, 6]}}
"""
FLOOD = "{{tenant: batch, at_s: {at}, count: 12, prompt_tokens: 12000, output_tokens: 20}}"
INJECTED = {
    "r0": f"""
inject:
  - {FLOOD.format(at=FLOOD_S)}
  - {{engine: throttle, from_s: {THROTTLED_S[0]}, to_s: {THROTTLED_S[1]}, factor: 400}}
""",
    "r1": f"""
inject:
  - {FLOOD.format(at=ACROSS_S)}
""",
}


def _recorded(folder: Path, replica: str, seed: int) -> Trace:
    story, file = folder / f"{replica}.yaml", folder / f"{replica}.otlp.jsonl"
    story.write_text(STORY + INJECTED[replica], encoding="utf-8")
    record(load_scenario(str(story)), file, seed=seed, executor="virtual")
    return renamed(read_trace(file), {"replica": lambda _: replica})


def write_dataset(folder: Path) -> Path:
    """The dataset, written: ``r0`` is flooded and throttled for long, ``r1`` flooded where hours meet."""
    dataset = folder / "dataset"
    write_parquet(_recorded(folder, "r0", 0), dataset)
    append_parquet(_recorded(folder, "r1", 1), dataset)
    return dataset
