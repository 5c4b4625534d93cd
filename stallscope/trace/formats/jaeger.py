"""Jaeger's JSON: a document of traces, as its UI downloads them and its query API (``/api/traces``) returns them.

Each span names the process that sent it, whose tags were the resource's attributes. Times are in µs, so that all times
of steps and requests are rounded down to one. OpenTelemetry's arrays come as strings of JSON
(``pdata``'s ``AsString``, in the Collector's ``translator/jaeger``), and integers beyond 2^53 as strings. The document
is described by ``internal/uimodel`` and ``model/converter/json`` of jaegertracing/jaeger; written from those: never
seen from a live Jaeger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import cast

import orjson

from stallscope.trace.formats.records import Converted, Record, amount, part, text
from stallscope.trace.otlp.spans import MALFORMED, Attributes, Span, Value
from stallscope_telemetry import names

PRODUCER = "Jaeger"

_US = 1000  # ns
_TRACE_STATE = "w3c.tracestate"
_ARRAYS = {attribute.name: attribute.type for attribute in names.ATTRIBUTES if attribute.type.endswith("[]")}
_TYPES = {"int[]": int, "str[]": str}


def is_mine(record: Record) -> bool:
    """Whether it is a document of traces."""
    traces = record.get("data")
    return isinstance(traces, list) and all(isinstance(one, Mapping) and "spans" in one for one in traces)


def convert(record: Record) -> list[Converted]:
    """One for each process of each trace. Raises one of ``MALFORMED``."""
    return [one for trace in cast("list[Record]", record["data"]) for one in _by_process(trace)]


def _by_process(trace: Record) -> Iterator[Converted]:
    processes, spans = part(trace, "processes"), cast("list[Record]", trace["spans"])
    found: dict[str, list[Span]] = {}
    malformed = 0
    for raw in spans:
        try:
            found.setdefault(text(raw, "processID"), []).append(_span(raw))
        except MALFORMED:
            malformed += 1
    for key, of_process in found.items():
        yield Converted(_resource(part(processes, key)), of_process, malformed=malformed)
        malformed = 0
    if malformed:
        yield Converted({}, [], malformed=malformed)


def _resource(process: Record) -> Attributes:
    attributes, _ = _attributes(process)
    return {names.SERVICE_NAME: text(process, "serviceName"), **attributes}


def _span(raw: Record) -> Span:
    start = amount(raw, "startTime") * _US
    attributes, bad = _attributes(raw)
    state = attributes.pop(_TRACE_STATE, "")
    return Span(
        text(raw, "operationName"),
        text(raw, "traceID").lower().zfill(32),
        state if isinstance(state, str) else "",
        start,
        start + amount(raw, "duration") * _US,
        attributes,
        bad,
    )


def _attributes(record: Record) -> tuple[Attributes, int]:
    """The tags by name, and how many have no value that is of use here."""
    attributes: Attributes = {}
    bad = 0
    for tag in cast("list[Record]", record.get("tags") or []):
        try:
            name = text(tag, "key")
            attributes[name] = _value(name, tag.get("type"), tag["value"])
        except MALFORMED:
            bad += 1
    return attributes, bad


def _value(name: str, kind: object, value: object) -> Value:
    if name in _ARRAYS:
        items = orjson.loads(value) if isinstance(value, str) else value
        if not isinstance(items, list) or set(map(type, items)) - {_TYPES[_ARRAYS[name]]}:
            raise TypeError(f"{name} is no list")
        return items
    if kind == "int64" and isinstance(value, int | str) and not isinstance(value, bool):
        return int(value)
    if kind == "float64" and isinstance(value, int | float):
        return float(value)
    if (kind == "bool" and isinstance(value, bool)) or (kind == "string" and isinstance(value, str)):
        return value
    raise TypeError(f"{name} is of no type that is read here")
