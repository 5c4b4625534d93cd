"""TensorRT-LLM's iteration statistics: steps with their sums, joined with the engine's own request spans."""

from pathlib import Path

import orjson
import pytest

from stallscope.trace import read_trace
from stallscope_telemetry import names
from tests.trace.recording import as_batches, key_values

START_NS = 1_790_080_200_000_000_000  # 09-22-2026 12:30:00
SECOND = "09-22-2026 12:30:00"


def iteration(
    number: int, end_ms: int, latency_ms: float, prefills: int, tokens: int, decodes: int
) -> dict[str, object]:
    """An iteration's statistics with the names of jsonSerialization.cpp."""
    return {
        "timestamp": f"{SECOND}.{end_ms:03}000",
        "iter": number,
        "iterLatencyMS": latency_ms,
        "newActiveRequestsQueueLatencyMS": 0.0,
        "numNewActiveRequests": prefills,
        "numActiveRequests": prefills + decodes,
        "numQueuedRequests": 1,
        "numCompletedRequests": 0,
        "maxNumActiveRequests": 64,
        "maxBatchSizeRuntime": 32,
        "maxNumTokensRuntime": 8192,
        "kvCacheStats": {"maxNumBlocks": 500, "freeNumBlocks": 480, "usedNumBlocks": 20, "tokensPerBlock": 64},
        "inflightBatchingStats": {
            "numScheduledRequests": prefills + decodes,
            "numContextRequests": prefills,
            "numGenRequests": decodes,
            "numPausedRequests": 0,
            "numCtxTokens": tokens,
            "microBatchId": 0,
            "avgNumDecodedTokensPerIter": 1.0,
        },
    }


ITERATIONS = [
    iteration(7, 30, 30.0, 1, 100, 0),
    iteration(8, 40, 10.0, 0, 0, 1),
    iteration(9, 90, 50.0, 1, 300, 1),
    *(iteration(10 + n, 100 + 10 * n, 10.0, 0, 0, 2) for n in range(3)),
]


def request(name: str, offsets_ms: tuple[int, int, int, int], tokens: tuple[int, int]) -> bytes:
    """A span as the engine's --otlp_traces_endpoint sends it; offsets: arrival, scheduled, first token, end."""
    arrival, scheduled, first, end = offsets_ms
    attributes = {
        names.REQUEST_ID: name,
        names.USAGE_PROMPT: tokens[0],
        names.USAGE_COMPLETION: tokens[1],
        names.LATENCY_QUEUE: (scheduled - arrival) / 1e3,
        names.LATENCY_TTFT: (first - arrival) / 1e3,
        "tenant.id": name,
    }
    span = {
        "traceId": "1" * 32,
        "name": "llm_request",
        "startTimeUnixNano": str(START_NS + arrival * 1_000_000),
        "endTimeUnixNano": str(START_NS + end * 1_000_000),
        "attributes": key_values(attributes),
    }
    return orjson.dumps({"resourceSpans": [{"resource": {}, "scopeSpans": [{"spans": [span]}]}]})


REQUESTS = [request("a", (0, 0, 30, 120), (100, 6)), request("b", (35, 40, 90, 120), (300, 4))]


@pytest.mark.parametrize("document", [False, True])
def test_iterations_and_request_spans_are_one_trace(tmp_path: Path, document: bool) -> None:
    lines = [orjson.dumps(ITERATIONS)] if document else [orjson.dumps(one) for one in ITERATIONS]
    (tmp_path / "stats.jsonl").write_bytes(b"\n".join(lines))
    (tmp_path / "spans.jsonl").write_bytes(b"\n".join(REQUESTS))
    trace = read_trace(tmp_path)
    assert trace.validate() == []
    assert trace.coverage.select(["fidelity", "steps_seen", "steps_lost"]).to_pylist() == [
        {"fidelity": 2, "steps_seen": 6, "steps_lost": 0}
    ]
    assert trace.steps["ready"].to_pylist()[0] == START_NS + 30_000_000
    assert trace.steps["scheduled"].to_pylist()[2] == START_NS + 40_000_000
    assert set(trace.steps["kv_used"].to_pylist()) == {20}
    (replica,) = trace.replicas.to_pylist()
    assert [replica[name] for name in ("engine", "kv_total", "block_size", "max_num_seqs")] == [
        "tensorrt_llm",
        500,
        64,
        32,
    ]
    doing = {
        step: {name: (phase, tokens) for name, (phase, tokens, *_) in one.items() if phase != "waiting"}
        for step, one in as_batches(trace, "(unknown)").items()
    }
    assert doing[7] == {"a": ("prefill", 100)}
    assert doing[9] == {"a": ("decode", 1), "b": ("prefill", 300)}
    assert doing[12] == {"a": ("decode", 1), "b": ("decode", 1)}


@pytest.mark.parametrize(
    ("name", "value"),
    [("timestamp", ""), ("timestamp", "01:23:56"), ("iter", -1), ("iterLatencyMS", None), ("kvCacheStats", [])],
)
def test_a_damaged_iteration_costs_itself(tmp_path: Path, name: str, value: object) -> None:
    records = [*ITERATIONS[:3], {**ITERATIONS[3], name: value}, *ITERATIONS[4:]]
    (tmp_path / "stats.jsonl").write_bytes(b"\n".join([*map(orjson.dumps, records), *REQUESTS]))
    trace = read_trace(tmp_path)
    assert trace.steps.num_rows == 5
    assert {one.kind: one.count for one in trace.findings}["malformed_span"] == 1


def test_each_rank_of_data_parallel_attention_is_a_replica(tmp_path: Path) -> None:
    records = [{**one, "attentionDpRank": rank} for one in ITERATIONS for rank in (0, 1)]
    (tmp_path / "stats.jsonl").write_bytes(b"\n".join([*map(orjson.dumps, records), *REQUESTS]))
    trace = read_trace(tmp_path)
    assert sorted(set(trace.steps["replica"].to_pylist())) == ["(unknown)", "rank 1"]
