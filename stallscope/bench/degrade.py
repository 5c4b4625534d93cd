"""A recording as poorer telemetry would have it, with decoys: what can still be said of it?

Fidelity 2 keeps the sums of each step, fidelity 1 nothing of the steps. Of a request either keeps what a plain vLLM
says: durations, tokens, and a tenant in its tracestate. Decoys are long prompts that hurt nobody of the recording: one
on another replica while the victims waited and, at fidelity 1, one on their own after it was over; both are of innocent
tenants.
"""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import orjson
import zstandard

from stallscope.bench.truth import Truth
from stallscope.workloads.draws import chance
from stallscope_telemetry import names

ELSEWHERE = "elsewhere"  # the replica of a decoy
_OF_REQUEST = {
    *(names.REQUEST_ID, names.USAGE_PROMPT, names.USAGE_COMPLETION, names.REQUEST_MAX_TOKENS),
    *(names.LATENCY_QUEUE, names.LATENCY_TTFT, names.LATENCY_E2E),
}
_OF_STEP = {names.STEP, names.DISPATCH_DELAY, names.SCHED, names.PREFILL_TOKENS, names.DECODE_TOKENS} | {
    *(names.BATCH_SIZE, names.RUNNING, names.WAITING, names.KV_USED, names.IDLE),
}
_OF_RESOURCE = {names.SERVICE_NAME, names.REPLICA, names.MODEL}
_DECOY_TOKENS, _DECOY_OUTPUT, _DECOY_PREFILL_S, _DECOY_S = 40_000, 50, 4.0, 8.0
_AFTER_S = 3.0

Json = dict[str, object]


def degrade(trace: Path, fidelity: int, truth: Truth, out: Path, kept: float = 1.0) -> Path:
    """Writes the recording to ``out`` at a fidelity of 1 or 2, with decoys where there was harm.

    ``kept``: the share of requests that there are spans of; which ones depends on their arrival alone.
    """
    with out.open("wb") as stream, zstandard.ZstdCompressor().stream_writer(stream) as writer:
        innocent: dict[str, int] = {}
        for data in _lines(trace):
            for resource in data["resourceSpans"]:  # type: ignore[attr-defined]
                attributes = resource["resource"]["attributes"]
                resource["resource"]["attributes"] = _only(attributes, _OF_RESOURCE)
                for scope in resource["scopeSpans"]:
                    spans = (_span(span, fidelity, innocent) for span in scope["spans"] if _stays(span, kept))
                    scope["spans"] = [span for span in spans if span is not None]
            writer.write(orjson.dumps(data) + b"\n")
        for decoy in _decoys(truth, innocent, data, fidelity):
            writer.write(orjson.dumps(decoy) + b"\n")
    return out


def _lines(trace: Path) -> Iterator[Json]:
    with trace.open("rb") as stream:
        plain = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
        yield from map(orjson.loads, BytesIO(plain.read()))


def _stays(span: Json, kept: float) -> bool:
    return span["name"] != names.REQUEST_SPAN or chance(0, "kept", str(span["startTimeUnixNano"])) < kept


def _only(attributes: list[Json], kept: set[str]) -> list[Json]:
    return [one for one in attributes if one["key"] in kept]


def _span(span: Json, fidelity: int, tenants: dict[str, int]) -> Json | None:
    """The span as it is told at this fidelity, None where it is not; ``tenants`` counts whose requests there are."""
    attributes: list[Json] = span["attributes"]  # type: ignore[assignment]
    if span["name"] == names.STEP_SPAN:
        return None if fidelity == 1 else span | {"attributes": _only(attributes, _OF_STEP)}
    if span["name"] != names.REQUEST_SPAN:
        return None
    tenant = next((one["value"]["stringValue"] for one in attributes if one["key"] == names.TENANT), "")  # type: ignore[index]
    tenants[tenant] = tenants.get(tenant, 0) + 1
    return span | {"attributes": _only(attributes, _OF_REQUEST), "traceState": f"stallscope={tenant}"}


def _decoys(truth: Truth, tenants: dict[str, int], like: Json, fidelity: int) -> Iterator[Json]:
    """Requests that were never there: on the recording's own replica only where no sums of steps belie it."""
    harm = truth.harm
    innocent = sorted(set(tenants) - {"", *truth.culprits, *truth.excused, harm.tenant if harm else ""})
    if harm is None or not innocent:
        return
    resource = like["resourceSpans"][-1]["resource"]  # type: ignore[index]
    elsewhere = {"attributes": [{"key": names.REPLICA, "value": {"stringValue": ELSEWHERE}}]}
    yield _request("decoy-1", elsewhere, innocent[0], truth.start_ns + int(harm.from_s * 1e9))
    if fidelity > 1:
        return
    yield _request("decoy-2", resource, innocent[-1], truth.start_ns + int((harm.to_s + harm.with_s + _AFTER_S) * 1e9))


def _request(name: str, resource: object, tenant: str, arrival_ns: int) -> Json:
    """A line with one request, computed for some seconds in small chunks."""
    values: dict[str, Json] = {
        names.REQUEST_ID: {"stringValue": name},
        names.USAGE_PROMPT: {"intValue": str(_DECOY_TOKENS)},
        names.USAGE_COMPLETION: {"intValue": str(_DECOY_OUTPUT)},
        names.LATENCY_QUEUE: {"doubleValue": 0.0},
        names.LATENCY_TTFT: {"doubleValue": _DECOY_PREFILL_S},
    }
    span = {
        "name": names.REQUEST_SPAN,
        "traceState": f"stallscope={tenant}",
        "startTimeUnixNano": str(arrival_ns),
        "endTimeUnixNano": str(arrival_ns + int(_DECOY_S * 1e9)),
        "attributes": [{"key": key, "value": value} for key, value in values.items()],
    }
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": [span]}]}]}
