"""Writes a recording of the virtual engine as NVIDIA Dynamo's files, as its documents describe them."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

import orjson

from stallscope_telemetry.records import RequestRecord, StepRecord
from tests.trace.recording import START_NS, Recording

MS = 1_000_000
SLOWER = 20


def forward_pass(
    counter: int, end_ms: int, wall_s: float, *, prefill: tuple[int, int] = (0, 0), decodes: int = 0, queued: int = 0
) -> dict[str, object]:
    """A record of a forward pass; ``prefill``: requests and their tokens."""
    fpm = {
        "version": 1,
        "worker_id": "4192",
        "dp_rank": 0,
        "counter_id": counter,
        "wall_time": wall_s,
        "scheduled_requests": {
            "num_prefill_requests": prefill[0],
            "sum_prefill_tokens": prefill[1],
            "var_prefill_length": 0.0,
            "sum_prefill_kv_tokens": 0,
            "num_decode_requests": decodes,
            "sum_decode_kv_tokens": 10 * decodes,
            "var_decode_kv_tokens": 0.0,
        },
        "queued_requests": {"num_prefill_requests": queued, "num_decode_requests": 0},
    }
    source = {"namespace": "default", "component": "backend", "producer_id": "4192"}
    return {
        "timestamp": end_ms % 1_000_000,
        "event": {
            "schema": "dynamo.fpm.trace.v1",
            "source": source,
            "capture_mode": "full",
            "observed_at_unix_ms": end_ms,
            "fpm": fpm,
        },
    }


def request_end(
    name: str, received_ms: int, prefill_ms: tuple[float, float], total_ms: float, tokens: tuple[int, int], tenant: str
) -> dict[str, object]:
    """A record of a request; ``prefill_ms``: waiting for it, and computing it; ``tokens``: prompt and output."""
    request = {
        "request_id": name,
        "model": "m",
        "input_tokens": tokens[0],
        "output_tokens": tokens[1],
        "cached_tokens": 0,
        "request_received_ms": received_ms,
        "prefill_wait_time_ms": prefill_ms[0],
        "prefill_time_ms": prefill_ms[1],
        "ttft_ms": sum(prefill_ms),
        "total_time_ms": total_ms,
        "worker": {
            "prefill_worker_id": 4192,
            "prefill_dp_rank": 0,
            "decode_worker_id": 4192,
            "decode_dp_rank": 0,
        },
    }
    return {
        "timestamp": 0,
        "event": {
            "schema": "dynamo.request.trace.v1",
            "event_type": "request_end",
            "event_time_unix_ms": round(received_ms + total_ms),
            "event_source": "dynamo",
            "agent_context": {"session_type_id": tenant, "session_id": f"{tenant}-1"},
            "request": request,
        },
    }


def write_records(path: Path, records: Iterable[object]) -> Path:
    path.write_bytes(gzip.compress(b"".join(orjson.dumps(one) + b"\n" for one in records)))
    return path


def write_recording(folder: Path, recording: Recording) -> None:
    """Its passes and its requests, a file each.

    Dynamo rounds times to milliseconds, which can't tell the virtual engine's steps of one apart: here all takes
    ``SLOWER`` times as long, as on a real engine.
    """
    write_records(folder / "fpm.4192.000000.jsonl.gz", map(_pass_of, recording.steps))
    answered = [one for one in recording.ended if one.first_token_ns]
    write_records(folder / "request-trace.000000.jsonl.gz", map(_request_of, answered))


def _pass_of(step: StepRecord) -> dict[str, object]:
    return forward_pass(
        step.step,
        _slowed(step.ready_ns) // MS,
        SLOWER * (step.ready_ns - step.scheduled_ns) / 1e9,
        prefill=(len(step.chunks), step.prefill_tokens),
        decodes=step.decode_tokens,
        queued=step.waiting,
    )


def _request_of(one: RequestRecord) -> dict[str, object]:
    return request_end(
        one.info.request_id,
        _slowed(one.info.arrival_ns) // MS,
        (
            SLOWER * (one.scheduled_ns - one.info.arrival_ns) / MS,
            SLOWER * (one.first_token_ns - one.scheduled_ns) / MS,
        ),
        SLOWER * (one.end_ns - one.info.arrival_ns) / MS,
        (one.info.prompt_tokens, len(one.token_times_ns)),
        one.info.tenant,
    )


def _slowed(time_ns: int) -> int:
    return START_NS + SLOWER * (time_ns - START_NS)
