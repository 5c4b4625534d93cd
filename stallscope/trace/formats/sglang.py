"""SGLang's request traces: its own OTLP spans, put together to one request span for each request.

``--enable-trace`` writes a root span "Req ID" with the request's usage and latencies, and below it one for each stage
(``sglang/srt/observability/trace.py`` and ``req_time_stats.py`` of sglang 0.5.23); of these ``prefill_waiting`` says
how long it queued. Written from those: never seen from a live engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from msgspec.structs import replace

from stallscope.trace.otlp.spans import Resource, Span
from stallscope.trace.plain_spans import PREFILL_TIME
from stallscope_telemetry import names

PRODUCER = "SGLang"

_WAITING = "prefill_waiting"
_CACHED = "gen_ai.usage.cached_tokens"
_RID = "rid"


@dataclass(slots=True)
class Requests:
    """Root spans and waits until all spans were seen, in whatever order they come."""

    _roots: list[tuple[Resource, Span]] = field(default_factory=list)
    _waits: dict[str, list[Span]] = field(default_factory=dict)

    def take(self, resource: Resource, span: Span) -> bool:
        """Keeps the span if it is of a request of SGLang's, and says whether it is."""
        module = span.attributes.get("module")
        if isinstance(module, str) and module.startswith("sglang::") and _RID in span.attributes:
            self._roots.append((resource, span))
            return True
        if span.name == _WAITING and span.trace_id:
            self._waits.setdefault(span.trace_id, []).append(span)
            return True
        return False

    def spans(self) -> Iterator[tuple[Resource, Span]]:
        """A request span for each root."""
        for resource, root in self._roots:
            yield resource, self._request(root)

    def _request(self, root: Span) -> Span:
        attributes = {names.REQUEST_ID: root.attributes[_RID]} | root.attributes
        if _CACHED in attributes:
            attributes[names.CACHED_TOKENS] = attributes[_CACHED]
        # What it calls prefill time includes the queueing. A caller's trace may hold several requests: the wait within.
        attributes.pop(PREFILL_TIME, None)
        waits = [one for one in self._waits.get(root.trace_id, ()) if root.start <= one.start <= one.end <= root.end]
        if len(waits) == 1:
            attributes |= {names.QUEUED: waits[0].start - root.start, names.SCHEDULED: waits[0].end - root.start}
        else:
            attributes.setdefault(names.LATENCY_QUEUE, 0.0)
        return replace(root, name=names.REQUEST_SPAN, attributes=attributes)
