"""Request spans of an engine's frontend joined with the engine's own: one request told twice is one request.

vLLM's HTTP process emits an ``llm_request`` span of its own for each request of an engine that has our hook. Both have
the same ``gen_ai.request.id`` and begin at the same time, but for rounding (seen with 0.32; trace ids agree only where
the caller sent one); its end is when the answer had left the engine for good.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from stallscope.trace.decode import ReplicaSpans, RequestSpan
from stallscope_telemetry import names

_SAME_NS = 1_000_000
_Told = tuple[ReplicaSpans, RequestSpan]


def join_frontends(replicas: Iterable[ReplicaSpans]) -> None:
    """Moves what senders without steps tell of other replicas' requests to those, in place.

    Of a request that is told twice stays the engine's own span, with the later end as its delivery. Others of such a
    sender belong to the engine that most of its requests were found in: there, steps may know them.
    """
    engines = [one for one in replicas if one.rows]
    by_id: dict[str, list[_Told]] = {}
    for engine in engines:
        for span in engine.requests:
            if names.HANDLE in span.attributes:
                by_id.setdefault(span.request_id, []).append((engine, span))
    for sender in replicas:
        if sender.rows or not sender.requests:
            continue
        # What was written from tables was joined before, or else told by one alone.
        found = [None if span.is_whole else _twin(span, by_id) for span in sender.requests]
        homes = Counter(twin[0].name for twin in found if twin is not None)
        if not homes:
            continue
        home = next(engine for engine in engines if engine.name == homes.most_common(1)[0][0])
        for span, twin in zip(sender.requests, found, strict=True):
            if twin is None:
                home.requests.append(_as_of(span, home))
            elif span.end > twin[1].end:
                twin[1].attributes.setdefault(names.DELIVERED, span.end - twin[1].end)
        sender.requests.clear()


def _twin(span: RequestSpan, by_id: Mapping[str, Sequence[_Told]]) -> _Told | None:
    told = by_id.get(span.request_id, ())
    return next((one for one in told if abs(one[1].arrival - span.arrival) <= _SAME_NS), None)


def _as_of(span: RequestSpan, engine: ReplicaSpans) -> RequestSpan:
    """The span as one that the engine sent last."""
    resource = len(engine.resources) - 1
    return RequestSpan(
        span.request_id, span.arrival, span.end, span.trace_id, resource, span.attributes, span.claim, span.kept
    )
