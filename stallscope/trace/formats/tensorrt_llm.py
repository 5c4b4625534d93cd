"""TensorRT-LLM's iteration statistics: each iteration becomes a step with its sums.

As ``LLM.get_stats()`` and the server's ``/metrics`` give them: JSON objects with the names of
``cpp/tensorrt_llm/executor/jsonSerialization.cpp`` (NVIDIA/TensorRT-LLM), and ``attentionDpRank`` where attention is
data-parallel. Written from those: never seen from a live engine.
"""

from __future__ import annotations

from datetime import UTC, datetime

from stallscope.trace.formats.records import Converted, Record, amount, milliseconds, part, step_span, text
from stallscope.trace.otlp.spans import Attributes
from stallscope_telemetry import names

PRODUCER = "TensorRT-LLM"

_TIMESTAMP = "%m-%d-%Y %H:%M:%S.%f"  # of the server's clock, without its zone


def is_mine(record: Record) -> bool:
    """Whether it is an iteration's statistics."""
    return "iter" in record and "iterLatencyMS" in record


def convert(record: Record) -> list[Converted]:
    """Nothing for an iteration without a batch's sums. Raises one of ``MALFORMED``."""
    batch, cache = part(record, "inflightBatchingStats"), part(record, "kvCacheStats")
    if not batch:
        return []
    latency = milliseconds(record, "iterLatencyMS")
    if latency is None:
        raise ValueError("an iteration without a duration")
    ended = datetime.strptime(text(record, "timestamp"), _TIMESTAMP).replace(tzinfo=UTC)
    end = round(ended.timestamp() * 1e6) * 1000
    prefills, decodes = amount(batch, "numContextRequests"), amount(batch, "numGenRequests")
    attributes: Attributes = {
        names.STEP: amount(record, "iter"),
        names.PREFILL_TOKENS: amount(batch, "numCtxTokens"),
        names.DECODE_TOKENS: decodes,
        names.BATCH_SIZE: prefills + decodes,
        names.RUNNING: amount(record, "numActiveRequests", prefills + decodes),
        names.WAITING: amount(record, "numQueuedRequests", 0) + amount(batch, "numPausedRequests", 0),
        names.KV_USED: amount(cache, "usedNumBlocks", 0),
    }
    return [Converted(_resource(record, cache), [step_span(end - round(latency * 1e6), end, attributes)])]


def _resource(record: Record, cache: Record) -> Attributes:
    """A replica for each rank but the first: that has no name, as the engine's request spans have none."""
    resource: Attributes = {names.ENGINE: "tensorrt_llm", names.ASYNC_SCHEDULING: True}
    rank = amount(record, "attentionDpRank", 0)
    if rank:
        resource[names.REPLICA] = f"rank {rank}"
    told = (
        (names.KV_TOTAL, cache, "maxNumBlocks"),
        (names.BLOCK_SIZE, cache, "tokensPerBlock"),
        (names.MAX_NUM_SEQS, record, "maxBatchSizeRuntime"),
        (names.MAX_NUM_BATCHED_TOKENS, record, "maxNumTokensRuntime"),
    )
    return resource | {name: value for name, where, key in told if (value := amount(where, key, 0))}
