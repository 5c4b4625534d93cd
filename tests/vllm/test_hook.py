"""The hook in a real vLLM's schedulers (``drive_scheduler``): does the trace say what vLLM itself said?

``STALLSCOPE_VLLM_PYTHON`` names the Python of an environment with vLLM 0.32; ``make test-vllm`` asks for it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from stallscope.trace import Trace, read_trace
from stallscope.trace.batches import batches

VLLM_PYTHON = os.environ.get("STALLSCOPE_VLLM_PYTHON", "")
ROOT = Path(__file__).parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 2048,
    "max_position_embeddings": 4096,
}

pytestmark = pytest.mark.skipif(
    not VLLM_PYTHON, reason="STALLSCOPE_VLLM_PYTHON names no Python of an environment with vLLM 0.32"
)


@dataclass(frozen=True)
class Driven:
    trace: Trace
    log: dict[str, Any]
    said: str


def drive(folder: Path, seed: int, *options: str) -> Driven:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    trace, log = folder / "trace.otlp.jsonl", folder / "log.json"
    script = Path(__file__).with_name("drive_scheduler.py")
    ran = subprocess.run(
        [VLLM_PYTHON, script, folder / "model", trace, log, str(seed), *options],
        env=os.environ
        | {"PYTHONPATH": str(ROOT / "telemetry"), "STALLSCOPE_REPLICA": "vllm-0", "VLLM_TARGET_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return Driven(read_trace(trace), json.loads(log.read_text(encoding="utf-8")), ran.stdout + ran.stderr)


def seen_batches(trace: Trace) -> dict[int, dict[str, int]]:
    """Tokens by request of each step, as the trace tells them."""
    found: dict[int, dict[str, int]] = defaultdict(dict)
    for row in batches(trace, "vllm-0").to_pylist():
        if row["tokens"]:
            found[row["step"]][row["request"]] = row["tokens"]
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("options", [(), ("--asynchronous",)], ids=["synchronous", "asynchronous"])
def test_the_trace_says_what_vllm_said(tmp_path: Path, seed: int, options: tuple[str, ...]) -> None:
    driven = drive(tmp_path, seed, *options)
    trace, log = driven.trace, driven.log
    assert trace.findings == ()
    said = seen_batches(trace)
    requests, steps = trace.requests.to_pandas().set_index("request"), trace.steps.to_pandas().set_index("step")
    ended = dict(zip(requests.index, requests["end"], strict=True))
    assert len(steps) == len(log["batches"])
    for step, batch in enumerate(log["batches"]):
        # With asynchronous scheduling vLLM computes one token in vain for who had stopped in the step before.
        in_vain = {one for one in batch if options and step and ended[one] <= steps["ready"][step - 1]}
        assert said[step] == {one: tokens for one, tokens in batch.items() if one not in in_vain}
    assert requests["output_tokens"].to_dict() == {one: log["outputs"].get(one, 0) for one in requests.index}
    assert (steps["kv_used"] <= log["total_blocks"]).all()
    assert set(requests["tenant"]) == {"a", "b", "c"}
    assert log["preempted"], "the test is to have some"
    assert requests["preemptions"][requests["preemptions"] > 0].to_dict() == log["preempted"]
    rows = trace.residency.to_pandas()
    rows = rows[rows["phase"] == "preempted"]
    assert (rows["holder"].astype(str) != rows["request"].astype(str)).any()
    for lost in rows.itertuples():
        assert lost.holder in {*log["batches"][lost.first_step], lost.request}, "who took the blocks runs"
    assert requests["cached_tokens"].sum() > 0, "and these"
    assert (requests["finish_reason"] == "abort").any()


@pytest.mark.parametrize("options", [(), ("--asynchronous",)], ids=["synchronous", "asynchronous"])
def test_what_breaks_in_the_hook_breaks_nothing_in_vllm(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = drive(tmp_path / "whole", 0, *options)
    broken = drive(tmp_path / "broken", 0, "--break-at", "40", *options)
    assert broken.log == whole.log
    assert "telemetry is off from here on, serving goes on" in broken.said
    assert 30 <= len(broken.trace.steps) <= 40
