"""Recordings of small scenarios in virtual time, read back as the diagnosis reads them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa

from stallscope.diagnosis.incidents import find_episodes, find_windows, measure_waits
from stallscope.diagnosis.load import Loads
from stallscope.diagnosis.replay.history import History, read_history
from stallscope.diagnosis.replay.interventions import IncidentReplays
from stallscope.diagnosis.replay.replayer import prepare_replay
from stallscope.diagnosis.replica import Replica, replicas
from stallscope.diagnosis.suspects import healthy_waits
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
GROWTH = "inject: [{tenant: chat, from_s: 11, to_s: 21, grow: 3}]"
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
# Two residents hold most of the KV cache, and the others wait for blocks with slots and budget to spare.
PINNED = """
name: pinned
duration_s: 30
engine: {ENGINE}
tenants:
  chat: {arrivals: {poisson_per_s: 6}, prompt_tokens: {uniform: [40, 200]}, output_tokens: {uniform: [20, 60]}}
  search: {arrivals: {poisson_per_s: 1}, prompt_tokens: {uniform: [200, 600]}, output_tokens: {uniform: [5, 15]}}
inject: [{tenant: archive, at_s: 14, count: 2, prompt_tokens: {uniform: [7300, 7500]}, output_tokens: 700}]
"""
SMALL_CACHE = "max_num_seqs: 32, kv_blocks: 1056, watermark: 0.05"
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


def saying(trace: Trace, **said: str) -> Trace:
    """The trace with something else in its table of replicas."""
    table = trace.replicas
    for name, value in said.items():
        at = table.schema.get_field_index(name)
        column = pa.array([value] * len(table)).dictionary_encode().cast(table.schema.field(at).type)
        table = table.set_column(at, table.schema.field(at), column)
    return replace(trace, tables={**trace.tables, "replicas": table})


def replays_of(trace: Trace) -> list[IncidentReplays]:
    """The replays of each incident of a trace of one replica."""
    replica = only_replica(trace)
    waits = measure_waits(replica)
    episodes = find_episodes(waits)
    windows = find_windows(waits, episodes, replica)
    loads = Loads(replica, [(episode.start, episode.end) for episode in episodes])
    replayer = prepare_replay(replica)
    return replayer.incidents(windows, waits, healthy_waits(waits, windows), loads)


@cache
def only_incident(text: str, engine: str = PLAIN, seed: int = 0) -> IncidentReplays:
    """The replays of the one incident of a scenario; those that are made are kept for the next test."""
    (replays,) = replays_of(recorded(text, engine, seed))
    return replays
