"""Where each column of the table of replicas stands among the attributes of a span's resource."""

from __future__ import annotations

from stallscope_telemetry import names

RESOURCE_COLUMNS = {
    "group": names.GROUP,
    "rank": names.RANK,
    "role": names.ROLE,
    "model": names.MODEL,
    "engine": names.ENGINE,
    "engine_version": names.ENGINE_VERSION,
    "executor": names.EXECUTOR,
    "policy": names.POLICY,
    "block_size": names.BLOCK_SIZE,
    "kv_total": names.KV_TOTAL,
    "max_num_seqs": names.MAX_NUM_SEQS,
    "max_num_batched_tokens": names.MAX_NUM_BATCHED_TOKENS,
    "chunked_prefill": names.CHUNKED_PREFILL,
    "watermark": names.WATERMARK,
    "prefix_caching": names.PREFIX_CACHING,
    "async_scheduling": names.ASYNC_SCHEDULING,
    "preemption": names.PREEMPTION,
    "long_prefill_token_threshold": names.LONG_PREFILL_THRESHOLD,
    "tenant_kv_share": names.TENANT_KV_SHARE,
    "tenant_token_share": names.TENANT_TOKEN_SHARE,
    "tp_size": names.TENSOR_PARALLEL,
    "pp_size": names.PIPELINE_PARALLEL,
    "dp_size": names.DATA_PARALLEL,
}
