"""The hook in a real vLLM's schedulers (``drive_scheduler``): does the trace say what vLLM itself said?

``STALLSCOPE_VLLM_PYTHON`` names the Python of an environment with vLLM 0.32; ``make test-vllm`` asks for it.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from stallscope.trace import Trace, read_trace
from stallscope.trace.batches import batches
from stallscope_telemetry import names

VLLM_PYTHON = os.environ.get("STALLSCOPE_VLLM_PYTHON", "")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not VLLM_PYTHON, reason="STALLSCOPE_VLLM_PYTHON names no Python of an environment with vLLM 0.32"
)


@dataclass
class Driven:
    """A trace, what vLLM itself said meanwhile, and what was logged."""

    path: Path
    log: dict[str, Any]
    said: str

    @cached_property
    def trace(self) -> Trace:
        return read_trace(self.path)


def drive(folder: Path, seed: int, *options: str) -> Driven:
    trace, log = folder / "trace.otlp.jsonl", folder / "log.json"
    script = Path(__file__).with_name("drive_scheduler.py")
    ran = subprocess.run(
        [VLLM_PYTHON, script, trace, log, str(seed), *options],
        env=os.environ
        | {
            "PYTHONPATH": f"{ROOT / 'telemetry'}{os.pathsep}{ROOT}",
            "STALLSCOPE_REPLICA": "vllm-0",
            "VLLM_TARGET_DEVICE": "cpu",
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return Driven(trace, json.loads(log.read_text(encoding="utf-8")), ran.stdout + ran.stderr)


def seen_batches(trace: Trace) -> dict[int, dict[str, int]]:
    """Tokens by request of each step, as the trace tells them."""
    found: dict[int, dict[str, int]] = defaultdict(dict)
    for row in batches(trace, "vllm-0").to_pylist():
        if row["tokens"]:
            found[row["step"]][row["request"]] = row["tokens"]
    return found


def seen_reasons(trace: Trace) -> dict[int, dict[str, str]]:
    """Why each request waits in each step, as the trace tells it."""
    found: dict[int, dict[str, str]] = defaultdict(dict)
    rows = trace.residency.to_pandas()
    for row in rows[rows["phase"].isin(["waiting", "preempted"])].itertuples():
        for step in range(row.first_step, row.last_step + 1):
            found[step][row.request] = row.reason
    return found


def token_times(path: Path) -> dict[str, list[int]]:
    """When each token of each request was ready, in ns."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        for span in json.loads(line)["resourceSpans"][0]["scopeSpans"][0]["spans"]:
            if span["name"] == names.REQUEST_SPAN:
                said = {one["key"]: next(iter(one["value"].values())) for one in span["attributes"]}
                gaps = said.get(names.TOKEN_TIMES, "")
                times = accumulate(map(int, gaps.split(",")), initial=int(span["startTimeUnixNano"])) if gaps else [0]
                found[said[names.REQUEST_ID]] = list(times)[1:]
    return found


SYNCHRONOUS: tuple[str, ...] = ()
ASYNCHRONOUS = ("--asynchronous",)


@pytest.mark.parametrize(
    ("options", "seed"),
    [
        *((SYNCHRONOUS, seed) for seed in range(3)),
        *((ASYNCHRONOUS, seed) for seed in (0, 1, 3)),
        ((*ASYNCHRONOUS, "--policy", "priority"), 0),
        (("--adapters",), 0),
        ((*ASYNCHRONOUS, "--whole-prompts"), 0),
    ],
    ids=lambda value: "-".join(one.strip("-") for one in value) or "synchronous" if isinstance(value, tuple) else None,
)
def test_the_trace_says_what_vllm_said(tmp_path: Path, options: tuple[str, ...], seed: int) -> None:
    driven = drive(tmp_path, seed, *options)
    trace, log = driven.trace, driven.log
    assert trace.findings == ()
    said = seen_batches(trace)
    requests, steps = trace.requests.to_pandas().set_index("request"), trace.steps.to_pandas().set_index("step")
    ended = dict(zip(requests.index, requests["end"], strict=True))
    assert len(steps) == len(log["batches"])
    for step, batch in enumerate(log["batches"]):
        # With asynchronous scheduling vLLM computes one token in vain for who had stopped in the step before.
        in_vain = {
            one for one in batch if "--asynchronous" in options and step and ended[one] <= steps["ready"][step - 1]
        }
        assert said[step] == {one: tokens for one, tokens in batch.items() if one not in in_vain}
    ready = steps["ready"].to_dict()
    assert token_times(driven.path) == {
        one: [ready[step] for step in log["tokens"].get(one, ())] for one in requests.index
    }
    assert requests["output_tokens"].to_dict() == {one: len(log["tokens"].get(one, ())) for one in requests.index}
    assert (steps["kv_used"] <= log["blocks"]).all()
    assert set(requests["tenant"]) == {"a", "b", "c"}
    assert log["preempted"], "the test is to have some"
    assert requests["preemptions"][requests["preemptions"] > 0].to_dict() == log["preempted"]
    rows = trace.residency.to_pandas()
    rows = rows[rows["phase"] == "preempted"]
    assert (rows["holder"].astype(str) != rows["request"].astype(str)).any()
    goes_on = {(row.request, row.last_step + 1) for row in rows.itertuples()}  # for another reason
    begins = rows[[(row.request, row.first_step) not in goes_on for row in rows.itertuples()]]
    for step, lost in begins.groupby("first_step"):
        takers = {*log["batches"][step], *lost["request"]}
        assert set(lost["holder"]) <= takers, "who took the blocks runs, or lost its own for want of more"
    assert requests["cached_tokens"].sum() > 0, "and these"
    assert (requests["finish_reason"] == "abort").any()


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        (SYNCHRONOUS, {"slots", "budget", "kv", "head"}),
        (ASYNCHRONOUS, {"slots", "budget", "kv", "head"}),
        (("--policy", "priority"), {"slots", "budget", "kv", "head"}),
        (("--adapters",), {"slots", "budget", "kv", "head", "adapter"}),
        (("--whole-prompts",), {"slots", "budget", "kv", "head"}),
    ],
    ids=["synchronous", "asynchronous", "priority", "adapters", "whole-prompts"],
)
def test_everybody_waits_for_what_vllm_lacked(tmp_path: Path, options: tuple[str, ...], reasons: set[str]) -> None:
    """Also for those whom the hook did not look at in a step."""
    driven = drive(tmp_path, 3, *options)
    seen = seen_reasons(driven.trace)
    gone = dict(zip(*(driven.trace.requests[name].to_pylist() for name in ("request", "end")), strict=True))
    scheduled = driven.trace.steps["scheduled"].to_pylist()
    for step, said in enumerate(driven.log["reasons"]):
        assert seen[step] == {one: reason for one, reason in said.items() if gone[one] > scheduled[step]}
    assert {reason for said in seen.values() for reason in said.values()} == reasons


@pytest.mark.parametrize("options", [SYNCHRONOUS, ASYNCHRONOUS], ids=["synchronous", "asynchronous"])
def test_what_breaks_in_the_hook_breaks_nothing_in_vllm(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = drive(tmp_path / "whole", 0, *options)
    broken = drive(tmp_path / "broken", 0, "--break-at", "40", *options)
    assert broken.log == whole.log
    assert broken.said.count("telemetry is off") == 1
    assert "stallscope: telemetry is off from here on, serving goes on: AttributeError" in broken.said
    assert "Traceback" not in broken.said
    assert 30 <= len(broken.trace.steps) <= 40


@pytest.mark.parametrize(
    "attribute",
    [
        "connector",
        "deferred_waiting",
        "finished_req_ids",
        "kv_cache_manager",
        "kv_holding_waiting",
        "max_num_active_reqs",
        "max_num_scheduled_tokens",
        "num_sampled_tokens_per_step",
        "num_spec_tokens",
        "running",
    ],
)
def test_a_vllm_that_lacks_what_the_hook_reads_serves_without_telemetry(tmp_path: Path, attribute: str) -> None:
    driven = drive(tmp_path, 0, "--without", attribute)
    assert driven.log["batches"]
    assert driven.said.count("stallscope: no telemetry: AttributeError") == 1
    assert f"no attribute '{attribute}' (vLLM " in driven.said
    assert "Traceback" not in driven.said
