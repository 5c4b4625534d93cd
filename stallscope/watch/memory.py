"""The spans of a replica's latest minutes, packed: what a diagnosis reads when a stall is suspected."""

from __future__ import annotations

import pickle
from collections import deque

import zstandard

from stallscope.trace.decode import Collected, ReplicaSpans
from stallscope.trace.findings import Findings
from stallscope.trace.model import Trace
from stallscope.trace.otlp import Resource
from stallscope.trace.read import trace_of

_MOST_BYTES = 64 << 20  # of one replica
_Parts = tuple[object, ...]


class Memory:
    """Windows of one replica's spans, each packed by itself: some 40 bytes a step."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._windows: deque[tuple[int, bytes]] = deque()  # when it was over (ns), and what was in it
        self._resources: dict[Resource, int] = {}
        self.bytes = 0  # that it holds

    def add(self, spans: ReplicaSpans, end_ns: int) -> None:
        """Keeps what came in a window that is over at ``end_ns``."""
        if spans.resources is not self._resources:  # they are numbered anew
            self._resources = spans.resources
            self._windows.clear()
            self.bytes = 0
        if not (spans.rows or spans.requests or spans.samples):
            return
        parts: _Parts = (spans.rows, spans.composition, spans.requests, spans.samples)
        # Of our own making, and never out of this process: pickle is safe here, and the fastest.
        packed = zstandard.compress(pickle.dumps(parts, protocol=pickle.HIGHEST_PROTOCOL), level=1)
        self._windows.append((end_ns, packed))
        self.bytes += len(packed)
        while self.bytes > _MOST_BYTES:
            self._let_go()

    def forget(self, before_ns: int) -> None:
        """Lets windows go that were over before then."""
        while self._windows and self._windows[0][0] < before_ns:
            self._let_go()

    def _let_go(self) -> None:
        _, packed = self._windows.popleft()
        self.bytes -= len(packed)

    def trace(self) -> Trace:
        """All that is remembered. Raises UsageError where nothing in it is sound."""
        spans = ReplicaSpans(self._name, self._resources)
        for _, packed in self._windows:
            rows, composition, requests, samples = pickle.loads(zstandard.decompress(packed))
            spans.rows += rows
            spans.composition += composition
            spans.requests += requests
            spans.samples += samples
        return trace_of(Collected({self._name: spans}), self._name, Findings())
