"""The spans of a replica's latest minutes, packed: what a diagnosis reads when a stall is suspected."""

from __future__ import annotations

import pickle
from collections import deque

import zstandard

from stallscope.trace.decode import Collected, ReplicaSpans
from stallscope.trace.findings import Findings
from stallscope.trace.model import Trace
from stallscope.trace.read import trace_of

_Parts = tuple[object, ...]


class Memory:
    """Windows of one replica's spans, each packed by itself: some 40 bytes a step."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._windows: deque[tuple[int, bytes]] = deque()  # when it was over (ns), and what was in it
        self._latest = ReplicaSpans(name)
        self._pack = zstandard.ZstdCompressor(level=1).compress
        self._unpack = zstandard.ZstdDecompressor().decompress

    @property
    def bytes(self) -> int:
        """That it holds."""
        return sum(len(packed) for _, packed in self._windows)

    def add(self, spans: ReplicaSpans, end_ns: int) -> None:
        """Keeps what came in a window that is over at ``end_ns``."""
        parts: _Parts = (spans.rows, spans.composition, spans.requests, spans.samples)
        # Of our own making, and never out of this process: pickle is safe here, and the fastest.
        self._windows.append((end_ns, self._pack(pickle.dumps(parts, protocol=pickle.HIGHEST_PROTOCOL))))
        self._latest = spans

    def forget(self, before_ns: int) -> None:
        """Lets windows go that were over before then."""
        while self._windows and self._windows[0][0] < before_ns:
            self._windows.popleft()

    def trace(self) -> Trace:
        """All that is remembered. Raises UsageError where nothing in it is sound."""
        spans = ReplicaSpans(self._name, self._latest.resources)
        for _, packed in self._windows:
            rows, composition, requests, samples = pickle.loads(self._unpack(packed))
            spans.rows += rows
            spans.composition += composition
            spans.requests += requests
            spans.samples += samples
        return trace_of(Collected({self._name: spans}), self._name, Findings())
