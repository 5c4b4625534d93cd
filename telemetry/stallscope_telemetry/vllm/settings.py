"""What the environment says to the hook, and what a vLLM request says of itself: tenant, caller, length.

``OTEL_EXPORTER_OTLP_ENDPOINT``: where spans are sent to, with OpenTelemetry's other variables. With vLLM's own
``--otlp-traces-endpoint`` they go where its spans go.
``STALLSCOPE_TRACE_DIR``: a folder in which each engine process writes a file.
``STALLSCOPE_REPLICA``: the name of this replica; else it is that of the host, with the data-parallel rank.
``STALLSCOPE_TENANT_FROM``: where a request's tenant is looked for, the first that has one, by commas: ``xargs:KEY``,
``tracestate:KEY``, ``lora``, ``request_id:REGEX`` with one group. ``TENANT_FROM`` where it is not set.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace.export import SpanExporter

from stallscope_telemetry.emitter import exporters_from_environment, is_export_off
from stallscope_telemetry.files import OtlpFileExporter
from stallscope_telemetry.records import RequestInfo

log = logging.getLogger("vllm.stallscope")  # below vLLM's own, so that it is shown as vLLM's is

TENANT_FROM = "xargs:tenant,tracestate:tenant,lora"
MOST_TENANT_CHARACTERS = 256

_ADDED_TO_ID = re.compile(r"-[0-9a-f]{8}$")
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}")

Tenants = Callable[[Any], tuple[str, str]]


def exporters(scheduler: Any) -> list[SpanExporter]:
    """Where spans go to, files first; nothing where neither the environment nor vLLM's flag says anything."""
    files: list[SpanExporter] = []
    if folder := os.environ.get("STALLSCOPE_TRACE_DIR"):
        # A name of its own for each process that ever wrote here: a recording is never written over.
        replica, now = replica_name(scheduler.parallel_config.data_parallel_rank), time.gmtime()
        name = f"{replica}-{time.strftime('%Y%m%dT%H%M%SZ', now)}-{os.getpid()}.otlp.jsonl{_compression()}"
        files = [OtlpFileExporter(Path(folder) / re.sub(r"[^\w.-]", "_", name))]
    if (endpoint := scheduler.observability_config.otlp_traces_endpoint) and not is_export_off():
        from vllm.tracing.otel import get_span_exporter

        # By vLLM's own exporter: where no protocol is named, vLLM means gRPC, and OpenTelemetry HTTP.
        return [*files, get_span_exporter(endpoint)]
    return [*files, *exporters_from_environment()]


def replica_name(rank: int) -> str:
    return os.environ.get("STALLSCOPE_REPLICA") or f"{socket.gethostname()}-{rank}"


def tenants_from_environment() -> Tenants:
    """Reads a request's tenant and who said so ("", "" where nobody did). What is not understood is logged and left
    out."""
    rules: list[Callable[[Any], tuple[str, str]]] = []
    for text in (os.environ.get("STALLSCOPE_TENANT_FROM") or TENANT_FROM).split(","):
        kind, _, key = text.strip().partition(":")
        try:
            rules.append(_rule(kind, key))
        except (ValueError, re.error) as error:
            log.warning("stallscope: STALLSCOPE_TENANT_FROM: %r is left out: %s", text.strip(), error)

    def tenant_of(request: Any) -> tuple[str, str]:
        for rule in rules:
            tenant, source = rule(request)
            if tenant:
                return tenant[:MOST_TENANT_CHARACTERS], source
        return "", ""

    return tenant_of


def _rule(kind: str, key: str) -> Callable[[Any], tuple[str, str]]:
    if kind == "xargs" and key:
        return lambda request: (_extra(request, key), "claim:vllm_xargs")
    if kind == "tracestate" and key:
        return lambda request: (_tracestate(request.trace_headers, key), "claim:tracestate")
    if kind == "lora" and not key:
        return lambda request: (request.lora_request.lora_name if request.lora_request else "", "lora")
    if kind == "request_id" and key:
        pattern = re.compile(key)
        if pattern.groups != 1:
            raise ValueError("it needs one group, the tenant")

        def from_id(request: Any) -> tuple[str, str]:
            found = pattern.search(_known_id(request))
            return (found[1] or "", "claim:request_id") if found else ("", "")

        return from_id
    raise ValueError("known are xargs:KEY, tracestate:KEY, lora and request_id:REGEX")


def info_of(tenant_of: Tenants, request: Any, handle: int) -> RequestInfo:
    """What never changes about a vLLM request."""
    tenant, source = tenant_of(request)
    trace_id, parent = _caller(request.trace_headers)
    return RequestInfo(
        handle,
        _known_id(request),
        round(request.arrival_time * 1e9),
        request.num_prompt_tokens,
        request.max_tokens,
        tenant,
        source,
        request.priority,
        session=request.session_id or "",
        trace_id=trace_id,
        parent_span_id=parent,
    )


def _known_id(request: Any) -> str:
    """A request's id as clients and vLLM's own spans have it; within, vLLM adds digits that tell equal ones apart."""
    return _ADDED_TO_ID.sub("", request.request_id)


def _extra(request: Any, key: str) -> str:
    extra = getattr(request.sampling_params, "extra_args", None)
    value = extra.get(key) if extra else None
    return str(value) if value is not None else ""


def _tracestate(headers: Any, key: str) -> str:
    entries = (one.partition("=") for one in (headers or {}).get("tracestate", "").split(","))
    return next((value.strip() for name, _, value in entries if name.strip() == key), "")


def _caller(headers: Any) -> tuple[int, int]:
    found = _TRACEPARENT.fullmatch((headers or {}).get("traceparent", "").strip())
    return (int(found[1], 16), int(found[2], 16)) if found else (0, 0)


def _compression() -> str:
    try:
        import zstandard  # noqa: F401
    except ImportError:
        return ".gz"
    return ".zst"
