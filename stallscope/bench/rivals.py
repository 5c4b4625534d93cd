"""Rules that people use today to name a culprit, on the same traces: each accuses one tenant in the victims' window.

They are told when it was, which an analyzer has to find: the victims' window, and as long before it as they waited.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from stallscope.bench.paired import Harm
from stallscope.diagnosis.model import Diagnosis
from stallscope.trace import Trace

RULES = (
    "most tokens",
    "longest prompt",
    "most KV held",
    "highest rate",
    "load follows latency",
    "tokens above usual",
    "charge above usual",
)
_BIN_S = 5.0  # of the correlation


def accuse(trace: Trace, diagnosis: Diagnosis, harm: Harm, start_ns: int) -> dict[str, str]:
    """Whom each rule names in a run that began at ``start_ns``, "" where it has nothing to go by.

    The charges are those of the diagnosis.
    """
    harm = replace(harm, from_s=max(harm.from_s - harm.with_s, 0.0))
    requests = _requests(trace, start_ns)
    inside = requests["arrival_s"].between(harm.from_s, harm.to_s)
    during = requests[inside].groupby("tenant")
    length_s = harm.to_s - harm.from_s
    rest_s = max(float(requests["arrival_s"].max()) - length_s, 1.0)
    usual = requests[~inside].groupby("tenant")["tokens"].sum() / rest_s
    above = (during["tokens"].sum() / length_s).sub(usual, fill_value=0)
    scores: list[pd.Series[float]] = [
        during["tokens"].sum(),
        during["prompt_tokens"].max(),
        _kv_held(trace, harm, start_ns),
        during.size().astype(np.float64),
        _correlation(requests),
        above,
        _charges(diagnosis),
    ]
    return {rule: str(score.idxmax()) if len(score) else "" for rule, score in zip(RULES, scores, strict=True)}


def _requests(trace: Trace, start_ns: int) -> pd.DataFrame:
    """tenant, arrival_s, prompt_tokens, tokens, ttft_s (null where there was none)."""
    columns = ["tenant", "arrival", "first_token", "prompt_tokens", "output_tokens"]
    table = trace.requests.select(columns).to_pandas()
    return pd.DataFrame(
        {
            "tenant": table["tenant"].astype(str),
            "arrival_s": (table["arrival"] - start_ns) / 1e9,
            "prompt_tokens": table["prompt_tokens"],
            "tokens": table["prompt_tokens"] + table["output_tokens"].fillna(0),
            "ttft_s": (table["first_token"] - table["arrival"]) / 1e9,
        }
    )


def _kv_held(trace: Trace, harm: Harm, start_ns: int) -> pd.Series[float]:
    """Block-seconds of each tenant in the window, by the blocks that a stretch of steps begins with."""
    steps = trace.steps.select(["step", "dispatched", "ready"]).to_pandas().sort_values("step")
    held = trace.residency.select(["tenant", "first_step", "last_step", "kv_blocks"]).to_pandas()
    numbers = steps["step"].to_numpy()
    start = _at(steps["dispatched"] - start_ns, numbers, held["first_step"]).clip(harm.from_s, harm.to_s)
    end = _at(steps["ready"] - start_ns, numbers, held["last_step"]).clip(harm.from_s, harm.to_s)
    seconds = pd.Series(held["kv_blocks"].fillna(0).to_numpy() * (end - start), dtype=float)
    return seconds.groupby(held["tenant"].astype(str)).sum()


def _at(times: pd.Series[int], numbers: np.ndarray, step: pd.Series[int]) -> np.ndarray:
    """Seconds (of ``times``, ns) at each of ``step``, or of the next step that was seen."""
    place = np.minimum(np.searchsorted(numbers, step.to_numpy()), len(numbers) - 1)
    return times.to_numpy()[place] / 1e9


def _correlation(requests: pd.DataFrame) -> pd.Series[float]:
    """Of each tenant's tokens with the TTFT of all others, over bins of the whole run."""
    bins = (requests["arrival_s"] // _BIN_S).astype(int)
    everywhere = pd.RangeIndex(bins.max() + 1)
    scores = {}
    for tenant in requests["tenant"].unique():
        own = requests["tenant"] == tenant
        load = requests["tokens"][own].groupby(bins[own]).sum().reindex(everywhere, fill_value=0)
        latency = requests["ttft_s"][~own].groupby(bins[~own]).mean().reindex(everywhere)
        scores[tenant] = load.corr(latency)
    return pd.Series(scores, dtype=float).dropna()


def _charges(diagnosis: Diagnosis) -> pd.Series[float]:
    """Seconds of the worst incident by the tenant they are charged to, above what it usually costs."""
    charges = diagnosis.incidents[0].charges if diagnosis.incidents else ()
    rows = [(one.holder, one.seconds) for one in charges if not one.own and not one.holder.startswith("(")]
    return pd.DataFrame(rows, columns=["tenant", "seconds"]).groupby("tenant")["seconds"].sum()
