"""The canonical tables: every column of a trace, declared once.

Times are int64 ns since the Unix epoch, durations int64 ns, names dictionary-coded strings. ``Trace`` holds one Arrow
table for each; readers build them, analysis takes columns of them.
"""

from __future__ import annotations

import pyarrow as pa

NAME = pa.dictionary(pa.int32(), pa.string())
INT = pa.int64()

REPLICAS = pa.schema(
    [
        ("replica", NAME),
        ("since", INT),
        ("group", NAME),
        ("rank", INT),
        ("role", NAME),
        ("model", NAME),
        ("engine", NAME),
        ("engine_version", NAME),
        ("executor", NAME),
        ("policy", NAME),
        ("block_size", INT),
        ("kv_total", INT),
        ("max_num_seqs", INT),
        ("max_num_batched_tokens", INT),
        ("chunked_prefill", pa.bool_()),
        ("watermark", pa.float64()),
        ("prefix_caching", pa.bool_()),
        ("async_scheduling", pa.bool_()),
        ("preemption", NAME),
        ("long_prefill_token_threshold", INT),
        ("tenant_kv_share", pa.float64()),
        ("tenant_token_share", pa.float64()),
        ("tp_size", INT),
        ("pp_size", INT),
        ("dp_size", INT),
    ]
)

STEPS = pa.schema(
    [
        ("replica", NAME),
        ("step", INT),
        ("scheduled", INT),
        ("dispatched", INT),
        ("ready", INT),
        ("idle_ns", INT),
        ("sched_ns", INT),
        ("device_ns", INT),  # null where not measured
        ("prefill_tokens", INT),
        ("decode_tokens", INT),
        ("batch_size", INT),
        ("running", INT),
        ("waiting", INT),
        ("kv_used", INT),
        ("kv_cached", INT),
        ("kv_total", INT),
        ("budget", INT),
    ]
)

# A stretch of steps in which a request's state does not change. `tokens` is what it computes in each step of the
# stretch (0 unless prefill or decode), so it holds `context_start + (k - first_step) * tokens` tokens before step k.
# `kv_blocks` is what it holds in the first step. `holder` is the request charged with a preemption's wait and its
# recompute: who took the blocks (null otherwise, and where the preemption was not seen). Steps are inclusive, rows of
# one request never overlap, and no row spans a lost step.
RESIDENCY = pa.schema(
    [
        ("replica", NAME),
        ("request", NAME),
        ("tenant", NAME),
        ("phase", NAME),  # waiting, prefill, decode, paused, preempted
        ("reason", NAME),  # of waiting and preempted: budget, kv, slots, head, ...
        ("lacking", INT),
        ("first_step", INT),
        ("last_step", INT),
        ("tokens", INT),
        ("context_start", INT),
        ("kv_blocks", INT),
        ("holder", NAME),
    ]
)

REQUESTS = pa.schema(
    [
        ("replica", NAME),
        ("request", NAME),
        ("handle", INT),
        ("tenant", NAME),
        ("tenant_source", NAME),
        ("model", NAME),
        ("adapter", NAME),
        ("priority", INT),
        ("session", NAME),
        ("predecessor", NAME),
        ("retry_of", NAME),
        ("arrival", INT),
        ("queued", INT),  # null where it did not get so far, as the next ones
        ("scheduled", INT),
        ("first_token", INT),
        ("end", INT),
        ("delivered", INT),
        ("prompt_tokens", INT),
        ("cached_tokens", INT),
        ("prefix", INT),  # the same for prompts that begin with the same block; null where unknown
        ("max_tokens", INT),
        ("output_tokens", INT),  # as far as seen
        ("preemptions", INT),
        ("state", NAME),  # finished, open, lost
        ("finish_reason", NAME),  # stop, length, abort, timeout, error; null unless finished
        ("trace_id", NAME),
    ]
)

# Every inter-token gap from the floor on (count 1; the floor is in ``gaps``), or all of a request's gaps in one
# octave below it: start of the first, mean length, count.
GAPS = pa.schema([("replica", NAME), ("request", NAME), ("start", INT), ("length_ns", INT), ("count", INT)])

EVICTIONS = pa.schema(
    [
        ("replica", NAME),
        ("step", INT),
        ("evicting_request", NAME),
        ("owner_request", NAME),
        ("owner_tenant", NAME),
        ("blocks", INT),
    ]
)

# A request as its client saw it. ``late_ns`` is how late the client itself was, ``longest_gap_ns`` between two tokens.
CLIENTS = pa.schema(
    [
        ("replica", NAME),  # null where it reached no engine that was seen
        ("request", NAME),
        ("trace_id", NAME),
        ("tenant", NAME),
        ("sent", INT),
        ("first_token", INT),
        ("end", INT),
        ("status", NAME),  # ok, rejected, http_CODE, timeout, disconnected, unreachable, error, abandoned
        ("output_tokens", INT),
        ("longest_gap_ns", INT),
        ("late_ns", INT),
    ]
)

# A value is null where the device doesn't have it or it may not be read. ``device``: UUID. ``utilization``: share in
# [0, 1]; clocks in MHz, temperature in °C, memory in bytes. ``throttle``: reasons joined by |, "" where there is none.
GPU = pa.schema(
    [
        ("replica", NAME),
        ("device", NAME),
        ("time", INT),
        ("utilization", pa.float64()),
        ("sm_clock", INT),
        ("mem_clock", INT),
        ("power_w", pa.float64()),
        ("temperature", pa.float64()),
        ("memory_used", INT),
        ("throttle", NAME),
    ]
)

# Stretches, in order: batches known (fidelity 3) from step 0 or a keyframe until a step is lost; from there to the next
# keyframe only sums of the steps seen (2), or nothing but requests (1). Steps before the first one seen are not lost.
COVERAGE = pa.schema(
    [
        ("replica", NAME),
        ("start", INT),
        ("end", INT),
        ("fidelity", INT),
        ("steps_seen", INT),
        ("steps_lost", INT),
        ("spans_dropped", INT),
        ("sampled_share", pa.float64()),
    ]
)

TABLES: dict[str, pa.Schema] = {
    "replicas": REPLICAS,
    "steps": STEPS,
    "residency": RESIDENCY,
    "requests": REQUESTS,
    "gaps": GAPS,
    "evictions": EVICTIONS,
    "clients": CLIENTS,
    "gpu": GPU,
    "coverage": COVERAGE,
}
