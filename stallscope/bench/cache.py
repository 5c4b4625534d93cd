"""What a case costs to make, kept on disk: its trace, its truth, its requests with and without the cause.

Kept by content: of the scenario that runs, the seed, and all code that decides what a run does.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

import stallscope
import stallscope_engine
import stallscope_telemetry
from stallscope.bench.cases import Case
from stallscope.bench.policies import registered
from stallscope.bench.truth import InVirtualTime, OnTorch, Truth, find_truth
from stallscope.workloads.recording import record
from stallscope.workloads.replica import ExecutorName

_TRUTH_CODE = ("cases", "paired", "policies", "relaxations", "truth")


def default_folder() -> Path:
    """Where caches of a user belong (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stallscope" / "bench"


@dataclass(frozen=True, slots=True)
class Made:
    """A case that is ready to be judged; ``pairs`` are as ``paired.pair`` gives them."""

    truth: Truth
    pairs: pd.DataFrame
    trace: Path


def make(case: Case, folder: Path, executor: ExecutorName) -> Made:
    """The case from ``folder``, or made on ``executor`` and put there."""
    stem = folder / _digest(case, executor)
    truth, pairs = stem.with_suffix(".json"), stem.with_suffix(".parquet")
    trace = stem.with_suffix(".otlp.jsonl.zst")
    folder.mkdir(parents=True, exist_ok=True)
    if not trace.exists():
        draft = stem.with_name(f"{stem.name}-{os.getpid()}.otlp.jsonl.zst")
        with registered():
            record(case.scenario, draft, seed=case.seed, executor=executor, force=True)
        draft.replace(trace)
    if not truth.exists():
        with TemporaryDirectory() as scratch:
            on_torch = OnTorch(case.seed, Path(scratch), case.scenario, trace)
            found, table = find_truth(case, on_torch if executor == "torch" else InVirtualTime(case.seed))
        table.to_parquet(pairs)
        draft = truth.with_suffix(f".{os.getpid()}")
        draft.write_text(found.to_json(), encoding="utf-8")
        draft.replace(truth)
    return Made(Truth.from_json(truth.read_text(encoding="utf-8")), pd.read_parquet(pairs), trace)


def _digest(case: Case, executor: ExecutorName) -> str:
    return hashlib.sha256(f"{_code()}{executor}{case}".encode()).hexdigest()[:24]


@cache
def _code() -> str:
    """A digest of all code that decides what a run does."""
    folders = [Path(module.__file__ or "").parent for module in (stallscope_engine, stallscope_telemetry)]
    package = Path(stallscope.__file__).parent
    files = [file for folder in (*folders, package / "workloads") for file in folder.rglob("*.py")]
    files = [file for file in files if "vllm" not in file.parts]  # another engine's
    files += [package / "bench" / f"{name}.py" for name in _TRUTH_CODE]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in sorted(files))).hexdigest()
