"""Recordings of small scenarios in virtual time, read back as the diagnosis reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from stallscope.diagnosis.replay.history import History, read_history
from stallscope.diagnosis.replica import Replica, replicas
from stallscope.trace import Trace, read_trace
from stallscope.workloads.recording import record
from stallscope.workloads.scenario import load_scenario

CHAT = """
name: chat
duration_s: 30
engine: {ENGINE}
tenants:
  chat: {arrivals: {poisson_per_s: 8}, prompt_tokens: {uniform: [40, 400]}, output_tokens: {uniform: [20, 80]}}
  search: {arrivals: {poisson_per_s: 2}, prompt_tokens: {uniform: [400, 900]}, output_tokens: {uniform: [5, 15]}}
"""
FLOOD = "inject: [{tenant: batch, at_s: [12, 18], count: 6, prompt_tokens: 6000, output_tokens: 20}]"
AGENTS = """
name: agents
duration_s: 30
engine: {ENGINE}
tenants:
  chat: {arrivals: {poisson_per_s: 6}, prompt_tokens: {uniform: [40, 400]}, output_tokens: {uniform: [20, 60]}}
  agents:
    closed_loop: {clients: 6, think_s: 0.3, timeout_s: 2, retries: 1}
    prompt_tokens: {uniform: [800, 1600]}
    output_tokens: {uniform: [20, 60]}
inject: [{tenant: batch, at_s: 12, count: 10, prompt_tokens: 7000, output_tokens: 20}]
"""
PLAIN = "max_num_seqs: 32, kv_blocks: 4096"


@cache
def recorded(text: str, engine: str = PLAIN, seed: int = 0, inject: bool = True) -> Trace:
    """The trace of a scenario; ENGINE in its text is replaced."""
    with TemporaryDirectory() as folder:
        story = Path(folder) / "story.yaml"
        story.write_text(text.replace("ENGINE", engine), encoding="utf-8")
        out = Path(folder) / "recorded.otlp.jsonl"
        record(load_scenario(story), out, seed=seed, executor="virtual", inject=inject)
        return read_trace(out)


def only_replica(trace: Trace) -> Replica:
    (replica,) = replicas(trace)
    return replica


def history_of(text: str, engine: str = PLAIN, seed: int = 0) -> History:
    return read_history(only_replica(recorded(text, engine, seed)))


Recorded = Callable[..., Trace]
